"""Constrained rewards: the drop and the multiplier by hand, and the known optimum of a constrained problem."""

import math

import pytest
import torch

from mlcm_rl.equations.constraints import drop, dual_ascent, mean_drop, penalty


def test_a_drop_is_in_units_of_the_reference_by_hand():
    scores, reference = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.5])
    assert drop(scores, reference, 0.5).tolist() == [2.0, -1.0]
    assert mean_drop(scores, reference, 0.5) == 0.5
    assert penalty(scores, 3.0, 0.5).tolist() == [-6.0, -24.0]


@pytest.mark.parametrize(
    ("multiplier", "measured", "result"),
    [(0.0, 0.3, 0.1), (1.0, 0.3, 1.1), (1.0, 0.1, 1.0), (1.0, -0.4, 0.75), (0.2, -0.4, 0.0)],
)
def test_a_multiplier_grows_beyond_the_limit_and_falls_to_0_below_it(multiplier, measured, result):
    assert dual_ascent(multiplier, measured, max_drop=0.1, rate=0.5) == pytest.approx(result)


def tuned(slope: float, max_drop: float, unit: float) -> tuple[float, float]:
    """x and the multiplier after gradient ascent on slope x, where -(x - 1)^2 may fall from its 0 at x = 1."""
    x, multiplier = torch.tensor([1.0], dtype=torch.float64), 0.0
    for _ in range(4000):
        x.requires_grad_()
        constrained = -(x - 1.0).square()
        (gradient,) = torch.autograd.grad((-slope * x + penalty(constrained, multiplier, unit)).sum(), x)
        multiplier = dual_ascent(multiplier, mean_drop(constrained, torch.zeros(1), unit), max_drop, rate=0.02)
        x = (x - 0.02 * gradient).detach()
    return x.item(), multiplier


@pytest.mark.parametrize(("slope", "max_drop", "unit"), [(1.0, 0.25, 1.0), (-0.5, 0.25, 2.0)])
def test_dual_ascent_ends_at_the_constrained_optimum_with_the_multiplier_of_the_gradients(slope, max_drop, unit):
    """At the optimum (x - 1)^2 = unit d, and slope = multiplier 2 (x - 1) / unit: the gradients cancel."""
    reach = math.sqrt(unit * max_drop)
    x, multiplier = tuned(slope, max_drop, unit)
    assert x == pytest.approx(1.0 + math.copysign(reach, slope), abs=1e-5)
    assert multiplier == pytest.approx(abs(slope) * unit / (2 * reach), abs=1e-4)
