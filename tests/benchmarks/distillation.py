"""Seconds, network evaluations and memory of a distillation step, variant against variant in one run.

    python tests/benchmarks/distillation.py [--steps 8] [--batch-size 32]        (or: make benchmark)

Every variant runs in a process of its own, one after another, so that peak memory is its own. Times are medians over
steps, per sample: `teacher` makes the points (states read, or solved online), `target` is the pass without gradient,
`student` forward, backward and the optimiser. Ratios are to `data`, which is how LCM trains; `plain script` is the same
as the field's scripts write it (plain_script.py), all of its step under `student`. Captions are encoded once, before
the first step. Network evaluations are counted, by the same parts, in a table of their own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from plain_script import PlainScript
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlcm_rl.cost.evaluations import evaluations_of
from mlcm_rl.data.training_points import NoisedData
from mlcm_rl.equations.segments import sampling_times, time_grid
from mlcm_rl.evaluation import training_cost
from mlcm_rl.models import sampler, students, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.recipe import Distill, Full, Recipe, Teacher, Trajectories
from mlcm_rl.recipe.file import load
from mlcm_rl.stages import distill, trajectories
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.seeding import generator

PROMPTS = "recipes/emoji/prompts/train.jsonl"
TEACHER = Teacher(path="recipes/emoji/teacher", family="sdxl", guidance_scale=4.0)
LORA = {"kind": "lora", "rank": 64, "alpha": 64}
CHANNELS_LAST = "stored, trajectory, channels-last"
VARIANTS = {
    "data (LCM)": {"source": "data", "images": "unused", "target": "consistency"},
    "online (Algorithm 1)": {"source": "online", "prompts": PROMPTS, "target": "consistency"},
    "stored, consistency": {"target": "consistency"},
    "stored, trajectory": {"target": "trajectory"},
    "stored, trajectory, LoRA": {"target": "trajectory", "adapter": LORA},
    CHANNELS_LAST: {"target": "trajectory"},
}
PLAIN = "plain script (LCM)"
WHOLE_RUN = 1000  # steps that draw every caption, so that all are encoded ahead
PARTS = ("store", "teacher", "target", "student")
SHIPPED = "recipes/emoji_mlcm.yaml"  # whose trajectories and samples say what share of its store a sample bears
STORED = 64  # trajectories solved for the stored variants and for the store's own cost


def measure(name: str, num_steps: int, batch_size: int) -> dict[str, float]:
    """Seconds per sample of each part, and peak memory in MB, of one variant."""
    stage = stage_of(name, batch_size)
    store = Trajectories(prompts=PROMPTS, num_trajectories=STORED, batch_size=batch_size)
    layout = "channels_last" if name == CHANNELS_LAST else "contiguous"
    teacher = TEACHER.model_copy(update={"memory_format": layout})
    recipe = Recipe(name="benchmark", teacher=teacher, stages=[store, stage], trackers=[])
    base = teachers.load(teacher, "cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as place:
        found = {"store": 0.0}
        if stage.reads_trajectories:
            started = time.perf_counter()
            trajectories.run(store, recipe, {}, Path(place))
            found["store"] = (time.perf_counter() - started) / STORED
        student = students.student(base, stage.adapter, seed=0)
        source = (
            NoisedData(stage, base, torch.randn(64, *base.latent_shape), [["panda"]] * 64, 0)
            if stage.source == "data"
            else distill.make_source(stage, recipe, base, student, {"trajectories": Path(place)})
        )
        if not stage.uses_teacher:
            base.forget_denoiser()
        whole_run = stage.model_copy(update={"num_steps": WHOLE_RUN})
        distill.encode_ahead(whole_run, recipe, base, source)
        rt = Runtime(recipe, stage, Path(place))
        return found | time_steps(rt, base, student, source, num_steps) | {"peak_mb": peak_mb()}


def stage_of(name: str, batch_size: int) -> Distill:
    """One step of a variant."""
    settings = {"num_segments": [1], "num_steps": 1, "batch_size": batch_size, "adapter": {"kind": "full"}}
    return Distill(**(settings | VARIANTS[name]))


def time_steps(rt: Runtime, base: Base, student: torch.nn.Module, source, num_steps: int) -> dict[str, float]:
    """Median seconds per sample of a step's parts, after one step to warm up."""
    stage: Distill = rt.stage
    parameters = students.trainable_parameters(student)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)  # as the stages do
    rt.prepare(student, optimizer)
    settings = distill.PhaseSettings(stage, 0)
    network = distill.Network(rt, base, student, {})
    distance = distill.make_distances(stage, rt.recipe, base, {}).of(settings.distance, 0)
    seconds: dict[str, list[float]] = {"teacher": [], "target": [], "student": []}
    for step in range(num_steps + 1):
        marks = [now()]
        batch = source.realise(source.draw(step, 1, "next", generator("benchmark", step)))
        marks.append(now())
        if settings.target == "consistency":
            network.target_x0(batch, None)
        marks.append(now())
        distill.loss(settings, network, batch, distance).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = now() - marks[2]
        spent = (marks[1] - marks[0], marks[2] - marks[1], whole - (marks[2] - marks[1]))  # the loss repeats the target
        for part, value in zip(seconds, spent, strict=True):
            seconds[part].append(value / stage.batch_size)
    return {part: statistics.median(values[1:]) for part, values in seconds.items()}


