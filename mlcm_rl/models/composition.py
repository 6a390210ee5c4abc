"""A student together with other inputs: a picture to start from, a mask, style LoRAs, control networks.

All are of sampling alone, and the sampler and the families do not know of them: a picture is another start, a mask
another view of the base, a style is in the weights, and control networks are hooks on the denoiser (`control`).
"""

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional as F

from ..equations.schedule import add_noise
from ..storage import finite
from . import sampler
from .base import Base
from .conditioning import Conditioning
from .control import controlled
from .quantised import is_quantised
from .teacher_lora import read_updates


@dataclass(frozen=True)
class Weighted:
    """A file or folder and how strongly it acts: `PATH` or `PATH:WEIGHT` on the command line."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Weighted":
        """Return what `text` says.

        Raise FileNotFoundError if there is no such path, with and without its end, ValueError for an infinite weight.
        """
        path, _, end = text.rpartition(":")
        try:
            parsed = cls(Path(path), float(end)) if path and not Path(text).exists() else cls(Path(text))
        except ValueError:  # a colon of the path's own
            parsed = cls(Path(text))
        if not parsed.path.exists():
            raise FileNotFoundError(f"{parsed.path}: no such file or folder")
        if not math.isfinite(parsed.weight):
            raise ValueError(f"{text}: the weight is {parsed.weight:g}; it must be a finite number")
        return parsed

    def __str__(self) -> str:
        return f"{self.path}:{self.weight:g}"


class Composition:
    """A teacher's `base` and a student's denoiser with other inputs; networks are changed in place.

    loras     styles, added to the weights
    controls  control networks, each with its picture (1, 3, H', W') in [0, 1] and a weight
    image     (1, 3, H', W') in [0, 1], to start from; or one for each of a batch
    strength  share of the time axis that is drawn: 1 leaves nothing of `image` but what the mask keeps
    mask      (1, 1, H', W') in [0, 1], 1 where the student draws
    """

    def __init__(
        self,
        base: Base,
        denoiser: ModelMixin,
        loras: Sequence[Weighted] = (),
        controls: Sequence[tuple[ModelMixin, Tensor, float]] = (),
        image: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
    ):
        self.base, self.denoiser, self.controls = base, denoiser, controls
        self.image, self.strength, self.mask = image, strength, mask
        self.latents = None if image is None else base.autoencoder.encode(image)  # (1, C, H, W), or (B, ...)
        add_loras(base, denoiser, loras)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        noise: Tensor,
        times: Sequence[int],
        gamma: float,
        generators: torch.Generator | Sequence[torch.Generator] | None = None,
        conditioned: bool = False,
    ) -> Tensor:
        """Return the student's x0 (B, C, H, W), as `sampler.sample` does."""
        base, start = self.base, noise
        if self.latents is not None:
            latents = self.latents.expand_as(noise)
            if self.strength < 1.0:
                first = torch.full((len(noise),), times[0], device=noise.device)
                start = add_noise(latents, noise, first, base.schedule)
            if self.mask is not None:
                base = inpainting(base, latents, latent_mask(self.mask, noise.shape[-1]), noise)
        with ExitStack() as stack:
            for network, image, scale in self.controls:
                stack.enter_context(controlled(self.denoiser, network, image, scale))
            return sampler.sample(base, self.denoiser, conditioning, start, times, gamma, generators, conditioned)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Return the pictures (B, 3, H', W') in [0, 1] of x0, with the pixels that the mask keeps put back."""
        images = self.base.autoencoder.decode(x0)
        if self.image is None or self.mask is None:
            return images
        return torch.lerp(self.image, images, self.mask)


def latent_mask(mask: Tensor, side: int) -> Tensor:
    """Return which latents (1, 1, H, W) are drawn: those with any pixel of `mask` (1, 1, H', W') of 0.5 or more."""
    return F.adaptive_max_pool2d(mask, side) >= 0.5


def inpainting(base: Base, latents: Tensor, drawn: Tensor, noise: Tensor) -> Base:
    """Return `base` with an `x0` that draws where `drawn` is true, with the picture's `latents` (B, C, H, W) elsewhere.

    The denoiser sees the picture there at the noise of each time, always with the same `noise`, as in the stock
    pipelines for denoisers without inputs for a mask. A sampler's steps are elementwise, so that its own state there
    is never read.
    """

    def x0(
        denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        seen = torch.where(drawn, x_t, add_noise(latents, noise, t, base.schedule))
        return torch.where(drawn, base.x0(denoiser, seen, t, conditioning, s), latents)

    view = copy.copy(base)
    view.x0 = x0  # type: ignore[method-assign]
    return view


@torch.no_grad()
def add_loras(base: Base, denoiser: ModelMixin, loras: Sequence[Weighted]) -> None:
    """Add style LoRAs of diffusers' or kohya's layout to the weights of a student and of the text encoders, in place.

    Their sum is added in float32 and rounded once. Raise as `teacher_lora.read_updates` does, ValueError for integer
    weights and for a weight that overflows.
    """
    if loras and is_quantised(denoiser):
        raise ValueError("--lora: a style is added to floats: leave teacher.quantise out of the recipe")
    totals: dict[tuple[str, str], Tensor] = {}
    for lora in loras:
        where, over = f"--lora {lora.path}", f"the teacher {base.teacher.path}"
        for part, of_modules in read_updates(base.pipeline, lora.path, where, over, lora.weight).items():
            for module, update in of_modules.items():
                total = update.total()
                totals[part, module] = totals[part, module] + total if (part, module) in totals else total
    changed = {}
    for (part, module), total in totals.items():
        network = denoiser if part == base.denoiser_part else base.pipeline.components[part]
        layer = network.get_submodule(module)
        weight = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer).weight
        weight.data = (weight.float() + total.to(weight.device)).to(weight.dtype)
        changed[f"{part}.{module}"] = weight
    if (bad := finite.first_nonfinite(changed)) is not None:
        raise ValueError(f"--lora: {bad} is not made of finite numbers with the styles added: lower their weights")
