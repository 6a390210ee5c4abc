"""Randomness as a function of (seed, purpose, step), so that resuming needs no state of a generator."""

import hashlib
from functools import lru_cache

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
    positions = [divmod(position, num_items) for position in range(step * batch_size, (step + 1) * batch_size)]
    orders = {epoch: _order(num_items, (*parts, "epoch", epoch)) for epoch in {epoch for epoch, _ in positions}}
    return torch.stack([orders[epoch][position] for epoch, position in positions])


@lru_cache(maxsize=4)  # drawn once an epoch: at a million items it takes longer than a step
def _order(num_items: int, parts: tuple[object, ...]) -> Tensor:
    return torch.randperm(num_items, generator=generator(*parts))
