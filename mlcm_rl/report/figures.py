"""The numbers of a report, in its file and in words. P prompts, I pictures of each."""

import math
import statistics

import torch
from torch import Tensor

from ..equations.statistics import mean_and_error, wilson_interval
from .types import Point, Row, Summary

DIGITS = 6  # significant ones of the values kept per prompt
CURVE_POINTS = 100  # of a curve over training; more are averaged in bins


def summary(values: Tensor) -> Summary:
    """Return mean and standard error of `values` (P,), and how many of them are not NaN."""
    mean, error = mean_and_error(values)
    return Summary(mean=rounded(mean), se=rounded(error), n=int((~values.isnan()).sum()))


def rounded(value: float) -> float | None:
    """Return `value` to DIGITS significant digits; None, which JSON can hold, for NaN."""
    return None if math.isnan(value) else significant(value)


def significant(value: float) -> float:
    """Return `value` to DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def listed(values: Tensor) -> list[float | None]:
    """Return `values` (N,) as JSON holds them."""
    return [rounded(value) for value in values.tolist()]


def values_of(row: Row, key: str) -> Tensor:
    """Return the values (P,) of metric `key` of `row`, NaN where a prompt has none."""
    return _unlisted(row.metrics[key].values)


def samples_of(row: Row, key: str) -> Tensor:
    """Return the values (P, I) of a student's row under the reward `key`, picture by picture."""
    samples = row.metrics[key].samples
    return torch.stack([_unlisted(values) for values in samples]) if samples else values_of(row, key)[:, None]


def _unlisted(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values])


def binned(points: list[tuple[int, float]]) -> list[Point]:
    """Return the (step, value) of a curve's `points`, at most CURVE_POINTS of them, each the mean of its bin."""
    width = max(1, math.ceil(len(points) / CURVE_POINTS))
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [(one[-1][0], rounded(statistics.fmean(value for _, value in one))) for one in bins]


def number(summary: Summary) -> str:
    """Return mean and standard error of `summary` in words."""
    return plus_minus(summary.mean, summary.se)


def win_rate(summary: Summary) -> str:
    """Return a win rate and its standard error in words; where all or none are won, the interval of 95 % and n."""
    if summary.mean not in (0.0, 1.0):
        return number(summary)
    low, high = (round(end, 2) for end in wilson_interval(summary.mean, summary.n))
    return f"{summary.mean:.0f} (n = {summary.n}, 95 %: {low:g} to {high:g})"


def plus_minus(value: float | None, error: float | None) -> str:
    """Return `value` with its standard error, to the error's second digit; a dash for None."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.4g}"
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} \u00b1 {error:.{decimals}f}"