def measure_plain(num_steps: int, batch_size: int) -> dict[str, float]:
    """The same of the plain script: what it does besides a student's pass is not taken apart."""
    base = teachers.load(TEACHER, "cuda" if torch.cuda.is_available() else "cpu")
    script = PlainScript(base, Full())
    images = torch.rand(batch_size, 3, base.resolution, base.resolution, generator=generator("benchmark"))
    seconds = []
    for step in range(num_steps + 1):
        started = now()
        script.step(images.to(base.device), ["panda"] * batch_size, generator("benchmark", step))
        seconds.append((now() - started) / batch_size)
    spent = {"store": 0.0, "teacher": 0.0, "target": 0.0, "student": statistics.median(seconds[1:])}
    return spent | {"peak_mb": peak_mb()}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def evaluations(name: str, store: float) -> dict[str, float]:
    """Network evaluations per sample of each part of a variant; `store` is what a sample bears of one that it reads."""
    if name == PLAIN:  # a guided step of the teacher, as `data`
        return {"store": 0.0, "teacher": 2.0, "target": 1.0, "student": 1.0}
    stage = stage_of(name, batch_size=1)
    passes = stage.passes(load(Path(SHIPPED)))
    step = {part: evaluations_of(one for one in passes if one.role == part) for part in PARTS[1:]}
    return {"store": store if stage.reads_trajectories else 0.0} | step


def evaluations_table() -> tuple[Table, str]:
    """Network evaluations per sample, split into the parts of a step and the store, and what the store's share is of.

    Nothing is measured: the store is that of the shipped recipe, whose evaluations all its samples share.
    """
    recipe = load(Path(SHIPPED))
    position = next(i for i, stage in enumerate(recipe.stages) if isinstance(stage, Distill))
    cost = training_cost.of_stage(recipe, position)
    store = next(stage for stage in recipe.stages if isinstance(stage, Trajectories))
    trajectories = store.num_trajectories + store.num_held_out
    table = Table("evaluations a sample", title="Network evaluations", box=SIMPLE_HEAD)
    for head in ("store*", *PARTS[1:], "all", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    reference = None
    for name in (*VARIANTS, PLAIN):
        parts = evaluations(name, cost.store / cost.samples)
        whole = sum(parts.values())
        reference = reference or whole
        table.add_row(name, *(f"{parts[part]:.3g}" for part in PARTS), f"{whole:.4g}", f"{whole / reference:.2f}")
    return table, (
        f"* {cost.store // trajectories} x {trajectories} trajectories / {cost.samples} samples drawn = "
        f"{cost.store / cost.samples:.3g}, the figures of {SHIPPED}"
    )


def peak_mb() -> float:
    """This process's peak: what torch allocated on a GPU, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sampling() -> Table:
    """Pictures a second, decoded: the teacher at 50 guided steps against a student's 8, 4, 2 and 1."""
    base = teachers.load(TEACHER, "cuda" if torch.cuda.is_available() else "cpu")
    conditioning, dropped = base.encode_prompts(["panda"] * 16), base.unconditional(16)
    noise = base.noise(generator("benchmark"), 16)
    table = Table("sampler", "evals", "pictures a second", "ratio", title="Sampling, batch 16", box=SIMPLE_HEAD)
    times = {"teacher, 50 guided steps": time_grid(50)[:-1]} | {
        f"student, {n} steps": sampling_times(n) for n in (8, 4, 2, 1)
    }
    first = None
    for name, grid in times.items():
        started = now()
        with torch.no_grad():
            if first is None:
                latents = sampler.sample_teacher(base, conditioning, dropped, noise, grid, 4.0)
            else:
                latents = sampler.sample(base, base.denoiser, conditioning, noise, grid, 0.0)
            base.autoencoder.decode(latents)
        rate = 16 / (now() - started)
        first = first or rate
        table.add_row(name, str(len(grid) * (2 if "guided" in name else 1)), f"{rate:.1f}", f"{rate / first:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--only", choices=[PLAIN, *VARIANTS], help="measure one variant and print it as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        sizes = (arguments.steps, arguments.batch_size)
        print(json.dumps(measure_plain(*sizes) if arguments.only == PLAIN else measure(arguments.only, *sizes)))
        return
    table = Table("ms a sample", title=f"Distillation, batch {arguments.batch_size}", box=SIMPLE_HEAD)
    for head in ("store*", *PARTS[1:], "a step", "ratio", "peak MB"):
        table.add_column(head, justify="right", no_wrap=True)
    reference = None
    for name in track((*VARIANTS, PLAIN), "variants", console=Console(stderr=True)):
        command = [sys.executable, __file__, "--only", name, "--steps", str(arguments.steps)]
        output = subprocess.run(
            [*command, "--batch-size", str(arguments.batch_size)], capture_output=True, text=True, check=True
        )
        found = json.loads(output.stdout.splitlines()[-1])
        step = found["teacher"] + found["target"] + found["student"]
        reference = reference or step
        parts = [f"{1000 * found[part]:.2f}" for part in PARTS]
        table.add_row(
            name,
            *parts,
            f"{1000 * step:.2f}",
            f"{step / reference:.2f}",
            f"{found['peak_mb']:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print("* once a trajectory (96 evaluations), shared by all samples drawn from it; ratios are to data (LCM)")
    counted, footnote = evaluations_table()
    console.print(counted)
    console.print(footnote)
    console.print(sampling())


if __name__ == "__main__":
    main()
