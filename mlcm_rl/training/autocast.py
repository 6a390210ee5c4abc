"""Precisions beside one another: autocast for the student's passes, and frozen networks in their own precision."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..storage import finite


@contextmanager
def own(device: torch.device) -> Iterator[None]:
    """Switch autocast off for the block: text encoders, teachers and rewards compute in the dtype of their weights."""
    if device.type == "meta":  # which has no autocast
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def forget_copies() -> None:
    """Clear autocast's cache, after trained weights were changed or swapped.

    Autocast keeps its copies until the outermost block ends, by tensor object and not by content.
    """
    torch.clear_autocast_cache()


def frozen_in_bfloat16(student: torch.nn.Module) -> None:
    """Convert the student's frozen float16 weights to bfloat16, for passes in bfloat16.

    Autocast to bfloat16 refuses some operations on float16, and for the others copies a frozen weight at every use.
    """
    for parameter in student.parameters():
        if parameter.dtype == torch.float16 and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def in_halves(network: nn.Module, what: str) -> Iterator[None]:
    """Let the parameters of `network` be in half precision while the block writes them.

    Raise as `finite.refuse_weights` does, with `what` they are of, where one overflows.
    """
    own = dict(network.named_parameters())
    halves = {name: value.half() for name, value in own.items()}
    finite.refuse_weights(halves, what)
    with swapped(own, halves):
        yield


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `weights` in place of the `parameters` of the same names while the block runs."""
    targets = {name: parameters[name] for name in weights}
    if all(weights[name] is parameter for name, parameter in targets.items()):
        yield
        return
    originals = {name: parameter.data for name, parameter in targets.items()}
    forget_copies()
    try:
        for name, parameter in targets.items():
            parameter.data = weights[name].data
        yield
    finally:
        for name, parameter in targets.items():
            parameter.data = originals[name]
        forget_copies()
