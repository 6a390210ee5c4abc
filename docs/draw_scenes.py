"""Draws docs/scenes.png of a finished run of recipes/scenes_demo.yaml: a sampler a row, a prompt a column, one noise.

    python docs/draw_scenes.py runs/scenes_demo docs/scenes.png --font NotoSansCJK-Regular.ttc --font-index 2

The prompts are those that the report shows, all of them; the font has to have Chinese.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mlcm_rl.report import assembly, page
from mlcm_rl.storage.files import replacing

SIZE, GAP, LEFT, TOP = 112, 8, 142, 84  # pixels: a picture, between pictures, labels of rows, prompts above columns
ROWS = {
    "ddim-guided-4": "teacher, not distilled\n4 evaluations\n(2 guided steps)",
    "ddim-unguided-4": "teacher, not distilled\n4 evaluations\n(4 steps, no guidance)",
    "student0-4-gamma0-milestones": "student\n4 evaluations\n(4 steps)",
    "student1-4-gamma0-milestones": "student, tuned\n4 evaluations\n(4 steps)",
    "teacher-50": "teacher\n100 evaluations\n(50 guided steps)",
}


def sheet(folder: Path, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return the pictures of ROWS in the evaluation's `folder`, with their labels."""
    report = assembly.read(folder / "report.json")
    shown = [i for i, prompt in enumerate(report.prompts) if prompt.shown]
    cell = SIZE + GAP
    drawn = Image.new("RGB", (LEFT + len(shown) * cell + GAP, TOP + len(ROWS) * cell), "white")
    draw = ImageDraw.Draw(drawn)
    for column, number in enumerate(shown):
        lines = wrapped(report.prompts[number].prompt, font, SIZE)
        draw.multiline_text((LEFT + column * cell, TOP - GAP), lines, "#333", font, "ld", spacing=2)
    for row, (name, label) in enumerate(ROWS.items()):
        top = TOP + row * cell
        draw.multiline_text((GAP, top + SIZE // 2), label, "#333", font, "lm", spacing=3)
        for column, number in enumerate(shown):
            with Image.open(page.picture_path(folder, name, number)) as picture:
                resized = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            drawn.paste(resized, (LEFT + column * cell, top))
    return drawn


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return `text` with line breaks, of at most `width` pixels each: between words, in Chinese before no mark."""
    words = text.split(" ") if text.isascii() else list(text)
    space, lines = " " if text.isascii() else "", [""]
    for word in words:
        longer = f"{lines[-1]}{space}{word}" if lines[-1] else word
        if font.getlength(longer) <= width or word in "，。：、；":
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--font", required=True, help="a font file with Chinese")
    parser.add_argument("--font-index", type=int, default=0, help="of the font in a collection")
    options = parser.parse_args()
    folder = sorted(options.run.glob("[0-9]*-evaluate"))[-1]
    font = ImageFont.truetype(options.font, 12, options.font_index)
    with replacing(options.out) as temporary:
        sheet(folder, font).quantize(192).save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
