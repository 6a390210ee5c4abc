"""Means and their standard errors, and those of paired differences."""

import math

from torch import Tensor


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of the `values` (P,) that are not nan and its standard error sd / sqrt(n), sd with n - 1.

    The error is nan for a single value, both are nan for none.
    """
    values = values[~values.isnan()].double()
    if len(values) == 0:
        return math.nan, math.nan
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def paired_difference(values: Tensor, others: Tensor) -> tuple[float, float]:
    """Mean of values - others (P,) over prompts that have both, and its standard error.

    The same prompts and noise stand in both, so what they share (a hard prompt is hard for everybody) drops out.
    """
    return mean_and_error(values.double() - others.double())
