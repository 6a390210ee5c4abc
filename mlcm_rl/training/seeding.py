"""Randomness as a function of (seed, purpose, step), so that resuming needs no state of a generator."""

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed from its `parts`: seed, purpose, step. The same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator with the seed of `parts`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def epoch_order(num_items: int, batch_size: int, step: int, *parts: object) -> Tensor:
    """Return the indices (batch_size,) of the batch of `step`: every item once an epoch, each epoch in a new order."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, Tensor] = {}
    for epoch in {position // num_items for position in positions}:
        orders[epoch] = torch.randperm(num_items, generator=generator(*parts, "epoch", epoch))
    return torch.stack([orders[position // num_items][position % num_items] for position in positions])
