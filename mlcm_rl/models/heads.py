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
    """A head of its own for one of the features: a residual block of `width` channels, and a logit a place.

    It may read the features of several states at once, each of `channels`.
    """

    def __init__(self, channels: int, width: int, is_picture: bool, num_states: int):
        super().__init__()
        size = 3 if is_picture else 1  # tokens have no neighbours here, and have seen one another in the teacher
        # features of a teacher's blocks differ in scale, and so may those of its states
        self.norm = nn.GroupNorm(num_states, num_states * channels, affine=False)
        self.inward = nn.Conv2d(num_states * channels, width, 1)
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
    """One head for each of the teacher's `features`, of these `shapes`. Its weights are drawn from `seed`.

    Where heads read `num_states` at once, the features of each are beside those of the other in the channels.
    """

    def __init__(self, shapes: list[torch.Size], width: int, seed: int, num_states: int = 1):
        super().__init__()
        self.num_states = num_states
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            heads = [Head(shape[0], width, shape[-1] > 1, num_states) for shape in shapes]
        self.heads = nn.ModuleList(heads)

    def forward(self, read: list[Tensor]) -> list[Tensor]:
        """Return the logits (B, N) of each head; N is the number of places of its features."""
        return [head(states) for head, states in zip(self.heads, read, strict=True)]


def paired(read: list[Tensor], others: list[Tensor] | None) -> list[Tensor]:
    """Return features (B, D, h, w), each with that of `others` behind it in the channels (B, 2 D, h, w), if any."""
    if others is None:
        return read
    return [torch.cat(pair, dim=1) for pair in zip(read, others, strict=True)]


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
