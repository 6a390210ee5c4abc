"""LAION's improved aesthetic predictor: how much people would like the picture, whatever it shows."""

from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPTokenizer, CLIPVisionModelWithProjection

from mlcm_rl.rewards import HubFile, Weights, read_checkpoint

from ._clip import CLIP_L_14, VIT_L_14
from ._published import Head, covered, network, normalised, opened, ready, wide

HEAD = Weights(  # the very file of github.com/christophschuhmann/improved-aesthetic-predictor, which is not on the hub
    "aesthetic_head",
    HubFile("haor/aesthetics", "60617cce14f355d3923a0e320c9b616fc32ad36d", "sac+logos+ava1-l14-linearMSE.pth"),
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    licence="Apache-2.0",
    convert="reward_models.aesthetic:convert",
)


def convert(path: Path) -> dict[str, Tensor]:
    """The published head as it is."""
    return read_checkpoint(path)


class Aesthetic:
    """A linear head over the CLIP-L/14 features of the picture, brought to unit length: about 1 to 10.

    From the cache, or from `folder` in transformers' layout: a CLIP's config.json and tokenizer files, and a
    model.safetensors that holds the CLIP and the head's `layers.0.weight` and so on.
    """

    differentiable = True
    needs_prompt = False
    languages = ()
    weights: ClassVar[tuple[Weights, ...]] = (CLIP_L_14, HEAD)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, folder: str | None = None):
        if folder is not None:
            config, tensors, _ = opened(folder, CLIPConfig, CLIPTokenizer)
        else:
            config, tensors = CLIPConfig(**VIT_L_14), load_file(CLIP_L_14.path()) | load_file(HEAD.path())
        of_pictures = {name: value for name, value in tensors.items() if name.startswith("vision_model.")}
        of_pictures["visual_projection.weight"] = tensors["visual_projection.weight"]
        self.clip = network(CLIPVisionModelWithProjection, config.vision_config, of_pictures, device, dtype)
        self.head = Head("layers.", tensors, device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score (B,) float32 of `images` (B, 3, H, W) in [0, 1]; `prompts` are not looked at."""
        pixels = normalised(covered(ready(images, self.clip), self.clip.config.image_size, rounding=round))
        return self.head(F.normalize(self.features(pixels), dim=1)).float()

    def features(self, pixels: Tensor) -> Tensor:
        """Projected features (B, D) of `pixels` (B, 3, size, size), normalised channels."""
        return wide(self.clip(pixels.to(self.clip.dtype)).image_embeds)
