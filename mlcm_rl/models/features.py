"""The teacher's features: what its blocks make of a noisy sample, for networks that read them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..training import autocast
from .base import Base
from .conditioning import Conditioning

MOST_BLOCKS = 6  # that are read, spread evenly from the first to the last


class _Enough(Exception):
    """The last block that is read has been computed; those after it need not be."""


def features(
    base: Base,
    x_t: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    denoiser: nn.Module | None = None,
    s: Tensor | None = None,
) -> list[Tensor]:
    """Return what the teacher's blocks make of x_t (B, C, H, W) at t (B,), float32, in its own precision.

    Or those of another `denoiser`, told the target time s (B,) where it is a conditioned student; at most MOST_BLOCKS.
    Each is (B, D, h, w), of a UNet's level, or (B, D, L, 1) of a transformer's tokens. Gradients flow back to x_t.
    """
    denoiser = base.denoiser if denoiser is None else denoiser
    places = _spread(len(base.blocks(denoiser)))
    with autocast.own(base.device):
        states = after_blocks(base, denoiser, x_t, t, conditioning, places, s)
    return [_as_picture(one).float() for one in states]


def after_blocks(
    base: Base,
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    places: Sequence[int],
    s: Tensor | None = None,
) -> list[Tensor]:
    """Return the states of the picture after each of the blocks number `places` of `denoiser`, channels second.

    x_t (B, C, H, W) at t (B,) gives (B, D, h, w) or (B, D, L). Blocks after the last of `places` are not computed.
    """
    states: dict[int, Tensor] = {}

    def keeping(place: int) -> Callable[..., None]:
        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            states[place] = base.picture_of(output)
            if place == max(places):
                raise _Enough

        return keep

    blocks = base.blocks(denoiser)
    with ExitStack() as hooks:
        for place in places:
            hooks.callback(blocks[place].register_forward_hook(keeping(place)).remove)
        try:
            base.predict(denoiser, x_t, t, conditioning, s)
        except _Enough:
            return [states[place] for place in places]
    raise RuntimeError(f"the denoiser of {base.teacher.path} did not call its block {max(places)}")


def _spread(count: int) -> list[int]:
    """Return the numbers of the blocks that are read, of `count`."""
    if count <= MOST_BLOCKS:
        return list(range(count))
    return [i * (count - 1) // (MOST_BLOCKS - 1) for i in range(MOST_BLOCKS)]


def _as_picture(states: Tensor) -> Tensor:
    """Return states (B, D, h, w) as they are, and tokens (B, D, L) as (B, D, L, 1)."""
    return states if states.ndim == 4 else states.unsqueeze(3)
