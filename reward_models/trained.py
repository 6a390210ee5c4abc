"""Somebody's own taste: a Bradley-Terry head over frozen features, read from what a stage `train_reward` has left."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import _efficientnet_lite, emoji_style_judge
from ._mobile_trunk import resized
from .emoji_style import untrained_head

FORMAT = 1  # of such a folder
DESCRIPTION_FILE, HEAD_FILE = "reward.json", "head.safetensors"


class Trained:
    """A Bradley-Terry score: the difference of two pictures' scores is the log-odds that the first is preferred.

    `folder` holds `reward.json` and `head.safetensors`; its card, which says what the taste was learnt from, is beside
    them. Raises ValueError for a folder that is none, or whose head was trained on other features than are here.
    """

    differentiable = True
    needs_prompt = False
    languages = ()

    def __init__(self, device: torch.device | str, dtype: torch.dtype, folder: str):
        self.device, self.dtype = torch.device(device), dtype
        features = load_features(_described(Path(folder))["backbone"])
        head = untrained_head(features.width)
        head.load_state_dict(load_file(Path(folder) / HEAD_FILE))
        self.predictor = nn.Sequential(features, head).eval().requires_grad_(False).to(self.device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) float32 of `images` (B, 3, H, W) in [0, 1]; the prompts are not read."""
        return self.predictor(images.to(self.device, self.dtype)).squeeze(-1).float()


class _JudgeFeatures(nn.Module):
    """The frozen body of `emoji_style_judge`, from pictures to what its taps read, `width` numbers a picture."""

    def __init__(self) -> None:
        super().__init__()
        judge = emoji_style_judge.untrained()
        judge.load_state_dict(load_file(emoji_style_judge.SHIPPED))
        self.trunk, self.width = judge.trunk, judge.trunk.width

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, width) of images (B, 3, H, W) in [0, 1]."""
        return self.trunk(resized(images, emoji_style_judge.SIDE))


@dataclass(frozen=True)
class _Backbone:
    """A shipped body: how it is loaded, the file that its weights are in, its source in words."""

    load: Callable[[], Any]
    weights: Path
    source: str


BACKBONES = {
    "efficientnet_lite0": _Backbone(
        _efficientnet_lite.shipped_features,
        _efficientnet_lite.SHIPPED,
        "EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946) up to its eleventh block, read at three depths",
    ),
    "mobilenet_v2": _Backbone(
        _JudgeFeatures,
        emoji_style_judge.SHIPPED,
        "MobileNetV2 (Sandler et al., arXiv 1801.04381) up to its thirteenth block, read at seven depths",
    ),
}


def load_features(backbone: str) -> Any:
    """The frozen body named `backbone`: pictures (B, 3, H, W) in [0, 1] to features (B, its `width`)."""
    return BACKBONES[backbone].load().eval().requires_grad_(False)


def description(backbone: str) -> dict[str, Any]:
    """What `reward.json` holds: which body the head stands on, by name and by the hash of its weights."""
    weights = hashlib.sha256(BACKBONES[backbone].weights.read_bytes()).hexdigest()
    return {"format": FORMAT, "backbone": backbone, "backbone_sha256": weights}


def _described(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {DESCRIPTION_FILE}: `folder` is what a train_reward stage has left")
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if described.get("format") != FORMAT:
        raise ValueError(f"{path} has format {described.get('format')}, this version reads {FORMAT}: train it again")
    backbone = described["backbone"]
    if backbone not in BACKBONES:
        raise ValueError(f"{path} stands on {backbone}; known backbones are {', '.join(BACKBONES)}")
    if described != description(backbone):
        raise ValueError(f"{path} was trained on other weights of {backbone} than are shipped here: train it again")
    return described
