"""A sheet of sampled pictures with labels: the numbers of steps over the columns, number and prompt over the rows."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

GAP, PADDING = 4, 3  # pixels between pictures, and around a label
MIN_WIDTH = 320  # pixels of a sheet, so that a prompt can be read over one small picture
PAPER, INK = (255, 255, 255), (40, 40, 40)
ELLIPSIS = "..."
MAX_LETTERS = 4000  # that are looked at: more than any sheet is wide
EAST_ASIAN_FONTS = (  # of Linux, macOS and Windows; Pillow looks for them in the system's folders
    *("NotoSansCJK-Regular.ttc", "NotoSerifCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
    *("DroidSansFallbackFull.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simsun.ttc"),
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def labelled(images: Sequence[Image.Image], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Return `images` of one size, row by row, with a label over each of the `rows` and each of the `columns`."""
    width, height = images[0].size
    size = max(11, min(28, height // 16))
    line = size + 2 * PADDING
    across = len(columns) * (width + GAP) + GAP
    titles = _short(columns, width, size)
    sheet = Image.new("RGB", (max(across, MIN_WIDTH), line + len(rows) * (line + height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(titles):
        _write(draw, text, GAP + i * (width + GAP), 0, width, size)
    for i, text in enumerate(rows):
        top = line + i * (line + height + GAP)
        _write(draw, text, GAP, top, sheet.width - 2 * GAP, size)
        for j, image in enumerate(images[i * len(columns) : (i + 1) * len(columns)]):
            sheet.paste(image, (GAP + j * (width + GAP), top + line))
    return sheet


def _short(columns: Sequence[str], width: int, size: int) -> list[str]:
    """Return the labels of `columns`; where one is wider than `width`, what differs: without the first part of all."""
    font = _fonts(size)[0]
    parts = [text.split(", ", 1) for text in columns]
    is_wide = any(font.getlength(text) > width for text in columns)
    return [one[-1] for one in parts] if is_wide and len({one[0] for one in parts}) == 1 else list(columns)


def can_write(text: str) -> bool:
    """Return whether this system has a font for `text`; without one its letters are boxes."""
    return any(_has(font, text) for font in _fonts(16))


def _write(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int, size: int) -> None:
    """Write as much of `text` as fits `width` pixels, in the first font that has its letters."""
    text = " ".join(text.split())
    fonts = _fonts(size)
    font = next((one for one in fonts if _has(one, text)), fonts[0])
    draw.text((left, top + PADDING), _fitting(text, lambda shown: font.getlength(shown) <= width), fill=INK, font=font)


def _fitting(text: str, fits: Callable[[str], bool]) -> str:
    """Return `text`, or as much of its beginning as fits with an ellipsis; a prompt may have 100,000 letters."""
    if len(text) <= MAX_LETTERS and fits(text):
        return text
    lengths = range(min(len(text), MAX_LETTERS + 1))
    num_letters = bisect_left(lengths, True, key=lambda num: not fits(text[:num] + ELLIPSIS)) - 1
    return text[: max(num_letters, 0)] + ELLIPSIS


@cache
def _fonts(size: int) -> list[Font]:
    """Return Pillow's own font, then those for East Asian text that this system has."""
    fonts: list[Font] = [ImageFont.load_default(size)]
    for name in EAST_ASIAN_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this system
            continue
    return fonts


def _has(font: Font, text: str) -> bool:
    """Return whether `font` has the letters of `text`: one that it lacks is drawn as a character of no script is."""
    missing = bytes(font.getmask("\U0010fffd"))
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if not letter.isspace())
