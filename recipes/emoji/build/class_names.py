"""List the names of the ImageNet classes that `imagenet_class` knows, in English and Chinese.

English names are those of npm `@tensorflow-models/mobilenet` (Apache-2.0), all 1,000 classes. Chinese ones are the
names that emojibase gives to an emoji whose English name is a class's name, and a few written here by hand.
"""

import json
import re

from sources import EMOJI, Package, fetch, list_concepts, read_member, write_text

CLASSES = Package(
    "npm",
    "@tensorflow-models/mobilenet",
    "2.1.1",
    "tensorflow-models-mobilenet-2.1.1.tgz",
    "29b97f8db758d1d699c5654100fd363beaaeda1874e1488b5bceb267d13f90ff",
)
ENTRY = re.compile(r"""^\s*(\d+): ?(['"])(.*)\2,?$""", re.MULTILINE)
NUM_CLASSES = 1000
BY_HAND = {  # where emojibase has no such emoji, or calls it otherwise than most people do
    "goldfish": ("金鱼",),
    "orange": ("橙子", "橙"),
    "lemon": ("柠檬",),
    "pineapple": ("菠萝", "凤梨"),
    "golden retriever": ("金毛",),
    "tabby": ("虎斑猫",),
    "tiger": ("老虎",),
    "lion": ("狮子",),
    "sports car": ("跑车",),
    "teapot": ("茶壶",),
    "mountain bike": ("山地自行车",),
    "computer mouse": ("鼠标",),
    "umbrella": ("雨伞", "伞"),
}
AMBIGUOUS = {  # words that mostly mean something else than the class: a prompt that says no more names nothing
    *("crane", "kite", "mouse", "notebook", "pick", "ear", "wing", "spike", "wireless", "file", "knot", "hook", "claw"),
    *(
        "hack",
        "killer",
        "cell",
        "mike",
        "trump",
        "shades",
        "bullet",
        "rig",
        "semi",
        "red hot",
        "bath",
        "jersey",
        "bell",
    ),
}


def english_names() -> list[list[str]]:
    """Return the names of each class, lower case, in the classes' order; a name of several classes is left out."""
    text = read_member(fetch(CLASSES), "dist/imagenet_classes.js").decode()
    text = re.sub(r"""['"] \+\n *['"]""", "", text)  # long lines are broken in two
    found = {int(number): names.replace("\\'", "'").lower().split(", ") for number, _, names in ENTRY.findall(text)}
    if sorted(found) != list(range(NUM_CLASSES)):
        raise ValueError(f"{CLASSES.archive} lists {len(found)} classes, not {NUM_CLASSES}")
    names = [found[number] for number in range(NUM_CLASSES)]
    every = [name for mine in names for name in mine]
    return [
        [name for name in dict.fromkeys(mine) if every.count(name) == 1 and name not in AMBIGUOUS] for mine in names
    ]


def chinese_names(english: list[list[str]]) -> list[list[str]]:
    """Return the Chinese names of each class; most have none."""
    known: dict[str, list[str]] = {name: list(names) for name, names in BY_HAND.items()}
    for concept in list_concepts():
        known.setdefault(concept.en.lower(), [concept.zh])
    return [list(dict.fromkeys(zh.lower() for name in names for zh in known.get(name, ()))) for names in english]


def main() -> None:
    """Write `reward_models/imagenet_class.json`: one object a class, with its names in both languages."""
    english = english_names()
    chinese = chinese_names(english)
    lines = [json.dumps({"en": en, "zh": zh}, ensure_ascii=False) for en, zh in zip(english, chinese, strict=True)]
    write_text(EMOJI.parents[1] / "reward_models" / "imagenet_class.json", "[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{sum(map(bool, english))} classes with an English name, {sum(map(bool, chinese))} with a Chinese one")


if __name__ == "__main__":
    main()
