"""Loss, error and bytes of a denoiser in int8 and nf4 beside the one in floats, and what a plan says of SDXL.

    python tests/benchmarks/quantised.py [--steps 24] [--batch-size 4]        (or: make benchmark)

A LoRA student of the emoji teacher is distilled from one small store, that of the teacher in floats, with the same
seeds. `guided x0` is the relative error of the teacher's, over all milestones. The held-out loss is that of
trajectories which are never trained on: before the first step, after the last, and with the trained adapter over the
teacher in floats, as an export has it. Times are the process's own, medians over steps. The second table is predicted
from shapes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlcm_rl.data.prompts import first_prompts
from mlcm_rl.data.training_points import StoredStates
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.equations.axis import NUM_SEGMENTS
from mlcm_rl.equations.segments import milestones
from mlcm_rl.models import students, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.models.perceptual import Distance
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.recipe import Distill, Lora, Recipe, Teacher, Trajectories
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.types import Quantised
from mlcm_rl.stages import distill, trajectories
from mlcm_rl.training.loop import Runtime

PROMPTS = "recipes/emoji/prompts/train.jsonl"
TEACHER = Teacher(path="recipes/emoji/teacher", family="sdxl", guidance_scale=4.0)
KINDS: tuple[Quantised | None, ...] = (None, "int8", "nf4")
STORE = Trajectories(prompts=PROMPTS, num_trajectories=32, num_held_out=16, solver_steps=8, batch_size=16)
SDXL = "recipes/sdxl_mlcm.yaml"
SMALLEST = ["stages.trajectories.batch_size=1", "stages.distill.gradient_accumulation=32"]
GIB = 2**30


def recipe_of(kind: Quantised | None, num_steps: int, batch_size: int) -> Recipe:
    """A LoRA student of the recommended form over the teacher in `kind`."""
    stage = Distill(adapter=Lora(), num_steps=num_steps, batch_size=batch_size, learning_rate=1e-4, warmup_steps=5)
    teacher = TEACHER.model_copy(update={"quantise": kind})
    return Recipe(name="benchmark", teacher=teacher, stages=[STORE, stage], device="cpu", trackers=[])


class Trial:
    """The training of one student in `folder`, from the store of the teacher in floats."""

    def __init__(self, recipe: Recipe, store: Path, folder: Path):
        self.recipe, self.stage, self.folder = recipe, recipe.stages[1], folder
        self.rt = Runtime(recipe, self.stage, folder)
        self.base = teachers.load(recipe.teacher, "cpu")
        self.source = StoredStates(self.stage, self.base, Store(store), recipe.seed)
        self.settings = distill.PhaseSettings(self.stage, 0)

    def held_out_loss(self, base: Base, student: torch.nn.Module) -> float:
        """The loss of `student` over `base`."""
        return distill.held_out_loss(
            self.rt, self.stage, self.settings, base, student, {}, self.source, self.distance(base)
        )

    def distance(self, base: Base) -> Distance:
        """The distance that the stage is trained by."""
        return distill.make_distances(self.stage, self.recipe, base, {}).of(self.settings.distance, 0)

    def train(self) -> tuple[float, float, float]:
        """CPU seconds a step, and the held-out loss before the first and after the last; the student is in `folder`."""
        stage, rt = self.stage, self.rt
        student = students.student(self.base, stage.adapter, 0, stage.condition_on_target)
        parameters = students.trainable_parameters(student)
        optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, fused=True)
        rt.resume({"student": rt.prepare(student, optimizer)})
        before, seconds = self.held_out_loss(self.base, student), []
        distance = self.distance(self.base)
        for step in rt.steps(0, stage.num_steps, "distill"):
            started = time.process_time()
            points = self.source.draw(step, self.settings.num_segments, self.settings.pair, rt.generator("times", step))
            parts = (self.source.realise(points.rows(part)) for part in rt.micro_batches())
            losses = (distill.loss(rt, stage, self.settings, self.base, student, {}, part, distance) for part in parts)
            rt.backward(losses)
            seconds.append(time.process_time() - started)
        distill.save_student(student, stage, self.recipe, self.base, stage.num_segments[-1], self.folder / "student")
        return statistics.median(seconds), before, self.held_out_loss(self.base, student)


@torch.no_grad()
def guided_x0(base: Base) -> torch.Tensor:
    """The guided x0 (N, C, H, W) of prompts at each of the milestones, from the same noise."""
    times = milestones(NUM_SEGMENTS)[1:]
    texts = [prompt.prompt for prompt in first_prompts(PROMPTS, len(times))]
    noise = base.noise(torch.Generator().manual_seed(0), len(times))
    return base.guided_x0(noise, times, base.encode_prompts(texts), base.unconditional(len(times)), 4.0)


def megabytes(base: Base) -> float:
    """The denoiser's weights in MB."""
    return sum(value.nbytes for value in (*base.denoiser.parameters(), *base.denoiser.buffers())) / 1e6


def trained(num_steps: int, batch_size: int) -> Table:
    """The table of measurements."""
    table = Table("weights", title=f"LoRA distillation, {num_steps} steps of {batch_size}", box=SIMPLE_HEAD)
    for head in ("MB", "CPU ms a step", "guided x0", "held-out loss before", "after", "adapter over floats"):
        table.add_column(head, justify="right")
    with tempfile.TemporaryDirectory() as place:
        store = Path(place) / "store"
        store.mkdir()
        trajectories.run(STORE, recipe_of(None, num_steps, batch_size), {}, store)
        floats = teachers.load(TEACHER, "cpu")
        exact = guided_x0(floats)
        for kind in KINDS:
            folder = Path(place) / str(kind)
            folder.mkdir()
            trial = Trial(recipe_of(kind, num_steps, batch_size), store, folder)
            error = (guided_x0(trial.base) - exact).norm() / exact.norm()
            seconds, before, after = trial.train()
            exported = trial.held_out_loss(floats, students.load_student(floats, folder / "student").denoiser)
            figures = (f"{error:.4f}", f"{before:.4f}", f"{after:.4f}", f"{exported:.4f}")
            table.add_row(kind or TEACHER.dtype, f"{megabytes(trial.base):.2f}", f"{1000 * seconds:.0f}", *figures)
    return table


def planned() -> Table:
    """The table of predictions for a GPU."""
    table = Table("weights", title=f"{SDXL}, GiB by `mlcm plan`", box=SIMPLE_HEAD)
    for head in ("networks", "trajectories", "distill", "trajectories, batch 1", "distill, micro-batch 1"):
        table.add_column(head, justify="right")
    for kind in KINDS:
        totals = []
        for changes in ([], SMALLEST):
            recipe = load(Path(SDXL), [*changes, *([f"teacher.quantise={kind}"] if kind else [])])
            sizes = [Sizes(recipe).memory(stage, "cuda") for stage in recipe.stages[:2]]
            totals += [f"{memory.total / GIB:.1f}" for memory in sizes]
        table.add_row(kind or recipe.teacher.dtype, f"{sizes[1].parameters / GIB:.1f}", *totals)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(trained(arguments.steps, arguments.batch_size))
    console.print(planned())


if __name__ == "__main__":
    main()
