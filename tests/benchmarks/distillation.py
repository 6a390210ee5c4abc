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
import statistics
import tempfile
from pathlib import Path

import torch
from measuring import in_own_process, now, peak_mb, table_of_figures
from plain_script import PlainScript
from rich.console import Console
from rich.progress import track
from rich.table import Table
from training_step import DEVICE, PROMPTS, TEACHER, DistillationStep, recipe_of

from mlcm_rl.cost.evaluations import evaluations_of
from mlcm_rl.data.training_points import NoisedData, Source
from mlcm_rl.equations.segments import sampling_times, time_grid
from mlcm_rl.evaluation import training_cost
from mlcm_rl.models import sampler, teachers
from mlcm_rl.recipe import Distill, Full, Recipe, Trajectories
from mlcm_rl.recipe.file import load
from mlcm_rl.stages import distill, trajectories
from mlcm_rl.training.seeding import generator

CHANNELS_LAST = "stored, trajectory, channels-last"
VARIANTS: dict[str, dict[str, object]] = {
    "data (LCM)": {"source": "data", "images": "unused", "target": "consistency"},
    "online (Algorithm 1)": {"source": "online", "prompts": PROMPTS, "target": "consistency"},
    "stored, consistency": {"target": "consistency"},
    "stored, trajectory": {"target": "trajectory"},
    "stored, trajectory, LoRA": {"target": "trajectory", "adapter": {"kind": "lora", "rank": 64, "alpha": 64}},
    CHANNELS_LAST: {"target": "trajectory"},
}
PLAIN = "plain script (LCM)"
WHOLE_RUN = 1000  # steps that draw every caption, so that all are encoded ahead
PARTS = ("store", "teacher", "target", "student")
SHIPPED = "recipes/emoji_mlcm.yaml"  # whose trajectories and samples say what share of its store a sample bears
TEACHER_STEPS = 50  # of the sampling that a student is compared with


def measure(name: str, num_steps: int, batch_size: int, num_trajectories: int) -> dict[str, float]:
    """Return seconds per sample of each part, and peak memory in MB, of one variant.

    The shipped recipe's solver stores `num_trajectories` for it; the part `store` is seconds for one of them.
    """
    stage = stage_of(name, batch_size)
    numbers = {"num_trajectories": num_trajectories, "num_held_out": 0, "batch_size": batch_size}
    store = store_of(load(Path(SHIPPED))).model_copy(update=numbers)
    layout = "channels_last" if name == CHANNELS_LAST else "contiguous"
    teacher = TEACHER.model_copy(update={"memory_format": layout})
    recipe = recipe_of(store, stage, teacher=teacher)
    base = teachers.load(teacher, DEVICE)
    with tempfile.TemporaryDirectory() as place:
        seconds = {"store": 0.0}
        if stage.reads_trajectories:
            started = now()
            trajectories.run(store, recipe, {}, Path(place))
            seconds["store"] = (now() - started) / num_trajectories
        training = DistillationStep(recipe, stage, base, Path(place))
        source: Source
        if stage.source == "data":
            source = NoisedData(stage, base, torch.randn(64, *base.latent_shape), [["panda"]] * 64, recipe.seed)
        else:
            source = distill.make_source(stage, recipe, base, training.student, {"trajectories": Path(place)})
        if not stage.uses_teacher:
            base.forget_denoiser()
        whole_run = stage.model_copy(update={"num_steps": WHOLE_RUN})
        distill.encode_ahead(whole_run, recipe, base, source, real=None)
        return seconds | time_steps(training, source, num_steps, batch_size) | {"peak_mb": peak_mb()}


def stage_of(name: str, batch_size: int) -> Distill:
    """Return one step of a variant."""
    settings = {"num_segments": [1], "num_steps": 1, "batch_size": batch_size, "adapter": {"kind": "full"}}
    return Distill.model_validate(settings | VARIANTS[name])


def store_of(recipe: Recipe) -> Trajectories:
    """Return the stage of `recipe` that stores trajectories."""
    return next(stage for stage in recipe.stages if isinstance(stage, Trajectories))


def time_steps(training: DistillationStep, source: Source, num_steps: int, batch_size: int) -> dict[str, float]:
    """Return median seconds per sample of a step's parts, after one step to warm up."""
    seconds: dict[str, list[float]] = {"teacher": [], "target": [], "student": []}
    for step in range(num_steps + 1):
        marks = [now()]
        batch = training.points(source, step)
        marks.append(now())
        if training.settings.target == "consistency":
            training.network.target_x0(batch, None)
        marks.append(now())
        training.learn(batch)
        whole = now() - marks[2]
        spent = (marks[1] - marks[0], marks[2] - marks[1], whole - (marks[2] - marks[1]))  # the loss repeats the target
        for part, value in zip(seconds, spent, strict=True):
            seconds[part].append(value / batch_size)
    return {part: statistics.median(values[1:]) for part, values in seconds.items()}


def measure_plain(num_steps: int, batch_size: int) -> dict[str, float]:
    """Return the same of the plain script: what it does besides a student's pass is not taken apart."""
    base = teachers.load(TEACHER, DEVICE)
    script = PlainScript(base, Full())
    images = torch.rand(batch_size, 3, base.resolution, base.resolution, generator=generator("benchmark"))
    seconds = []
    for step in range(num_steps + 1):
        started = now()
        script.step(images.to(base.device), ["panda"] * batch_size, generator("benchmark", step))
        seconds.append((now() - started) / batch_size)
    spent = {"store": 0.0, "teacher": 0.0, "target": 0.0, "student": statistics.median(seconds[1:])}
    return spent | {"peak_mb": peak_mb()}


