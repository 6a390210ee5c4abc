"""Whether as many cells of a scene are occupied as its prompt asks for: a closed formula, no weights."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mlcm_rl.rewards.scenes import CANVAS, NUM_CELLS, Requests, border_of, cells_of

DIFFERENT = 0.1  # from the background in some channel, in [0, 1]: more than the noise of a decoded picture
SHARE = 0.06  # of a cell's pixels that are different: an object stands there


class SceneCount:
    """Minus the number of objects too many or too few, so 0 is right."""

    differentiable = False
    needs_prompt = True
    languages = ("en", "zh")

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, prompts: str | None = None):
        self.device, self.dtype = torch.device(device), dtype
        self.requests = Requests(prompts)

    def refuse_prompt(self, prompt: str, aspect: float) -> None:
        """Raise ValueError for a `prompt` that is in none of the prompt files."""
        self.requests.of(prompt)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score (B,) float32, one of 0, -1, -2, -3, of `images` (B, 3, H, W) in [0, 1].

        Raises ValueError for a prompt that `refuse_prompt` refuses.
        """
        asked = torch.tensor([self.requests.of(prompt).count for prompt in prompts], device=self.device)
        return 0.0 - (self.count(images) - asked).abs().float()

    def count(self, images: Tensor) -> Tensor:
        """Return the number of occupied cells (B,) int64 of `images` (B, 3, H, W), resized to the canvas."""
        pictures = images.detach().to(self.device, self.dtype).float()
        pictures = F.interpolate(pictures, (CANVAS, CANVAS), mode="bilinear", antialias=True)
        colour = border_of(pictures).median(-1).values[:, :, None, None]
        different = (pictures - colour).abs().amax(1, keepdim=True) > DIFFERENT
        shares = cells_of(different.float()).mean((1, 2, 3)).unflatten(0, (-1, NUM_CELLS))
        return (shares > SHARE).sum(1)
