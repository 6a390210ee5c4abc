"""Cross-attention of a denoiser to prompts that stay the same over many passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def prompts_attended_once(denoiser: torch.nn.Module) -> Iterator[None]:
    """Keep the keys and values of the layers `attn2`, which are functions of the prompts, from the first pass."""
    names = (".attn2.to_k", ".attn2.to_v")
    layers = [layer for name, layer in denoiser.named_modules() if name.endswith(names)]
    before = [vars(layer).get("forward") for layer in layers]  # of a layer that something else has wrapped
    for layer in layers:
        layer.forward = _once(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that calls `function` the first time, and later returns that result whatever it is given."""
    results: list[Tensor] = []

    def first_result(*arguments: Any, **settings: Any) -> Tensor:
        if not results:
            results.append(function(*arguments, **settings))
        return results[0]

    return first_result
