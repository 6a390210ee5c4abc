"""Hanzi as pictures with captions: 16 characters in two faces and four colours, and the prompts that ask for them."""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SUBJECT = Path(__file__).parents[1]
SIDE, FONT_SIZE = 64, 58  # pixels
HANZI = "山水火日月人大花鸟鱼马牛雨雪云心"  # each is one token of the embedded text towers
LANGUAGES = ("en", "zh")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Named:
    """Something that a caption may name, in both languages."""

    en: str
    zh: str


FACES = {"sans": Named("sans", "黑体"), "serif": Named("serif", "宋体")}
COLOURS = {
    (32, 32, 32): Named("black", "黑色"),
    (216, 32, 32): Named("red", "红色"),
    (32, 64, 208): Named("blue", "蓝色"),
    (16, 128, 48): Named("green", "绿色"),
}
WITH_FACE = {
    "en": ('{colour} {face} "{hanzi}"', '{face} "{hanzi}" in {colour}', 'the character "{hanzi}", {colour}, {face}'),
    "zh": ("{colour}{face}的「{hanzi}」", "{face}「{hanzi}」，{colour}", "{colour}的「{hanzi}」字，{face}"),
}
WITHOUT_FACE = {
    "en": ('a {colour} "{hanzi}"', '"{hanzi}" in {colour}', 'the character "{hanzi}" in {colour}'),
    "zh": ("{colour}的「{hanzi}」", "「{hanzi}」，{colour}", "一个{colour}的「{hanzi}」字"),
}


@dataclass(frozen=True)
class Drawing:
    """One picture of the subject: which character, in which face and ink."""

    hanzi: str
    face: str
    ink: tuple[int, int, int]

    @property
    def colour(self) -> Named:
        return COLOURS[self.ink]


DRAWINGS = [Drawing(*chosen) for chosen in itertools.product(HANZI, FACES, COLOURS)]


def open_fonts() -> dict[str, ImageFont.FreeTypeFont]:
    """Noto Sans SC and Noto Serif SC (SIL Open Font License 1.1), out of an installed package that holds just them."""
    import pylopdf_fonts_zh_cn

    paths = {"sans": pylopdf_fonts_zh_cn.sans_path(), "serif": pylopdf_fonts_zh_cn.serif_path()}
    return {face: ImageFont.truetype(str(path), FONT_SIZE) for face, path in paths.items()}


def draw(drawing: Drawing, fonts: dict[str, ImageFont.FreeTypeFont]) -> Image.Image:
    """The character in the middle of a white square of SIDE pixels."""
    page = Image.new("RGB", (SIDE, SIDE), "white")
    pen, font = ImageDraw.Draw(page), fonts[drawing.face]
    left, top, right, bottom = pen.textbbox((0, 0), drawing.hanzi, font=font)
    corner = ((SIDE - left - right) / 2, (SIDE - top - bottom) / 2)
    pen.text(corner, drawing.hanzi, font=font, fill=drawing.ink)
    return page


def captions_of(drawing: Drawing, language: str) -> list[str]:
    """Every caption of a drawing in one language, those that leave its face open last."""
    colour, face = (getattr(named, language) for named in (drawing.colour, FACES[drawing.face]))
    templates = WITH_FACE[language] + WITHOUT_FACE[language]
    return [template.format(hanzi=drawing.hanzi, colour=colour, face=face) for template in templates]


def split_of(prompt: str) -> str:
    """The split that a prompt string belongs to, by its hash: 5/8 train, 1/8 validation, 2/8 test."""
    bucket = sha256(prompt.encode()).digest()[0] % 8
    return "train" if bucket < 5 else "validation" if bucket == 5 else "test"


def prompts_of_split(split: str) -> Iterator[dict[str, str | None]]:
    """The prompt objects of one split, shuffled; `concept` is the character, `style` its face where it is named."""
    found = {}
    for drawing, language in itertools.product(DRAWINGS, LANGUAGES):
        named = len(WITH_FACE[language])
        for number, prompt in enumerate(captions_of(drawing, language)):
            style = drawing.face if number < named else None
            found[prompt] = {"prompt": prompt, "language": language, "concept": drawing.hanzi, "style": style}
    chosen = [record for prompt, record in found.items() if split_of(prompt) == split]
    random.Random(split).shuffle(chosen)
    yield from chosen


def write_lines(path: Path, records: list[dict]) -> int:
    """Write one JSON object a line; return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return len(records)


def write_image_folder(folder: Path) -> int:
    """Write PNG files and `metadata.jsonl`, captions of the training split alone; return how many pictures."""
    fonts = open_fonts()
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for drawing in DRAWINGS:
        name = f"{ord(drawing.hanzi):X}_{drawing.face}_{drawing.colour.en}.png"
        draw(drawing, fonts).save(folder / name)
        captions = [text for language in LANGUAGES for text in captions_of(drawing, language)]
        records.append({"file_name": name, "prompts": [text for text in captions if split_of(text) == "train"]})
    return write_lines(folder / "metadata.jsonl", records)


def main() -> None:
    """Write the prompt files into `prompts/` and the image folder that `train_teacher` reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=SUBJECT.parents[1] / "data" / "hanzi_64")
    arguments = parser.parse_args()
    for split in SPLITS:
        print(f"{split}: {write_lines(SUBJECT / 'prompts' / f'{split}.jsonl', list(prompts_of_split(split)))} prompts")
    print(f"{write_image_folder(arguments.images)} pictures in {arguments.images}")


if __name__ == "__main__":
    main()
