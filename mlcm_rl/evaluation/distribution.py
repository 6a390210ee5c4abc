"""Distances of distributions: a row's pictures and patches of them to the reference's own of the same prompts.

A student that averages over what the teacher might draw is near to its picture of the same noise and blurred; these
distances see that, and do not mind another picture that the teacher might have drawn. Patches are crops at full
resolution, at the same places in every row: in them sharpness counts and composition does not. KID and FID with the
teacher's pictures in place of real ones are the field's "FID-T" and, on patches, "patch FID-T" (SDXL-Lightning, arXiv
2402.13929; SenseFlow, arXiv 2506.00523). Letters: B pictures, P prompts, I pictures of each, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training import seeding
from . import inception, metrics

NUM_GROUPS = 10  # of prompts, for FID's standard error
PATCH = "patch"  # key of the readings of patches


@dataclass(frozen=True)
class Distribution:
    """What sees the pictures: the subject's judge where there is one, else Inception.

    `reading` is the key of the readings of whole pictures, `of_patches` reads crops (B, 3, s, s) in [0, 1] into (B, D),
    and `gamma` is that of KID's kernel, None for 1 / D.
    """

    reading: str
    of_patches: Callable[[Tensor], Tensor]
    gamma: float | None

    def of_reference(self, readings: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those of a row's `readings` that other rows are compared with."""
        return {name: readings[name] for name in (self.reading, PATCH)}

    def values(self, readings: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return KID to the `reference`, and FID where it has a meaning, of pictures and of patches, by key.

        Both hold features (P, I, D), prompt by prompt. FID asks for more pictures than features have dimensions, since
        a covariance of fewer is singular.
        """
        values = {}
        for name, part in ((self.reading, ""), (PATCH, "patch_")):
            features, others = readings[name], reference[name]
            values[f"teacher_{part}kid"] = metrics.kid_by_prompt(features, others, self.gamma)
            if features.shape[0] * features.shape[1] > features.shape[2]:
                values[f"teacher_{part}fid"] = metrics.fid_by_group(features, others, NUM_GROUPS)
        return values


def patches(images: Tensor, seed: int, samples: Sequence[tuple[int, int]]) -> Tensor:
    """Return a square crop (B, 3, s, s) of each of `images` (B, 3, H, W), at a place drawn from `seed` and its sample.

    `samples` are (prompt, picture). The side is Inception's 299 pixels, or half of the picture's shorter side if that
    is less.
    """
    height, width = images.shape[-2:]
    side = min(inception.SIDE, min(height, width) // 2)
    crops = []
    for image, sample in zip(images, samples, strict=True):
        generator = seeding.generator(seed, "patch", *sample)
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in (height, width))
        crops.append(image[:, top : top + side, left : left + side])
    return torch.stack(crops)
