"""Exponential moving averages as functions of progress."""

from collections.abc import Iterable

import torch
from torch import Tensor


def ema_decay(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): short memory first, so that early steps are not averaged for long."""
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def ema_update_(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) current, in place, parameter by parameter."""
    for mean, value in zip(average, current, strict=True):
        mean.lerp_(value.to(mean.dtype), 1.0 - decay)
