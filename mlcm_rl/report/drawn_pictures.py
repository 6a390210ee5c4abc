"""The pictures that `mlcm sample` has left in a folder, as columns of a gallery: each says what it is in its text."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..recipe.languages import guess_language
from ..storage.files import CheckpointError
from .gallery import Cell, Column, Place
from .types import SampledRow

PICTURES = "[0-9]*-seed*-steps*.png"
NEEDED = ("prompt", "number", "seed", "steps", "gamma", "student")


@dataclass(frozen=True)
class Drawn:
    """A folder of pictures of `mlcm sample`, and its name on the page."""

    name: str
    folder: Path


def has_pictures(folder: Path) -> bool:
    """Return whether `mlcm sample` has left pictures in `folder`."""
    return next(folder.glob(PICTURES), None) is not None


def columns_of(drawn: Drawn, steps: set[int]) -> list[Column]:
    """Return a column for each student, number of steps, gamma and seed in the folder; of `steps`, where any are named.

    Raise CheckpointError for a picture that does not say what it is.
    """
    by_column: dict[tuple[str, int, str, int], dict[Place, Cell]] = {}
    repeats: Counter[tuple] = Counter()
    for path in sorted(drawn.folder.glob(PICTURES)):
        text = text_of(path)
        key = text["student"], int(text["steps"]), text["gamma"], int(text["seed"])
        if steps and key[1] not in steps:
            continue
        place = Place(text["prompt"], guess_language(text["prompt"]), repeats[*key, text["prompt"]])
        repeats[*key, text["prompt"]] += 1
        cell = Cell(path, ("sample", int(text["seed"]), int(text["number"])), {})
        by_column.setdefault(key, {})[place] = cell
    seeds = len({seed for *_, seed in by_column})
    return [
        Column(
            name=f"{drawn.name}:{student}@{count}, gamma {gamma}" + f", seed {seed}" * (seeds > 1),
            evaluation=drawn.name,
            row=SampledRow(
                id="",
                role="student",
                name=student,
                sampler=f"gamma {float(gamma):g}, seed {seed}",
                num_steps=count,
                num_evaluations=count,
            ),
            is_shown=True,
            cells=cells,
        )
        for (student, count, gamma, seed), cells in by_column.items()
    ]


def text_of(path: Path) -> dict[str, str]:
    """Return the text in a picture. Raise CheckpointError where it does not say what the picture is."""
    try:
        with Image.open(path) as image:
            text = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
        numbers = [int(text[name]) for name in ("number", "steps", "seed")]
        if min(numbers) < 0 or not math.isfinite(float(text["gamma"])) or not (text["prompt"] and text["student"]):
            raise ValueError("a negative number, or empty text")
    except (KeyError, ValueError, OSError, UnidentifiedImageError) as error:
        raise CheckpointError(
            f"{path} does not say what it is ({', '.join(NEEDED)} in its PNG text), as `mlcm sample` writes it: remove "
            "it, or draw it again"
        ) from error
    return text
