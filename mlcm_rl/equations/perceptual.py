"""Perceptual distances: of a network's features as in LPIPS, the logarithm of one, and the loss that trains LPIPS."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-20  # squared length below which features count as none
RATIO = 0.1  # added to the distance that another is divided by, in what the ranking loss is given


def unit_channels(features: Tensor) -> Tensor:
    """`features` (B, C, ...) divided by their length over channels at each place (LPIPS, arXiv 1801.03924, section 3).

    Where all channels are 0 they stay 0.
    """
    return features / (features.square().sum(1, keepdim=True) + TINY).sqrt()


def feature_distance(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over places of sum_c w_c (unit a - unit b)_c^2, (B,) float32 (arXiv 1801.03924, eq. 1).

    `a` and `b` (B, C, ...) are features of one layer, `weights` (C,) those of its channels, 1 each by default.
    """
    difference = (unit_channels(a.float()) - unit_channels(b.float())).square()
    if weights is not None:
        difference = difference * weights.reshape(1, -1, *[1] * (a.ndim - 2))
    return difference.sum(1).flatten(1).mean(1)


def log_distance(distance: Tensor, c: float) -> Tensor:
    """log sqrt(d + c^2), (B,): of a squared distance d (B,) only its relative size counts, until it is below c^2."""
    return 0.5 * (distance + c * c).log()


def ranking_inputs(near: Tensor, far: Tensor) -> Tensor:
    """d0, d1, d0 - d1, d0 / (d1 + 0.1), d1 / (d0 + 0.1), (B, 5), of two distances (B,).

    From them a small network guesses which of two distorted pictures is nearer to the original (arXiv 1801.03924,
    appendix C).
    """
    return torch.stack([near, far, near - far, near / (far + RATIO), far / (near + RATIO)], dim=1)


def two_alternative_loss(logits: Tensor, is_second: Tensor) -> Tensor:
    """Cross entropy (B,) of guesses that the second picture is nearer, logits (B,); `is_second` (B,) is 0 or 1.

    It is the ranking loss of LPIPS (arXiv 1801.03924, section 3), whose labels are shares of people.
    """
    return F.binary_cross_entropy_with_logits(logits, is_second.to(logits.dtype), reduction="none")


def two_alternative_score(first: Tensor, second: Tensor, is_second: Tensor) -> Tensor:
    """1 where the smaller of two distances (B,) is the one that `is_second` (B,) says, 0 where not, 0.5 for a tie."""
    right = torch.where(is_second.bool(), second < first, first < second)
    return torch.where(first == second, torch.full_like(first, 0.5), right.to(first.dtype))


def mean_over_layers(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mean over layers of `feature_distance` (B,) float32; `a` and `b` have the features (B, C, ...) of each."""
    return torch.stack([feature_distance(*pair) for pair in zip(a, b, strict=True)]).mean(0)
