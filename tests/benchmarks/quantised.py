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
from measuring import table_of_figures
from rich.console import Console
from rich.table import Table
from training_step import PROMPTS, TEACHER, DistillationStep, recipe_of

from mlcm_rl.data.prompts import first_prompts
from mlcm_rl.data.training_points import StoredStates
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.equations.axis import NUM_SEGMENTS
from mlcm_rl.equations.segments import milestones
from mlcm_rl.models import students, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.recipe import Distill, Lora, Recipe, Trajectories
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.types import Quantised
from mlcm_rl.stages import distill, trajectories

KINDS: tuple[Quantised | None, ...] = (None, "int8", "nf4")
LEARNING_RATE = 1e-4
SDXL = "recipes/sdxl_mlcm.yaml"
SMALLEST = ["stages.trajectories.batch_size=1", "stages.distill.gradient_accumulation=32"]
GIB = 2**30


class Trial:
    """The training of the student of `stage` in `folder`, from what the teacher in floats has `stored`."""

    def __init__(self, recipe: Recipe, stage: Distill, stored: Path, folder: Path):
        self.recipe, self.stage, self.folder = recipe, stage, folder
        self.base = teachers.load(recipe.teacher, "cpu")
        self.source = StoredStates(stage, self.base, Store(stored), recipe.seed)
        self.training = DistillationStep(recipe, stage, self.base, folder, LEARNING_RATE)

    def held_out_loss(self, base: Base, student: torch.nn.Module) -> float:
        """Return the loss of `student` over `base`."""
        settings = self.training.settings
        measure = self.training.distances.of(settings.distance, "held out")
        network = distill.Network(self.training.rt, base, student, {})
        return distill.held_out_loss(settings, network, self.source, measure)

    def train(self) -> tuple[float, float, float]:
        """Return CPU seconds a step, and the held-out loss before the first and after the last; write the student."""
        stage, student, (num_steps,) = self.stage, self.training.student, self.stage.steps_per_phase
        before, seconds = self.held_out_loss(self.base, student), []
        for step in range(num_steps):
            started = time.process_time()
            self.training.learn(self.training.points(self.source, step))
            seconds.append(time.process_time() - started)
        distill.save_student(student, stage, self.recipe, self.base, stage.num_segments[-1], self.folder / "student")
        return statistics.median(seconds), before, self.held_out_loss(self.base, student)


@torch.no_grad()
def guided_x0(base: Base) -> torch.Tensor:
    """Return the guided x0 (N, C, H, W) of prompts at each of the milestones, from the same noise."""
    times = milestones(NUM_SEGMENTS)[1:]
    texts = [prompt.prompt for prompt in first_prompts(PROMPTS, len(times))]
    noise = base.noise(torch.Generator().manual_seed(0), len(times))
    scale = base.teacher.guidance_scale
    return base.guided_x0(noise, times, base.encode_prompts(texts), base.unconditional(len(times)), scale)


def megabytes(base: Base) -> float:
    """Return the size of the denoiser's weights in MB."""
    return sum(value.nbytes for value in (*base.denoiser.parameters(), *base.denoiser.buffers())) / 1e6


def trained(num_steps: int, batch_size: int, num_trajectories: int) -> Table:
    """Return the table of measurements, from `num_trajectories` and half as many that are held out."""
    heads = ("MB", "CPU ms a step", "guided x0", "held-out loss before", "after", "adapter over floats")
    table = table_of_figures(f"LoRA distillation, {num_steps} steps of {batch_size}", "weights", *heads)
    numbers = {"num_trajectories": num_trajectories, "num_held_out": (num_trajectories + 1) // 2}
    store = Trajectories(prompts=PROMPTS, **numbers, solver_steps=8, batch_size=16)
    stage = Distill(adapter=Lora(), num_steps=num_steps, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as place:
        stored = Path(place) / "store"
        stored.mkdir()
        trajectories.run(store, recipe_of(store, stage, device="cpu"), {}, stored)
        floats = teachers.load(TEACHER, "cpu")
        exact = guided_x0(floats)
        for kind in KINDS:
            folder = Path(place) / str(kind)
            folder.mkdir()
            teacher = TEACHER.model_copy(update={"quantise": kind})
            trial = Trial(recipe_of(store, stage, teacher=teacher, device="cpu"), stage, stored, folder)
            error = (guided_x0(trial.base) - exact).norm() / exact.norm()
            seconds, before, after = trial.train()
            exported = trial.held_out_loss(floats, students.load_student(floats, folder / "student").denoiser)
            figures = (f"{error:.4f}", f"{before:.4f}", f"{after:.4f}", f"{exported:.4f}")
            table.add_row(kind or TEACHER.dtype, f"{megabytes(trial.base):.2f}", f"{1000 * seconds:.0f}", *figures)
    return table


def planned() -> Table:
    """Return the table of predictions for a GPU."""
    heads = ("networks", "trajectories", "distill", "trajectories, batch 1", "distill, micro-batch 1")
    table = table_of_figures(f"{SDXL}, GiB by `mlcm plan`", "weights", *heads)
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
    parser.add_argument("--trajectories", type=int, default=32, help="stored, and half as many that are held out")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(trained(arguments.steps, arguments.batch_size, arguments.trajectories))
    console.print(planned())


if __name__ == "__main__":
    main()
