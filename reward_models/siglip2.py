"""SigLIP 2: how well the picture fits a prompt in Chinese, English or another language (arXiv 2502.14786)."""

from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from mlcm_rl.rewards import HubFile, Weights

from ._published import network, ready, wide

BASE_256 = {"text_config": {"vocab_size": 256000}, "vision_config": {"image_size": 256}}
LENGTH = 64  # tokens of a prompt, all of which the network looks at
PADDING, END = 0, 1  # tokens of the published vocabulary, Gemma's

_COMMIT = "3f9f96cb90da5dbc758b01813f2f6f1aee24c1ab"
SIGLIP2 = Weights(
    "siglip2_base_256",
    HubFile("google/siglip2-base-patch16-256", _COMMIT, "model.safetensors"),
    sha256="6125cacc01fa93bdc98a0c5101cefcd69b2ed1f8ab4f38d86f4ad5984f5dc863",
    licence="Apache-2.0",
)
TOKENIZER = Weights(
    "siglip2_tokenizer",
    HubFile("google/siglip2-base-patch16-256", _COMMIT, "tokenizer.json"),
    sha256="cb9140fae3ac5122c972d37adf83e1248471a38147ad76f8215c8872c6fd8322",
    licence="Apache-2.0",
)


class Siglip2:
    """The log-odds that picture and prompt belong together: exp(scale) cos + bias, as trained by the sigmoid loss.

    The whole picture is squeezed into a square. ViT-B/16 at 256 pixels from the cache, or another size of fixed
    resolution from a `folder` in transformers' layout (config.json, model.safetensors, tokenizer.json).
    """

    differentiable = True
    needs_prompt = True
    languages = ("en", "zh")
    weights: ClassVar[tuple[Weights, ...]] = (SIGLIP2, TOKENIZER)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, folder: str | None = None):
        if folder is not None:
            config = SiglipConfig.from_pretrained(folder, local_files_only=True)
            weights, tokenizer = Path(folder) / "model.safetensors", Path(folder) / "tokenizer.json"
        else:
            config, weights, tokenizer = SiglipConfig(**BASE_256), SIGLIP2.path(), TOKENIZER.path()
        # Of another form, such as NaFlex: `network` names the tensors, where transformers would only stop.
        form = {"ignore_mismatched_sizes": True}
        self.model: SiglipModel = network(SiglipModel, config, load_file(weights), device, dtype, **form)
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_padding()  # the file may hold settings of its own, which would add to those of `token_ids`
        self.tokenizer.no_truncation()
        self.size: int = config.vision_config.image_size

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return the score (B,) float32 of `images` (B, 3, H, W) in [0, 1] for `prompts`."""
        cosine = F.cosine_similarity(self.image_features(self.pixels(images)), self.text_features(prompts))
        return (wide(self.model.logit_scale).exp() * cosine + wide(self.model.logit_bias)).float()

    def pixels(self, images: Tensor) -> Tensor:
        """Return `images` (B, 3, H, W) in [0, 1] as the network reads them: (B, 3, size, size) in [-1, 1].

        PIL's bilinear filter, which widens as it shrinks.
        """
        size = (self.size, self.size)
        return 2.0 * F.interpolate(ready(images, self.model), size, mode="bilinear", antialias=True) - 1.0

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return features (B, D) of `pixels` (B, 3, size, size)."""
        return wide(self.model.get_image_features(pixels.to(self.model.dtype)).pooler_output)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Return features (B, D) of `prompts`, taken at the last of their LENGTH places."""
        return wide(self.model.get_text_features(self.token_ids(prompts).to(self.model.device)).pooler_output)

    def token_ids(self, prompts: list[str]) -> Tensor:
        """Return the tokens (B, LENGTH) of `prompts`: in lower case, cut to leave room for the end, then padded."""
        rows = [self.tokenizer.encode(prompt.lower(), add_special_tokens=False).ids for prompt in prompts]
        rows = [[*row[: LENGTH - 1], END] for row in rows]
        return torch.tensor([row + [PADDING] * (LENGTH - len(row)) for row in rows])
