"""The teacher's features: what its blocks make of a noisy sample, for networks that read them."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..training import autocast
from .base import Base
from .conditioning import Conditioning

MOST_BLOCKS = 6  # that are read, spread evenly from the first to the last


def blocks_read(base: Base, denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks of a `denoiser` that are read: all, or as many as `MOST_BLOCKS` of them."""
    blocks = base.blocks(denoiser)
    if len(blocks) <= MOST_BLOCKS:
        return blocks
    return [blocks[i * (len(blocks) - 1) // (MOST_BLOCKS - 1)] for i in range(MOST_BLOCKS)]


def features(
    base: Base,
    x_t: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    denoiser: nn.Module | None = None,
    s: Tensor | None = None,
) -> list[Tensor]:
    """Return what the teacher's `blocks_read` make of x_t (B, C, H, W) at t (B,), float32, in its own precision.

    Or those of another `denoiser`, told the target time s (B,) where it is a conditioned student. Each is
    (B, D, h, w), of a UNet's level, or (B, D, L, 1) of a transformer's tokens. Gradients flow back to x_t.
    """
    states: dict[int, Tensor] = {}

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        states[id(block)] = base.picture_of(output)

    denoiser = base.denoiser if denoiser is None else denoiser
    blocks = blocks_read(base, denoiser)
    with ExitStack() as hooks, autocast.own(base.device):
        for block in blocks:
            hooks.callback(block.register_forward_hook(keep).remove)
        base.predict(denoiser, x_t, t, conditioning, s)
    return [_as_picture(states[id(block)]).float() for block in blocks]


def _as_picture(states: Tensor) -> Tensor:
    """Return states (B, D, h, w) as they are, and tokens (B, D, L) as (B, D, L, 1)."""
    return states if states.ndim == 4 else states.unsqueeze(3)
