"""Optimiser steps as the loops of the stages make them, and the embedded teacher that most benchmarks train by."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mlcm_rl.data.training_points import Batch, Source
from mlcm_rl.models import students
from mlcm_rl.models.base import Base
from mlcm_rl.recipe import Distill, Recipe, Stage, Teacher, Training
from mlcm_rl.stages import distill
from mlcm_rl.training.loop import Runtime, adamw, set_rate

PROMPTS = "recipes/emoji/prompts/train.jsonl"
TEACHER = Teacher(path="recipes/emoji/teacher", family="sdxl", guidance_scale=4.0)
DEVICE: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"


def recipe_of(*stages: Stage, teacher: Teacher = TEACHER, device: Literal["cuda", "cpu"] = DEVICE) -> Recipe:
    """Return the recipe of `stages`, without trackers."""
    return Recipe(name="benchmark", teacher=teacher, stages=list(stages), device=device, trackers=[])


class TrainingStep:
    """The optimiser step of `stage` on `student` at a constant rate, for a loss that the caller knows."""

    def __init__(
        self, recipe: Recipe, stage: Training, student: torch.nn.Module, folder: Path, learning_rate: float = 1e-5
    ):
        self.rt, self.student = Runtime(recipe, stage, folder), student
        optimizer = adamw(students.trainable_parameters(student), stage)
        set_rate(optimizer, learning_rate)
        self.trained = self.rt.prepare(student, optimizer)
        # `rt.steps` would set both, and two students cannot take turns in it; from update 1 on no failed step is saved
        self.rt.step, self.rt.update = 0, 1

    def update(self, loss: Callable[[], Tensor]) -> None:
        """Make a step from the values (B,) of `loss`, of one micro-batch."""
        with self.rt.autocast():
            self.rt.backward([loss()])


class DistillationStep(TrainingStep):
    """The step of `stage`, whose loss is that of its first phase, on a new student of `base`."""

    def __init__(self, recipe: Recipe, stage: Distill, base: Base, folder: Path, learning_rate: float = 1e-5):
        student = students.student(base, stage.adapter, recipe.seed, stage.condition_on_target)
        if stage.gradient_checkpointing:
            base.checkpoint_blocks(student)
        super().__init__(recipe, stage, student, folder, learning_rate)
        self.settings = distill.PhaseSettings(stage, 0)
        self.network = distill.Network(self.rt, base, student, self.trained)
        self.distances = distill.make_distances(stage, recipe, base, {})

    def points(self, source: Source, step: int) -> Batch:
        """Return the points of `step`."""
        draws = self.rt.generator("times", step)
        return source.realise(source.draw(step, self.settings.num_segments, self.settings.pair, draws))

    def learn(self, batch: Batch) -> None:
        """Make a step on `batch`."""
        measure = self.distances.of(self.settings.distance, 0)
        self.update(lambda: distill.loss(self.settings, self.network, batch, measure))
