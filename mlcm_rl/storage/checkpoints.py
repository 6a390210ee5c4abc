"""Checkpoints that a stage resumes from: `checkpoints/step-<n>`, whole or absent, with checksums inside."""

import re
from pathlib import Path

from torch import Tensor

from .files import CheckpointError, read_json, remove, replacing, write_json
from .hashing import seal_of, sha256
from .tensors import TensorFile, write_tensors

STATE_FORMAT = 2  # of checkpoints
NAME = re.compile(r"step-[0-9]{8,18}")  # of a checkpoint's folder


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], record: dict | None = None, keep: int = 2) -> Path:
    """Write the state after `step` steps to `checkpoints/step-<n>`, and delete all but the newest `keep` checkpoints.

    `record` is whatever else a loop needs to go on, as JSON. The folder appears by rename with its checksums inside;
    older ones are deleted only after that.
    """
    path = state_path(folder, step)
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        write_tensors(temporary / "state.safetensors", tensors)
        checksum = sha256(temporary / "state.safetensors")
        state = {"format": STATE_FORMAT, "step": step, "sha256": checksum, "record": record or {}}
        write_json(temporary / "state.json", state | {"seal": seal_of(state)})
    for old in checkpoints(folder)[:-keep]:
        remove(old)
    return path


def load_state(folder: Path) -> tuple[int, TensorFile, dict] | None:
    """Return the newest checkpoint of a stage's folder: number of steps, tensors on the CPU, record. None without one.

    Each tensor is read when it is looked up, so that no checkpoint is in memory beside what is filled from it.

    Raise CheckpointError if it is damaged: no run restarts silently from zero or from an older state.
    """
    paths = checkpoints(folder)
    if not paths:
        return None
    fault = damage(paths[-1])
    if fault:
        whole = next((path for path in reversed(paths[:-1]) if not damage(path)), None)
        instead = f"the one before it, {whole.name}" if whole else "the start of the stage, since no other is whole"
        raise CheckpointError(f"{paths[-1]} is damaged ({fault}): `mlcm run --skip-damaged` goes on from {instead}")
    state = read_json(paths[-1] / "state.json", step=int, record=dict)
    return state["step"], TensorFile(paths[-1] / "state.safetensors"), state["record"]


def damage(path: Path) -> str | None:
    """Return what is wrong with the checkpoint `path`; None if it is whole."""
    try:
        state = read_json(path / "state.json", sha256=str)
    except CheckpointError as error:
        return str(error)
    seal = state.pop("seal", None)
    if state.get("format") != STATE_FORMAT:
        return f"it is of format {state.get('format')}, this version reads {STATE_FORMAT}"
    if seal != seal_of(state):
        return "state.json is not as it was written"
    tensors = path / "state.safetensors"
    return None if tensors.is_file() and sha256(tensors) == state["sha256"] else f"{tensors.name} is not as written"


def skip_damaged(folder: Path) -> list[str]:
    """Rename the checkpoints after the newest whole one to `damaged-step-<n>`. Return what is wrong with each."""
    skipped = []
    for path in reversed(checkpoints(folder)):
        fault = damage(path)
        if not fault:
            break
        remove(path.with_name(f"damaged-{path.name}"))
        path.rename(path.with_name(f"damaged-{path.name}"))
        skipped.append(f"{path}: {fault}")
    return skipped


def state_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` steps."""
    return folder / "checkpoints" / f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a stage's folder, oldest first; what else is there, a copy by hand say, is none."""
    names = (path for path in (folder / "checkpoints").glob("step-*") if NAME.fullmatch(path.name))
    return sorted(names, key=step_of)


def step_of(path: Path) -> int:
    """Return the number of steps after which the checkpoint `path` was written."""
    return int(path.name.removeprefix("step-"))
