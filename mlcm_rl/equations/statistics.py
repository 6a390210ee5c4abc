"""Means, their standard errors, those of paired differences and of the jackknife; how far counts are from a coin's."""

import math

import torch
from torch import Tensor

# The least deviation of a reward, as a share of its largest score at the reference. A reward with nearly the same score
# for every picture (safety, at its cap) would otherwise be divided by its rounding errors and decide alone; left out,
# it could not object when the student leaves the cap. The floor is relative, since scores have no other scale.
LEAST_DEVIATION = 0.01


def deviation(scores: Tensor) -> float:
    """Return the unit of a reward's gains and drops, from those of the reference's `scores` (P,) that are not NaN.

    0 where all of them are 0, and for none.
    """
    scores = scores[~scores.isnan()]
    if not len(scores):
        return 0.0
    spread = scores.std().item() if len(scores) > 1 else 0.0
    return max(spread, LEAST_DEVIATION * scores.abs().max().item())


def wins(scores: Tensor, others: Tensor) -> Tensor:
    """Return 1 where a score (...) is higher than the other, 0 where it is lower, 0.5 where they are equal.

    NaN where either is. The mean is a win rate.
    """
    difference = scores - others
    won = torch.heaviside(difference, difference.new_tensor(0.5))
    return torch.where(difference.isnan(), math.nan, won)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of the `values` (P,) that are not NaN and its standard error sd / sqrt(n), sd with n - 1.

    The error is NaN for a single value; both are NaN for none.
    """
    values = values[~values.isnan()].double()
    if len(values) == 0:
        return math.nan, math.nan
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return both ends of the interval of a `share` of `count` trials (Wilson 1927), of 95 % at the default `z`.

    Unlike the standard error it has a width where all trials are won, or none is.
    """
    spread = z * z / count
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def paired_difference(values: Tensor, others: Tensor) -> tuple[float, float]:
    """Mean of values - others (P,) over prompts that have both, and its standard error.

    Both are of the same prompts and noise, so that their common part drops out (a hard prompt is hard for all).
    """
    return mean_and_error(values.double() - others.double())


def jackknife_values(whole: Tensor, without: Tensor) -> Tensor:
    """Return G values whose mean is the statistic `whole` of all data and whose standard error is the jackknife's.

    `without` (G,) is the same statistic with each of G equal groups left out in turn. The values are whole + (G - 1)
    (mean of without - without): sd / sqrt(G) of them is the square root of (G - 1) / G sum (without - mean)^2 (Efron
    and Stein 1981). Two statistics on the same groups have the jackknife's error of their difference in the difference
    of their values.
    """
    return whole + (len(without) - 1) * (without.mean() - without)


def sign_test(wins: int, losses: int) -> float:
    """Return the probability that a fair coin, thrown wins + losses times, is as far from even or further.

    The two-sided sign test (Dixon and Mood 1946): min(1, 2 sum_{i <= min(wins, losses)} C(n, i) / 2^n); ties are left
    out of n. 1 for none.
    """
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n)
