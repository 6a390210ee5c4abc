"""Scenes: what a prompt asks for by cell, what is seen on a picture, and whether the one is as the other asks.

A canvas of 128 x 128 pixels has four cells, two by two. A `Request` is what a prompt states of it; a `Reading` is what
a judge sees on a picture. The judge's questions, rewards and the pictures of `recipes/scenes` follow from these two.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

CANVAS, CELL = 128, 64  # pixels a side
NUM_CELLS = 4  # row by row from the top left
BORDER = 2  # pixels around the canvas and beside its middle lines, on which no object stands
STYLES = ("noto", "twemoji", "fluent")
RELATIONS = ("single", "count", "beside", "above")
QUESTIONS = ("objects", "count", "relation", "style", "background")
OPEN = "-"  # in a request's code: what the prompt leaves open
PAIRS = {"beside": ((0, 1), (2, 3)), "above": ((0, 2), (1, 3))}  # cells of (left, right), and of (upper, lower)
COUNTS = {"single": (1,), "count": (1, 2, 3, 4), "beside": (2,), "above": (2,)}  # of objects, by relation
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

    @property
    def questions(self) -> list[str]:
        """Return those of QUESTIONS that the prompt asks; a relation, a style or a background may be left open."""
        left_open = {
            "relation": self.relation not in PAIRS,
            "style": self.style is None,
            "background": self.background is None,
        }
        return [question for question in QUESTIONS if not left_open.get(question)]

    @property
    def arrangements(self) -> list[tuple[str | None, ...]]:
        """Return every way to be as asked: the concept of each of the NUM_CELLS cells, None for an empty one."""
        if self.relation in PAIRS:
            placed = [dict(zip(cells, self.concepts, strict=True)) for cells in PAIRS[self.relation]]
        else:
            placed = [dict.fromkeys(cells, self.concepts[0]) for cells in combinations(range(NUM_CELLS), self.count)]
        return [tuple(concepts.get(cell) for cell in range(NUM_CELLS)) for concepts in placed]


@dataclass(frozen=True)
class Reading:
    """What is seen on a picture: (concept, style) or None for each cell, and the background."""

    cells: tuple[tuple[str, str] | None, ...]
    background: str


def read_code(code: str) -> Request:
    """Return the request whose code it is. Raise ValueError for a text that is no request's code."""
    parts = code.split(" ")
    num_concepts = len(parts) - 4
    if parts[0] not in RELATIONS or num_concepts != (2 if parts[0] in PAIRS else 1) or not parts[-3].isdecimal():
        raise ValueError(f"{code!r} is not a request's code, which is like 'beside 1F43C 1F34E 2 noto -'")
    relation, *concepts, count, style, background = parts
    if count not in (counts := [str(number) for number in COUNTS[relation]]):
        raise ValueError(f"{code[:100]!r}: {relation} has {' or '.join(counts)} objects, not {count[:20]}")
    if {"", OPEN}.intersection(concepts) or len(set(concepts)) < len(concepts):
        raise ValueError(f"{code!r}: a concept is missing, or named twice")
    for what, value, known in (("style", style, STYLES), ("background", background, BACKGROUNDS)):
        if value not in (OPEN, *known):
            raise ValueError(f"{code!r}: {value!r} is no {what}; known are {', '.join(known)}, and {OPEN} for open")
    stated = (None if part == OPEN else part for part in (style, background))
    return Request(relation, tuple(concepts), int(count), *stated)


def answers(request: Request, reading: Reading) -> dict[str, bool]:
    """Return what of a request is fulfilled: each of QUESTIONS, and "all" of them.

    "objects": exactly the concepts asked for are there; "count": as many cells are occupied as asked for; "relation":
    the objects stand as asked; "style": all are of the style that is asked for; "background". What the request leaves
    open is true.
    """
    occupied = {cell: seen for cell, seen in enumerate(reading.cells) if seen is not None}
    styles = {style for _, style in occupied.values()}
    result = {
        "objects": {concept for concept, _ in occupied.values()} == set(request.concepts),
        "count": len(occupied) == request.count,
        "relation": True,
        "style": request.style is None or styles == {request.style},
        "background": request.background in (None, reading.background),
    }
    if request.relation in PAIRS:
        placed = [[cell for cell, seen in occupied.items() if seen[0] == concept] for concept in request.concepts]
        result["relation"] = any([[one], [other]] == placed for one, other in PAIRS[request.relation])
    return result | {"all": all(result.values())}


def cells_of(images: Tensor) -> Tensor:
    """Return the cells (NUM_CELLS B, 3, CELL, CELL) of pictures (B, 3, CANVAS, CANVAS), row by row of each."""
    cells = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL)  # (B, 3, 2, 2, CELL, CELL)
    return cells.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def border_of(images: Tensor) -> Tensor:
    """Return the pixels (B, 3, N) of pictures (B, 3, CANVAS, CANVAS) on which no object of a scene stands."""
    mask = torch.zeros(CANVAS, CANVAS, dtype=torch.bool, device=images.device)
    for start in (0, CELL - BORDER, CELL, CANVAS - BORDER):
        mask[start : start + BORDER] = True
        mask[:, start : start + BORDER] = True
    return images[:, :, mask]


def palette(device: torch.device | str = "cpu") -> Tensor:
    """Return the colours of BACKGROUNDS in their order, (7, 3) float32 in [0, 1]."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device) / 255
