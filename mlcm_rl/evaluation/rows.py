"""The rows of an evaluation: which network, under which sampler, at which cost."""

from dataclasses import dataclass
from pathlib import Path

from ..equations.segments import paper_times
from ..models.base import Base
from ..models.gammas import own_gamma, tuned_from
from ..models.grids import MILESTONES, SamplingGrid
from ..models.student_description import DESCRIPTION_FILE, describe, grid_of, jumps_whole_segments
from ..models.students import refuse_other
from ..recipe import Evaluate, Teacher
from ..recipe.experiment import STUDENTS
from ..recipe.families import layout_of
from ..recipe.student_sources import finished_in
from ..report.types import SampledRow
from ..storage.files import read_json
from ..training.progress import tell
from . import training_cost
from .undistilled import label_of


@dataclass(frozen=True)
class Entry:
    """A student to measure, described by its folder and not loaded yet."""

    name: str
    folder: Path
    num_segments: int
    conditioned: bool
    grid: SamplingGrid  # its own
    training: training_cost.TrainingCost | None  # None for one from elsewhere
    own_gamma: float  # that of its tuning, or the default for its kind
    gammas: tuple[float, ...]  # to measure; its own first, if it is among them
    steps: tuple[int, ...] = ()  # the numbers of steps that it is for, where it draws noise in others; empty: all

    def draws_in(self, num_steps: int) -> bool:
        """Return whether it can be sampled in so many steps."""
        return self.grid.has(num_steps) and (not self.steps or num_steps in self.steps)


def entries(stage: Evaluate, parents: dict[str, Path], base: Base) -> list[Entry]:
    """Return every student of the table. Raise ValueError for one that is not a student of `base`."""
    folders = student_folders(stage, parents)
    origins = {name: origin for name, folder in folders.items() if (origin := tuned_from(folder)) is not None}
    students: list[Entry] = []
    for name, folder in folders.items():
        description = describe(folder)
        refuse_other(folder, description, base)
        cost = training_cost.of_student(folder)
        shape = (description["num_segments"], description["conditioned"], grid_of(description))
        default = own_gamma(folder)
        # a tuned student and the one that it was tuned from are both measured at the gamma of the tuning
        of_tuning = [
            gamma for tuned, (origin, gamma) in origins.items() if name == tuned or is_student_of(folder, origin)
        ]
        stated = [default] * ("gamma" in description)  # by one from elsewhere
        gammas = [default] if training_cost.is_snapshot(folder) else [*stage.gammas, *of_tuning, *stated]
        gammas.sort(key=lambda gamma: gamma != default)
        steps = () if description["conditioned"] else tuple(description["budgets"])
        others = [str(n) for n in stage.sampling_steps if n != description["num_segments"]]
        if others and not steps and jumps_whole_segments(description):
            learned = f"{name} learned the jumps of {description['num_segments']} steps alone (starts: milestones)"
            tell("evaluate", f"{learned}: in {', '.join(others)} steps it begins at times that it has not seen")
        students.append(Entry(name, folder, *shape, cost, default, tuple(dict.fromkeys(gammas)), steps))
    return students


def is_student_of(folder: Path, stage: str) -> bool:
    """Return whether `folder` is the finished student of the stage in the folder named `stage`."""
    return folder.name == "student" and folder.resolve().parent.name == stage


