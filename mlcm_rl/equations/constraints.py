"""A constrained reward: the drop that is measured, and dual ascent on its Lagrange multiplier.

Maximise r subject to drop_j <= d_j for each constrained reward c_j. The Lagrangian

    r + sum_j lambda_j (d_j - drop_j),   lambda_j >= 0

is ascended in the student's weights, where d_j and the reference are constants and -drop_j is c_j / unit_j, and
descended in the multipliers (Arrow, Hurwicz and Uzawa 1958; for language models Safe RLHF, arXiv 2310.12773, eq. 11).
"""

from torch import Tensor


def drop(scores: Tensor, reference: Tensor, unit: float) -> Tensor:
    """(reference - scores) / unit (B,): how far each of `scores` (B,) is below the reference's from the same noise."""
    return (reference - scores) / unit


def penalty(scores: Tensor, multiplier: float, unit: float) -> Tensor:
    """-lambda c / unit (B,): the part of the negative Lagrangian that depends on the scores c (B,), with gradient."""
    return -multiplier * scores / unit


def dual_ascent(multiplier: float, mean_drop: float, max_drop: float, rate: float) -> float:
    """max(0, lambda + rate (drop - d)): up while the constraint is broken, down to 0 where it has room."""
    return max(0.0, multiplier + rate * (mean_drop - max_drop))


def mean_drop(scores: Tensor, reference: Tensor, unit: float) -> float:
    """Return the mean of `drop`, summed in float64 on the CPU: the same number in every process."""
    return drop(scores.detach().cpu().double(), reference.detach().cpu().double(), unit).mean().item()
