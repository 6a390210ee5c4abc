"""What a stage leaves on disk: files that appear by rename, a manifest written last, and checkpoints to resume from."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .recipe import Teacher

FORMAT = 1  # of manifest.json and of checkpoints; raised when their layout changes
KEPT_CHECKPOINTS = 2


class CheckpointError(Exception):
    """A file that a run needs is missing, damaged, or of another format; the message names it."""


# ---- files that are whole or absent ----


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder to; it becomes `path` by rename when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    remove(temporary)
    try:
        yield temporary
        if path.is_dir():
            remove(path)
        temporary.replace(path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The object in `path`. Raises CheckpointError where it is missing or not JSON."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save `tensors` as safetensors, on the CPU and contiguous."""
    with replacing(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of every file under `folder`, by relative path, but for those that match a pattern of `skip`."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256(path) for name, path in names.items() if not any(fnmatch(name, pattern) for pattern in skip)}


def teacher_hash(teacher: Teacher) -> str:
    """Identity of a teacher's weights and configuration: one sha256 over every file's, or the pinned revision."""
    folder = Path(teacher.path)
    if not folder.is_dir():
        return f"{teacher.path}@{teacher.revision}"
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".json", ".txt")]
    return _hash_of_files(folder, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache
def _hash_of_files(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Cached by size and time of change: gigabytes are read once a process."""
    found = {path.relative_to(folder).as_posix(): sha256(path) for path, _, _ in files}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


# ---- finished stages ----

# Not results, or checked elsewhere: store.json holds the checksums of a store's shards, and its reader compares them.
UNHASHED = ("manifest.json", "checkpoints/*", "tensorboard/*", "log.jsonl", "samples/*", "shard-*")


def finish(folder: Path, manifest: dict) -> None:
    """Mark a stage's folder as finished: its manifest, with the checksum of every result, is the last file written."""
    remove(folder / "checkpoints")
    write_json(folder / "manifest.json", {"format": FORMAT, **manifest, "files": checksums(folder, skip=UNHASHED)})


def is_finished(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def verify(folder: Path) -> dict:
    """The manifest of a finished stage whose files are all there and unchanged.

    Raises CheckpointError naming the first file that is missing or differs from what was written.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} was written in format {manifest.get('format')}, this version reads {FORMAT}: "
            "delete the folder to run the stage again"
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: delete {folder} to run the stage again")
        if sha256(path) != expected:
            raise CheckpointError(f"{path} is damaged (its sha256 changed): delete {folder} to run the stage again")
    return manifest


# ---- checkpoints to resume from ----


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], record: dict | None = None) -> Path:
    """Write the state after `step` steps as `checkpoints/step-<n>`; the newest KEPT_CHECKPOINTS stay.

    `record` is what else a loop must know to go on, as JSON.

    The folder appears by rename with its checksum inside; older ones go only after it is there.
    """
    path = folder / "checkpoints" / f"step-{step:08d}"
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        write_tensors(temporary / "state.safetensors", tensors)
        write_json(
            temporary / "state.json",
            {
                "format": FORMAT,
                "step": step,
                "sha256": sha256(temporary / "state.safetensors"),
                "record": record or {},
            },
        )
    for old in _checkpoints(folder)[:-KEPT_CHECKPOINTS]:
        remove(old)
    return path


def load_state(folder: Path) -> tuple[int, dict[str, Tensor], dict] | None:
    """The newest checkpoint of a stage's folder: steps done, tensors on the CPU, record; None where there is none.

    Raises CheckpointError where it is damaged: nothing restarts from zero, or from an older state, in silence.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    state = read_json(found[-1] / "state.json")
    path = found[-1] / "state.safetensors"
    if state.get("format") != FORMAT or not path.is_file() or sha256(path) != state["sha256"]:
        raise CheckpointError(f"{found[-1]} is damaged: delete it to resume from the checkpoint before it")
    return state["step"], load_file(path), state["record"]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors: `optimizer.<parameter index>.<name>`. Rates are functions of the step."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_training(
    folder: Path,
    steps: int,
    weights: dict[str, dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    record: dict | None = None,
) -> None:
    """A checkpoint after `steps` steps: groups of `weights`, the optimiser, and a `record` of what does not follow
    from the step."""
    tensors = optimizer_tensors(optimizer)
    for prefix, group in weights.items():
        tensors |= named(prefix, group)
    save_state(folder, steps, tensors, record)


def load_training(
    folder: Path, weights: dict[str, dict[str, Tensor]], optimizer: torch.optim.Optimizer
) -> tuple[int, dict | None]:
    """Put back the newest checkpoint in `folder`, in place; returns the steps done and its record.

    0 and None where there is none.
    """
    found = load_state(folder)
    if found is None:
        return 0, None
    steps, tensors, record = found
    for prefix, group in weights.items():
        kept = taken(prefix, tensors)
        if kept.keys() != group.keys():
            raise CheckpointError(
                f"{folder}: its checkpoint holds other weights than this {prefix}: delete checkpoints/"
            )
        for name, value in group.items():
            value.data.copy_(kept[name])
    load_optimizer(optimizer, tensors)
    return steps, record


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `prefix.` before every name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `tensors` under `prefix.`, without it: the inverse of `named`."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
