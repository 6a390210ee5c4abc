"""Edges of pictures, and how far two pictures have them in the same places.

B batch   H, W size in pixels
"""

import torch
from torch import Tensor
from torch.nn import functional as F

THRESHOLD = 0.2  # of a step between two colours of [0, 1]
NEIGHBOURS = ((0, 1), (1, 1), (1, 0), (1, -1))  # (down, right) along a gradient of 0, 45, 90 and 135 degrees


def edge_map(images: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Return the edges (B, 1, H, W) float32 of `images` (B, 3, H, W) in [0, 1]: 1 on an edge, 0 elsewhere.

    Canny's detector (1986) without its blur and its hysteresis: the gradient by Sobel's filters, a step between two
    colours being their difference; at each pixel that of the channel where it is largest; the pixels that are largest
    along their gradient, and at least `threshold`. Edges are one pixel wide.
    """
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    gradients = F.conv2d(padded, torch.stack([across, across.T])[:, None]).unflatten(0, images.shape[:2])
    sizes = gradients.norm(dim=2)
    channel = sizes.argmax(dim=1, keepdim=True)
    size = sizes.gather(1, channel)
    right, down = gradients.gather(1, channel[:, :, None].expand(-1, -1, 2, -1, -1))[:, 0].split(1, dim=1)
    direction = (torch.atan2(down, right) / (torch.pi / 4)).round().remainder(4)
    is_largest = torch.zeros_like(size, dtype=torch.bool)
    for i, (y, x) in enumerate(NEIGHBOURS):
        ahead, behind = _shifted(size, y, x), _shifted(size, -y, -x)
        is_largest |= (direction == i) & (size >= ahead) & (size > behind)  # one of two equal neighbours
    return (is_largest & (size >= threshold)).float()


def edge_overlap(edges: Tensor, reference: Tensor, tolerance: int = 1) -> Tensor:
    """Return the F-measure (B,) in [0, 1] of edges (B, 1, H, W) against `reference` (B, 1, H, W), both 0 or 1.

    The harmonic mean of precision, the share of `edges` within `tolerance` pixels of an edge of the reference, and
    recall, the share of the reference within `tolerance` of `edges` (Martin, Fowlkes and Malik, 2004, without their
    one-to-one matching). 1 where both have no edge, 0 where one has none.
    """
    counts, ours = reference.sum(dim=(1, 2, 3)), edges.sum(dim=(1, 2, 3))
    precision = (edges * _widened(reference, tolerance)).sum(dim=(1, 2, 3)) / ours.clamp(min=1)
    recall = (reference * _widened(edges, tolerance)).sum(dim=(1, 2, 3)) / counts.clamp(min=1)
    overlap = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where((ours == 0) & (counts == 0), torch.ones_like(overlap), overlap)


def _shifted(values: Tensor, down: int, right: int) -> Tensor:
    """Return at each pixel the value (B, 1, H, W) of the one that far `down` and to the `right`; zero outside."""
    padded = F.pad(values, (1, 1, 1, 1))
    height, width = values.shape[-2:]
    return padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]


def _widened(edges: Tensor, tolerance: int) -> Tensor:
    """Return 1 within `tolerance` pixels of an edge, in a square."""
    return F.max_pool2d(edges, 2 * tolerance + 1, stride=1, padding=tolerance)
