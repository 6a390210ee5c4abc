"""Chinese-CLIP: how well the picture fits a Chinese prompt (Yang et al., arXiv 2211.01335)."""

from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, ChineseCLIPConfig, ChineseCLIPModel

from mlcm_rl.rewards import HubFile, PipFile, Weights, read_checkpoint

from ._published import bert_tokenizer, network, normalised, opened, ready, resized, tokens, wide

VIT_B_16 = {
    "projection_dim": 512,
    "text_config": {"vocab_size": 21128},
    "vision_config": {"patch_size": 16},
}
LENGTH = 52  # tokens of a prompt in training; the network has room for 512

CHINESE_CLIP = Weights(
    "chinese_clip_vit_b_16",
    HubFile("OFA-Sys/chinese-clip-vit-base-patch16", "36e679e65c2a2fead755ae21162091293ad37834", "pytorch_model.bin"),
    sha256="7b7b583c210c867410bc6bdb8a55fe14eec62999e0a9ea31ff222dc501f9cfbe",
    licence="not stated",
    convert="reward_models.chinese_clip:convert",
)
VOCABULARY = Weights(
    "chinese_clip_vocabulary",
    PipFile("cn-clip", "1.6.0", "cn_clip/clip/vocab.txt"),
    sha256="45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c",
    licence="MIT",
)


def convert(path: Path) -> dict[str, Tensor]:
    """The published checkpoint as it is: it has transformers' names already."""
    return read_checkpoint(path)


class ChineseClip:
    """100 cos of the features of picture and prompt; the whole picture is squeezed into a square.

    ViT-B/16 from the cache, or another size from a `folder` in transformers' layout (config.json, model.safetensors,
    vocab.txt).
    """

    differentiable = True
    needs_prompt = True
    languages = ("zh",)
    weights: ClassVar[tuple[Weights, ...]] = (CHINESE_CLIP, VOCABULARY)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, folder: str | None = None):
        if folder is not None:
            config, tensors, self.tokenizer = opened(folder, ChineseCLIPConfig, BertTokenizer)
        else:
            config, tensors = ChineseCLIPConfig(**VIT_B_16), load_file(CHINESE_CLIP.path())
            self.tokenizer = bert_tokenizer(VOCABULARY.path())
        self.clip = network(ChineseCLIPModel, config, tensors, device, dtype)
        self.size: int = config.vision_config.image_size

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score (B,) float32 of `images` (B, 3, H, W) in [0, 1] for `prompts`."""
        pixels = normalised(resized(ready(images, self.clip), [self.size, self.size]))
        return 100.0 * F.cosine_similarity(self.image_features(pixels), self.text_features(prompts)).float()

    def image_features(self, pixels: Tensor) -> Tensor:
        """Projected features (B, D) of `pixels` (B, 3, size, size), normalised channels."""
        return wide(self.clip.get_image_features(pixels.to(self.clip.dtype)).pooler_output)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Projected features (B, D) of `prompts`, taken at their first token."""
        encoded = tokens(self.tokenizer, prompts, LENGTH, self.clip.device)
        return wide(self.clip.get_text_features(**encoded).pooler_output)
