"""Stage `start`: take in a student from elsewhere, in place of a distill stage."""

from pathlib import Path

from ..models import student_files, teachers
from ..recipe import Recipe, Start
from ..training import processes
from ..training.devices import device_of


def run(stage: Start, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Write the student that `stage` names to `folder`/student, as a student of the recipe's teacher.

    Raises as `student_files.take_in`.
    """
    base = teachers.load(recipe.teacher, device_of(recipe.device))
    processes.on_rank_zero(student_files.take_in, base, stage, folder / "student")
