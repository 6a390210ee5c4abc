"""Prompts for requests, in English and Chinese: frames, order, synonyms and clauses vary.

Every list of words and of frames has a part that is trained on and a part that is held out of all training. `WORDINGS`
names the three ways to word a request: "trained" (nothing held out), "frames" (held-out frames, trained words) and
"synonyms" (held-out words, trained frames).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mlcm_rl.data.scenes import Request
from scenes import Concept, read_concepts

WORDINGS = ("trained", "frames", "synonyms")


@dataclass(frozen=True)
class Choice:
    """Words or frames to choose from: the trained ones and the held-out ones."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    def of(self, held_out: bool) -> tuple[str, ...]:
        """Return the part that is held out, or the part that is trained on."""
        return self.held_out if held_out else self.trained


# In a frame {a} and {b} are objects ("a panda"), {n} a count with its measure word, {names} a plural, {name} bare.
BODIES = {
    "en": {
        "single": Choice(
            (
                "{a}",
                "a picture of {a}",
                "there is {a}",
                "just {a}",
                "a single {name}",
                "one {name}",
                "only {a}",
                "{a} and nothing else",
                "an image of {a}",
                "this is {a}",
                "here is {a}",
                "{a} alone",
            ),
            ("you can see {a} here", "nothing but {a}", "{a} all alone", "look: {a}"),
        ),
        "count": Choice(
            (
                "{n} {names}",
                "a picture of {n} {names}",
                "there are {n} {names}",
                "{names}, {n} of them",
                "exactly {n} {names}",
                "a group of {n} {names}",
                "an image of {n} {names}",
                "{n} {names} together",
                "only {n} {names}",
                "here are {n} {names}",
                "the number of {names} is {n}",
                "{n} of the {names}",
            ),
            ("you can see {n} {names} here", "{names} and there are {n}", "just {n} {names}", "look: {n} {names}"),
        ),
        "beside": Choice(
            (
                "{a} to the left of {b}",
                "{b} to the right of {a}",
                "{a} left of {b}",
                "{a} on the left and {b} on the right",
                "{b} on the right, {a} on the left",
                "left: {a}, right: {b}",
                "to the left of {b} is {a}",
                "to the right of {a} is {b}",
                "{a} and on its right {b}",
                "{b} and on its left {a}",
                "from left to right: {a}, {b}",
                "from right to left: {b}, {a}",
                "on the left there is {a}, on the right {b}",
                "on the right there is {b}, on the left {a}",
                "{b} right of {a}",
            ),
            (
                "right of {a} there is {b}",
                "{b} stands at the right side of {a}",
                "the left one is {a}, the right one is {b}",
                "{a} is left of {b}",
                "right: {b}, left: {a}",
            ),
        ),
        "above": Choice(
            (
                "{a} above {b}",
                "{b} below {a}",
                "{b} under {a}",
                "{a} over {b}",
                "{a} at the top and {b} at the bottom",
                "{b} at the bottom, {a} at the top",
                "top: {a}, bottom: {b}",
                "above {b} is {a}",
                "under {a} is {b}",
                "{a} and below it {b}",
                "{b} and above it {a}",
                "from top to bottom: {a}, {b}",
                "from bottom to top: {b}, {a}",
                "at the top there is {a}, at the bottom {b}",
                "{a} on top of {b}",
            ),
            (
                "below {a} there is {b}",
                "{a} stands at the top side of {b}",
                "the top one is {a}, the bottom one is {b}",
                "{b} is below {a}",
                "bottom: {b}, top: {a}",
            ),
        ),
    },
    "zh": {
        "single": Choice(
            (
                "{a}",
                "{a}的图片",
                "有{a}",
                "只有{a}",
                "单独的{name}",
                "画面里是{a}",
                "这是{a}",
                "一张{a}的图",
                "画着{a}",
                "图中只有{a}",
            ),
            ("这里可以看到{a}", "除了{a}什么也没有", "看，{a}"),
        ),
        "count": Choice(
            (
                "{n}{name}",
                "{n}{name}的图片",
                "有{n}{name}",
                "{name}，一共{n}",
                "正好{n}{name}",
                "画面里有{n}{name}",
                "只有{n}{name}",
                "一共有{n}{name}",
                "{n}{name}在一起",
                "这里有{n}{name}",
                "一张{n}{name}的图",
                "{name}的数量是{n}",
            ),
            ("这里可以看到{n}{name}", "{name}共有{n}", "看，{n}{name}", "图中{n}{name}"),
        ),
        "beside": Choice(
            (
                "{a}在{b}的左边",
                "{b}在{a}的右边",
                "{a}在{b}左侧",
                "{b}在{a}右侧",
                "左边是{a}，右边是{b}",
                "右边{b}，左边{a}",
                "左：{a}，右：{b}",
                "{a}位于{b}的左边",
                "{b}位于{a}的右边",
                "从左到右：{a}、{b}",
                "从右到左：{b}、{a}",
                "{b}的左边是{a}",
                "{a}的右边是{b}",
                "左侧是{a}，右侧是{b}",
            ),
            ("{a}的右边有{b}", "{b}位于{a}右侧", "右侧{b}，左侧{a}", "靠左是{a}，靠右是{b}"),
        ),
        "above": Choice(
            (
                "{a}在{b}的上面",
                "{b}在{a}的下面",
                "{a}在{b}上方",
                "{b}在{a}下方",
                "上面是{a}，下面是{b}",
                "下面{b}，上面{a}",
                "上：{a}，下：{b}",
                "{a}位于{b}的上面",
                "{b}位于{a}的下面",
                "从上到下：{a}、{b}",
                "从下到上：{b}、{a}",
                "{b}的上面是{a}",
                "{a}的下面是{b}",
                "上方是{a}，下方是{b}",
            ),
            ("{a}的下面有{b}", "{b}位于{a}下方", "下方{b}，上方{a}", "靠上是{a}，靠下是{b}"),
        ),
    },
}

