"""Exponential moving averages as functions of progress."""

from collections.abc import Iterable

import torch
from torch import Tensor


def ema_decay(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): short memory first, so that early steps are not averaged for long."""
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def ema_update_(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) current, in place, all parameters in one call."""
    pairs = list(zip(average, current, strict=True))
    torch._foreach_lerp_([mean for mean, _ in pairs], [value.to(mean.dtype) for mean, value in pairs], 1.0 - decay)
