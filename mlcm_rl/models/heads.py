"""Heads on a frozen teacher's features: light residual convolutions that tell real samples from a student's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .base import Base
from .conditioning import Conditioning
from .features import features

GROUPS = 4  # of channels that are normalised together


class Head(nn.Module):
    """A head of its own for one of the features: a residual block of `width` channels, and a logit a place."""

    def __init__(self, channels: int, width: int, is_picture: bool):
        super().__init__()
        size = 3 if is_picture else 1  # tokens have no neighbours here, and have seen one another in the teacher
        self.norm = nn.GroupNorm(1, channels, affine=False)  # features of a teacher's blocks differ in scale
        self.inward = nn.Conv2d(channels, width, 1)
        self.block = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, size, padding="same"),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, size, padding="same"),
        )
        self.outward = nn.Sequential(nn.SiLU(), nn.Conv2d(width, 1, 1))

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (B, N) of the N places of `states` (B, D, h, w)."""
        hidden = self.inward(self.norm(states))
        return self.outward(hidden + self.block(hidden)).flatten(1)


class Heads(nn.Module):
    """One head for each of the teacher's `features`, of these `shapes`. Its weights are drawn from `seed`."""

    def __init__(self, shapes: list[torch.Size], width: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            heads = [Head(shape[0], width, is_picture=shape[-1] > 1) for shape in shapes]
        self.heads = nn.ModuleList(heads)

    def forward(self, read: list[Tensor]) -> list[Tensor]:
        """Return the logits (B, N) of each head; N is the number of places of its features."""
        return [head(states) for head, states in zip(self.heads, read, strict=True)]


@torch.no_grad()
def shapes_of(base: Base, conditioning: Conditioning) -> list[torch.Size]:
    """Return the shapes (D, h, w) of the teacher's features, by one pass over an empty sample under `conditioning`."""
    x_t = torch.zeros(1, *base.latent_shape, device=base.device)
    t = torch.ones(1, dtype=torch.int64, device=base.device)
    return [states.shape[1:] for states in features(base, x_t, t, conditioning)]


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keep the weights of `network` out of the graph of what is computed in the block."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
