"""HPS v2: a CLIP-H fine-tuned on 798,000 choices between pictures (Wu et al., arXiv 2306.09341)."""

from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig

from mlcm_rl.rewards import HubFile, Weights, read_checkpoint

from ._clip import CLIP_MERGES, VIT_H_14, Clip, published_tokenizer
from ._published import normalised, ready

REVISION = "697403c78157020a1ae59d23f111aa58ced35b0a"
VERSIONS = {
    "v2.0": Weights(
        "hps_v2_0",
        HubFile("xswu/HPSv2", REVISION, "HPS_v2_compressed.pt"),
        sha256="07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
        licence="Apache-2.0",
        convert="reward_models.hps_v2:convert",
    ),
    "v2.1": Weights(
        "hps_v2_1",
        HubFile("xswu/HPSv2", REVISION, "HPS_v2.1_compressed.pt"),
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        licence="Apache-2.0",
        convert="reward_models.hps_v2:convert",
    ),
}

# Names of OpenCLIP's network and of transformers', which compute the same; replaced in this order.
RENAMED = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("ln_final.", "text_model.final_layer_norm."),
)
ALONE = {  # whole names that are also a part of another's
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}


def convert(path: Path) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under transformers' names."""
    return from_open_clip(read_checkpoint(path)["state_dict"])


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP `state` under the names of transformers' CLIPModel.

    Query, key and value projections lie stacked in one matrix there, and the two projections to the common space are
    transposed.
    """
    converted = {}
    for name, value in state.items():
        renamed = ALONE.get(name) or _renamed(name)
        if "in_proj_" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[renamed.replace("in_proj_", f"{part}_proj.")] = rows.clone()
        else:
            converted[renamed] = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
    return converted


def _renamed(name: str) -> str:
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def padded(images: Tensor, size: int) -> Tensor:
    """`images` (B, 3, H, W) scaled until the longer side is `size`, black bars beside them: (B, 3, size, size).

    The official code resizes tensors, not PIL's pictures: what overshoots at edges is kept.
    """
    longer = max(images.shape[-2:])
    height, width = (round(side * (size / longer)) for side in images.shape[-2:])
    left, top = (size - width) // 2, (size - height) // 2
    scaled = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    return F.pad(scaled, (left, size - width - left, top, size - height - top))


class HpsV2:
    """100 cos of the features of picture and prompt; a picture is not cropped but given black bars.

    `version` v2.1 or v2.0 from the cache, whose scores do not compare; or a `folder` in transformers' layout
    (config.json, model.safetensors, tokenizer files). Raises ValueError for another version.
    """

    differentiable = True
    needs_prompt = True
    languages = ("en",)
    weights: ClassVar[tuple[Weights, ...]] = (*VERSIONS.values(), CLIP_MERGES)

    def __init__(
        self, device: torch.device | str, dtype: torch.dtype, *, version: str = "v2.1", folder: str | None = None
    ):
        if version not in VERSIONS:
            raise ValueError(f"hps_v2: version must be one of {', '.join(VERSIONS)}, is {version!r}")
        if folder is not None:
            self.clip = Clip.opened(folder, device, dtype)
        else:
            tensors = load_file(VERSIONS[version].path())
            self.clip = Clip(CLIPConfig(**VIT_H_14), tensors, published_tokenizer(), device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score (B,) float32 of `images` (B, 3, H, W) in [0, 1] for `prompts`."""
        pixels = normalised(padded(ready(images, self.clip.model), self.clip.size))
        return 100.0 * self.clip.cosine(pixels, prompts).float()
