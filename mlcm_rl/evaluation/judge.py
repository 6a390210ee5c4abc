"""The judge: a picture encoder whose features of one concept are similar in all drawing styles.

It is for measurement (retrieval, KID) and never trained against: its features carry no gradient. Letters: B pictures,
D features, K concepts, S styles, N reference pictures.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..storage.files import CheckpointError, read_json
from ..storage.tensors import load_weights, read_tensors

# MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2) up to its twelfth block of six-fold expansion: width, stride.
BLOCKS = ((24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1), (96, 1), (96, 1), (96, 1))
TAPS = (2, 5, 12)  # blocks whose outputs the head takes: the last at each of three resolutions
CELLS = 3  # of each output it takes the mean and the means of 3 x 3 cells
INPUT_SIZE, PICTURE_SIZE = 96, 64
TAPPED_WIDTH = sum(BLOCKS[tap - 1][0] for tap in TAPS) * (1 + CELLS**2)


def downsample_pad(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) padded below and on the right, as "same" padding of an even side at stride 2."""
    return F.pad(x, (0, 1, 0, 1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; a shortcut if the shape stays. Batch norms are folded in."""

    def __init__(self, width_in: int, width_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width_in * expansion
        self.stride, self.shortcut = stride, stride == 1 and width_in == width_out
        self.expand = nn.Conv2d(width_in, hidden, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=2 - stride, groups=hidden)
        self.project = nn.Conv2d(hidden, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width_out, H / stride, W / stride) from (B, width_in, H, W)."""
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = downsample_pad(hidden) if self.stride == 2 else hidden
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return x + hidden if self.shortcut else hidden


class PictureEncoder(nn.Module):
    """The trunk of MobileNetV2, with a linear head over the outputs at three depths."""

    def __init__(self, feature_width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        widths = [16, *(width for width, _ in BLOCKS)]
        self.first = InvertedResidual(32, widths[0], 1, expansion=1)
        self.blocks = nn.ModuleList(
            InvertedResidual(before, after, stride, expansion=6)
            for before, (after, stride) in zip(widths[:-1], BLOCKS, strict=True)
        )
        self.head = nn.Linear(TAPPED_WIDTH, feature_width)

    def tapped(self, images: Tensor) -> Tensor:
        """Return the head's input (B, TAPPED_WIDTH) for images (B, 3, H, W) in [0, 1]."""
        resized = F.interpolate(images, INPUT_SIZE, mode="bilinear", antialias=True)
        hidden = self.first(F.relu6(self.stem(downsample_pad(resized))))
        taps = []
        for number, block in enumerate(self.blocks, 1):
            hidden = block(hidden)
            if number in TAPS:
                taps += [hidden.mean((2, 3)), F.adaptive_avg_pool2d(hidden, CELLS).flatten(1)]
        return torch.cat(taps, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return unit features (B, D) of images (B, 3, H, W) in [0, 1]."""
        return F.normalize(self.head(self.tapped(images)), dim=-1)


class Judge:
    """A trained encoder with the concepts' prototypes and the features of real pictures.

    `concepts` are K codepoints, `prototypes` (K, D) unit vectors in their order, `style_prototypes` (K, S, D) the
    single drawings, `reference_features` (N, D) the same as a list of N = K S real pictures, named by
    `reference_concepts` and `reference_styles`.
    """

    picture_size = PICTURE_SIZE  # pixels a side that it reads

    def __init__(self, encoder: PictureEncoder, references: Tensor, concepts: list[str], styles: list[str]) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.concepts, self.styles = concepts, styles
        self.prototypes = F.normalize(references.mean(1), dim=-1)
        self.style_prototypes = references
        self.reference_features = references.flatten(0, 1)
        self.reference_concepts = [concept for concept in concepts for _ in styles]
        self.reference_styles = [style for _ in concepts for style in styles]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return unit features (B, D), float32 and without gradient, of images (B, 3, 64, 64) in [0, 1].

        Raise ValueError for another size: the encoder was trained on 64 x 64.
        """
        if images.shape[1:] != (3, PICTURE_SIZE, PICTURE_SIZE):
            raise ValueError(f"the judge reads pictures (B, 3, 64, 64), got {tuple(images.shape)}")
        return self.encoder(images.float())

    @torch.no_grad()
    def patch_features(self, patches: Tensor) -> Tensor:
        """Return unit features (B, D) of crops (B, 3, s, s) of any size, which the encoder sees enlarged."""
        return self.encoder(patches.float())


def load(folder: str | Path, device: torch.device | str = "cpu") -> Judge:
    """Return the judge in `folder`: `config.json`, `judge.safetensors` (half precision), `references.safetensors`.

    The references (K, S, D) hold one real picture per concept and style. Raise CheckpointError if a file is missing or
    is not a judge's.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", feature_width=int, concepts=list, styles=list)
    with torch.device("meta"):  # the width comes from an unverified file: nothing is allocated for it
        encoder = PictureEncoder(config["feature_width"])
    weights = read_tensors(folder / "judge.safetensors")
    load_weights(encoder, {name: weight.float() for name, weight in weights.items()}, folder / "judge.safetensors")
    references = read_tensors(folder / "references.safetensors").get("references", torch.empty(0))
    if references.shape != (len(config["concepts"]), len(config["styles"]), config["feature_width"]):
        raise CheckpointError(f"{folder / 'references.safetensors'} does not hold a picture per concept and style")
    return Judge(encoder.to(device), references.to(device), config["concepts"], config["styles"])
