"""The device that a recipe names. torch is imported only when a device is looked for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_of(name: str) -> "torch.device":
    """Return the device of a recipe's `device`; `auto` takes CUDA, then MPS, then the CPU.

    Raise ValueError for a device that this machine does not have.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {"cuda": num_gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in here.items() if count))
    kind, colon, index = name.partition(":")
    number = index if colon else "0"
    if not number.isdecimal() or int(number) >= here.get(kind, 0):
        raise ValueError(f"device: {name} is not available here: write device: auto or cpu")
    return torch.device(kind, int(number)) if colon else torch.device(kind)
