"""Distortions of pictures by kind and strength, and pairs of them of which one is the weaker, as BAPPS has them.

A strength is between 0, the picture itself, and 1. The kinds are scaled by eye so that equal strengths look about
equally bad: a warp of few pixels changes many values and looks well, a blur changes few and does not. That is
what a perceptual distance is to learn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from io import BytesIO

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from ..training.seeding import generator

MIN_GAP = 0.15  # between the strengths of a pair: nearer ones look alike
MIN_STRENGTH = 0.05
WARP_CELLS = 4  # a side, of a warp's random field
# What strength 1 is:
BLUR = 1 / 36  # deviation of the Gaussian, in sides of the picture
NOISE = 0.22  # deviation, in the range of values
WARP = 1 / 6  # largest displacement, in sides of the picture
COLOUR = 0.5  # length of the change of three gains and three offsets
BEST_JPEG, WORST_JPEG = 40, 2  # qualities at strengths 0 and 1


def blur(picture: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    """Return the picture (3, H, W) uint8 under a Gaussian."""
    radius = strength * BLUR * picture.shape[-1]
    return _of_pil(_to_pil(picture).filter(ImageFilter.GaussianBlur(radius)))


def noise(picture: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    """Return the picture with white noise."""
    return _rounded(picture + 255 * strength * NOISE * torch.randn(picture.shape, generator=draws))


def warp(picture: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    """Return the picture bent by a smooth random field, whose largest displacement is the strength's."""
    field = torch.randn(1, 2, WARP_CELLS, WARP_CELLS, generator=draws)
    field = F.interpolate(field, picture.shape[-2:], mode="bicubic", align_corners=True)[0]
    field = 2 * strength * WARP * field / field.norm(dim=0).max()  # a side is 2 to grid_sample
    height, width = (torch.linspace(-1, 1, size) for size in picture.shape[-2:])
    places = torch.stack([width.expand(len(height), -1), height[:, None].expand(-1, len(width))])
    grid = (places + field).permute(1, 2, 0)[None]
    return _rounded(F.grid_sample(picture[None].float(), grid, padding_mode="border", align_corners=True)[0])


def colour(picture: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    """Return the picture with other gains and offsets of its three colours, in a random direction."""
    change = torch.randn(6, generator=draws)
    gains, offsets = (strength * COLOUR * change / change.norm()).reshape(2, 3, 1, 1)
    return _rounded((picture.float() - 127.5) * (1 + gains) + 127.5 + 255 * offsets)


def jpeg(picture: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    """Return the picture after compression."""
    file, quality = BytesIO(), round(BEST_JPEG + (WORST_JPEG - BEST_JPEG) * strength)
    _to_pil(picture).save(file, format="JPEG", quality=quality)
    with Image.open(file) as image:
        return _of_pil(image.convert("RGB"))


KINDS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "blur": blur,
    "noise": noise,
    "warp": warp,
    "colour": colour,
    "jpeg": jpeg,
}


@dataclass(frozen=True)
class Pairs:
    """Pictures (B, 3, H, W) uint8, two distortions of each, which is the weaker (1: the second), and of one kind?"""

    original: Tensor
    first: Tensor
    second: Tensor
    is_second: Tensor  # (B,) float32
    is_one_kind: Tensor  # (B,) bool

    @property
    def pictures(self) -> Tensor:
        """All of them (3 B, 3, H, W)."""
        return torch.cat([self.original, self.first, self.second])

    def rows(self, index: Tensor) -> "Pairs":
        """Return the pairs `index` (b,)."""
        return Pairs(**{one.name: getattr(self, one.name)[index] for one in fields(self)})


def draw_pairs(
    pictures: Tensor,
    kinds: Sequence[str],
    others: Sequence[str],
    crop: int | None,
    seed: tuple[object, ...],
    first_row: int = 0,
) -> Pairs:
    """Return a pair of distortions of each of `pictures` (B, 3, H, W) uint8, or of a part of `crop` pixels a side.

    Half of the pairs are of one of `kinds`, each under random draws of its own; in the rest the second is of one of
    `others`, perhaps the same. Picture i is drawn for by the generator of (*seed, first_row + i).
    """
    rows = [_draw(one, kinds, others, crop, generator(*seed, first_row + i)) for i, one in enumerate(pictures)]
    original, first, second, is_second, is_one_kind = zip(*rows, strict=True)
    answers = torch.tensor(is_second, dtype=torch.float32)
    return Pairs(torch.stack(original), torch.stack(first), torch.stack(second), answers, torch.tensor(is_one_kind))


def _draw(
    picture: Tensor, kinds: Sequence[str], others: Sequence[str], crop: int | None, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
    if crop is not None:
        top, left = (int(torch.randint(size - crop + 1, (), generator=draws)) for size in picture.shape[-2:])
        picture = picture[:, top : top + crop, left : left + crop]
    chances = torch.rand(3, generator=draws).tolist()
    first, second = (names[int(chance * len(names))] for names, chance in zip((kinds, others), chances, strict=False))
    if chances[2] < 0.5:
        second = first
    strengths = _two_strengths(draws)
    one, other = (
        KINDS[kind](picture, strength, draws) for kind, strength in zip((first, second), strengths, strict=True)
    )
    return picture, one, other, strengths[1] < strengths[0], first == second


def _two_strengths(draws: torch.Generator) -> list[float]:
    """Return two strengths at least MIN_GAP apart, in random order."""
    while True:
        strengths = (MIN_STRENGTH + (1 - MIN_STRENGTH) * torch.rand(2, generator=draws)).tolist()
        if abs(strengths[0] - strengths[1]) >= MIN_GAP:
            return strengths


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).byte()


def _to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _of_pil(image: Image.Image) -> Tensor:
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .reshape(image.height, image.width, 3)
        .permute(2, 0, 1)
    )
