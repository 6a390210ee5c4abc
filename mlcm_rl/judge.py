"""The judge: a picture encoder under which drawings of one concept in different styles lie together.

It measures (retrieval, KID) and is never trained against: its features carry no gradient. Letters: B pictures,
D features, K concepts, N reference pictures.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; `stride` 2 halves each side."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, width_out)
        self.shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width_out, H / stride, W / stride) from (B, width_in, H, W)."""
        hidden = F.silu(self.first_norm(self.first(x)))
        return F.silu(self.second_norm(self.second(hidden)) + self.shortcut(x))


class PictureEncoder(nn.Module):
    """A small residual network; every width but the first halves the sides once."""

    def __init__(self, widths: tuple[int, ...], feature_width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.ModuleList(ResidualBlock(before, after, 2) for before, after in pairs)
        self.project = nn.Linear(2 * widths[-1], feature_width)

    def forward(self, images: Tensor) -> Tensor:
        """Return unit features (B, D) in float32 of images (B, 3, H, W) in [0, 1]."""
        hidden = self.stem(images * 2 - 1)
        for block in self.blocks:
            hidden = block(hidden)
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1)
        return F.normalize(self.project(pooled).float(), dim=-1)


class Judge:
    """A trained encoder with what it needs to judge: the concepts' prototypes and features of real pictures.

    `concepts` are K codepoints, `prototypes` (K, D) unit vectors in their order, `reference_features` (N, D) the
    features of the real pictures, and `reference_concepts` and `reference_styles` name these N pictures.
    """

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

        Raises ValueError for another size: the encoder has only seen 64 x 64.
        """
        if images.shape[1:] != (3, 64, 64):
            raise ValueError(f"the judge reads pictures (B, 3, 64, 64), got {tuple(images.shape)}")
        return self.encoder(images.float())


def load(folder: str | Path, device: torch.device | str = "cpu") -> Judge:
    """Return the judge in `folder`: `config.json`, `judge.safetensors` (half precision), `references.safetensors`.

    The references (K, S, D) hold one real picture per concept and style. Raises FileNotFoundError where a file is
    missing.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder = PictureEncoder(tuple(config["widths"]), config["feature_width"])
    weights = load_file(folder / "judge.safetensors")
    encoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
    references = load_file(folder / "references.safetensors")["references"]
    return Judge(encoder.to(device), references.to(device), config["concepts"], config["styles"])
