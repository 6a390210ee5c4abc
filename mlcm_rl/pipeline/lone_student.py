"""A student that no run has, such as a published LoRA's file, over a teacher that a command names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from ..models import student_files, teachers
from ..models.base import Base
from ..recipe import Teacher, student_sources, teacher_check
from ..recipe.families import family_of, names
from ..recipe.start import StudentSource
from ..storage.files import read_json
from ..training.devices import device_of
from .errors import BadArgument, prefix_errors


@dataclass(frozen=True)
class Over:
    """What a command says of such a student: the folder of its teacher, and what its files may not state.

    `grid` is a name or times with commas between; the `family` is by default the one that loads the teacher's pipeline.
    """

    teacher: Path
    family: str | None = None
    grid: str | None = None
    gamma: float | None = None
    alpha: float | None = None
    prediction: str | None = None


def source_of(path: Path, over: Over) -> StudentSource:
    """Return the student at `path`. Raise BadArgument where that is none, and for what no one states of it."""
    grid = over.grid
    times = [int(one) for one in grid.split(",")] if grid and grid.replace(",", "").isdigit() else grid
    try:
        stated = {"gamma": over.gamma, "grid": times, "alpha": over.alpha, "prediction": over.prediction}
        source = StudentSource.model_validate({"path": str(path), **stated})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise BadArgument(f"--{wrong['loc'][0]}: {student_sources.VALUES[str(wrong['loc'][0])]}") from error
    with prefix_errors(str(path), BadArgument):
        found = student_sources.find(path)
    if missing := [name for name in found.unstated if getattr(source, name) is None]:
        ways = "; ".join(student_sources.VALUES[name] for name in missing)
        options = " ".join(f"--{name} ..." for name in missing)
        raise BadArgument(
            f"{path} does not state how it is sampled: add {options}, where {ways}. The model's card says which "
            "(docs/start_from.md)"
        )
    with prefix_errors(str(path), BadArgument):
        student_sources.refuse_unstated(found, source)  # an alpha without effect
    return source


def teacher_in(over: Over, text_adapter: Path | None = None) -> Teacher:
    """Return the teacher in a folder. Raise BadArgument where it is none, or of a family that no one states."""
    index = over.teacher / "model_index.json"
    if not index.is_file():
        raise BadArgument(f"--teacher: {over.teacher} holds no model_index.json: name a folder in diffusers' format")
    with prefix_errors("--teacher", BadArgument):
        pipeline = read_json(index).get("_class_name")
    family = over.family or (family_of(pipeline) if isinstance(pipeline, str) else None)
    if family is None or family not in names():
        what = f"no family is called {family}" if family else f"no family loads {pipeline}, which {index} names"
        raise BadArgument(f"--family: {what}; known are {', '.join(names())}")
    with prefix_errors("--teacher", BadArgument):
        teacher_check.refuse(over.teacher, family, None)
    adapter = None if text_adapter is None else str(text_adapter)
    return Teacher(path=str(over.teacher), family=family, text_adapter=adapter)


@contextmanager
def taken_in(source: StudentSource, teacher: Teacher, device: str) -> Iterator[tuple[Base, Path]]:
    """Yield the loaded teacher and a folder with `student` in it, as a stage leaves one, that is gone afterwards."""
    base = teachers.load(teacher, device_of(device))
    with TemporaryDirectory() as place:
        student_files.take_in(base, source, Path(place) / "student")
        yield base, Path(place)
