"""A store of measured rows, which later evaluations reuse.

`<runs>/rows/<hash>` holds a row's record, the pictures that a page shows of it, and the reference's latents. The hash
is over everything that can change them: network, sampler, prompts, noise, instruments. An evaluation of a new student
then samples only its own rows, and not the teacher's, which cost far more.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline.fingerprint import hashed, identity
from ..recipe import Evaluate, Recipe
from ..report.page import picture_path
from ..report.types import SampledRow
from ..storage import lock
from ..storage.files import read_json, remove_partial, replacing, write_json
from ..storage.hashing import folder_hash

# Keys of an evaluation by their first names, as in a fingerprint.
CHOICES = ("num_steps", "gammas", "grids", "students", "teacher_steps", "teacher_solvers", "also", "keep_pictures")
SAMPLER_FIELDS = (
    "num_steps",
    "solver",
    "guidance_scale",
    "times",
    "gamma",
    "conditioned",
)  # of a row: what its pictures depend on


@dataclass(frozen=True)
class RowStore:
    """The rows of one recipe's runs, for evaluations with equal `measured`: all that values depend on but the row."""

    folder: Path
    measured: dict[str, Any]
    reference: str  # id of the row that distances are measured to

    def path(self, row: SampledRow, student: Path | None) -> Path:
        """Return the folder of `row` of the student in a folder (None for the teacher), whether or not it exists."""
        return self.folder / hashed(
            self.measured | {"row": sampler_of(row), "student": folder_hash(student) if student else None}
        )

    def sweep(self) -> None:
        """Delete the unfinished folders of evaluations that were killed."""
        with lock.folder_lock(self.folder, wait=True):
            remove_partial(self.folder)

    def keep(self, row: SampledRow, student: Path | None, record: dict[str, Any], evaluation: Path) -> None:
        """Store `row` of the stage in `evaluation` with its finished `record`, unless it is stored already.

        Wait for other evaluations that are storing rows.
        """
        path = self.path(row, student)
        with lock.folder_lock(self.folder, wait=True):
            if path.exists():
                return
            self._write(row, record, evaluation, path)

    def _write(self, row: SampledRow, record: dict[str, Any], evaluation: Path, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.mkdir(parents=True)
            write_json(temporary / "record.json", record)
            shutil.copytree(picture_path(evaluation, row.id, 0).parent, temporary / "pictures")
            if row.id == self.reference:
                shutil.copytree(reference_folder(evaluation), temporary / "reference")

    def bring(self, row: SampledRow, student: Path | None, evaluation: Path) -> bool:
        """Copy `row` into the stage in `evaluation` as if it was sampled there; return False if it is not stored."""
        path = self.path(row, student)
        if not path.is_dir():
            return False
        places = {"pictures": picture_path(evaluation, row.id, 0).parent, "reference": reference_folder(evaluation)}
        for name, place in places.items():
            if (path / name).is_dir():
                shutil.copytree(path / name, place, dirs_exist_ok=True)
        record = read_json(path / "record.json", metrics=dict)
        write_json(record_path(evaluation, row), record | row.model_dump())
        return True


def open_store(
    stage: Evaluate, recipe: Recipe, parents: dict[str, Path], reference: SampledRow, device: str
) -> RowStore:
    """Return the store of `recipe`'s runs for the measurements of `stage` on `device`.

    `parents` maps a kind of stage to its finished folder; a trained teacher and a trained reward enter the hash.
    """
    networks = {kind: path.name for kind, path in parents.items() if kind in ("train_teacher", "train_reward")}
    described = identity(stage, recipe, networks)
    settings = {name: value for name, value in described["stage"].items() if name not in CHOICES}
    measured = described | {"stage": settings, "reference": sampler_of(reference), "device": device}
    return RowStore(Path(recipe.runs) / "rows", measured, reference.id)


def sampler_of(row: SampledRow) -> dict[str, Any]:
    """Return the fields of `row` that its pictures depend on, beside the network."""
    return {name: getattr(row, name) for name in SAMPLER_FIELDS}


def record_path(evaluation: Path, row: SampledRow) -> Path:
    """Return the file in which the stage in `evaluation` keeps the record of a row until all rows are finished."""
    return evaluation / "rows" / f"{row.id}.json"


def reference_folder(evaluation: Path) -> Path:
    """Return the folder in which the stage in `evaluation` keeps the reference's latents, one file per sample."""
    return evaluation / "rows" / "reference"
