"""What a student's training cost, read off the manifest of the stage that made it.

The manifest keeps the whole recipe that the stage was run with, so that stages before it are counted even where their
folders are gone (a store of trajectories is large).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ..cost.evaluations import evaluations_per_phase, network_evaluations
from ..recipe import Distill, Dpo, Feedback, Policy, Recipe, Stage, Trajectories, Tuning
from ..storage.files import read_json


@dataclass(frozen=True)
class TrainingCost:
    """Network evaluations: forward passes of a denoiser for one sample; a guided one counts two."""

    samples: int  # drawn for optimiser steps, with repetition, over the whole chain of stages
    store: int  # of the teacher for stored trajectories, held-out ones too; a store is counted once
    online: int  # of the teacher in the steps themselves
    student: int  # of the student and of its target

    def record(self) -> dict[str, float]:
        """All of it, for report.json."""
        teacher = self.store + self.online
        return asdict(self) | {
            "total": teacher + self.student,
            "teacher_per_sample": teacher / self.samples,
            "student_per_sample": self.student / self.samples,
        }


def of_student(folder: Path) -> TrainingCost:
    """The cost of the student in `folder`: `student` of a stage's folder, or `snapshots/phase-<i>-K<k>`.

    A snapshot has cost its own stage's steps up to the end of its phase, and all that came before them.
    Raises CheckpointError where the stage's folder has no manifest: it is not finished.
    """
    snapshot = is_snapshot(folder)
    stage = folder.parent.parent if snapshot else folder.parent
    manifest = read_json(stage / "manifest.json", recipe=dict, stage=dict, parents=dict)
    recipe = Recipe.model_validate(manifest["recipe"])
    num_phases = int(folder.name.split("-")[1]) + 1 if snapshot else None
    return of_stage(recipe, _position(recipe, manifest), num_phases)


def is_snapshot(folder: Path) -> bool:
    """Whether the student in `folder` is one that a distill stage kept at the end of a phase."""
    return folder.parent.name == "snapshots"


def of_stage(recipe: Recipe, position: int, num_phases: int | None = None) -> TrainingCost:
    """The cost of what `recipe.stages[position]` makes, of its first `num_phases` phases alone where that is given.

    A distill stage starts from the student of the one before it, and so does a stage of preference learning, whose own
    student no other starts from: the chain is every distill stage up to there, and the stage itself.
    """
    samples = online = student = 0
    stores: dict[int, int] = {}
    for i, stage in enumerate(recipe.stages[: position + 1]):
        if not isinstance(stage, Distill) and i != position:
            continue
        assert isinstance(stage, Distill | Tuning)
        drawn, by_teacher, by_student = _of_steps(stage, recipe, num_phases if i == position else None)
        samples, online, student = samples + drawn, online + by_teacher, student + by_student
        if isinstance(stage, Distill | Feedback) and stage.reads_trajectories:
            store = max(j for j in range(i) if isinstance(recipe.stages[j], Trajectories))
            stores[store] = network_evaluations(recipe.stages[store], recipe)
    return TrainingCost(samples, sum(stores.values()), online, student)


def _of_steps(stage: Distill | Feedback | Dpo | Policy, recipe: Recipe, num_phases: int | None) -> tuple[int, int, int]:
    """Samples drawn in a stage's steps, and the evaluations that they took of the teacher and of the student."""
    if not isinstance(stage, Distill):
        return stage.num_steps * stage.batch_size, 0, network_evaluations(stage, recipe)
    guided = 1 if recipe.teacher.guidance_scale == 1.0 else 2
    costs = evaluations_per_phase(stage, guided)[:num_phases]
    teacher = round(sum(by_teacher for by_teacher, _, _ in costs))
    student = round(sum(target + own for _, target, own in costs))
    return sum(stage.per_phase("num_steps")[:num_phases]) * stage.batch_size, teacher, student


def _position(recipe: Recipe, manifest: dict) -> int:
    """Which of the recipe's stages the manifest is of; of equal ones the first starts from no other, the last does."""
    stage: Stage = TypeAdapter(Stage).validate_python(manifest["stage"])
    places = [i for i, one in enumerate(recipe.stages) if one == stage]
    return places[-1 if "distill" in manifest["parents"] else 0]
