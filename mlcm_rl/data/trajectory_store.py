"""The store of teacher trajectories: written shard by shard, verified, memory-mapped when read.

A store is a folder of `shard-*.safetensors`, each with `states` (n, steps + 1, C, H, W) from noise at the first grid
time to index 0, `x0` (n, C, H, W), the last step's own estimate of the clean latents, and one entry for every tensor of
the prompts' conditioning. `store.json` has their provenance and every shard's sha256.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from ..models.base import Base, Conditioning
from ..models.teachers import teacher_hash
from ..recipe import Teacher
from ..storage import finite
from ..storage.files import CheckpointError, read_json, require_space, write_json
from ..storage.hashing import sha256
from ..storage.tensors import read_shapes, read_tensors, write_tensors
from ..training import processes

FORMAT = 1  # of the files
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Provenance:
    """Everything that determines the states."""

    teacher_hash: str
    scheduler: dict
    prediction_type: str
    solver: str
    grid: list[int]
    guidance_scale: float
    prompts_hash: str
    num_trajectories: NonNegativeInt
    num_held_out: NonNegativeInt
    seed: int
    dtype: str
    maths: int
    format: int = FORMAT


def expected_of(teacher: Teacher, base: Base) -> dict[str, Any]:
    """Return the provenance that the store of a stage with this `teacher` must have.

    Seed, prompts, grid and precision are settings of the trajectories stage. The teacher's weights are compared by
    content, wherever they are.
    """
    return {
        "teacher_hash": teacher_hash(teacher),
        "prediction_type": base.prediction_type,
        "guidance_scale": teacher.guidance_scale,
    }


class Writer:
    """Writes a store and resumes it: whole shards stay, and `missing` returns the others.

    store.json lists the sizes of the batches that states were solved in: in another size they agree to about 1e-5 of
    the largest, since a device sums in another order. The size is not part of the provenance, so that a run which is
    out of memory can go on with smaller batches. Raises CheckpointError if the folder has damaged shards, or those of
    another teacher or seed.
    """

    def __init__(self, folder: Path, provenance: Provenance, shard_size: int, batch_size: int):
        self.folder, self.provenance, self.shard_size, self.batch_size = folder, provenance, shard_size, batch_size
        self.total = provenance.num_trajectories + provenance.num_held_out
        self.record: dict[str, Any] = {"provenance": vars(provenance), "shard_size": shard_size, "shards": {}}
        path = folder / "store.json"
        if path.is_file():
            self.record = read_record(path)
            refuse_mismatch(path, self.record["provenance"], vars(provenance))
            self.shard_size = self.record["shard_size"]

    def missing(self) -> list[range]:
        """Return the index ranges of the shards that are not written yet."""
        return [indices for indices in shard_ranges(self.total, self.shard_size) if not self._is_whole(indices)]

    def require_room(self, missing: Sequence[range], latent_shape: Sequence[int]) -> None:
        """Raise CheckpointError if the disk has no room for the states (each of `latent_shape`) of `missing`."""
        count = sum(map(len, missing)) * (len(self.provenance.grid) + 1)  # and x0
        require_space(self.folder, count * math.prod(latent_shape) * DTYPES[self.provenance.dtype].itemsize)

    def write(self, indices: range, states: Tensor, x0: Tensor, conditioning: Conditioning) -> None:
        """Write one shard: states (n, steps + 1, C, H, W), x0 (n, C, H, W), conditioning (n, ...).

        `record_shards` enters it in store.json. Raise ValueError for values that are not finite in the store's dtype.
        """
        path = self.folder / shard_name(indices)
        dtype = DTYPES[self.provenance.dtype]
        tensors = {f"conditioning.{name}": value.to(dtype) for name, value in conditioning.items()}
        tensors |= {"states": states.to(dtype), "x0": x0.to(dtype)}
        if (name := finite.first_nonfinite(tensors)) is not None:
            raise ValueError(
                f"trajectories {indices.start} to {indices.stop - 1}: their {name} do not fit {self.provenance.dtype}, "
                f"whose largest is {finite.LARGEST[dtype]}: set dtype: float32 in the trajectories stage"
            )
        write_tensors(path, tensors)
        self.record["shards"][path.name] = sha256(path)
        sizes = self.record.get("batch_sizes", [])
        self.record["batch_sizes"] = sorted({*sizes, self.batch_size})

    def record_shards(self) -> None:
        """Write the whole shards of every process into store.json. Waits for all."""
        for shards in processes.gather_objects(self.record["shards"]):
            self.record["shards"] |= shards
        processes.on_rank_zero(write_json, self.folder / "store.json", self.record)

    def _is_whole(self, indices: range) -> bool:
        path = self.folder / shard_name(indices)
        if path.name not in self.record["shards"] or not path.is_file():
            return False
        if sha256(path) != self.record["shards"][path.name]:
            raise CheckpointError(f"{path} is damaged (its sha256 changed): delete it, and it is made again")
        return True


class Store:
    """A finished store, read lazily: only the states in use leave the disk.

    Raises CheckpointError if a shard is missing or damaged, or if the store's provenance differs from a field of
    `expected` (names of Provenance); without `expected` any store will do.
    """

    def __init__(self, folder: Path, expected: Mapping[str, Any] | None = None):
        self.folder = folder
        path = folder / "store.json"
        record = read_record(path)
        if expected is not None:
            refuse_mismatch(path, record["provenance"], expected)
        self.provenance = read_provenance(record["provenance"], path)
        if self.provenance.format != FORMAT:
            raise CheckpointError(f"{folder}: written in format {self.provenance.format}, this version reads {FORMAT}")
        self.grid = self.provenance.grid
        self.num_trajectories, self.num_held_out = self.provenance.num_trajectories, self.provenance.num_held_out
        self.shard_size = record["shard_size"]
        self._names = self._check(record["shards"])

    def _check(self, checksums: dict[str, str]) -> list[str]:
        """Return the names of the shards, in order, after checking their sha256, names, shapes and row counts.

        Raise CheckpointError if one is missing, changed or has another content than store.json says.
        """
        total = self.num_trajectories + self.num_held_out
        if -(-total // self.shard_size) != len(checksums):  # before a loop over as many shards as it says
            raise CheckpointError(
                f"{self.folder / 'store.json'} is damaged: {total} trajectories in shards of {self.shard_size} "
                f"are not {len(checksums)} shards"
            )
        expected_shapes = None
        ranges = shard_ranges(total, self.shard_size)
        for indices in ranges:
            path = self.folder / shard_name(indices)
            if not path.is_file() or sha256(path) != checksums.get(path.name):
                raise CheckpointError(
                    f"{path} is missing or damaged: delete it and {self.folder / 'manifest.json'}, and the same "
                    "command makes it again"
                )
            shapes = {name: tuple(shape) for name, shape in read_shapes(path).items()}
            row_shapes = {name: shape[1:] for name, shape in shapes.items()}
            expected_shapes = expected_shapes or row_shapes
            num_rows = {shape[:1] for shape in shapes.values()}
            whole = row_shapes.get("states", ())[:1] == (len(self.grid),) and "x0" in row_shapes
            if not whole or row_shapes != expected_shapes or num_rows != {(len(indices),)}:
                raise CheckpointError(f"{path} does not hold {len(indices)} trajectories of {len(self.grid)} states")
        return [shard_name(indices) for indices in ranges]

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        return [read_tensors(self.folder / name) for name in self._names]

    @cached_property
    def held_out(self) -> range:
        """Indices of the trajectories that are never trained on."""
        return range(self.num_trajectories, self.num_trajectories + self.num_held_out)

    def states(self, indices: Tensor, points: Tensor) -> Tensor:
        """Return states (B, C, H, W) float32 of trajectories `indices` (B,) at grid positions `points`; 0 is noise."""
        return self._rows("states", indices, points)

    def x0(self, indices: Tensor) -> Tensor:
        """Return the teacher's samples (B, C, H, W) float32: the last step's x0 of trajectories `indices` (B,)."""
        return self._rows("x0", indices)

    def conditioning(self, indices: Tensor) -> Conditioning:
        """Return the prompts' conditioning (B, ...) float32 of trajectories `indices` (B,)."""
        names = [name for name in self._shards[0] if name.startswith("conditioning.")]
        return {name.removeprefix("conditioning."): self._rows(name, indices) for name in names}

    def _rows(self, name: str, indices: Tensor, points: Tensor | None = None) -> Tensor:
        rows = [self._shards[i // self.shard_size][name][i % self.shard_size] for i in indices.tolist()]
        if points is not None:
            rows = [row[point] for row, point in zip(rows, points.tolist(), strict=True)]
        return torch.stack([row.float() for row in rows])


def shard_ranges(total: int, size: int) -> list[range]:
    """Return the range of trajectories of every shard, `size` each except the last."""
    return [range(i, min(i + size, total)) for i in range(0, total, size)]


def shard_name(indices: range) -> str:
    return f"shard-{indices.start:07d}.safetensors"


def read_record(path: Path) -> dict:
    """Return the content of store.json. Raise CheckpointError if it is missing or damaged."""
    record = read_json(path, provenance=dict, shard_size=int, shards=dict)
    if record["shard_size"] < 1:
        raise CheckpointError(f"{path} is damaged: shard_size is {record['shard_size']}")
    return record


def read_provenance(record: dict, path: Path) -> Provenance:
    """Return the `record` of the file `path` as a Provenance. Raise CheckpointError for a missing or wrong field."""
    try:
        return TypeAdapter(Provenance).validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, ("provenance", *wrong["loc"])))
        raise CheckpointError(f"{path} is damaged: {key}: {wrong['msg']}") from error


def refuse_mismatch(path: Path, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise CheckpointError with every field in which the `actual` provenance differs from the `expected` one."""
    differences = [
        f"{name} is {actual.get(name)!r}, expected {value!r}"
        for name, value in expected.items()
        if actual.get(name) != value
    ]
    if differences:
        raise CheckpointError(f"{path} does not belong to this run: " + "; ".join(differences))
