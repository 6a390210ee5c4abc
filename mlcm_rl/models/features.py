"""The teacher's features: what its blocks make of a noisy sample, for networks that read them."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..training import autocast
from .base import Base
from .conditioning import Conditioning

MOST_BLOCKS = 6  # that are read, spread evenly from the first to the last


def blocks_read(base: Base) -> list[nn.Module]:
    """Return the blocks of the teacher's denoiser that are read: all, or as many as `MOST_BLOCKS` of them."""
    blocks = base.blocks(base.denoiser)
    if len(blocks) <= MOST_BLOCKS:
        return blocks
    return [blocks[i * (len(blocks) - 1) // (MOST_BLOCKS - 1)] for i in range(MOST_BLOCKS)]


def features(base: Base, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
    """Return what the teacher's `blocks_read` make of x_t (B, C, H, W) at t (B,), float32, in its own precision.

    Each is (B, D, h, w), of a UNet's level, or (B, D, L, 1) of a transformer's tokens. Gradients flow back to x_t.
    """
    states: dict[int, Tensor] = {}

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        states[id(block)] = base.picture_of(output)

    blocks = blocks_read(base)
    with ExitStack() as hooks, autocast.own(base.device):
        for block in blocks:
            hooks.callback(block.register_forward_hook(keep).remove)
        base.predict(base.denoiser, x_t, t, conditioning)
    return [_as_picture(states[id(block)]).float() for block in blocks]


def _as_picture(states: Tensor) -> Tensor:
    """Return states (B, D, h, w) as they are, and tokens (B, D, L) as (B, D, L, 1)."""
    return states if states.ndim == 4 else states.unsqueeze(3)