# {body} is a frame filled in, or one that another clause already stands around.
STYLED = {
    "en": Choice(
        (
            "{style} style: {body}",
            "in {style} style, {body}",
            "{body}, {style} style",
            "{body} in {style} style",
            "{body}, drawn by {style}",
            "{style}: {body}",
            "{body} by {style}",
            "{body}, {style}",
        ),
        ("{body}, as {style} draws it", "{body}, a {style} picture"),
    ),
    "zh": Choice(
        (
            "{style}风格：{body}",
            "{style}风格，{body}",
            "{body}，{style}风格",
            "{body}，{style}的画风",
            "{style}：{body}",
            "用{style}风格画：{body}",
            "{body}，{style}",
        ),
        ("{body}，按{style}的样子画", "{body}，出自{style}"),
    ),
}
COLOURED = {
    "en": Choice(
        (
            "{colour} background, {body}",
            "on a {colour} background, {body}",
            "{body}, {colour} background",
            "{body} on a {colour} background",
            "{body}, background: {colour}",
            "background {colour}, {body}",
            "{body} with a {colour} background",
            "{body} in front of {colour}",
            "{body}, all on {colour}",
        ),
        (
            "{body}, everything behind is {colour}",
            "with {colour} behind it, {body}",
            "the background is {colour}: {body}",
        ),
    ),
    "zh": Choice(
        (
            "{colour}背景，{body}",
            "{colour}的背景上，{body}",
            "{body}，{colour}背景",
            "{body}，背景是{colour}",
            "底色{colour}，{body}",
            "{body}，底色是{colour}",
            "背景{colour}：{body}",
            "{body}，以{colour}为背景",
        ),
        ("{body}，后面全是{colour}", "{body}，衬着{colour}"),
    ),
}
STYLE_WORDS = {
    "en": {
        "noto": Choice(("noto", "google"), ("android",)),
        "twemoji": Choice(("twemoji", "twitter"), ("tweet",)),
        "fluent": Choice(("fluent", "microsoft"), ("windows",)),
    },
    "zh": {
        "noto": Choice(("Noto", "谷歌"), ("安卓",)),
        "twemoji": Choice(("Twemoji", "推特"), ("推文",)),
        "fluent": Choice(("Fluent", "微软"), ("视窗",)),
    },
}
COLOUR_WORDS = {
    "en": {
        "white": Choice(("white", "plain white", "pure white"), ("snow white",)),
        "yellow": Choice(("yellow", "light yellow", "soft yellow"), ("pale yellow",)),
        "pink": Choice(("pink", "light pink", "soft pink"), ("rose",)),
        "blue": Choice(("blue", "light blue", "soft blue"), ("sky blue",)),
        "green": Choice(("green", "light green", "soft green"), ("mint green",)),
        "grey": Choice(("grey", "light grey", "soft grey"), ("gray",)),
        "purple": Choice(("purple", "light purple", "soft purple"), ("lavender",)),
    },
    "zh": {
        "white": Choice(("白色", "纯白色", "白"), ("雪白色",)),
        "yellow": Choice(("黄色", "浅黄色", "黄"), ("淡黄色",)),
        "pink": Choice(("粉色", "浅粉色", "粉"), ("粉红色",)),
        "blue": Choice(("蓝色", "浅蓝色", "蓝"), ("天蓝色",)),
        "green": Choice(("绿色", "浅绿色", "绿"), ("薄荷绿",)),
        "grey": Choice(("灰色", "浅灰色", "灰"), ("银灰色",)),
        "purple": Choice(("紫色", "浅紫色", "紫"), ("淡紫色",)),
    },
}
NUMBERS = {
    "en": {1: ("one",), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")},
    "zh": {1: ("一",), 2: ("两", "2"), 3: ("三", "3"), 4: ("四", "4")},
}
WITHOUT_SINGULAR = {"grapes", "cherries", "fries", "glasses", "eyeglasses", "jeans"}  # last words of names
IRREGULAR_PLURALS = {"fish": "fish", "leaf": "leaves"}


def plural(name: str) -> str:
    """Return the plural of an English name: that of its last word."""
    *before, last = name.split(" ")
    if last in WITHOUT_SINGULAR:
        many = last
    elif last in IRREGULAR_PLURALS:
        many = IRREGULAR_PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        many = last + "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return " ".join([*before, many])


def with_article(name: str) -> str:
    """Return an English name with "a" or "an", or with none where it has no singular."""
    if name.split(" ")[-1] in WITHOUT_SINGULAR:
        return name
    return f"{'an' if name[0] in 'aeio' or name.startswith('umb') else 'a'} {name}"


class Writer:
    """Words requests about some concepts; every draw comes from the generator that is passed in."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = {concept.codepoint: concept for concept in concepts}

    def write(self, request: Request, language: str, wording: str, draw: random.Random) -> str:
        """Return one prompt that states the request in a language, in one of WORDINGS.

        Clauses of style and background stand around the body in either order.
        """
        return self.write_in_order(request, language, wording, draw)[0]

    def write_in_order(self, request: Request, language: str, wording: str, draw: random.Random) -> tuple[str, bool]:
        """Return a prompt as `write`, and whether it names the second concept of the request before the first."""
        new_frame, new_words = wording == "frames", wording == "synonyms"
        frame = draw.choice(BODIES[language][request.relation].of(new_frame))
        swapped = -1 < frame.find("{b}") < frame.find("{a}")
        body = frame.format(**self._names(request, language, new_words, draw))
        clauses = []
        if request.style is not None:
            word = draw.choice(STYLE_WORDS[language][request.style].of(new_words))
            clauses.append((draw.choice(STYLED[language].of(new_frame)), {"style": word}))
        if request.background is not None:
            word = draw.choice(COLOUR_WORDS[language][request.background].of(new_words))
            clauses.append((draw.choice(COLOURED[language].of(new_frame)), {"colour": word}))
        draw.shuffle(clauses)
        for frame, words in clauses:
            body = frame.format(body=body, **words)
        return body, swapped

    def _names(self, request: Request, language: str, new_words: bool, draw: random.Random) -> dict[str, str]:
        chosen = [self.concepts[codepoint] for codepoint in request.concepts]
        names = [draw.choice((c.held_out_names if new_words else c.names)[language]) for c in chosen]
        bare, number = draw.random() < 0.4, draw.choice(NUMBERS[language][request.count])
        if language == "en":
            objects = [name if bare else with_article(name) for name in names]
            return dict(zip("ab", objects, strict=False)) | {
                "name": names[0],
                "names": plural(names[0]),
                "n": number,
            }
        objects = [name if bare else f"一{c.measure}{name}" for c, name in zip(chosen, names, strict=True)]
        return dict(zip("ab", objects, strict=False)) | {"name": names[0], "n": f"{number}{chosen[0].measure}"}


def held_out_shares() -> dict[str, float]:
    """Return the shares of frames and of words that are held out of training."""
    frames = [f for per in BODIES.values() for f in per.values()] + [*STYLED.values(), *COLOURED.values()]
    words = [w for per in (*STYLE_WORDS.values(), *COLOUR_WORDS.values()) for w in per.values()]
    for concept in read_concepts():
        words += [Choice(concept.names[language], concept.held_out_names[language]) for language in BODIES]
    return {
        name: round(sum(len(c.held_out) for c in part) / sum(len(c.held_out) + len(c.trained) for c in part), 3)
        for name, part in (("frames", frames), ("words", words))
    }
