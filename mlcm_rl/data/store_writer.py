"""Writes the store of trajectories: file by file, by any number of processes on any number of machines.

Each process claims the next file that nobody has, writes it, and lays a record beside it, `<file>.json`. Claims are
files made by O_EXCL, which one process alone can make, on a shared folder too. So a fast machine writes more than a
slow one, no file is written twice, and what a process that died had claimed is made at the next start, whoever makes
it. At the end the first process gathers the records in store.json. `trajectory_store.py` reads what is written here.
"""

import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.conditioning import CONTEXT, LENGTHS, Conditioning, in_dtype, rows_of
from ..storage import finite
from ..storage.files import CheckpointError, read_json, remove, require_space, write_json
from ..storage.hashing import is_unchanged, sha256
from ..storage.tensors import write_tensors
from ..training import processes
from .trajectory_store import (
    DTYPES,
    FORMAT,
    EncodedPrompts,
    Files,
    Provenance,
    Store,
    is_entry,
    prompts_name,
    read_provenance,
    read_record,
    refuse_mismatch,
    shard_name,
    shard_ranges,
    sizes_in,
)

Kind = Literal["prompts", "shards"]
NAMES = {"prompts": prompts_name, "shards": shard_name}
CLAIMS = "claims-"  # begins the name of a folder beside the files, of this run alone, while they are written


