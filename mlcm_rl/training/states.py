"""What a training loop puts into a checkpoint and takes out of it: the optimiser's state, groups of weights by name."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..storage.checkpoints import checkpoints, load_state
from ..storage.files import CheckpointError


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors: `optimizer.<parameter index>.<name>`. Rates are functions of the step."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took. Raises ValueError where it was taken of other parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in under_prefix("optimizer", tensors).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in state.items():  # torch takes moments of any shape, and fails or broadcasts at the next step
        shapes = {value.shape for value in entry.values() if value.ndim}
        if number >= len(parameters) or shapes - {parameters[number].shape}:
            raise ValueError(f"the optimiser's state number {number} is of another parameter")
        for name, value in entry.items():  # fused AdamW reads a moment in its parameter's own order of memory
            if value.ndim:
                entry[name] = torch.empty_like(parameters[number], dtype=value.dtype, device=value.device).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_training(
    folder: Path, shapes: dict[str, dict[str, torch.Size]], parts: Iterable[str] = ()
) -> tuple[int, dict[str, Tensor], dict] | None:
    """The newest checkpoint in `folder`: steps done, tensors, record; None where there is none.

    Raises CheckpointError where it holds weights of other `shapes`, by group and name, no state of the optimiser, or
    nothing of one of `parts` in its record: training would go on, and end elsewhere.
    """
    found = load_state(folder)
    if found is None:
        return None
    steps, tensors, record = found
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
    """`tensors` with `prefix.` before every name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def under_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `tensors` under `prefix.`, without it: the inverse of `add_prefix`."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
