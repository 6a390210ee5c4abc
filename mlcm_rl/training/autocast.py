"""Precisions beside one another: autocast is for the student's passes, and what is frozen computes in its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def own(device: torch.device) -> Iterator[None]:
    """Autocast is off inside, for a text encoder, a teacher or a reward: weights say what it computes in."""
    if device.type == "meta":  # has no autocast
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def forget_copies() -> None:
    """Autocast casts trained weights anew, for when they have changed or changed places.

    It keeps its copies until the outermost block ends, by tensor and not by what is in it.
    """
    torch.clear_autocast_cache()


def frozen_in_bfloat16(student: torch.nn.Module) -> None:
    """Take frozen float16 weights in bfloat16, for passes that are.

    Autocast to bfloat16 refuses some operations on float16, and for the others copies a frozen weight at every use.
    """
    for parameter in student.parameters():
        if parameter.dtype == torch.float16 and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The `weights` in place of those of `parameters` that have their names, for as long as the block lasts."""
    own = {name: parameters[name] for name in weights}
    if all(weights[name] is parameter for name, parameter in own.items()):
        yield
        return
    held = {name: parameter.data for name, parameter in own.items()}
    forget_copies()
    try:
        for name, parameter in own.items():
            parameter.data = weights[name].data
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = held[name]
        forget_copies()
