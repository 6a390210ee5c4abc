"""Scenes: what is on a canvas, and which combinations are drawn.

A `Scene` is what stands in the four cells of a canvas; pictures and captions follow from it. What a prompt states of
one, what a judge sees on a picture, and whether the one is as the other asks, is in `mlcm_rl/data/scenes.py`.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mlcm_rl.data.scenes import BACKGROUNDS, NUM_CELLS, PAIRS, STYLES, Reading, Request

SUBJECT = Path(__file__).parents[1]
MEASURED = SUBJECT / "measured"  # the figures that the card quotes
LANGUAGES = ("en", "zh")
MAX_COUNT = NUM_CELLS


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

    def reading(self) -> Reading:
        """Return what a judge without error reads on this scene's picture."""
        cells: list[tuple[str, str] | None] = [None] * NUM_CELLS
        for o in self.objects:
            cells[o.cell] = (o.concept, o.style)
        return Reading(tuple(cells), self.background)


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
