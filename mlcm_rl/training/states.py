"""The content of a training loop's checkpoint: the optimiser's state, and groups of weights by name."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..storage.checkpoints import checkpoints, load_state
from ..storage.files import CheckpointError


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as `optimizer.<parameter index>.<name>`, without rates: the step gives them."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned. Raise ValueError if it is of other parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in under_prefix("optimizer", tensors).items():
        index, name = key.split(".", 1)
        number = int(index)
        # torch takes moments of any shape, and fails or broadcasts at the next step
        if number >= len(parameters) or (value.ndim and value.shape != parameters[number].shape):
            raise ValueError(f"the optimiser's state number {number} is of another parameter")
        # fused AdamW reads a moment in its parameter's own order of memory
        like = parameters[number] if value.ndim else value
        copy = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
        state.setdefault(number, {})[name] = copy
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_training(
    folder: Path, shapes: dict[str, dict[str, torch.Size]], parts: Iterable[str] = ()
) -> tuple[int, Mapping[str, Tensor], dict] | None:
    """Return the newest checkpoint in `folder`: number of steps, tensors, record; None without one.

    Each tensor is read when it is looked up.

    Raise CheckpointError if its weights have other `shapes` (by group and name), if it has no state of the optimiser,
    or if its record lacks one of `parts`: training would go on, with another result.
    """
    checkpoint = load_state(folder)
    if checkpoint is None:
        return None
    steps, tensors, record = checkpoint
    place = checkpoints(folder)[-1]
    for prefix, group in shapes.items():
        if {name: value.shape for name, value in under_prefix(prefix, tensors).items()} != group:
            raise CheckpointError(f"{place} holds other weights than this {prefix}: delete checkpoints/")
    missing = [name for name in parts if name not in record]
    if steps and not under_prefix("optimizer", tensors):
        missing.append("optimizer")
    if missing:
        raise CheckpointError(f"{place} holds nothing of {', '.join(missing)} to go on from: delete checkpoints/")
    return steps, tensors, record


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with `prefix.` before every name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the entries of `tensors` whose names begin with `prefix.`, without it: the inverse of `add_prefix`.

    Each is looked up in `tensors` when it is needed.
    """
    return _Under(prefix, tensors)


class _Under(Mapping[str, Tensor]):
    def __init__(self, prefix: str, tensors: Mapping[str, Tensor]):
        self.prefix, self.tensors = f"{prefix}.", tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.tensors if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
