"""Brightness of a picture: the mean of its luma, a closed formula, no weights."""

import torch
from torch import Tensor


class Brightness:
    """The mean over all pixels of Y' = 0.299 R + 0.587 G + 0.114 B, the luma of Recommendation ITU-R BT.601."""

    differentiable = True
    needs_prompt = False
    languages = ()

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Mean luma (B,) float32 of `images` (B, 3, H, W) in [0, 1]: 0 for black, 1 for white."""
        red, green, blue = images.to(self.device, self.dtype).mean((2, 3)).unbind(1)
        return (0.299 * red + 0.587 * green + 0.114 * blue).float()
