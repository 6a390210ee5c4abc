"""Rows that an evaluation has measured, found again by every later one that asks for the same.

`<runs>/rows/<hash>` holds a row's record, the pictures that a page shows of it, and the reference's latents. The hash
is of all that can change them: the network and how it was drawn, prompts, noise, instruments. So of a new student only
its own rows are drawn, and not the teacher's, which cost far more.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..pipeline.fingerprint import hashed, identity
from ..recipe import Evaluate, Recipe
from ..report.page import picture_path
from ..storage import lock
from ..storage.files import read_json, remove_partial, replacing, write_json
from ..storage.hashing import folder_hash
from .rows import Row

CHOICES = ("num_steps", "gammas", "grids", "students", "teacher_steps", "teacher_solvers", "also", "keep_pictures")
DRAWN_BY = ("num_steps", "solver", "guidance_scale", "times", "gamma", "conditioned")  # of a row


@dataclass(frozen=True)
class RowStore:
    """The rows of one recipe's runs, for evaluations that share `measured`: all that a value depends on but the row."""

    folder: Path
    measured: dict[str, Any]
    reference: str  # id of the row that distances are taken to

    def path(self, row: Row, student: Path | None) -> Path:
        """Where `row` of the student in a folder, None for the teacher, is or will be."""
        return self.folder / hashed(
            self.measured | {"row": drawn_by(row), "student": folder_hash(student) if student else None}
        )

    def sweep(self) -> None:
        """Delete what an evaluation that was killed left unfinished here."""
        with lock.folder_lock(self.folder, wait=True):
            remove_partial(self.folder)

    def keep(self, row: Row, student: Path | None, record: dict[str, Any], evaluation: Path) -> None:
        """Put `row` of the stage in `evaluation`, whose `record` is all there is to it now, here for others.

        Does nothing where it is here already, and waits for other evaluations that put something here.
        """
        path = self.path(row, student)
        with lock.folder_lock(self.folder, wait=True):
            if path.exists():
                return
            self._write(row, record, evaluation, path)

    def _write(self, row: Row, record: dict[str, Any], evaluation: Path, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.mkdir(parents=True)
            write_json(temporary / "record.json", record)
            shutil.copytree(picture_path(evaluation, row.id, 0).parent, temporary / "pictures")
            if row.id == self.reference:
                shutil.copytree(reference_folder(evaluation), temporary / "reference")

    def bring(self, row: Row, student: Path | None, evaluation: Path) -> bool:
        """Put `row` into the stage in `evaluation` as if it had been drawn there; False where it is not here."""
        path = self.path(row, student)
        if not path.is_dir():
            return False
        places = {"pictures": picture_path(evaluation, row.id, 0).parent, "reference": reference_folder(evaluation)}
        for name, place in places.items():
            if (path / name).is_dir():
                shutil.copytree(path / name, place, dirs_exist_ok=True)
        record = read_json(path / "record.json", metrics=dict)
        write_json(record_path(evaluation, row), record | asdict(row))
        return True


def open_store(stage: Evaluate, recipe: Recipe, parents: dict[str, Path], reference: Row, device: str) -> RowStore:
    """The store of `recipe`'s runs for what `stage` measures on `device`, beside the rows of its table.

    `parents` maps a kind of stage to its finished folder; of these a trained teacher and a trained reward count.
    """
    made = {kind: path.name for kind, path in parents.items() if kind in ("train_teacher", "train_reward")}
    whole = identity(stage, recipe, made)
    settings = {name: value for name, value in whole["stage"].items() if name not in CHOICES}
    measured = whole | {"stage": settings, "reference": drawn_by(reference), "device": device}
    return RowStore(Path(recipe.runs) / "rows", measured, reference.id)


def drawn_by(row: Row) -> dict[str, Any]:
    """What of `row` its pictures depend on, beside the network."""
    return {name: getattr(row, name) for name in DRAWN_BY}


def record_path(evaluation: Path, row: Row) -> Path:
    """Where the stage in `evaluation` keeps the record of a finished row until all are."""
    return evaluation / "rows" / f"{row.id}.json"


def reference_folder(evaluation: Path) -> Path:
    """Where the stage in `evaluation` keeps the reference's latents, a file a sample."""
    return evaluation / "rows" / "reference"
