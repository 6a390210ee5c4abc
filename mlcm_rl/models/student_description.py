"""student.json: what a student's folder says of it, checked when it is read."""

import reprlib
from pathlib import Path
from typing import Any

from ..equations.axis import MOST_SEGMENTS, NUM_SEGMENTS
from ..recipe.student_sources import DESCRIPTION_FILE
from ..recipe.types import default_gamma, sampling_segments
from ..storage.files import CheckpointError, read_json
from .grids import MILESTONES, SamplingGrid, grid_named

__all__ = ["DESCRIPTION_FILE", "default_gamma_in", "describe", "grid_of", "jumps_whole_segments", "tuned_steps"]

WHOLE = "milestones"  # starts of a student that learned the jumps of whole segments alone


def describe(folder: Path) -> dict[str, Any]:
    """Read student.json in `folder`.

    Raise FileNotFoundError if there is none, CheckpointError for one that is damaged.
    """
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no student: no {DESCRIPTION_FILE}; name a finished student's folder")
    description = read_json(file, family=str, prediction_type=str, conditioned=bool, adapter=dict)
    # in older folders num_segments is called segments, and the two keys below are missing
    num_segments = description.setdefault("num_segments", description.pop("segments", None))
    if type(num_segments) is not int or not 1 <= num_segments <= MOST_SEGMENTS:
        message = f"num_segments must be a whole number from 1 to {MOST_SEGMENTS}, is {reprlib.repr(num_segments)}"
        raise CheckpointError(f"{file}: {message}")
    tuned_steps = description.get("tuned_steps", 0)
    if type(tuned_steps) is not int or tuned_steps < 0:
        raise CheckpointError(f"{file}: tuned_steps must be a whole number from 0, is {reprlib.repr(tuned_steps)}")
    budgets = description.setdefault("budgets", [])
    if type(budgets) is not list or not all(type(n) is int and 1 <= n <= NUM_SEGMENTS for n in budgets):
        raise CheckpointError(f"{file}: budgets must be numbers from 1 to {NUM_SEGMENTS}, are {reprlib.repr(budgets)}")
    if description.get("starts", WHOLE) != WHOLE:
        raise CheckpointError(
            f"{file}: starts must be {WHOLE} where it is said, is {reprlib.repr(description['starts'])}"
        )
    gamma = description.get("gamma", 0.0)
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 <= gamma <= 1:
        raise CheckpointError(f"{file}: gamma must be a number from 0 to 1, is {reprlib.repr(gamma)}")
    try:
        grid_of(description)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return description


def grid_of(description: dict[str, Any]) -> SamplingGrid:
    """Return the times that the student of a `description` is sampled at: milestones, where it names none."""
    num_segments = sampling_segments(description["num_segments"], description["conditioned"])
    return grid_named(description.get("grid", MILESTONES), num_segments)


def jumps_whole_segments(description: dict[str, Any]) -> bool:
    """Return whether the student of a `description` learned the jumps of whole segments alone (`starts: milestones`).

    Older descriptions do not say it; it is then known of those with as many segments as no sampler has steps, and of
    those that predict x0, which have one number of steps.
    """
    one_number = bool(description["budgets"]) and not description["conditioned"]
    return "starts" in description or one_number or description["num_segments"] > NUM_SEGMENTS


def default_gamma_in(description: dict[str, Any]) -> float:
    """Return the gamma that the student of a `description` is sampled with: its own where it states one.

    Else 1 (all noise drawn again) for one segment, 0 (deterministic) for more or for a conditioned student.
    """
    return description.get("gamma", default_gamma(description["num_segments"], description["conditioned"]))


def tuned_steps(folder: Path) -> int | None:
    """Return the optimiser steps of tuning in the student in `folder`; None if it is not tuned or an older folder.

    0 is the distilled student itself, since its guard found none of the tuned weights better.
    """
    description = describe(folder)
    return description.get("tuned_steps") if "preference" in description else None
