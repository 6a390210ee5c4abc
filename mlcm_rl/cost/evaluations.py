"""Network evaluations a stage: forward passes of a denoiser on one sample; a guided pass counts two."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..recipe import Recipe, Stage
from ..recipe.takes import Pass


@dataclass(frozen=True)
class Tally:
    """How often a stage takes each kind of pass, in samples or pictures."""

    teacher: float = 0  # of the teacher's denoiser; a guided one counts two
    student: float = 0  # of the student's without gradient: target, reference, samples
    trained: float = 0  # of the student's with gradient
    decoded: float = 0  # pictures that are drawn only
    scored: float = 0  # pictures that the rewards trained on are asked about
    graded: float = 0  # the same with gradient
    watched: float = 0  # pictures that the guard looks at


def network_evaluations(stage: Stage, recipe: Recipe) -> int:
    """Return the forward passes of a denoiser that `stage` takes, samples times passes."""
    return whole_evaluations(stage.passes(recipe))


def whole_evaluations(passes: list[Pass]) -> int:
    """Return the forward passes of a denoiser in `passes`; those of steps may be a mean, and are rounded together."""
    inside, outside = ([one for one in passes if one.in_step is side] for side in (True, False))
    return round(evaluations_of(inside)) + round(evaluations_of(outside))


def evaluations_of(passes: Iterable[Pass]) -> float:
    """Return the forward passes of a denoiser in `passes`."""
    return sum(one.samples * one.evaluations for one in passes)


def has_gradients(stage: Stage, recipe: Recipe) -> bool:
    """Return whether `stage` trains a denoiser."""
    return any(one.gradient for one in stage.passes(recipe))


def passes_of(stage: Stage, recipe: Recipe) -> Tally:
    """Return how often `stage` takes each kind of pass."""
    counts: dict[str, float] = {}
    passes = stage.passes(recipe)
    for one in passes:
        network, pictures = kind_of(one), kind_of_pictures(one)
        counts[network] = counts.get(network, 0) + one.samples * one.evaluations
        if pictures:
            counts[pictures] = counts.get(pictures, 0) + one.samples
    by_student = whole_evaluations([one for one in passes if one.role != "teacher"])
    counts["student"] = by_student - counts.get("trained", 0)  # whole, though a mean number of steps is not
    return Tally(**{kind: count for kind, count in counts.items() if count})


def kind_of(one: Pass) -> str:
    """Return which of a tally's networks `one` goes through."""
    return "teacher" if one.role == "teacher" else "trained" if one.gradient else "student"


def kind_of_pictures(one: Pass) -> str:
    """Return which of a tally's pictures come of `one`, if any."""
    of_rewards = "graded" if one.gradient else "scored"
    return {"": "", "person": "decoded", "rewards": of_rewards, "guard": "watched"}[one.viewer]
