"""Which drawing of an emoji is preferred: a predictor in LAION's form over EfficientNet-Lite0, a stand-in for taste."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ._efficientnet_lite import shipped_features

SHIPPED = Path(__file__).with_suffix(".safetensors")


class EmojiStyle:
    """A Bradley-Terry score: the difference of two pictures' scores is the log-odds that the first is preferred.

    The preference is fluent over noto over twemoji, learnt from real drawings of one concept; see the card.
    """

    differentiable = True
    needs_prompt = False
    languages = ()

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        features = shipped_features()
        head = untrained_head(features.width)
        head.load_state_dict(load_file(SHIPPED))
        self.predictor = nn.Sequential(features, head).eval().requires_grad_(False).to(self.device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) float32 of `images` (B, 3, H, W) in [0, 1], drawings on white; the prompts are not read."""
        return self.predictor(images.to(self.device, self.dtype)).squeeze(-1).float()


def untrained_head(width: int) -> nn.Sequential:
    """The small network over the frozen features, (B, D = `width`) to (B, 1)."""
    layers = [nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 1)]
    return nn.Sequential(*layers)
