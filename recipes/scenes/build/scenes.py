"""Scenes: what is on a canvas, what a prompt says of it, and whether the one is as the other asks.

A canvas of 128 x 128 pixels has four cells, two by two. A `Scene` is what stands in them; a `Request` is what a prompt
states of a scene; a `Reading` is what a judge sees on a picture. Pictures, captions and the judge's questions follow
from these three and from nothing else.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

SUBJECT = Path(__file__).parents[1]
MEASURED = SUBJECT / "measured"  # the figures that the card quotes
LANGUAGES = ("en", "zh")
STYLES = ("noto", "twemoji", "fluent")
RELATIONS = ("single", "count", "beside", "above")
NUM_CELLS = 4  # row by row from the top left
MAX_COUNT = NUM_CELLS
OPEN = "-"  # in a request's code: what the prompt leaves open
PAIRS = {"beside": ((0, 1), (2, 3)), "above": ((0, 2), (1, 3))}  # cells of (left, right), and of (upper, lower)
BACKGROUNDS = {  # RGB
    "white": (255, 255, 255),
    "yellow": (255, 241, 168),
    "pink": (255, 200, 215),
    "blue": (176, 216, 255),
    "green": (190, 235, 190),
    "grey": (205, 205, 205),
    "purple": (215, 195, 250),
}


@dataclass(frozen=True)
class Concept:
    """One thing that may stand in a cell.

    `names` and `held_out_names` give its words in each language, the latter in no training; `measure` is the Chinese
    measure word.
    """

    codepoint: str
    names: dict[str, tuple[str, ...]]
    held_out_names: dict[str, tuple[str, ...]]
    measure: str


@dataclass(frozen=True)
class Object:
    """One drawing on the canvas: a concept's codepoint, a style and the cell that it stands in."""

    concept: str
    style: str
    cell: int


@dataclass(frozen=True)
class Request:
    """What a prompt states: `concepts` are one, or two in the order left, right or upper, lower.

    `count` is the number of objects on the whole canvas. A style or a background that the prompt leaves open is None.
    """

    relation: str
    concepts: tuple[str, ...]
    count: int
    style: str | None = None
    background: str | None = None

    @property
    def code(self) -> str:
        """Return the request in one line, the `concept` of a line in a prompt file: "beside 1F43C 1F34E 2 noto -"."""
        return " ".join([self.relation, *self.concepts, str(self.count), self.style or OPEN, self.background or OPEN])


@dataclass(frozen=True)
class Scene:
    """What is on a canvas: objects of one style in cells of their own, on a background."""

    relation: str
    objects: tuple[Object, ...]
    background: str

    def request(self, with_style: bool, with_background: bool) -> Request:
        """Return what a prompt for this scene states, with or without its style and its background."""
        return Request(
            self.relation,
            tuple(dict.fromkeys(o.concept for o in self.objects)),
            len(self.objects),
            self.objects[0].style if with_style else None,
            self.background if with_background else None,
        )

    def reading(self) -> "Reading":
        """Return what a judge without error reads on this scene's picture."""
        cells: list[tuple[str, str] | None] = [None] * NUM_CELLS
        for o in self.objects:
            cells[o.cell] = (o.concept, o.style)
        return Reading(tuple(cells), self.background)


@dataclass(frozen=True)
class Reading:
    """What is seen on a picture: (concept, style) or None for each cell, and the background."""

    cells: tuple[tuple[str, str] | None, ...]
    background: str


def read_code(code: str) -> Request:
    """Return the request whose code it is. Raise ValueError for a text that is no request's code."""
    parts = code.split(" ")
    if len(parts) not in (5, 6) or parts[0] not in RELATIONS or not parts[-3].isdecimal():
        raise ValueError(f"{code!r} is not a request's code, which is like 'beside 1F43C 1F34E 2 noto -'")
    relation, *concepts, count, style, background = parts
    stated = (None if part == OPEN else part for part in (style, background))
    return Request(relation, tuple(concepts), int(count), *stated)


def answers(request: Request, reading: Reading) -> dict[str, bool]:
    """Return what of a request is fulfilled: objects, count, relation, style, background, and all of them.

    "objects": exactly the concepts asked for are there; "count": as many cells are occupied as asked for; "relation":
    the objects stand as asked, true for a request without one. What the request leaves open is true, but for a style:
    then all objects share one.
    """
    occupied = {cell: seen for cell, seen in enumerate(reading.cells) if seen is not None}
    styles = {style for _, style in occupied.values()}
    result = {
        "objects": {concept for concept, _ in occupied.values()} == set(request.concepts),
        "count": len(occupied) == request.count,
        "relation": True,
        "style": len(styles) == 1 and request.style in (None, *styles),
        "background": request.background in (None, reading.background),
    }
    if request.relation in PAIRS:
        placed = [[cell for cell, seen in occupied.items() if seen[0] == concept] for concept in request.concepts]
        result["relation"] = any([[one], [other]] == placed for one, other in PAIRS[request.relation])
    return result | {"all": all(result.values())}


def read_concepts() -> list[Concept]:
    """Return the concepts of `concepts.json` in its order; a teacher of N concepts draws the first N."""
    entries = json.loads((SUBJECT / "concepts.json").read_text(encoding="utf-8"))
    return [
        Concept(
            entry["codepoint"],
            {language: tuple(entry[language]) for language in LANGUAGES},
            {language: tuple(entry["held_out"][language]) for language in LANGUAGES},
            entry["measure"],
        )
        for entry in entries
    ]


def is_held_out(concepts: Sequence[str], count: int) -> bool:
    """Say whether a combination is kept out of all training, by its hash: a tenth of the pairs, in any order or
    relation, and an eighth of the pairs of a concept and a count above one."""
    if count == 1:
        return False
    bucket = sha256(" ".join([*sorted(concepts), str(count)]).encode()).digest()[0]
    return bucket < (26 if len(concepts) == 2 else 32)


def draw_scene(draw: random.Random, concepts: Sequence[str], relation: str, held_out: bool) -> Scene:
    """Return a scene of a relation with concepts, style, background and free cells drawn at random.

    Its combination is a held-out one or is not, as asked. Raise ValueError for a held-out scene of a single object,
    since no combination of one is held out.
    """
    if held_out and relation == "single":
        raise ValueError("scenes of a single object have no held-out combinations: ask for another relation")
    while True:
        count = draw.randint(2, MAX_COUNT) if relation == "count" else 1 if relation == "single" else 2
        chosen = draw.sample(list(concepts), 2 if relation in PAIRS else 1)
        if is_held_out(chosen, count) == held_out:
            break
    style, background = draw.choice(STYLES), draw.choice(list(BACKGROUNDS))
    cells = draw.choice(PAIRS[relation]) if relation in PAIRS else sorted(draw.sample(range(NUM_CELLS), count))
    placed = chosen if relation in PAIRS else chosen * count
    return Scene(relation, tuple(Object(c, style, cell) for c, cell in zip(placed, cells, strict=True)), background)
