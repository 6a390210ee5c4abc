"""A teacher's autoencoder: decodes latents and encodes pictures, in tiles where memory is short."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOST_PIXELS = 2 * 1024**2  # of pictures that are decoded at a time where no gradient is wanted
RECOMPUTE = partial(checkpoint, use_reentrant=False)


class Autoencoder:
    """The `vae` of the teacher at the path `teacher`; one of its latents covers `downscale` x `downscale` pixels."""

    def __init__(self, vae: AutoencoderKL, downscale: int, teacher: str, device: torch.device):
        self.vae, self.downscale, self.teacher, self.device = vae, downscale, teacher, device

    @property
    def latent_channels(self) -> int:
        """The channels C of the latents that the denoiser takes."""
        return self.vae.config.latent_channels

    def decode(self, latents: Tensor, small: AutoencoderTiny | None = None) -> Tensor:
        """Decode clean latents (B, C, H, W) into pictures (B, 3, H', W') float32 in [0, 1], differentiably.

        A `small` decoder takes the latents in the denoiser's scale, without the autoencoder's own scale and shift.
        Without gradients pictures are decoded a few at a time, MOST_PIXELS or one: the memory is that of these.
        """
        size = len(latents)
        if not torch.is_grad_enabled():
            height, width = latents.shape[2:]
            size = max(1, MOST_PIXELS // (height * width * self.downscale**2))
        return torch.cat([self._pictures(part, small) for part in latents.float().split(size)])

    def _pictures(self, latents: Tensor, small: AutoencoderTiny | None) -> Tensor:
        decoded = self._decoded(self._to_own(latents)) if small is None else small.decode(latents).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def checkpoint_blocks(self, recompute: Callable[..., Any] = RECOMPUTE) -> None:
        """Let the decoder compute its blocks again in the backward pass, by `recompute`: the same gradients."""
        self.vae.enable_gradient_checkpointing(recompute)

    def use_tiles(self, size: int, recompute: Callable[..., Any] = RECOMPUTE) -> None:
        """Work in tiles of `size` x `size` pixels from now on, which takes less memory; seams are blended.

        Tiles overlap by a quarter. `recompute` recomputes each tile in the backward pass, since the activations of all
        tiles are more than those of the whole picture. Raise ValueError if a quarter is not a whole number of latents.
        """
        quarter = 4 * self.downscale
        if size % quarter:
            raise ValueError(
                f"autoencoder_tiles: {size} is not a multiple of {quarter}: tiles of {self.teacher} overlap by a "
                "quarter, which must be whole latents"
            )
        self._tile(size, recompute)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pictures (B, 3, H', W') in [0, 1] into latents (B, C, H, W).

        They are the posterior's mean, or a sample of it drawn by `generator`.
        """
        return self._from_own(self._encoded(images.float() * 2 - 1, generator))

    def _decoded(self, latents: Tensor) -> Tensor:
        """Return the pictures (B, 3, H', W') in [-1, 1] of latents (B, C, H, W) in the autoencoder's own scale."""
        return self.vae.decode(latents).sample

    def _encoded(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return latents (B, C, H, W) in the autoencoder's own scale of pictures (B, 3, H', W') in [-1, 1]."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mode() if generator is None else posterior.sample(generator)

    def _tile(self, size: int, recompute: Callable[..., Any]) -> None:
        """Work in tiles of `size` x `size` pixels, which overlap by a quarter."""
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = size, size // self.downscale
        self.vae.decoder.forward = partial(recompute, self.vae.decoder.forward)

    def _to_own(self, latents: Tensor) -> Tensor:
        """Return what the autoencoder decodes for the denoiser's `latents` (B, C, H, W)."""
        scale, mean = self._scale
        return latents * scale + mean

    def _from_own(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents (B, C, H, W) of those that the autoencoder encodes."""
        scale, mean = self._scale
        return (latents - mean) / scale

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return scale and mean (1, C or 1, 1, 1): for latents z, the autoencoder decodes scale z + mean."""
        settings = self.vae.config
        std = settings.get("latents_std") or [1.0]
        mean = settings.get("latents_mean") or [settings.get("shift_factor") or 0.0]
        scale = torch.tensor(std, dtype=torch.float32, device=self.device) / settings.get("scaling_factor", 1.0)
        shift = torch.tensor(mean, dtype=torch.float32, device=self.device)
        return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
