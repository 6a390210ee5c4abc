"""Two small bodies for pictures, EfficientNet-Lite0 and MobileNetV2, as one trunk of inverted residuals.

Both are a strided convolution and a row of blocks (expansion, depthwise convolution, projection; ReLU6; no squeeze
and excitation), so a table of blocks says which is which. Batch norms are folded into their convolutions: a trunk has
no training mode to forget, and fewer tensors. Legend: B pictures, C channels, H W rows and columns.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEM_WIDTH = 32


class Block(NamedTuple):
    """One row of a body's table: side of the depthwise kernel, stride, expansion, width of the output."""

    kernel: int
    stride: int
    expansion: int
    width: int


def _stage(repeats: int, kernel: int, stride: int, expansion: int, width: int) -> list[Block]:
    """Return a stage: its first block strides, the others keep the size."""
    return [Block(kernel, stride if i == 0 else 1, expansion, width) for i in range(repeats)]


# Tan and Le, arXiv 1905.11946, table 1, in the Lite form.
EFFICIENTNET_LITE0 = (
    *_stage(1, 3, 1, 1, 16),
    *_stage(2, 3, 2, 6, 24),
    *_stage(2, 5, 2, 6, 40),
    *_stage(3, 3, 2, 6, 80),
    *_stage(3, 5, 1, 6, 112),
    *_stage(4, 5, 2, 6, 192),
    *_stage(1, 3, 1, 6, 320),
)
# Sandler et al., arXiv 1801.04381, table 2, to the block before the last stride.
MOBILENET_V2 = (
    *_stage(1, 3, 1, 1, 16),
    *_stage(2, 3, 2, 6, 24),
    *_stage(3, 3, 2, 6, 32),
    *_stage(4, 3, 2, 6, 64),
    *_stage(3, 3, 1, 6, 96),
)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Return x (B, C, H, W), H and W multiples of the stride, padded as TensorFlow's "same" pads."""
    total = kernel - stride
    before = total // 2
    return F.pad(x, (before, total - before, before, total - before))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; a shortcut where the shape stays."""

    def __init__(self, width_in: int, block: Block) -> None:
        super().__init__()
        hidden = width_in * block.expansion
        self.block, self.shortcut = block, block.stride == 1 and width_in == block.width
        self.expand = nn.Conv2d(width_in, hidden, 1) if block.expansion > 1 else None
        self.depthwise = nn.Conv2d(hidden, hidden, block.kernel, block.stride, groups=hidden)
        self.project = nn.Conv2d(hidden, block.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride) from (B, width_in, H, W)."""
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = self.depthwise(pad_same(hidden, self.block.kernel, self.block.stride))
        hidden = self.project(F.relu6(hidden))
        return x + hidden if self.shortcut else hidden


class Trunk(nn.Module):
    """The body of a table of blocks; any prefix of a table is a body too."""

    def __init__(self, table: Sequence[Block]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM_WIDTH, 3, 2)
        widths = [STEM_WIDTH, *(block.width for block in table)]
        self.blocks = nn.ModuleList(map(InvertedResidual, widths[:-1], table))

    def maps(self, pixels: Tensor) -> Iterator[Tensor]:
        """Yield every block's output, (B, C, h, w), for pixels (B, 3, H, W) as the body's training fed them.

        H and W must be multiples of the strides' product, 32 for a whole body.
        """
        hidden = F.relu6(self.stem(pad_same(pixels, 3, 2)))
        for block in self.blocks:
            hidden = block(hidden)
            yield hidden

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the last block's output (B, C, H / 32, W / 32); larger where a prefix strides less."""
        *_, last = self.maps(pixels)
        return last


class TappedTrunk(Trunk):
    """A body's prefix read at several depths: what a small reward's head stands on.

    `taps` are numbers of blocks, from 1; `width` is that of their outputs joined.
    """

    def __init__(self, table: Sequence[Block], taps: Sequence[int]) -> None:
        super().__init__(table[: max(taps)])
        self.taps, self.width = tuple(taps), sum(table[tap - 1].width for tap in taps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return what the tapped blocks put out, averaged over the picture, (B, width).

        Each tap's vector has length one, as LAION's predictor takes CLIP's: only directions count, so no depth
        drowns another and no score grows with contrast alone.
        """
        maps = enumerate(self.maps(pixels), 1)
        return torch.cat([F.normalize(x.mean((2, 3)), dim=-1) for number, x in maps if number in self.taps], dim=-1)


def resized(images: Tensor, side: int) -> Tensor:
    """Return images (B, 3, H, W) as (B, 3, side, side), smoothed where they shrink."""
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
