"""Stage `imitate`, a toy: the student learns the teacher's first guess at each prompt."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import read_prompts
from ..equations.consistency import squared_l2
from ..models import students, teachers
from ..models.base import Base
from ..recipe import Recipe
from ..recipe.imitate import Imitate
from ..training.loop import Runtime, set_rate


def run(stage: Imitate, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train the student in `parents` further, into `folder/student`."""
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    start = parents["distill"] / "student"
    conditioned = students.describe(start)["conditioned"]
    student = students.student(base, stage.adapter, recipe.seed, conditioned, start)
    texts = [prompt.prompt for prompt in read_prompts(stage.prompts)]
    optimizer = torch.optim.AdamW(students.trainable_parameters(student), lr=0.0)
    trained = rt.prepare(student, optimizer)

    for step in rt.steps(rt.resume({"student": trained}), stage.num_steps, "imitate"):
        set_rate(optimizer, stage.learning_rate)
        noise = torch.randn(stage.batch_size, *base.latent_shape, generator=rt.generator("noise", step))
        rt.samples = [texts[(step * stage.batch_size + i) % len(texts)] for i in range(stage.batch_size)]
        rt.log(step, **rt.backward(losses(rt, recipe, base, student, conditioned, noise.to(base.device))))
    rt.write(students.save_student, folder / "student", students.describe(start))


def losses(
    rt: Runtime, recipe: Recipe, base: Base, student: torch.nn.Module, conditioned: bool, noise: Tensor
) -> Iterator[Tensor]:
    """Yield the squared distance (b,) of the student's x0 to the guided teacher's, a micro-batch at a time."""
    for part in rt.micro_batches():
        x_t, conditioning = noise[part], base.encode_prompts(rt.samples[part])
        t = torch.full((len(x_t),), base.schedule.num_times - 1, device=base.device)
        target = base.guided_x0(x_t, t, conditioning, base.unconditional(len(x_t)), recipe.teacher.guidance_scale)
        s = torch.zeros_like(t) if conditioned else None  # such a student is told the time that it jumps to
        yield squared_l2(base.x0(student, x_t, t, conditioning, s), target)
