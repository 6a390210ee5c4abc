"""A student together with other inputs: a picture to start from, a mask, style LoRAs, control networks, an IP-Adapter.

All are of sampling alone: networks are changed or hooked where they are, so that the sampler and the families do not
know of them. A picture gives the sampler another start, a mask gives it another view of the base, and a style changes
weights.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional as F

from ..equations.schedule import add_noise
from ..storage import finite
from .base import Base
from .conditioning import Conditioning
from .quantised import is_quantised
from .teacher_lora import read_updates


@dataclass(frozen=True)
class Weighted:
    """A file or folder and how strongly it acts: `PATH` or `PATH:WEIGHT` on the command line."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Weighted":
        """Return what `text` says. Raise FileNotFoundError if there is no such path, with and without its end."""
        path, _, end = text.rpartition(":")
        try:
            parsed = cls(Path(path), float(end)) if path and not Path(text).exists() else cls(Path(text))
        except ValueError:  # a colon of the path's own
            parsed = cls(Path(text))
        if not parsed.path.exists():
            raise FileNotFoundError(f"{parsed.path}: no such file or folder")
        return parsed

    def __str__(self) -> str:
        return f"{self.path}:{self.weight:g}"


class Composition:
    """A teacher's `base` and a student's denoiser with other inputs; networks are changed in place.

    loras     styles, added to the weights
    image     (1, 3, H', W') in [0, 1], to start from
    strength  share of the time axis that is drawn: 1 leaves nothing of `image` but what the mask keeps
    mask      (1, 1, H', W') in [0, 1], 1 where the student draws
    """

    def __init__(
        self,
        base: Base,
        denoiser: ModelMixin,
        loras: Sequence[Weighted] = (),
        image: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
    ):
        self.base, self.image, self.strength, self.mask = base, image, strength, mask
        self.latents = None if image is None else base.autoencoder.encode(image)  # (1, C, H, W)
        add_loras(base, denoiser, loras)

    def start(self, noise: Tensor, t: int) -> Tensor:
        """Return the state (B, C, H, W) that the sampler starts from at time t: the picture's, or `noise` alone."""
        if self.latents is None or self.strength == 1.0:
            return noise
        times = torch.full((len(noise),), t, device=noise.device)
        return add_noise(self.latents.expand_as(noise), noise, times, self.base.schedule)

    def view(self, noise: Tensor) -> Base:
        """Return what the sampler takes for the base, in a batch with this `noise` (B, C, H, W)."""
        if self.latents is None or self.mask is None:
            return self.base
        drawn = latent_mask(self.mask, noise.shape[-1])
        return inpainting(self.base, self.latents.expand_as(noise), drawn, noise)

    def finish(self, images: Tensor) -> Tensor:
        """Return decoded pictures (B, 3, H', W') with the pixels that the mask keeps put back."""
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