class Writer:
    """What one process writes of a store in `folder`; every process of a run has one, and all begin together.

    Files that are there and whole are left, the rest are claimed. The sizes of the batches that states were solved in
    stand in store.json: of another size they agree to about 1e-5 of the largest, since a device sums in another order.
    That is no part of the provenance, so that memory that does not suffice is no reason to begin anew. Raises
    CheckpointError where what is there is damaged, or was made by another teacher, from another seed or by an older
    version of this package. Waits for the other processes.
    """

    def __init__(self, folder: Path, provenance: Provenance, num_prompts: int, shard_size: int, batch_size: int):
        self.folder, self.provenance, self.batch_size = folder, provenance, batch_size
        self.num_prompts = min(num_prompts, provenance.total)
        self.claims = folder / f"{CLAIMS}{processes.broadcast(secrets.token_hex(4))}"
        self.record = processes.on_rank_zero(self._begun, shard_size)
        self.shard_size: int = self.record["shard_size"]

    def _begun(self, shard_size: int) -> dict[str, Any]:
        """Return store.json as it stands, with the records of those that were stopped; in the first process alone."""
        path = self.folder / "store.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        for claims in self.folder.glob(f"{CLAIMS}*"):  # of a run that ended, or will find that it was given up
            remove(claims)
        self.claims.mkdir()
        record: dict[str, Any] = {
            "provenance": vars(self.provenance),
            "shard_size": shard_size,
            "num_prompts": self.num_prompts,
            "batch_sizes": [],
            "shards": {},
            "prompts": {},
        }
        if path.is_file():
            found = read_json(path, provenance=dict)
            if found["provenance"].get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} was begun by an older version of this package, whose files this one does not go on with: "
                    f"delete {self.folder}, and the same command begins anew"
                )
            record = read_record(path)
            self._refuse_misplaced(record, path)
            refuse_mismatch(path, record["provenance"], vars(self.provenance))
            refuse_odd_record(record, path)
            record |= {"num_prompts": self.num_prompts}
        else:
            write_json(path, record)
        self._gather(record)
        self._refuse_damaged(record)
        return record

    def _refuse_misplaced(self, record: dict[str, Any], path: Path) -> None:
        """Raise CheckpointError if `path`, which holds `record`, was begun with other states than its name says."""
        begun = read_provenance(record["provenance"], path)
        own = begun.own_folder(self.folder)
        if begun.times != self.provenance.times and own != self.folder:
            count, expected = (len(one.stored_times) for one in (begun, self.provenance))
            raise CheckpointError(
                f"{path} was begun with {count} states of each trajectory, and the folder's name is that of a store of "
                f"{expected}: move {self.folder} to {own}, or delete it, and run again"
            )

    def _refuse_damaged(self, record: dict[str, Any]) -> None:
        """Forget files of `record` that are not there; raise CheckpointError for one that is not as it was written."""
        sizes = sizes_in(self.folder)
        for kind in ("prompts", "shards"):
            for name in [name for name in record[kind] if name not in sizes]:
                del record[kind][name]
            for name, (size, checksum) in record[kind].items():
                if sizes[name] != size or not is_unchanged(self.folder / name, checksum):
                    raise CheckpointError(
                        f"{self.folder / name} is damaged (its sha256 changed): delete it, and it is made again"
                    )

    # ---- what is still to write ----

    def missing(self, kind: Kind) -> list[range]:
        """Return the rows of every file of this `kind` that is still to write."""
        total = self.num_prompts if kind == "prompts" else self.provenance.total
        ranges = shard_ranges(total, self.shard_size)
        return [rows for rows in ranges if NAMES[kind](rows.start) not in self.record[kind]]

    def claimed(self, kind: Kind) -> Iterator[range]:
        """Yield one after the other the rows of those files that this process is the first to claim."""
        missing = self.missing(kind)
        first = len(missing) * processes.rank() // processes.world_size()  # apart, so that two seldom meet
        for rows in missing[first:] + missing[:first]:
            try:
                os.close(os.open(self.claims / f"{kind}-{rows.start}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{self.folder} is being written by another run, which began after this one: this one ends"
                ) from error
            yield rows

    def num_written(self) -> int:
        """Return how many trajectories are on the disk by now, by whichever process."""
        return min(self.provenance.total, _num_files_written(self.folder, self.record) * self.shard_size)

    def require_room(self, latent_shape: Sequence[int]) -> None:
        """Raise CheckpointError where the disk has no room for the states (each of `latent_shape`) still to write."""
        times = self.provenance.stored_times
        count = sum(map(len, self.missing("shards"))) * (len(times) + 1)  # and x0
        size = count * math.prod(latent_shape) * DTYPES[self.provenance.dtype].itemsize
        require_space(self.folder, size, " for its states alone (`mlcm plan` counts the encoded prompts too)")

    def encoded(self) -> EncodedPrompts:
        """Return what all prompts became, once they are written and gathered."""
        files = {name: (size, checksum) for name, (size, checksum) in self.record["prompts"].items()}
        return EncodedPrompts(Files(self.folder, files), self.num_prompts, self.shard_size)

    # ---- what is written ----

    def write_prompts(self, rows: range, conditioning: Conditioning, dtype: torch.dtype) -> None:
        """Write what the prompts `rows` became, (m, ...) float32, in the `dtype` that their encoders compute in."""
        tensors = in_dtype(conditioning, dtype)
        if LENGTHS in tensors:
            tensors[CONTEXT] = torch.cat([row[CONTEXT] for row in rows_of(tensors)])
        self._write(prompts_name(rows.start), tensors)

    def write(self, rows: range, states: Tensor, x0: Tensor) -> None:
        """Write the trajectories `rows`: states (n, P, C, H, W) at the stored times, x0 (n, C, H, W)."""
        dtype = DTYPES[self.provenance.dtype]
        tensors = {"states": states.to(dtype), "x0": x0.to(dtype)}
        if (name := finite.first_nonfinite(tensors)) is not None:
            raise ValueError(
                f"trajectories {rows.start} to {rows.stop - 1}: their {name} do not fit {self.provenance.dtype}, "
                f"whose largest is {finite.LARGEST[dtype]}: set dtype: float32 in the trajectories stage"
            )
        self._write(shard_name(rows.start), tensors)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self.folder / name
        write_tensors(path, tensors)
        record = {"size": path.stat().st_size, "sha256": sha256(path), "batch_size": self.batch_size}
        write_json(path.with_name(f"{name}.json"), record)

    def finish(self) -> None:
        """Put the records of all trajectories into store.json, and open the store as its readers will.

        Wait for all processes. Raise CheckpointError if the files are not those of a store.
        """
        self.gather("shards")
        processes.on_rank_zero(remove, self.claims)
        processes.on_rank_zero(lambda: Store(self.folder).num_trajectories)

    def gather(self, kind: Kind) -> None:
        """Put the records of all processes into store.json, those of every file of this `kind`. Waits for all.

        Raises CheckpointError where one of these is not there: the machines do not see the same folder.
        """
        names = {NAMES[kind](rows.start) for rows in self.missing(kind)}
        self.record = processes.on_rank_zero(self._gathered, names)

    def _gathered(self, names: set[str]) -> dict[str, Any]:
        for _ in range(processes.LOOKS):
            self._gather(self.record)
            if not (absent := names - set(self.record["shards"]) - set(self.record["prompts"])):
                return self.record
            time.sleep(processes.LOOK_SECONDS)
        seconds = processes.LOOKS * processes.LOOK_SECONDS
        raise CheckpointError(
            f"{self.folder / min(absent)} was claimed by another process and is not seen here after {seconds:.0f} s: "
            "that process has ended, or its machine does not share this folder. What is there is as it was, and the "
            "same command goes on from it"
        )

    def _gather(self, record: dict[str, Any]) -> None:
        """Move the records that lie beside files into `record` and store.json. In the first process alone."""
        beside = sorted(self.folder.glob("*.safetensors.json"))
        for path in beside:
            try:
                one = read_json(path, size=int, sha256=str, batch_size=int)
            except CheckpointError as error:
                raise CheckpointError(f"{error}: delete it, and the file that it is of is made again") from error
            kind = "prompts" if path.name.startswith("prompts-") else "shards"
            record[kind][path.name.removesuffix(".json")] = [one["size"], one["sha256"]]
            if kind == "shards":
                record["batch_sizes"] = sorted({*record["batch_sizes"], one["batch_size"]})
        if beside:
            for kind in ("prompts", "shards"):
                record[kind] = dict(sorted(record[kind].items()))
            write_json(self.folder / "store.json", record)
            for path in beside:
                path.unlink()


def refuse_odd_record(record: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError if the `record` of an unfinished store is not as `Writer` writes it to `path`."""
    sizes = record.get("batch_sizes")
    is_right = isinstance(sizes, list) and all(type(size) is int for size in sizes)
    entries = [*record["shards"].values(), *record["prompts"].values()]
    if not is_right or not all(map(is_entry, entries)):
        raise CheckpointError(
            f"{path} is damaged: batch_sizes must be numbers, and every file must have its size and its sha256: "
            "delete it, and the same command makes the store anew"
        )


def share_written(folder: Path, num_stored: int) -> float:
    """Return how much of a store of `num_stored` trajectories is on the disk in `folder`, from 0 to 1.

    Raise CheckpointError where store.json is missing or damaged.
    """
    record = read_record(folder / "store.json")
    return min(1.0, _num_files_written(folder, record) * record["shard_size"] / num_stored)


def _num_files_written(folder: Path, record: dict[str, Any]) -> int:
    """Return how many files of trajectories are in `record` or have one beside them in `folder`."""
    return len(record["shards"]) + len(list(folder.glob("shard-*.safetensors.json")))
