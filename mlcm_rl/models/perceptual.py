"""Distances of clean latents as a network sees them: a latent LPIPS, or the first blocks of the frozen teacher.

A distance returns its value with the gradient by its first argument taken already, so that the network's activations
are gone before the student's are needed again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..equations.consistency import DISTANCES
from ..equations.feedback import at_known_gradient, value_and_gradient
from ..equations.perceptual import log_distance, mean_over_layers
from ..equations.schedule import add_noise
from ..recipe.distill import LOG, Distill
from ..training import autocast
from ..training.seeding import generator
from . import lpips
from .base import Base
from .conditioning import Conditioning
from .features import after_blocks


class Distance(Protocol):
    """A distance (B,) float32 of latents (B, C, H, W) under the prompts of `conditioning`."""

    def __call__(self, a: Tensor, b: Tensor, conditioning: Conditioning) -> Tensor: ...


# c of the logarithm. Two different pictures are about 1 apart in either distance, and the nearest jumps of 8 steps 0.04
# by LPIPS and 0.002 by features (docs/terms.md): its square is far below.
FLOOR = 3e-3


class Distances:
    """The distances that a distill stage names, and the networks of the perceptual ones, which are never trained."""

    def __init__(self, stage: Distill, base: Base, place: Path | None, seed: int):
        """Load what `stage` needs; the weights of LPIPS are at `place`. Raise as `lpips.load` and `refuse_blocks`."""
        self.base, self.stage, self.seed = base, stage, seed
        self.lpips: lpips.LatentLpips | None = None
        if stage.compares_by("lpips"):
            assert place is not None  # the recipe checks it
            self.lpips = lpips.load(place, base.latent_shape[0], base.device)
        if stage.compares_by("features"):
            refuse_blocks(base, stage.feature_blocks)

    def of(self, name: str, step: int | str) -> Distance:
        """Return the distance `name`; the noise of `features` is that of `step`, the same for all its samples."""
        if name in DISTANCES:
            return lambda a, b, conditioning: DISTANCES[name](a, b)
        kind = name.removeprefix(LOG)
        compared: Distance = self._by_lpips
        if kind == "features":
            noise = self.base.noise(generator(self.seed, "distill", "features", step), 1)
            compared = lambda a, b, conditioning: teacher_distance(  # noqa: E731
                self.base, a, b, conditioning, noise, self.stage.feature_time, self.stage.feature_blocks
            )
        if not name.startswith(LOG):
            return compared
        return lambda a, b, conditioning: log_distance(compared(a, b, conditioning), FLOOR)

    def _by_lpips(self, a: Tensor, b: Tensor, conditioning: Conditioning) -> Tensor:
        assert self.lpips is not None
        return lpips_distance(self.lpips, a, b)


def lpips_distance(network: lpips.LatentLpips, a: Tensor, b: Tensor) -> Tensor:
    """Return the LPIPS distance (B,) float32 of clean latents (B, C, H, W), with its gradient by `a`."""
    with torch.no_grad(), autocast.own(a.device):
        of_b = network.features(b.float())

    def distance(latents: Tensor) -> Tensor:
        return network.distance(network.features(latents), of_b)

    with autocast.own(a.device):
        return with_gradient(distance, a.float())


def teacher_distance(
    base: Base,
    a: Tensor,
    b: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    time: int,
    blocks: Sequence[int],
) -> Tensor:
    """Return the mean distance (B,) float32 of the outputs of the teacher's `blocks`, with its gradient by `a`.

    Both latents (B, C, H, W) are noised to `time` by the same `noise` (1, C, H, W).
    """
    t = torch.full((len(a),), time, device=a.device)

    def features(latents: Tensor) -> list[Tensor]:
        x_t = add_noise(latents, noise.to(latents.device), t, base.schedule)
        return after_blocks(base, base.denoiser, x_t, t, conditioning, blocks)

    with autocast.own(a.device):
        with torch.no_grad():
            of_b = features(b.float())
        size = float(of_b[0].shape[1:].numel())
        return with_gradient(lambda latents: mean_over_layers(features(latents), of_b), a.float(), scale=size)


def with_gradient(distance: Callable[[Tensor], Tensor], a: Tensor, scale: float = 1.0) -> Tensor:
    """Return `distance(a)` (B,), whose gradient by `a` is taken here and at once.

    Each sample's distance must depend on its own row of `a` (B, ...) alone. The gradient is taken of `scale` times the
    distance: inside a network in half precision a gradient spread over many elements would be rounded to 0.
    """
    if not (torch.is_grad_enabled() and a.requires_grad):
        return distance(a)
    return at_known_gradient(*value_and_gradient(distance, a, scale), a)


def refuse_blocks(base: Base, blocks: Sequence[int]) -> None:
    """Raise ValueError unless the denoiser has all of these `blocks`."""
    count = len(base.blocks(base.denoiser))
    if blocks and max(blocks) >= count:
        raise ValueError(
            f"feature_blocks: {max(blocks)}, and the denoiser of {base.teacher.path} has {count} blocks, 0 to "
            f"{count - 1}"
        )
