"""Whether an emoji is drawn in the preferred style: a classifier on MobileNetV2, kept apart to check `emoji_style`."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ._mobile_trunk import MOBILENET_V2, TappedTrunk, resized

SHIPPED = Path(__file__).with_suffix(".safetensors")
TAPS = (1, 2, 3, 4, 6, 10, 13)  # blocks at 1/2 to 1/16 of the side
SIDE = 64  # pixels, of the square that the body reads
STYLES = ("noto", "twemoji", "fluent")
PREFERRED = STYLES.index("fluent")


class EmojiStyleJudge:
    """The log-odds of the preferred style: above 0 the picture is more likely fluent than noto or twemoji.

    Hold it out: it shares neither body nor head nor loss with `emoji_style`, so it sees what is done to please that.
    """

    differentiable = True
    needs_prompt = False
    languages = ()

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        self.classifier = untrained()
        self.classifier.load_state_dict(load_file(SHIPPED))
        self.classifier.eval().requires_grad_(False).to(self.device, dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Log-odds (B,) float32 of `images` (B, 3, H, W) in [0, 1], drawings on white; the prompts are not read."""
        logits = self.classifier(images.to(self.device, self.dtype)).float()
        others = [style for style in range(len(STYLES)) if style != PREFERRED]
        return logits[:, PREFERRED] - logits[:, others].logsumexp(1)


class _Classifier(nn.Module):
    """A frozen body and one linear layer over what its taps read."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = TappedTrunk(MOBILENET_V2, TAPS)
        self.head = nn.Linear(self.trunk.width, len(STYLES))

    def features(self, images: Tensor) -> Tensor:
        """Return the head's input (B, D) of images (B, 3, H, W) in [0, 1], the range this body was trained on."""
        return self.trunk(resized(images, SIDE))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, S) of the styles."""
        return self.head(self.features(images))


def untrained() -> _Classifier:
    """The network before its weights."""
    return _Classifier()
