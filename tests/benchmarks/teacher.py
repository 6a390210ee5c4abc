"""Seconds of the teacher's guided steps on a CPU, before and after what spares time, in one run.

    python tests/benchmarks/teacher.py [--rounds 5] [--steps 8] [--batch-size 32]        (or: make benchmark)

Every variant has a process of its own, and they take turns, one trajectory's first steps at a time, so that other work
on the machine meets all of them alike. Seconds are medians over rounds of a step, ratios are of medians to the first
row of a table. Processor time is what a variant costs; time on the clock is the point where threads wait for one
another. `bits` says whether the states are the first row's, to the last bit.

The last table runs a stage of trajectories whole, start and end of the program with it: one process with a thread a
core, and under `--launch recipes/launch/cpu2.yaml` two processes that share the cores.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from distillation import PROMPTS, TEACHER
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlcm_rl.equations.segments import time_grid
from mlcm_rl.models import teachers
from mlcm_rl.models.base import Base
from mlcm_rl.stages import trajectories
from mlcm_rl.training import allocator
from mlcm_rl.training.seeding import generator

ROOT = Path(__file__).parents[2]
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
RECIPE = """
name: benchmark
seed: 0
trackers: []
teacher: {{path: {root}/recipes/emoji/teacher, family: sdxl, guidance_scale: 4.0}}
stages:
  - {{kind: trajectories, prompts: {root}/{prompts}, num_trajectories: {size}, num_held_out: 0, batch_size: 16,
      shard_size: 16, solver_steps: 24}}
"""


@dataclass(frozen=True)
class Variant:
    """How the same steps are taken."""

    prompts_once: bool = False
    keep_memory: bool = False
    memory_format: str = "contiguous"
    num_threads: int = 1
    environment: dict[str, str] = field(default_factory=dict)


ONE_THREAD = {
    "before": Variant(),
    "keys and values once": Variant(prompts_once=True),
    "freed memory kept": Variant(keep_memory=True),
    "channels-last": Variant(memory_format="channels_last"),
    "the first two": Variant(prompts_once=True, keep_memory=True),
    "all three": Variant(prompts_once=True, keep_memory=True, memory_format="channels_last"),
}
TWO_THREADS = {
    "two threads that spin": Variant(num_threads=2),
    "two threads that sleep": Variant(num_threads=2, environment=PASSIVE),
    "one thread": Variant(),
}


def take_turns(variant: Variant, num_steps: int, batch_size: int) -> None:
    """Take `num_steps` guided steps for every line that comes in, and print what they took as JSON."""
    if variant.keep_memory:
        allocator.keep_freed_memory()
    base = teachers.load(TEACHER.model_copy(update={"memory_format": variant.memory_format}), "cpu")
    if not variant.prompts_once:
        type(base).same_prompts = Base.same_prompts  # which computes nothing once
    conditioning = base.encode_prompts(["panda"] * batch_size)
    noise, grid = base.noise(generator("benchmark"), batch_size), time_grid(48)[: num_steps + 1]
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        states, _ = trajectories.solve(base, conditioning, noise, grid, guidance_scale=4.0)
        taken = {"cpu": time.process_time() - processor, "wall": time.perf_counter() - wall}
        result = {name: seconds / num_steps for name, seconds in taken.items()}
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result | {"bits": sha256(states.numpy().tobytes()).hexdigest()}), flush=True)


def environment_of(variant: Variant) -> dict[str, str]:
    """Return the environment of a variant's process: none of the settings that are compared but its own."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MALLOC_"))}
    threads = {"OMP_NUM_THREADS": str(variant.num_threads)}
    return usual | {"PYTHONPATH": str(ROOT)} | threads | variant.environment


def measure(table: str, names: Iterable[str], arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Return what each round of each variant took, the first round, which warms up, left out."""
    processes = {}
    for name in names:
        command = [sys.executable, __file__, "--only", name, "--steps", str(arguments.steps)]
        command += ["--batch-size", str(arguments.batch_size)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = environment_of(VARIANTS[name])
        processes[name] = subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes)
    results: dict[str, list[dict]] = {name: [] for name in processes}
    for _ in track(range(arguments.rounds + 1), table, console=Console(stderr=True)):
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            results[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return {name: rounds[1:] for name, rounds in results.items()}


def table_of(title: str, results: dict[str, list[dict]]) -> Table:
    """Return a row a variant: seconds a step by processor and by the clock, ratios, peak memory, and its bits."""
    table = Table("s a step", title=title, box=SIMPLE_HEAD)
    for head in ("CPU", "ratio", "clock", "ratio", "peak MB", "bits"):
        table.add_column(head, justify="right", no_wrap=True)
    first = None
    for name, rounds in results.items():
        medians = {key: statistics.median(one[key] for one in rounds) for key in ("cpu", "wall", "peak_mb")}
        first = first or medians | {"bits": rounds[0]["bits"]}
        cells = [
            text for key in ("cpu", "wall") for text in (f"{medians[key]:.3f}", f"{medians[key] / first[key]:.2f}")
        ]
        same = {one["bits"] for one in rounds} == {first["bits"]}
        table.add_row(name, *cells, f"{medians['peak_mb']:.0f}", "same" if same else "other")
    return table


def whole_stages(size: int, rounds: int) -> Table:
    """Return seconds of `mlcm run` over `size` trajectories, by one process and by two."""
    ways = {"one process": [], "two processes": ["--launch", str(ROOT / "recipes/launch/cpu2.yaml")]}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as place:
        recipe = Path(place, "recipe.yaml")
        recipe.write_text(RECIPE.format(root=ROOT, prompts=PROMPTS, size=size), encoding="utf-8")
        for count in track(range(rounds), "whole stages", console=Console(stderr=True)):
            for name, options in ways.items():
                command = [sys.executable, "-m", "mlcm_rl", "run", str(recipe), f"runs={place}/{name}{count}", *options]
                environment = {key: value for key, value in environment_of(Variant()).items() if key[:4] != "OMP_"}
                wall, processor = time.perf_counter(), of_children()
                subprocess.run(command, env=environment, capture_output=True, check=True)
                seconds[name].append((of_children() - processor, time.perf_counter() - wall))
    table = Table(f"s, {size} trajectories", title="A stage of trajectories", box=SIMPLE_HEAD)
    for head in ("CPU", "ratio", "clock", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    first = None
    for name, rounds_of_one in seconds.items():
        medians = [statistics.median(values) for values in zip(*rounds_of_one, strict=True)]
        first = first or medians
        cells = (text for one, reference in zip(medians, first, strict=True) for text in (one, one / reference))
        table.add_row(name, *(f"{value:.2f}" for value in cells))
    return table


def of_children() -> float:
    """Return the processor seconds of all processes that this one has waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


VARIANTS = ONE_THREAD | TWO_THREADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--trajectories", type=int, default=128, help="of the whole stages; 0 leaves them out")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        take_turns(VARIANTS[arguments.only], arguments.steps, arguments.batch_size)
        return
    console = Console(width=120)
    for title, variants in (("One thread", ONE_THREAD), ("Threads", TWO_THREADS)):
        size = f"{title}, batch {arguments.batch_size}, {arguments.steps} guided steps"
        console.print(table_of(size, measure(title, variants, arguments)))
    if arguments.trajectories:
        console.print(whole_stages(arguments.trajectories, max(1, arguments.rounds // 2)))


if __name__ == "__main__":
    main()
