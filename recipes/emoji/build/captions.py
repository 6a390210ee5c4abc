"""Captions in English and Chinese from labels, tags and style words; the prompt files; the denoiser's image folder."""

import argparse
import json
import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from sources import EMOJI, STYLES, Concept, load_pictures, write_text

LANGUAGES = ("en", "zh")

# Each style by the name of the set and by the name of its maker; OpenMoji's is HfG Schwäbisch Gmünd.
STYLE_WORDS = {
    "en": {
        "noto": ("noto", "google"),
        "twemoji": ("twemoji", "twitter"),
        "fluent": ("fluent", "microsoft"),
        "openmoji": ("openmoji", "hfg"),
    },
    "zh": {
        "noto": ("Noto", "谷歌"),
        "twemoji": ("Twemoji", "推特"),
        "fluent": ("Fluent", "微软"),
        "openmoji": ("OpenMoji", "格明德"),
    },
}
STYLED = {
    "en": (
        "{style} style emoji of {label}",
        "{label} in {style} style",
        "{label}, {style} style",
        "a {style} emoji: {label}",
        "{style} style {label}",
    ),
    "zh": (
        "{style}风格的{label}表情",
        "{label}，{style}风格",
        "{style}风格，{label}",
        "{style}表情：{label}",
        "{style}风格的{label}",
    ),
}
STYLED_WITH_TAGS = {
    "en": ("{label}, {first}, {second}, {style} style", "{style} style emoji of {label}: {first}, {second}"),
    "zh": ("{label}，{first}，{second}，{style}风格", "{style}风格的{label}表情：{first}、{second}"),
}
PLAIN = {
    "en": ("{label}", "emoji of {label}", "a picture of {label}"),
    "zh": ("{label}", "{label}表情", "{label}的图片"),
}
PLAIN_WITH_TAGS = {"en": ("{label}, {first}, {second}",), "zh": ("{label}，{first}，{second}",)}

SPLITS = ("train", "validation", "test")
CONCEPT_SPLITS = ("teacher", "held_out")
# One round gives every teacher concept one prompt in each language; the rounds of training prompts, seven of three
# styles, give every concept and language each style twice and no style once.
STYLE_CYCLE = (*STYLES, *STYLES, None)
ROUNDS = {"train": len(STYLE_CYCLE), "validation": 1, "test": 2}


def label_and_tags(concept: Concept, language: str) -> tuple[str, tuple[str, ...]]:
    """Return the concept's name in a language, and up to six tags that the name does not already say."""
    label, tags = (concept.en, concept.en_tags) if language == "en" else (concept.zh, concept.zh_tags)
    return label, tuple(tag for tag in tags if tag not in label)[:6]


def captions_of(concept: Concept, style: str | None, language: str) -> list[str]:
    """Return every caption of a concept in one language, with the style named or, for None, without; no repeats."""
    label, tags = label_and_tags(concept, language)
    pairs = list(zip(tags[::2], tags[1::2], strict=False))
    words = STYLE_WORDS[language][style] if style else ("",)
    plain, with_tags = (STYLED, STYLED_WITH_TAGS) if style else (PLAIN, PLAIN_WITH_TAGS)
    captions = [template.format(label=label, style=word) for word in words for template in plain[language]]
    for word in words:
        for template in with_tags[language]:
            captions += [template.format(label=label, style=word, first=a, second=b) for a, b in pairs]
    return list(dict.fromkeys(captions))


def split_of(prompt: str) -> str:
    """Return the split that a prompt string belongs to, by its hash: 5/8 train, 1/8 validation, 2/8 test."""
    bucket = sha256(prompt.encode()).digest()[0] % 8
    return "train" if bucket < 5 else "validation" if bucket == 5 else "test"


def teacher_concepts() -> tuple[list[Concept], list[Concept]]:
    """Return the teacher's concepts and the held-out ones, as listed in `concepts.json`; needs no download."""
    entries = json.loads((EMOJI / "concepts.json").read_text(encoding="utf-8"))
    chosen: dict[str, list[Concept]] = {split: [] for split in CONCEPT_SPLITS}
    for entry in entries:
        words: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        split = words.pop("split")
        chosen[split].append(Concept(**words))
    return chosen["teacher"], chosen["held_out"]


def prompts_of_split(concepts: list[Concept], split: str, seed: int = 0) -> Iterator[dict[str, str | None]]:
    """Yield the prompt objects of one split.

    Languages alternate, and every round of 2 x concepts covers each concept in both languages once, so that any
    prefix is balanced. Where a style's captions are used up, or all fall into other splits, the next style stands in.
    """
    shuffle, used = random.Random(f"{seed} {split}"), set()
    for round_index in range(ROUNDS[split]):
        order = shuffle.sample(range(len(concepts)), len(concepts))
        for half in range(2):
            for position, index in enumerate(order):
                language = LANGUAGES[(position + half) % 2]
                start = (index + round_index) % len(STYLE_CYCLE)
                for style in (*STYLE_CYCLE[start:], *STYLE_CYCLE[:start]):
                    captions = captions_of(concepts[index], style, language)
                    free = [c for c in captions if split_of(c) == split and c not in used]
                    if free:
                        break
                prompt = shuffle.choice(free)
                used.add(prompt)
                codepoint = concepts[index].codepoint
                yield {"prompt": prompt, "language": language, "concept": codepoint, "style": style}


def write_prompts(concepts: list[Concept], folder: Path) -> dict[str, int]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl`; return how many prompts each holds."""
    counts = {}
    for split in SPLITS:
        lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts_of_split(concepts, split)]
        write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
        counts[split] = len(lines)
    return counts


def write_image_folder(concepts: list[Concept], folder: Path, size: int = 64) -> int:
    """Write the denoiser's training set: PNG files and `metadata.jsonl`; return how many pictures it holds.

    A picture's captions are those of the training split, in both languages, and those without a style word.
    """
    by_codepoint = {concept.codepoint: concept for concept in concepts}
    pictures = load_pictures(size)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for pixels, codepoint, style in zip(pictures.pixels, pictures.codepoints, pictures.styles, strict=True):
        if codepoint not in by_codepoint:
            continue
        name = f"images/{style}_{codepoint}.png"
        Image.fromarray(pixels).save(folder / name)
        captions = [
            caption
            for language in LANGUAGES
            for named in (style, None)
            for caption in captions_of(by_codepoint[codepoint], named, language)
            if split_of(caption) == "train"
        ]
        entry = {"file_name": name, "prompts": captions, "concept": codepoint, "style": style}
        lines.append(json.dumps(entry, ensure_ascii=False))
    write_text(folder / ".gitignore", "*\n")  # 960 files, 320 a style, that `rebuild.py` makes again
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return len(lines)


def main() -> None:
    """Write the prompt files into `prompts/` and the image folder that `train_teacher` reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=EMOJI.parents[1] / "data" / "emoji_64")
    arguments = parser.parse_args()
    teacher, held_out = teacher_concepts()
    print(f"{len(teacher)} teacher concepts, {len(held_out)} held out")
    print("prompts:", write_prompts(teacher, EMOJI / "prompts"))
    print("pictures:", write_image_folder(teacher, arguments.images))


if __name__ == "__main__":
    main()
