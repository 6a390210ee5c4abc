"""The rows of an evaluation: which network, drawn by which sampler, at what cost."""

from dataclasses import dataclass
from pathlib import Path

from ..equations.segments import paper_times, sampling_times
from ..models.base import Base
from ..models.gammas import own_gamma, tuned_from
from ..models.students import DESCRIPTION_FILE, describe
from ..recipe import Evaluate
from ..recipe.experiment import STUDENTS
from ..storage.files import read_json
from . import training_cost
from .undistilled import LABELS


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    id: str  # also the folder of its pictures
    role: str  # reference | undistilled | student
    name: str  # "teacher", or which student
    sampler: str  # in words
    num_steps: int
    num_evaluations: int
    solver: str | None = None  # of the teacher
    guidance_scale: float | None = None  # of the teacher; 1 is none
    times: tuple[int, ...] | None = None  # of a student, and so are the rest
    gamma: float | None = None
    grid: str | None = None
    num_segments: int | None = None
    conditioned: bool = False
    default: bool = False  # at the student's own gamma, on the milestones
    training: dict[str, float] | None = None  # what the student's training cost


@dataclass(frozen=True)
class Entry:
    """A student that is to be measured, known by what its folder says and not loaded yet."""

    name: str
    folder: Path
    num_segments: int
    conditioned: bool
    training: training_cost.TrainingCost
    own_gamma: float  # what suits it, or what it was tuned under
    gammas: tuple[float, ...]  # to measure; its own first, if that is one


def entries(stage: Evaluate, parents: dict[str, Path], base: Base) -> list[Entry]:
    """Every student of the table. Raises ValueError for one of another kind of teacher than `base`."""
    folders = student_folders(stage, parents)
    tuned = {name: of for name, folder in folders.items() if (of := tuned_from(folder)) is not None}
    found: list[Entry] = []
    for name, folder in folders.items():
        described = describe(folder)
        for key, expected in (("family", base.family), ("prediction_type", base.prediction_type)):
            if described[key] != expected:
                raise ValueError(f"{folder}: the student's {key} is {described[key]}, the teacher's {expected}")
        cost = training_cost.of_student(folder)
        shape = (described["num_segments"], described["conditioned"])
        own = own_gamma(folder)
        beside = [gamma for one, (distilled, gamma) in tuned.items() if name == one or is_student_of(folder, distilled)]
        gammas = [own] if training_cost.is_snapshot(folder) else [*stage.gammas, *beside]
        gammas.sort(key=lambda gamma: gamma != own)
        found.append(Entry(name, folder, *shape, cost, own, tuple(dict.fromkeys(gammas))))
    return found


def is_student_of(folder: Path, stage: str) -> bool:
    """Whether `folder` is what the stage in the folder named `stage` has finished with."""
    return folder.name == "student" and folder.resolve().parent.name == stage


def student_folders(stage: Evaluate, parents: dict[str, Path]) -> dict[str, Path]:
    """Name -> folder of every student: the recipe's own first, distilled and tuned, then those of `also`.

    The distilled one is "student", tuned ones are named for the stage that tuned them; those of `also` for the recipe
    that made them, by their folder too where one recipe made several. With `students: snapshots` the one after each
    phase comes along, but for the last phase's, which is the student.
    Raises ValueError for an entry of `also` without a student.
    """
    stages = {"student" if kind == "distill" else kind: parents[kind] for kind in STUDENTS if kind in parents}
    for path in map(Path, stage.also):
        if not (path / "student" / DESCRIPTION_FILE).is_file():
            raise ValueError(f"also: {path} holds no student; name the folder of a finished distill stage")
        name = str(read_json(path / "manifest.json", recipe=dict)["recipe"].get("name"))
        stages[f"{name} ({path.name})" if name in stages else name] = path
    found = {}
    for name, path in stages.items():
        found[name] = path / "student"
        if stage.students == "snapshots":
            found |= {f"{name} {one.name}": one for one in sorted((path / "snapshots").glob("phase-*"))[:-1]}
    return found


def teacher_rows(stage: Evaluate, guidance_scale: float) -> list[Row]:
    """The reference first, the other guided rows, then every solver at each of the students' numbers of evaluations.

    A guided step costs two evaluations, so only an even number has a guided row.
    """
    guided = guidance_scale != 1.0
    label = "DDIM, guided" if guided else "DDIM"
    rows = [
        Row(f"teacher-{n}", "reference", "teacher", label, n, (1 + guided) * n, "ddim", guidance_scale)
        for n in dict.fromkeys(reversed(stage.teacher_steps))
    ]
    for solver in stage.teacher_solvers:
        for n in stage.sampling_steps:
            at = ("undistilled", "teacher")
            if guided and n % 2 == 0:
                label = f"{LABELS[solver]}, guided"
                rows.append(Row(f"{solver}-guided-{n}", *at, label, n // 2, n, solver, guidance_scale))
            rows.append(Row(f"{solver}-unguided-{n}", *at, f"{LABELS[solver]}, unguided", n, n, solver, 1.0))
    return rows


def student_rows(stage: Evaluate, index: int, student: Entry) -> list[Row]:
    """`student` at each number of steps, gamma (its own too) and grid; what would be equal pictures is one row.

    (With one step gamma changes nothing, and grids may agree.) A student told its target may stop anywhere, so it takes
    the even grid; the others take one that holds their K boundaries.
    """
    rows: dict[tuple[tuple[int, ...], float | None], Row] = {}
    num_segments = 1 if student.conditioned else student.num_segments
    for gamma in student.gammas:
        for grid in sorted(stage.grids):  # milestones, paper
            for n in stage.sampling_steps:
                times = tuple(paper_times(n) if grid == "paper" else sampling_times(n, num_segments))
                rows.setdefault(
                    (times, gamma if n > 1 else None),
                    Row(
                        id=f"student{index}-{n}-gamma{gamma:g}-{grid}",
                        role="student",
                        name=student.name,
                        sampler=f"gamma {gamma:g}" + (", paper's grid" if grid == "paper" else ""),
                        num_steps=n,
                        num_evaluations=n,
                        times=times,
                        gamma=gamma,
                        grid=grid,
                        num_segments=student.num_segments,
                        conditioned=student.conditioned,
                        default=gamma == student.own_gamma and grid == "milestones",
                        training=student.training.record(),
                    ),
                )
    return list(rows.values())
