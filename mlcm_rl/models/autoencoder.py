"""A teacher's autoencoder: decodes latents and encodes pictures, in tiles where memory is short."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
        """
        scale, mean = self._scale
        decoded = self.vae.decode(latents.float() * scale + mean) if small is None else small.decode(latents.float())
        return (decoded.sample.float() / 2 + 0.5).clamp(0, 1)

    def use_tiles(self, size: int, recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)) -> None:
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
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = size, 4 * size // quarter
        self.vae.decoder.forward = partial(recompute, self.vae.decoder.forward)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pictures (B, 3, H', W') in [0, 1] into latents (B, C, H, W).

        They are the posterior's mean, or a sample of it drawn by `generator`.
        """
        posterior = self.vae.encode(images.float() * 2 - 1).latent_dist
        scale, mean = self._scale
        return ((posterior.mode() if generator is None else posterior.sample(generator)) - mean) / scale

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return scale and mean (1, C or 1, 1, 1): for latents z, the autoencoder decodes scale z + mean."""
        settings = self.vae.config
        std, mean = settings.latents_std or [1.0], settings.latents_mean or [settings.shift_factor or 0.0]
        scale = torch.tensor(std, dtype=torch.float32, device=self.device) / settings.scaling_factor
        shift = torch.tensor(mean, dtype=torch.float32, device=self.device)
        return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
