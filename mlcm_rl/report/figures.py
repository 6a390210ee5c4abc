"""The numbers of a report: as its file holds them, and as people read them. P prompts, I pictures of each."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from ..equations.statistics import mean_and_error

DIGITS = 6  # significant ones of the values kept per prompt
CURVE_POINTS = 100  # of a curve over training; more are averaged in bins


def summary(values: Tensor) -> dict[str, Any]:
    """Mean of `values` (P,), its standard error, and how many there are that are not nan."""
    mean, error = mean_and_error(values)
    return {"mean": rounded(mean), "se": rounded(error), "n": int((~values.isnan()).sum())}


def rounded(value: float) -> float | None:
    """`value` to DIGITS significant digits; None, which JSON can hold, for nan."""
    return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")


def listed(values: Tensor) -> list[float | None]:
    return [rounded(value) for value in values.tolist()]


def kept(row: dict, key: str) -> Tensor:
    """The values (P,) of a row's metric, nan where a prompt has none."""
    return _unlisted(row["metrics"][key]["values"])


def kept_samples(row: dict, key: str) -> Tensor:
    """The values (P, I) of a student's row under a reward, picture by picture."""
    metric = row["metrics"][key]
    if "samples" in metric:
        return torch.stack([_unlisted(values) for values in metric["samples"]])
    return kept(row, key)[:, None]


def _unlisted(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values])


def binned(points: list[tuple[int, float]]) -> list[list[float | None]]:
    """[step, value] of a curve's `points`, at most CURVE_POINTS of them, each the mean of its bin."""
    width = max(1, math.ceil(len(points) / CURVE_POINTS))
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [[one[-1][0], rounded(statistics.fmean(value for _, value in one))] for one in bins]


def number(summary: dict[str, Any]) -> str:
    return plus_minus(summary["mean"], summary["se"])


def plus_minus(value: float | None, error: float | None) -> str:
    """`value` with its standard error, to the error's second digit; a dash for none."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.4g}"
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} \u00b1 {error:.{decimals}f}"
