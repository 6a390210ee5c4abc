"""ImageReward: a BLIP that reads the prompt while it looks at the picture (Xu et al., arXiv 2304.05977)."""

import re
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from mlcm_rl.rewards import HubFile, Weights, read_checkpoint

from ._published import Head, bert_tokenizer, covered, network, normalised, opened, ready, tokens, under, wide

BLIP_LARGE = {  # ViT-L/16 and BERT-base; where transformers' defaults differ from the published network
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {"encoder_hidden_size": 1024, "num_attention_heads": 12},
}
LENGTH = 35  # tokens of a prompt
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the raw reward over the authors' pictures

IMAGE_REWARD = Weights(
    "image_reward",
    HubFile("THUDM/ImageReward", "7a9e21fc5c7873859f160173d502cc82f6709e33", "ImageReward.pt"),
    sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
    licence="Apache-2.0",
    convert="reward_models.image_reward:convert",
)
VOCABULARY = Weights(
    "bert_base_uncased_vocabulary",
    HubFile("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "vocab.txt"),
    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    licence="Apache-2.0",
)

RENAMED = (  # the published names and those of transformers' BLIP; replaced in this order
    (r"^blip\.visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^blip\.visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^blip\.text_encoder\.", "text_model."),
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.")


def convert(path: Path) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under transformers' names."""
    return from_published(read_checkpoint(path))


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `state` of the official class as `vision_model.`, `text_model.` and `mlp.layers.`; unused tensors dropped."""
    converted = {}
    for name, value in state.items():
        if not name.startswith(UNUSED):
            for old, new in RENAMED:
                name = re.sub(old, new, name)
            converted[name] = value
    return converted


class ImageReward:
    """ImageReward-v1.0, normalised by the authors' mean and deviation.

    From the cache, or from `folder` in transformers' layout: a BLIP's config.json, vocab.txt, and a model.safetensors
    under the names that `from_published` gives.
    """

    differentiable = True
    needs_prompt = True
    languages = ("en",)
    weights: ClassVar[tuple[Weights, ...]] = (IMAGE_REWARD, VOCABULARY)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, folder: str | None = None):
        if folder is not None:
            config, tensors, self.tokenizer = opened(folder, BlipConfig, BertTokenizer)
        else:
            config, tensors = BlipConfig(**BLIP_LARGE), load_file(IMAGE_REWARD.path())
            self.tokenizer = bert_tokenizer(VOCABULARY.path())
        of_pictures, of_text = under("vision_model.", tensors), under("text_model.", tensors)
        self.vision = network(BlipVisionModel, config.vision_config, of_pictures, device, dtype)
        self.text = network(BlipTextModel, config.text_config, of_text, device, dtype, add_pooling_layer=False)
        self.head = Head("mlp.layers.", tensors, device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score (B,) float32 of `images` (B, 3, H, W) in [0, 1] for `prompts`."""
        pixels = normalised(covered(ready(images, self.vision), self.vision.config.image_size, rounding=round))
        return ((self.raw_reward(pixels, prompts) - MEAN) / DEVIATION).float()

    def raw_reward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The reward (B,) as the head gives it, of `pixels` (B, 3, size, size), normalised channels."""
        return self.head(self.class_token(self.image_features(pixels), prompts))

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features (B, T, D) of `pixels`, the class token first."""
        features: Tensor = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        return features

    def class_token(self, features: Tensor, prompts: list[str]) -> Tensor:
        """What the text encoder makes (B, D) of `prompts` before pictures with `features`, at its first token."""
        encoded = tokens(self.tokenizer, prompts, LENGTH, self.text.device)
        read = self.text(
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            encoder_hidden_states=features,
            is_decoder=False,  # the config says decoder, for only its layers look at a picture; words see all words
        )
        return wide(read.last_hidden_state[:, 0])
