"""Colourfulness of a picture after Hasler and Suesstrunk (2003): a closed formula, no weights."""

import torch
from torch import Tensor


class Colourfulness:
    """sigma + 0.3 mu of the opponent colours rg = R - G and yb = (R + G) / 2 - B, on the paper's scale of 0 to 255.

    sigma and mu are the lengths of the two standard deviations (population form) and of the two means.
    """

    differentiable = True
    needs_prompt = False
    languages = ()

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """M (B,) float32 of `images` (B, 3, H, W) in [0, 1]: 0 for a grey picture, about 100 for a gaudy one."""
        red, green, blue = (255.0 * images.to(self.device, self.dtype)).flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1)  # (B, 2, H W)
        mean = opponents.mean(2)
        # Norms, not square roots of sums: their gradient at a grey picture is 0 where the root's would be nan.
        deviation = torch.linalg.vector_norm(opponents - mean[..., None], dim=(1, 2)) / opponents.shape[2] ** 0.5
        return (deviation + 0.3 * torch.linalg.vector_norm(mean, dim=1)).float()