def student_folders(stage: Evaluate, parents: dict[str, Path]) -> dict[str, Path]:
    """Return the folder of every student by name: the recipe's own first, distilled and tuned, then those of `also`.

    The distilled one is "student", the others have the name of their stage, and one that was tuned and is of no latest
    stage is "<stage>'s start". Those of `also` have the name of their recipe, with the folder's name if the recipe has
    several. `students: snapshots` adds the student after each phase but the last, whose student is the result. Raise
    ValueError for an entry of `also` without a student.
    """
    stages = {"student" if kind == "distill" else kind: parents[kind] for kind in STUDENTS if kind in parents}
    for kind, folder in list(stages.items()):
        origin = tuned_from(folder / "student")
        if origin is not None and origin[0] not in [one.resolve().name for one in stages.values()]:
            stages[f"{kind}'s start"] = folder.resolve().parent / origin[0]
    for path in map(finished_in, map(Path, stage.also)):
        if not (path / "student" / DESCRIPTION_FILE).is_file():
            raise ValueError(f"also: {path} holds no student; name a run, or a finished stage that leaves one")
        name = str(read_json(path / "manifest.json", recipe=dict)["recipe"].get("name"))
        stages[f"{name} ({path.name})" if name in stages else name] = path
    folders = {}
    for name, path in stages.items():
        folders[name] = path / "student"
        if stage.students == "snapshots":
            phases = sorted((path / "snapshots").glob("phase-*"))[:-1]
            folders |= {f"{name} {phase.name}": phase for phase in phases}
    return folders


def teacher_rows(stage: Evaluate, teacher: Teacher) -> list[SampledRow]:
    """Return the reference, the other guided rows, then every solver at each of the students' numbers of evaluations.

    Where a guided step costs two evaluations, only an even number has a guided row.
    """
    guidance_scale, cost = teacher.guidance_scale, teacher.evaluations
    guided = guidance_scale != 1.0
    is_flow = layout_of(teacher.family).is_flow
    label = label_of("ddim", is_flow) + (", guided" if guided else "")

    def row(role: str, name: str, label: str, num_steps: int, cost: int, solver: str, scale: float) -> SampledRow:
        return SampledRow(
            id=name,
            role=role,
            name="teacher",
            sampler=label,
            num_steps=num_steps,
            num_evaluations=num_steps * cost,
            solver=solver,
            guidance_scale=scale,
        )

    rows = [
        row("reference", f"teacher-{n}", label, n, cost, "ddim", guidance_scale)
        for n in dict.fromkeys(reversed(stage.teacher_steps))
    ]
    for solver in stage.teacher_solvers:
        for n in stage.sampling_steps:
            if guided and n % cost == 0:
                name, label = f"{solver}-guided-{n}", f"{label_of(solver, is_flow)}, guided"
                rows.append(row("undistilled", name, label, n // cost, cost, solver, guidance_scale))
            name, label = f"{solver}-unguided-{n}", f"{label_of(solver, is_flow)}, unguided"
            rows.append(row("undistilled", name, label, n, 1, solver, 1.0))
    return rows


def student_rows(stage: Evaluate, index: int, student: Entry) -> list[SampledRow]:
    """Return the rows of `student` at each number of steps, gamma (its own too) and grid; equal samplers are one row.

    With one step gamma has no effect, and grids may agree. A student conditioned on its target time may stop anywhere,
    so it takes the even grid; the others take one that includes their K boundaries. One from elsewhere has a grid of
    its own in place of the milestones, and maybe for some numbers of steps alone; so may one that predicts x0.
    """
    rows: dict[tuple[tuple[int, ...], float | None], SampledRow] = {}
    own = "" if student.grid.name == MILESTONES else f", {student.grid}"
    for gamma in student.gammas:
        for grid in sorted(stage.grids):  # milestones, paper
            for n in filter(student.draws_in, stage.sampling_steps):
                times = tuple(paper_times(n) if grid == "paper" else student.grid.times(n))
                rows.setdefault(
                    (times, gamma if n > 1 else None),
                    SampledRow(
                        id=f"student{index}-{n}-gamma{gamma:g}-{grid}",
                        role="student",
                        name=student.name,
                        sampler=f"gamma {gamma:g}" + (", paper's grid" if grid == "paper" else own),
                        num_steps=n,
                        num_evaluations=n,
                        times=times,
                        gamma=gamma,
                        grid=grid,
                        num_segments=student.num_segments,
                        conditioned=student.conditioned,
                        default=gamma == student.own_gamma and grid == "milestones",
                        training=student.training.record() if student.training is not None else None,
                    ),
                )
    return list(rows.values())
