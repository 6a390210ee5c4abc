"""What a family's tests need to know of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from mlcm_rl.models import teachers
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from mlcm_rl.recipe import Teacher


def kl_decoded(stock: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Return the pictures (B, 3, H, W) in [0, 1] of an AutoencoderKL with scale and shift, as stock pipelines do."""
    settings = stock.vae.config
    decoded = stock.vae.decode(latents / settings.scaling_factor + (settings.shift_factor or 0.0), return_dict=False)
    return stock.image_processor.postprocess(decoded[0].detach(), output_type="pt")


def kl_encoded(stock: DiffusionPipeline, images: Tensor) -> Tensor:
    """Return the latents (B, C, H, W) of pictures in [0, 1], the mean of an AutoencoderKL with scale and shift."""
    settings = stock.vae.config
    mean = stock.vae.encode(images * 2 - 1).latent_dist.mode()
    return (mean - (settings.shift_factor or 0.0)) * settings.scaling_factor


def unchanged(base: Base, latents: Tensor) -> Tensor:
    """Return `latents`: this family's stock pipeline takes and gives them as they are."""
    return latents


@dataclass(frozen=True)
class Case:
    """A family: its tiny teacher, and its stock pipeline.

    write       a tiny teacher's folder in the layout of the published one
    encoded     conditioning and unconditional conditioning of prompts by the stock pipeline's own encode_prompt
    guidance    the stock pipeline's arguments for `guidance_scale`
    to_stock    our latents as the stock pipeline takes them; from_stock, what it gives as ours
    schedules   a stock pipeline's scheduler, set so that it draws the teacher's trajectory at given times, and the
                arguments of the call; None: the student's own scheduler and call do
    """

    family: str
    write: Callable[[Path], Path]
    encoded: Callable[[DiffusionPipeline, list[str]], tuple[Conditioning, Conditioning]]
    guidance: dict[str, float | str]
    prompts: tuple[str, ...] = ("a red apple, 3d", "x" * 600)  # the second is longer than any encoder reads
    guidance_scale: float = 5.0
    resolution: int | None = None
    tolerance: float = 1e-5  # of a trajectory, relative to its largest latent
    to_stock: Callable[[Base, Tensor], Tensor] = unchanged
    from_stock: Callable[[Base, Tensor], Tensor] = unchanged
    schedules: Callable[[Base, DiffusionPipeline, list[int]], dict] | None = None
    decoded: Callable[[DiffusionPipeline, Tensor], Tensor] = kl_decoded
    encoded_pictures: Callable[[DiffusionPipeline, Tensor], Tensor] = kl_encoded
    absent: dict[str, None] = field(default_factory=dict)  # components that diffusers wants to be told are not there
    loads_lora: bool = True  # the stock pipeline can load an adapter
    renoises: bool = True  # the stock pipeline draws noise in its scheduler as we do, from the global generator
    planned: bool = True  # its passes run on the meta device

    def teacher(self, folder: Path) -> Teacher:
        """Return the recipe's entry for a tiny teacher."""
        settings = {"guidance_scale": self.guidance_scale, "resolution": self.resolution}
        return Teacher(path=str(folder), family=self.family, **settings)

    def load(self, folder: Path) -> Base:
        """Load a tiny teacher."""
        return teachers.load(self.teacher(folder), "cpu")

    def noise(self, base: Base) -> Tensor:
        """Return the noise (B, C, H, W) of a picture for each prompt."""
        return base.noise(torch.Generator().manual_seed(4), len(self.prompts))

    def stock(self, folder: Path) -> DiffusionPipeline:
        """Load a folder by stock diffusers. Its networks are as in `load`, misaligned memory maps and all."""
        pipeline = DiffusionPipeline.from_pretrained(folder, **self.absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def guided_call(self, base: Base, stock: DiffusionPipeline, times: list[int]) -> dict:
        """Return the arguments with which `stock`, its scheduler set where it must be, guides at `times`."""
        call = base.stock_call(times) if self.schedules is None else self.schedules(base, stock, times)
        return call | self.guidance

    def draw(self, base: Base, stock: DiffusionPipeline, noise: Tensor, call: dict) -> Tensor:
        """Return the latents (B, C, H, W) that the stock pipeline draws from `noise` with the arguments `call`."""
        size = {"height": base.resolution, "width": base.resolution} | base.stock_size
        latents = self.to_stock(base, noise)
        with torch.no_grad():
            images = stock(prompt=list(self.prompts), latents=latents, output_type="latent", **size, **call).images
        return self.from_stock(base, images)
