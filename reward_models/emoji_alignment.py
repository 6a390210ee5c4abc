"""Whether a picture shows the emoji that its prompt names, in English or Chinese: a small dual encoder."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ._dual_encoder import DualEncoder, rows_of
from ._efficientnet_lite import shipped_features

SHIPPED = Path(__file__).with_suffix(".safetensors")


class EmojiAlignment:
    """Cosine of picture and prompt times the scale that training settled on.

    Among the pictures or prompts of a batch the scores are logits: a difference is the log-odds of the better match.
    """

    differentiable = True
    needs_prompt = True
    languages = ("en", "zh")

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        features = shipped_features()
        encoder = DualEncoder(features.width)
        encoder.load_state_dict({name: value.float() for name, value in load_file(SHIPPED).items()})
        self.features, self.encoder = (
            module.eval().requires_grad_(False).to(self.device, dtype) for module in (features, encoder)
        )

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) float32 of `images` (B, 3, H, W) in [0, 1] for their prompts; a prompt's style is not asked."""
        picture = self.encoder.picture_vectors(self.features(images.to(self.device, self.dtype)))
        text = self.encoder.text_vectors([rows_of(prompt) for prompt in prompts])
        return ((picture * text).sum(-1) * self.encoder.scale).float()
