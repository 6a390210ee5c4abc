"""The store of teacher trajectories as it is read: checked, memory-mapped, lazy.

A store is a folder of

    shard-*.safetensors     `states` (n, P, C, H, W) at the P stored times, noise first, and `x0` (n, C, H, W), the last
                            step's own estimate of the clean latents
    prompts-*.safetensors   what m prompts became: one entry for every tensor of their conditioning, in the type that
                            the encoders compute in; of the context of prompts that differ in length the tokens alone,
                            (sum of lengths, D), and `lengths` (m,)
    store.json              how they were made, and size and sha256 of every file

Trajectory i is of prompt i modulo the number of prompts. `store_writer.py` writes it. A store of format 1 has the
conditioning of every trajectory in its shard; it is read too.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from ..models.base import Base
from ..models.conditioning import CONTEXT, LENGTHS, Conditioning, in_dtype, stacked
from ..models.teachers import teacher_hash
from ..recipe import Teacher
from ..storage.files import CheckpointError, read_json
from ..storage.hashing import identity_of, is_unchanged
from ..storage.tensors import read_shapes, read_tensors

FORMAT = 2  # of the files
DTYPES = {"float32": torch.float32, "float16": torch.float16}
OF_MILESTONES = "-milestones"  # ends the name of the folder of a store that has no other states


@dataclass(frozen=True)
class Provenance:
    """Everything that decides what the states are."""

    teacher_hash: str
    scheduler: dict
    prediction_type: str
    solver: str
    grid: list[int]  # times that the solver goes through
    guidance_scale: float
    prompts_hash: str
    num_trajectories: NonNegativeInt
    num_held_out: NonNegativeInt
    seed: int
    dtype: str
    maths: int
    times: list[int] | None = None  # that are stored; all of the grid where nothing is said
    format: int = FORMAT

    @property
    def total(self) -> int:
        """Trajectories, those that are held out among them."""
        return self.num_trajectories + self.num_held_out

    @property
    def stored_times(self) -> list[int]:
        """The times whose states are stored."""
        return self.times or self.grid

    def own_folder(self, folder: Path) -> Path:
        """Return `folder` under the name that says which states are stored, all of the grid or those of milestones."""
        name = folder.name.removesuffix(OF_MILESTONES)
        return folder.with_name(name if self.times in (None, self.grid) else f"{name}{OF_MILESTONES}")


def store_of(folder: Path, teacher: Teacher, base: Base) -> "Store":
    """Return the finished store in `folder`, for a stage that trains by `teacher`.

    Seed, prompts, grid and precision are the trajectories stage's own. The weights are known by content: where they
    are does not matter. Raise CheckpointError if the store is damaged, or is of another teacher, schedule or
    resolution.
    """
    store = Store(folder)
    expected = {
        "teacher_hash": teacher_hash(teacher),
        "scheduler": base.schedule_record(),
        "prediction_type": base.prediction_type,
        "guidance_scale": teacher.guidance_scale,
        "resolution": base.resolution,
        "latents": list(base.latent_shape),
    }
    latents = store.latent_shape
    found = {"resolution": latents[-1] * base.geometry.downscale, "latents": list(latents)}
    refuse_mismatch(folder / "store.json", vars(store.provenance) | found, expected)
    return store


class Files:
    """The files of a store, each compared with its checksum when it is first read, then memory-mapped.

    It is compared again when its size, time of change or inode are not those that it had then.

    Raises CheckpointError for the first one that is not there, or not of its size.
    """

    def __init__(self, folder: Path, files: Mapping[str, tuple[int | None, str]]):
        self.folder, self._files = folder, files
        self._open: dict[str, tuple[list[int], dict[str, Tensor]]] = {}
        sizes = sizes_in(folder)
        for name, (size, _) in files.items():
            if name not in sizes or size not in (None, sizes[name]):
                raise self._damaged(name)

    def read(self, name: str, complaint: Callable[[dict[str, Tensor]], str | None]) -> dict[str, Tensor]:
        """Return the tensors of a file. Raise CheckpointError where it is not what store.json says.

        `complaint` says what is wrong with the tensors where they are not what the file should hold.
        """
        path, (_, checksum) = self.folder / name, self._files[name]
        try:
            identity = identity_of(path)
            compared, tensors = self._open.get(name, (None, None))
            if tensors is not None and identity == compared:
                return tensors
            whole = is_unchanged(path, checksum)
        except FileNotFoundError:
            whole = False
        if not whole and name in self._open:
            raise CheckpointError(
                f"{path} was changed while it was read, and what was trained since is not to be trusted: delete it, "
                f"{self.folder / 'manifest.json'} and the folder of this stage, and run again"
            )
        if not whole:
            raise self._damaged(name)
        tensors = read_tensors(path)
        if (wrong := complaint(tensors)) is not None:
            raise CheckpointError(f"{path} {wrong}")
        self._open[name] = (identity, tensors)
        return tensors

    def _damaged(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / name} is missing or damaged: delete it and {self.folder / 'manifest.json'}, and the same "
            "command makes it again"
        )


class EncodedPrompts:
    """What the first `count` prompts became, `size` of them a file."""

    def __init__(self, files: Files, count: int, size: int, in_shards: bool = False):
        self._files, self.count, self._size = files, count, size
        self._name, self._prefix = (shard_name, "conditioning.") if in_shards else (prompts_name, "")

    def conditioning(self, indices: Tensor) -> Conditioning:
        """Return the conditioning (B, ...) float32 of prompts `indices` (B,), each modulo their number.

        Where prompts differ in length, "context" is as long as the longest of them, zeros after the shorter, and
        "lengths" (B,) says how many tokens count.
        """
        return stacked([self._row(i % self.count) for i in indices.tolist()])

    def _row(self, index: int) -> dict[str, Tensor]:
        """Return the conditioning of one prompt in float32, without a batch dimension."""
        row = index % self._size
        count = min(self._size, self.count - index + row)
        tensors = self._files.read(self._name(index - row), lambda tensors: self._complaint(tensors, count))
        named = [name for name in tensors if name.startswith(self._prefix)]
        values = {name.removeprefix(self._prefix): tensors[name] for name in named}
        rows = {name: value[row] for name, value in values.items() if not (name == CONTEXT and LENGTHS in values)}
        if LENGTHS in values:
            end = int(values[LENGTHS][: row + 1].sum())
            rows[CONTEXT] = values[CONTEXT][end - int(values[LENGTHS][row]) : end]
        # Before rows are stacked: autocast on a CPU stacks no halves.
        return in_dtype(rows, torch.float32)

    def _complaint(self, tensors: dict[str, Tensor], count: int) -> str | None:
        names = [name for name in tensors if name.startswith(self._prefix)]
        rows = {name: len(tensors[name]) for name in names if not (name == CONTEXT and LENGTHS in tensors)}
        if not rows or set(rows.values()) != {count}:
            return f"does not hold what {count} prompts became"
        if LENGTHS in tensors and (
            CONTEXT not in tensors
            or int(tensors[LENGTHS].min()) < 0
            or int(tensors[LENGTHS].sum()) != len(tensors[CONTEXT])
        ):
            return "does not hold as many tokens as its lengths say"
        return None


class Store:
    """A finished store, read lazily: only the states asked for leave the disk.

    Opening it looks at store.json and at the size of every file; what a file holds is compared when its first row is
    read. Raises CheckpointError where a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "store.json"
        record = read_record(path)
        self.provenance = read_provenance(record["provenance"], path)
        self.times = self.provenance.stored_times
        self.num_trajectories, self.num_held_out = self.provenance.num_trajectories, self.provenance.num_held_out
        self.shard_size, total = record["shard_size"], self.provenance.total
        self._files = Files(folder, files_of(record, path))
        self.prompts = EncodedPrompts(self._files, record["num_prompts"], self.shard_size, self.provenance.format == 1)
        if not 1 <= self.prompts.count <= max(total, 1):
            raise CheckpointError(f"{path} is damaged: {self.prompts.count} prompts of {total} trajectories")

    @cached_property
    def held_out(self) -> range:
        """Indices of the trajectories that are never trained on."""
        return range(self.num_trajectories, self.provenance.total)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """The latents' (C, H, W), by the header of the first file. Raise CheckpointError if it has none."""
        path = self.folder / shard_name(0)
        match read_shapes(path).get("x0"):
            case [_, int() as channels, int() as height, int() as width]:
                return channels, height, width
        raise CheckpointError(f"{path} does not hold the x0 of trajectories")

    def states(self, indices: Tensor, points: Tensor) -> Tensor:
        """Return states (B, C, H, W) float32 of trajectories `indices` (B,) at positions `points` (B,) of `times`."""
        rows = zip(indices.tolist(), points.tolist(), strict=True)
        return torch.stack([self._shard(i)["states"][i % self.shard_size, point].float() for i, point in rows])

    def x0(self, indices: Tensor) -> Tensor:
        """Return the teacher's samples (B, C, H, W) float32: the last step's x0 of trajectories `indices` (B,)."""
        return torch.stack([self._shard(i)["x0"][i % self.shard_size].float() for i in indices.tolist()])

    def conditioning(self, indices: Tensor) -> Conditioning:
        """Return the prompts' conditioning (B, ...) float32 of trajectories `indices` (B,), as EncodedPrompts does."""
        return self.prompts.conditioning(indices)

    def _shard(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of the file that trajectory `index` is in."""
        first = index - index % self.shard_size
        size, points = min(self.shard_size, self.provenance.total - first), len(self.times)

        def complaint(tensors: dict[str, Tensor]) -> str | None:
            states, x0 = (tensors.get(name, torch.empty(0)).shape for name in ("states", "x0"))
            is_right = states == (size, points, *self.latent_shape) and x0 == (size, *self.latent_shape)
            return None if is_right else f"does not hold {size} trajectories of {points} states {self.latent_shape}"

        return self._files.read(shard_name(first), complaint)


def shard_ranges(total: int, size: int) -> list[range]:
    """Return the rows of every file, `size` each but for the last."""
    return [range(i, min(i + size, total)) for i in range(0, total, size)]


def shard_name(first: int) -> str:
    """Return the name of the file that begins with trajectory `first`."""
    return f"shard-{first:07d}.safetensors"


def prompts_name(first: int) -> str:
    """Return the name of the file that begins with prompt `first`."""
    return f"prompts-{first:07d}.safetensors"


def sizes_in(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file in `folder`, by name: one look at the folder."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def read_record(path: Path) -> dict[str, Any]:
    """Return what store.json says: "provenance", "shard_size", "num_prompts", "shards", "prompts", ...

    One of format 1 has no "prompts", and as many of them as trajectories. Raise CheckpointError where it is missing or
    damaged, or of another format.
    """
    record = read_json(path, provenance=dict, shard_size=int, shards=dict)
    if record["shard_size"] < 1:
        raise CheckpointError(f"{path} is damaged: shard_size is {record['shard_size']}")
    if (number := record["provenance"].get("format")) == 1:
        total = read_provenance(record["provenance"], path).total
        return record | {"num_prompts": total, "prompts": {}}
    if number != FORMAT:
        raise CheckpointError(f"{path.parent}: written in format {number}, this version reads 1 and {FORMAT}")
    if not isinstance(record.get("prompts"), dict) or type(record.get("num_prompts")) is not int:
        raise CheckpointError(f"{path} is damaged: prompts and num_prompts must be there")
    return record


def files_of(record: dict[str, Any], path: Path) -> dict[str, tuple[int | None, str]]:
    """Return size (None where it is not said) and sha256 of every file of a finished store, by name.

    Raise CheckpointError where `record`, which `path` holds, does not name the files that its numbers make.
    """
    provenance = read_provenance(record["provenance"], path)
    kinds = [(record["shards"], "trajectories", provenance.total, shard_name)]
    if provenance.format != 1:
        kinds.append((record["prompts"], "prompts", record["num_prompts"], prompts_name))
    files: dict[str, tuple[int | None, str]] = {}
    for named, what, rows, name_of in kinds:
        count = -(-rows // record["shard_size"])
        if count != len(named) or any(name_of(i * record["shard_size"]) not in named for i in range(count)):
            raise CheckpointError(
                f"{path} is damaged: {rows} {what} in files of {record['shard_size']} are not the {len(named)} files "
                "that it names"
            )
        for name, value in named.items():
            entry = [0, value] if provenance.format == 1 else value
            if not is_entry(entry):
                raise CheckpointError(f"{path} is damaged: {name} must have its size and its sha256")
            files[name] = (None if provenance.format == 1 else entry[0], entry[1])
    return files


def is_entry(value: object) -> bool:
    """Return whether `value` is what store.json says of a file: its size in bytes and its sha256."""
    return isinstance(value, list) and [type(one) for one in value] == [int, str]


def read_provenance(stated: dict, path: Path) -> Provenance:
    """`stated` in the file `path` as a Provenance. Raises CheckpointError for a field that is missing or wrong."""
    try:
        return TypeAdapter(Provenance).validate_json(json.dumps(stated), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, ("provenance", *wrong["loc"])))
        raise CheckpointError(f"{path} is damaged: {key}: {wrong['msg']}") from error


def refuse_mismatch(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming every field in which a store differs from what the run expects."""
    differences = [
        f"{name} is {found.get(name)!r}, expected {wanted!r}"
        for name, wanted in expected.items()
        if found.get(name) != wanted
    ]
    if differences:
        raise CheckpointError(f"{path} does not belong to this run: " + "; ".join(differences))
