"""Train the teacher's `AutoencoderKL` on every concept in the three styles; measure it on concepts held out."""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from mlcm_rl.training.loop import cpu_has_bfloat16
from sources import cache_folder, load_pictures, whole_folder, write_text
from updates import Updates, say_every


@dataclass(frozen=True)
class AutoencoderSettings:
    """Sizes and schedule. `kl_weight` multiplies the mean KL per latent value; `shift` and `crop` are in pixels."""

    widths: tuple[int, ...] = (16, 48, 80, 96)
    latent_channels: int = 8
    num_steps: int = 7000
    batch_size: int = 16
    learning_rate: float = 2e-3
    kl_weight: float = 2e-3
    ema_decay: float = 0.998
    shift: int = 3
    crop: int | None = None
    seed: int = 0


def is_held_out(codepoint: str) -> bool:
    """Say whether the autoencoder keeps a concept back for measuring: 4 % of them, by a hash of the codepoint."""
    return sha256(codepoint.encode()).digest()[0] < 10


def build_autoencoder(settings: AutoencoderSettings) -> AutoencoderKL:
    """Return an untrained autoencoder that shrinks each side 2 ** (levels - 1) times; no attention anywhere."""
    torch.manual_seed(settings.seed)
    levels = len(settings.widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.widths,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def as_images(pixels: np.ndarray | Tensor) -> Tensor:
    """Return uint8 pictures (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(images: Tensor, shift: int, generator: torch.Generator, crop: int | None = None) -> Tensor:
    """Return the pictures (B, 3, H, H) moved by up to `shift` pixels on white, one half of them mirrored.

    With `crop` it is a random square of so many pixels a side of each, (B, 3, crop, crop).
    """
    size = crop or images.shape[-1]
    padded = F.pad(images, (shift,) * 4, value=1.0)
    offsets = torch.randint(0, padded.shape[-1] - size + 1, (len(images), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    rows = [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets, strict=True)]
    return torch.stack([row.flip(-1) if flip else row for row, flip in zip(rows, mirrored, strict=True)])


def reconstruction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Return L1 on the values plus L1 on the differences of neighbours: a scalar. Both are (B, C, H, W)."""
    loss = (found - wanted).abs().mean()
    for dim in (-1, -2):
        loss = loss + (found.diff(dim=dim) - wanted.diff(dim=dim)).abs().mean() / 2
    return loss


def train(
    model: AutoencoderKL,
    pixels: Tensor,
    settings: AutoencoderSettings,
    on_step: Callable[[int, float, AutoencoderKL], None] = lambda step, loss, averaged: None,
) -> AutoencoderKL:
    """Train `model` in place on `pixels`, uint8 (N, H, W, 3); return its running average.

    Under bfloat16 autocast where the CPU has such arithmetic.

    `on_step(step, loss, averaged)` is called after every step, counted from 1.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    averaged = AutoencoderKL.from_config(model.config).requires_grad_(False)
    averaged.load_state_dict(model.state_dict())
    updates = Updates(model.parameters(), settings.learning_rate, settings.num_steps, weight_decay=1e-4, max_norm=1.0)
    batches = index_batches(len(pixels), settings.batch_size, generator)
    for step in range(1, settings.num_steps + 1):
        images = augment(as_images(pixels[next(batches)]), settings.shift, generator, settings.crop)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            posterior = model.encode(images).latent_dist
            decoded = model.decode(posterior.sample(generator)).sample
        values = posterior.mean.numel() / len(images)
        loss = reconstruction_loss(decoded.float(), images)
        loss = loss + settings.kl_weight * posterior.kl().float().mean() / values
        updates.take(loss)
        update_average(averaged, model, min(settings.ema_decay, step / (step + 10)))
        on_step(step, loss.item(), averaged)
    return averaged


def index_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index tensors (B,) for ever, one permutation of the data after another; a short tail is dropped."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


@torch.no_grad()
def update_average(averaged: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's by 1 - decay, in place."""
    for target, source in zip(averaged.parameters(), model.parameters(), strict=True):
        target.lerp_(source, 1 - decay)


@torch.no_grad()
def encode(model: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Return the posterior means, float32 (N, C, H, W), not scaled."""
    return torch.cat([model.encode(as_images(part)).latent_dist.mean for part in pixels.split(batch_size)])


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor, batch_size: int = 64) -> Tensor:
    """Return pictures in [0, 1], float32 (N, 3, H, W), from latents that are not scaled."""
    parts = [model.decode(part).sample for part in latents.split(batch_size)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def measure_psnr(model: AutoencoderKL, pixels: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of reconstructions, from the mean square error over all pictures."""
    wanted = as_images(pixels) / 2 + 0.5
    error = (decode(model, encode(model, pixels)) - wanted).square().mean().item()
    return -10 * math.log10(error)


def save(model: AutoencoderKL, pixels: Tensor, folder: Path) -> None:
    """Set `scaling_factor` to 1 / std of the latents of `pixels`, then write the folder so that it appears whole."""
    model.register_to_config(scaling_factor=1 / encode(model, pixels).std().item())
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)


def main() -> None:
    """Train with progress lines; the averaged weights go to `autoencoder/` in the cache every 500 steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=AutoencoderSettings.num_steps)
    parser.add_argument("--latent-channels", type=int, default=AutoencoderSettings.latent_channels)
    parser.add_argument("--factor", type=int, default=8, choices=(4, 8), help="by which each side shrinks")
    parser.add_argument("--crop", type=int, help="pixels a side of what a step sees [all]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="autoencoder", help="folder in the cache to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    widths = AutoencoderSettings.widths[: arguments.factor.bit_length()]
    settings = AutoencoderSettings(widths, arguments.latent_channels, arguments.steps, crop=arguments.crop)
    pictures = load_pictures(64)
    held_out = np.array([is_held_out(codepoint) for codepoint in pictures.codepoints])
    seen, unseen = (torch.from_numpy(pictures.pixels[mask]) for mask in (~held_out, held_out))
    folder, started, history = cache_folder() / arguments.name, time.time(), []
    say = say_every(50, settings.num_steps)

    def on_step(step: int, loss: float, averaged: AutoencoderKL) -> None:
        say(step, loss)
        if step % 500 == 0 or step == settings.num_steps:
            history.append({"step": step, "held_out_psnr_db": round(measure_psnr(averaged, unseen), 2)})
            save(averaged, seen[::8], folder)
            print(f"held-out {history[-1]}, scaling_factor {averaged.config.scaling_factor:.3f}", flush=True)

    train(build_autoencoder(settings), seen, settings, on_step)
    report = {"minutes": round((time.time() - started) / 60, 1), "pictures": len(seen), "history": history}
    write_text(folder / "training.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
