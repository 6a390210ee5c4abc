"""What a student's training cost, read off the manifest of the stage that made it.

The manifest keeps the whole recipe that the stage was run with, so that stages before it are counted even where their
folders are gone (a store of trajectories is large).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ..cost.evaluations import network_evaluations, whole_evaluations
from ..recipe import Distill, Recipe, Stage
from ..recipe.renamed import renewed, renewed_stage
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
    recipe = Recipe.model_validate(renewed(manifest["recipe"]))
    num_phases = int(folder.name.split("-")[1]) + 1 if snapshot else None
    return of_stage(recipe, _position(recipe, manifest), num_phases)


def is_snapshot(folder: Path) -> bool:
    """Whether the student in `folder` is one that a distill stage kept at the end of a phase."""
    return folder.parent.name == "snapshots"


def of_stage(recipe: Recipe, position: int, num_phases: int | None = None) -> TrainingCost:
    """The cost of what `recipe.stages[position]` makes, of its first `num_phases` phases alone where that is given.

    A stage starts from the student of an earlier one: the chain is the stage itself, that one, and so on.
    """
    samples = online = student = 0
    stores: dict[int, int] = {}
    while position >= 0:
        stage = recipe.stages[position]
        shortened = stage.until(num_phases) if isinstance(stage, Distill) else stage
        samples += sum(shortened.steps_per_phase) * shortened.batch_size
        passes = shortened.passes(recipe)
        online += whole_evaluations([one for one in passes if one.role == "teacher"])
        student += whole_evaluations([one for one in passes if one.role != "teacher"])
        before = [i for i in range(position) if recipe.stages[i].kind in stage.parents]
        for i in [i for i in before if recipe.stages[i].num_stored][-1:]:
            stores[i] = network_evaluations(recipe.stages[i], recipe)
        position = max((i for i in before if recipe.stages[i].leaves_student), default=-1)
        num_phases = None
    return TrainingCost(samples, sum(stores.values()), online, student)


def _position(recipe: Recipe, manifest: dict) -> int:
    """Which of the recipe's stages the manifest is of; of equal ones the first starts from no other, the last does."""
    stage: Stage = TypeAdapter(Stage).validate_python(renewed_stage(manifest["stage"]))
    places = [i for i, one in enumerate(recipe.stages) if one == stage]
    return places[-1 if "distill" in manifest["parents"] else 0]
