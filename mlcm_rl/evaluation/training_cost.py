"""The training cost of a student, from the manifest of its stage.

The manifest has the complete recipe of the stage, so that earlier stages are counted even if their folders were deleted
(a store of trajectories is large).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ..cost.evaluations import network_evaluations, whole_evaluations
from ..recipe import Distill, Recipe, Stage, Start, Training
from ..recipe.experiment import student_before
from ..recipe.renamed import renewed, renewed_stage
from ..report import types
from ..storage.files import read_json


@dataclass(frozen=True)
class TrainingCost:
    """Network evaluations: forward passes of a denoiser for one sample; a guided one counts two."""

    samples: int  # of optimiser steps, repeated ones included, over the whole chain of stages
    store: int  # of the teacher for stored trajectories, held-out ones included; a store is counted once
    online: int  # of the teacher in the optimiser steps
    student: int  # of the student and of its target

    def record(self) -> types.TrainingCost:
        """Return the counts with totals and ratios, for report.json."""
        teacher = self.store + self.online
        return types.TrainingCost(
            **asdict(self),
            total=teacher + self.student,
            teacher_per_sample=teacher / self.samples,
            student_per_sample=self.student / self.samples,
        )


def of_student(folder: Path) -> TrainingCost | None:
    """Return the cost of the student in `folder`: `student` of a stage's folder, or `snapshots/phase-<i>-K<k>`.

    None for one from elsewhere, and for what was tuned from it: what it had cost before is unknown.

    A snapshot costs its stage's steps up to the end of its phase, and all stages before. Raise CheckpointError if the
    stage's folder has no manifest: it is not finished.
    """
    snapshot = is_snapshot(folder)
    stage = folder.parent.parent if snapshot else folder.parent
    manifest = read_json(stage / "manifest.json", recipe=dict, stage=dict, parents=dict)
    recipe = Recipe.model_validate(renewed(manifest["recipe"]))
    num_phases = int(folder.name.split("-")[1]) + 1 if snapshot else None
    return of_stage(recipe, _position(recipe, manifest), num_phases)


def is_snapshot(folder: Path) -> bool:
    """Return whether the student in `folder` is a distill stage's snapshot at the end of a phase."""
    return folder.parent.name == "snapshots"


def of_stage(recipe: Recipe, position: int | None, num_phases: int | None = None) -> TrainingCost | None:
    """Return the cost of the student of `recipe.stages[position]`, or of its first `num_phases` phases.

    A stage starts from the student of an earlier one: the chain is the stage itself, that one, and so on. None where it
    begins with a student from elsewhere.
    """
    samples = online = student = 0
    stores: dict[int, int] = {}
    while position is not None:
        stage = recipe.stages[position]
        if isinstance(stage, Start):
            return None
        assert isinstance(stage, Training), "no other stage leaves a student"
        shortened = stage.until(num_phases) if isinstance(stage, Distill) else stage
        samples += sum(shortened.steps_per_phase) * shortened.batch_size
        passes = shortened.passes(recipe)
        online += whole_evaluations([one for one in passes if one.role == "teacher"])
        student += whole_evaluations([one for one in passes if one.role != "teacher"])
        parents = [i for i in range(position) if recipe.stages[i].kind in stage.parents]
        for i in [i for i in parents if recipe.stages[i].num_stored][-1:]:  # the last store before it
            stores[i] = network_evaluations(recipe.stages[i], recipe)
        position = student_before(recipe.stages, position)
        num_phases = None
    return TrainingCost(samples, sum(stores.values()), online, student)


def _position(recipe: Recipe, manifest: dict) -> int:
    """Return the position in `recipe` of the manifest's stage.

    Of equal stages, the first is the one without a distilled parent and the last the one with it.
    """
    stage: Stage = TypeAdapter(Stage).validate_python(renewed_stage(manifest["stage"]))
    places = [i for i, one in enumerate(recipe.stages) if one == stage]
    return places[-1 if "distill" in manifest["parents"] else 0]
