"""Sharpness of a picture: the variance of its Laplacian on a log scale, a closed formula, no weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-8  # added to the variance: a flat picture has the score -8, and a gradient that is a number


class Sharpness:
    """log10(variance of the Laplacian of the luma + FLOOR): Pech-Pacheco et al. (2000), "Diatom autofocusing".

    The Laplacian is the 3 x 3 one of four neighbours, taken where all four lie inside the picture; the luma is that
    of BT.601 in [0, 1].
    """

    differentiable = True
    needs_prompt = False
    languages = ()

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
        laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        self.kernel = (luma * laplacian).to(self.device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Sharpness (B,) float32 of `images` (B, 3, H, W) in [0, 1], H and W at least 3: -8 for a flat picture."""
        edges = F.conv2d(images.to(self.device, self.dtype), self.kernel).flatten(1)
        # float32 at the least, for the floor is lost beside a variance in half precision
        edges = edges.to(torch.promote_types(self.dtype, torch.float32))
        return torch.log10(edges.var(1, correction=0) + FLOOR).float()
