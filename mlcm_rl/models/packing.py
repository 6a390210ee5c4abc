"""Latents as tokens: square patches of latents, each a token or a latent of more channels."""

from torch import Tensor
from torch.nn import functional as F


def patchified(latents: Tensor, size: int) -> Tensor:
    """Return latents (B, C, H, W) with each patch of `size` x `size` as one latent (B, C size^2, H / size, W / size).

    A channel's patch is row by row among its `size`^2 channels, as FLUX and Qwen-Image order them.
    """
    return F.pixel_unshuffle(latents, size)


def unpatchified(latents: Tensor, size: int) -> Tensor:
    """Return the latents (B, C, H, W) that `patchified` makes of `size`."""
    return F.pixel_shuffle(latents, size)


def as_tokens(latents: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H W, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def as_latents(tokens: Tensor, width: int) -> Tensor:
    """Return tokens (B, H W, C) as latents (B, C, H, W) of this `width`."""
    return tokens.transpose(1, 2).unflatten(2, (-1, width))
