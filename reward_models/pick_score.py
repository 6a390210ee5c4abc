"""PickScore: a CLIP-H fine-tuned on which of two pictures people kept (Kirstain et al., arXiv 2305.01569)."""

from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig

from mlcm_rl.rewards import HubFile, Weights

from ._clip import CLIP_MERGES, VIT_H_14, Clip, published_tokenizer
from ._published import covered, normalised, ready

PICK_SCORE = Weights(
    "pick_score",
    HubFile("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", "model.safetensors"),
    sha256="ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
    licence="not stated",
)


class PickScore:
    """exp(logit scale) cos of the features of picture and prompt.

    PickScore_v1 from the cache, or from `folder` another of its form in transformers' layout (config.json,
    model.safetensors, tokenizer files).
    """

    differentiable = True
    needs_prompt = True
    languages = ("en",)
    weights: ClassVar[tuple[Weights, ...]] = (PICK_SCORE, CLIP_MERGES)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, folder: str | None = None):
        if folder is not None:
            self.clip = Clip.opened(folder, device, dtype)
        else:
            tensors = load_file(PICK_SCORE.path())
            self.clip = Clip(CLIPConfig(**VIT_H_14), tensors, published_tokenizer(), device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score (B,) float32 of `images` (B, 3, H, W) in [0, 1] for `prompts`."""
        pixels = normalised(covered(ready(images, self.clip.model), self.clip.size))
        return (self.clip.logit_scale * self.clip.cosine(pixels, prompts)).float()
