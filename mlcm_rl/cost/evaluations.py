"""Network evaluations of a stage: forward passes of a denoiser on one sample; a guided pass counts two."""

from collections.abc import Iterable

from ..recipe import Recipe, Stage
from ..recipe.takes import Pass


def network_evaluations(stage: Stage, recipe: Recipe) -> int:
    """Return the network evaluations of `stage`: samples times passes."""
    return whole_evaluations(stage.passes(recipe))


def whole_evaluations(passes: list[Pass]) -> int:
    """Return the network evaluations of `passes` as a whole number.

    Those of optimiser steps may be a mean over steps; they are rounded together, and so are the others.
    """
    inside, outside = ([one for one in passes if one.in_step is side] for side in (True, False))
    return round(evaluations_of(inside)) + round(evaluations_of(outside))


def evaluations_of(passes: Iterable[Pass]) -> float:
    """Return the network evaluations of `passes`. Those of a distance are of another network, or of a few blocks."""
    return sum(one.samples * one.evaluations for one in passes if one.role not in ("lpips", "features"))


def has_gradients(stage: Stage, recipe: Recipe) -> bool:
    """Return whether `stage` trains a denoiser."""
    return any(one.gradient for one in stage.passes(recipe))
