"""Pictures: 8-bit pictures to latents, tensors to PNG, and sample grids (a row per prompt, a column per step count)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..equations.segments import time_grid
from ..recipe import Samples
from ..storage import finite
from ..storage.files import replacing
from ..training import autocast, processes
from ..training.loop import Runtime
from ..training.progress import progress
from ..training.seeding import generator
from . import sampler
from .base import Base
from .conditioning import Conditioning
from .grids import SamplingGrid

TEACHER_STEPS = 25  # of a sample grid by the guided teacher
TEACHER_COLUMNS = 8  # of one


def encode(base: Base, images: Tensor, first: int = 0) -> Tensor:
    """Encode 8-bit pictures (B, 3, H', W') into latents (B, C, H, W) on the CPU.

    Raise ValueError for one whose latents are not finite, by its number; `first` pictures were before these.
    """
    latents = base.autoencoder.encode(images.to(base.device) / 255).cpu()
    if (place := finite.first_bad_row(latents)) is not None:
        raise ValueError(
            f"picture {first + place + 1}: its latents by the autoencoder of {base.teacher.path} are not finite: the "
            "autoencoder's weights are damaged; fetch them again"
        )
    return latents


def encode_all(base: Base, parts: Iterable[Tensor], total: int) -> Tensor:
    """Encode `total` 8-bit pictures, given in `parts` (b, 3, H', W'), into latents (N, C, H, W) on the CPU.

    Raise as `encode`.
    """
    latents = []
    with progress(total, "encode pictures") as bar:
        for part in parts:
            latents.append(encode(base, part, bar.num_finished))
            bar.advance(len(part))
    return torch.cat(latents)


def to_pil(image: Tensor) -> Image.Image:
    """Return a picture (3, H, W) in [0, 1] as an 8-bit RGB image. Raise ValueError if it is not finite."""
    if not finite.is_finite(image):
        raise ValueError(
            "a sampled picture is not finite: the weights of the student, of its teacher or of what joins it are "
            "damaged, or weigh too much"
        )
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images: Tensor, num_columns: int, gap: int = 4) -> Image.Image:
    """Return pictures (N, 3, H, W) in [0, 1] laid out row by row on light grey."""
    return sheet([to_pil(image) for image in images], num_columns, gap)


def sheet(images: Sequence[Image.Image], num_columns: int, gap: int = 4) -> Image.Image:
    """Return pictures of one size laid out row by row on light grey."""
    (width, height), num_rows = images[0].size, -(-len(images) // num_columns)
    whole = Image.new("RGB", (num_columns * (width + gap) + gap, num_rows * (height + gap) + gap), (224, 224, 224))
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        whole.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return whole


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, object] | None = None) -> Path:
    """Write `image` to `path`, with `metadata` as PNG text, and return the path."""
    text = PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, str(value))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
    return path


@torch.no_grad()
def sample_grid(
    base: Base,
    denoiser: torch.nn.Module,
    samples: Samples,
    seed: int,
    times_of: SamplingGrid,
    conditioned: bool,
    gamma: float,
) -> Image.Image:
    """Sample the recipe's fixed prompts (rows) at its numbers of steps (columns), from equal noise in every column.

    Numbers of steps that the student's grid has no times for are left out, unless that leaves none.
    """
    conditioning = base.encode_prompts(samples.prompts)
    columns = []
    for num_steps in [n for n in samples.sampling_steps if times_of.has(n)] or times_of.steps:
        times = times_of.times(num_steps)
        seeds = [generator(seed, "samples", i) for i in range(len(samples.prompts))]
        noise = base.noise(seeds, len(seeds))
        x0 = sampler.sample(base, denoiser, conditioning, noise, times, gamma, seeds, conditioned)
        with autocast.own(base.device):
            columns.append(base.autoencoder.decode(x0))
    return grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns))


@torch.no_grad()
def of_teacher(base: Base, conditioning: Conditioning, seed: int) -> Tensor:
    """Return pictures (B, 3, H', W') by TEACHER_STEPS of the guided teacher, from the noises of a sample grid."""
    size = len(next(iter(conditioning.values())))
    noise = base.noise([generator(seed, "samples", i) for i in range(size)], size)
    times, scale = time_grid(TEACHER_STEPS)[:-1], base.teacher.guidance_scale
    x0 = sampler.sample_teacher(base, conditioning, base.unconditional(size), noise, times, scale)
    return base.autoencoder.decode(x0)


def save_samples(rt: Runtime, sheet: Image.Image, step: int) -> None:
    """Write a stage's sample grid at `step` to its folder, and send it to the trackers."""
    processes.on_rank_zero(save_png, sheet, samples_path(rt.folder, step + 1))
    rt.log_picture(step, "samples", lambda: sheet)


def samples_path(folder: Path, step: int) -> Path:
    """Return the path of the sample grid after `step` optimiser steps."""
    return folder / "samples" / f"step-{step:06d}.png"
