"""CLIP score: how well CLIP thinks the picture fits the prompt."""

from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig

from mlcm_rl.rewards import Weights

from ._clip import CLIP_L_14, CLIP_MERGES, VIT_L_14, Clip, published_tokenizer
from ._published import covered, normalised, ready


class ClipScore:
    """100 cos of the features of picture and prompt, without the cut at 0 of Hessel et al. (arXiv 2104.08718).

    The cut would leave a picture that is worse than unrelated without a gradient. OpenAI's ViT-L/14 from the cache,
    or any CLIP in transformers' layout (config.json, model.safetensors, tokenizer files) from `folder`.
    """

    differentiable = True
    needs_prompt = True
    languages = ("en",)
    weights: ClassVar[tuple[Weights, ...]] = (CLIP_L_14, CLIP_MERGES)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, folder: str | None = None):
        if folder is not None:
            self.clip = Clip.opened(folder, device, dtype)
        else:
            tensors = load_file(CLIP_L_14.path())
            self.clip = Clip(CLIPConfig(**VIT_L_14), tensors, published_tokenizer(), device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score (B,) float32 of `images` (B, 3, H, W) in [0, 1] for `prompts`."""
        pixels = normalised(covered(ready(images, self.clip.model), self.clip.size))
        return 100.0 * self.clip.cosine(pixels, prompts).float()