def evaluations(name: str, store: float) -> dict[str, float]:
    """Return network evaluations per sample of each part of a variant.

    `store` is what a sample bears of one that it reads.
    """
    if name == PLAIN:  # a guided step of the teacher, as `data`
        return {"store": 0.0, "teacher": 2.0, "target": 1.0, "student": 1.0}
    stage = stage_of(name, batch_size=1)
    passes = stage.passes(load(Path(SHIPPED)))
    step = {part: evaluations_of(one for one in passes if one.role == part) for part in PARTS[1:]}
    return {"store": store if stage.reads_trajectories else 0.0} | step


def evaluations_table() -> tuple[Table, str]:
    """Return network evaluations per sample, by the parts of a step and the store, and what the store's share is of.

    Nothing is measured: the store is that of the shipped recipe, whose evaluations all its samples share.
    """
    recipe = load(Path(SHIPPED))
    position = next(i for i, stage in enumerate(recipe.stages) if isinstance(stage, Distill))
    cost = training_cost.of_stage(recipe, position)
    assert cost is not None  # its student is its own
    num_stored = store_of(recipe).num_stored
    heads = ("store*", *PARTS[1:], "all", "ratio")
    table = table_of_figures("Network evaluations", "evaluations a sample", *heads)
    reference = None
    for name in (*VARIANTS, PLAIN):
        parts = evaluations(name, cost.store / cost.samples)
        whole = sum(parts.values())
        reference = reference or whole
        table.add_row(name, *(f"{parts[part]:.3g}" for part in PARTS), f"{whole:.4g}", f"{whole / reference:.2f}")
    return table, (
        f"* {cost.store // num_stored} x {num_stored} trajectories / {cost.samples} samples drawn = "
        f"{cost.store / cost.samples:.3g}, the figures of {SHIPPED}"
    )


def sampling(num_pictures: int) -> Table:
    """Return pictures a second, decoded: the teacher at 50 guided steps against a student's 8, 4, 2 and 1."""
    base = teachers.load(TEACHER, DEVICE)
    conditioning, dropped = base.encode_prompts(["panda"] * num_pictures), base.unconditional(num_pictures)
    noise = base.noise(generator("benchmark"), num_pictures)
    table = table_of_figures(f"Sampling, batch {num_pictures}", "sampler", "evals", "pictures a second", "ratio")
    teacher = f"teacher, {TEACHER_STEPS} guided steps"
    times = {teacher: time_grid(TEACHER_STEPS)[:-1]} | {f"student, {n} steps": sampling_times(n) for n in (8, 4, 2, 1)}
    first = None
    for name, grid in times.items():
        started = now()
        with torch.no_grad():
            if name == teacher:
                latents = sampler.sample_teacher(base, conditioning, dropped, noise, grid, TEACHER.guidance_scale)
            else:
                latents = sampler.sample(base, base.denoiser, conditioning, noise, grid, 0.0)
            base.autoencoder.decode(latents)
        rate = num_pictures / (now() - started)
        first = first or rate
        num_evaluations = len(grid) * (TEACHER.evaluations if name == teacher else 1)
        table.add_row(name, str(num_evaluations), f"{rate:.1f}", f"{rate / first:.1f}")
    return table


def steps_table(num_steps: int, batch_size: int, num_trajectories: int) -> Table:
    """Return milliseconds a sample of every variant, each measured in a process of its own."""
    heads = ("store*", *PARTS[1:], "a step", "ratio", "peak MB")
    table = table_of_figures(f"Distillation, batch {batch_size}", "ms a sample", *heads)
    sizes = ("--steps", num_steps, "--batch-size", batch_size, "--trajectories", num_trajectories)
    reference = None
    for name in track((*VARIANTS, PLAIN), "variants", console=Console(stderr=True)):
        figures = in_own_process(__file__, "--only", name, *sizes)
        step = figures["teacher"] + figures["target"] + figures["student"]
        reference = reference or step
        parts = [f"{1000 * figures[part]:.2f}" for part in PARTS]
        ratio = f"{step / reference:.2f}"
        table.add_row(name, *parts, f"{1000 * step:.2f}", ratio, f"{figures['peak_mb']:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--trajectories", type=int, default=64, help="solved for each variant that reads stored ones")
    parser.add_argument("--pictures", type=int, default=16, help="sampled together, in the last table")
    parser.add_argument("--only", choices=[PLAIN, *VARIANTS], help="measure one variant and print it as JSON")
    arguments = parser.parse_args()
    sizes = (arguments.steps, arguments.batch_size)
    if arguments.only == PLAIN:
        print(json.dumps(measure_plain(*sizes)))
        return
    if arguments.only:
        print(json.dumps(measure(arguments.only, *sizes, arguments.trajectories)))
        return
    console = Console(width=120)
    console.print(steps_table(*sizes, arguments.trajectories))
    evaluations_a_trajectory = TEACHER.evaluations * store_of(load(Path(SHIPPED))).solver_steps
    console.print(
        f"* once a trajectory ({evaluations_a_trajectory} evaluations), shared by all samples drawn from it; ratios "
        "are to data (LCM)"
    )
    counts, footnote = evaluations_table()
    console.print(counts)
    console.print(footnote)
    console.print(sampling(arguments.pictures))


if __name__ == "__main__":
    main()
