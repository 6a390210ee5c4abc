"""A teacher's autoencoder: pictures of latents and latents of pictures, in tiles where memory is short."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Autoencoder:
    """The `vae` of the teacher at the path `teacher`, whose latents are `downscale` pixels a side."""

    def __init__(self, vae: AutoencoderKL, downscale: int, teacher: str, device: torch.device):
        self.vae, self.downscale, self.teacher, self.device = vae, downscale, teacher, device

    def decode(self, latents: Tensor, small: AutoencoderTiny | None = None) -> Tensor:
        """Pictures (B, 3, H', W') float32 in [0, 1] of clean latents (B, C, H, W), differentiable where grad is on.

        By a `small` decoder where one is given, which reads latents as the denoiser has them.
        """
        scale, mean = self._scale
        decoded = self.vae.decode(latents.float() * scale + mean) if small is None else small.decode(latents.float())
        return (decoded.sample.float() / 2 + 0.5).clamp(0, 1)

    def use_tiles(self, size: int, recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)) -> None:
        """Let the autoencoder work in tiles of `size` pixels a side from now on: less memory, and seams are blended.

        They overlap by a quarter. A tile is computed again in the backward pass, by `recompute`: all tiles kept would
        be more than the whole picture. Raises ValueError for a size that is no whole number of quarters.
        """
        quarter = 4 * self.downscale
        if size % quarter:
            raise ValueError(
                f"autoencoder_tiles: {size} is not a multiple of {quarter}: tiles of {self.teacher} overlap by a "
                "quarter, which must be whole latents"
            )
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = size, 4 * size // quarter
        self.vae.decoder.forward = partial(recompute, self.vae.decoder.forward)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, H, W) of pictures (B, 3, H', W') in [0, 1]: the posterior's mean, or drawn by `generator`."""
        posterior = self.vae.encode(images.float() * 2 - 1).latent_dist
        scale, mean = self._scale
        return ((posterior.mode() if generator is None else posterior.sample(generator)) - mean) / scale

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Scale and mean (1, C or 1, 1, 1): what the autoencoder decodes is scale z + mean."""
        settings = self.vae.config
        std, mean = settings.latents_std or [1.0], settings.latents_mean or [settings.shift_factor or 0.0]
        scale = torch.tensor(std, dtype=torch.float32, device=self.device) / settings.scaling_factor
        shift = torch.tensor(mean, dtype=torch.float32, device=self.device)
        return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
