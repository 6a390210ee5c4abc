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
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

from measuring import output_of, resident_peak_mb, table_of_figures
from rich.console import Console
from rich.progress import track
from rich.table import Table
from training_step import PROMPTS, TEACHER

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


@dataclass(frozen=True)
class Round:
    """What a variant took for its steps once: seconds a step by processor and by the clock, its peak, its states."""

    cpu: float
    clock: float
    peak_mb: float
    bits: str


def take_turns(variant: Variant, num_steps: int, batch_size: int) -> None:
    """Take `num_steps` guided steps for every line that comes in, and print what they took as JSON."""
    if variant.keep_memory:
        allocator.keep_freed_memory()
    base = teachers.load(TEACHER.model_copy(update={"memory_format": variant.memory_format}), "cpu")
    conditioning = base.encode_prompts(["panda"] * batch_size)
    noise, grid = base.noise(generator("benchmark"), batch_size), time_grid(48)[: num_steps + 1]
    # that of `Base` computes nothing once
    setting = nullcontext() if variant.prompts_once else patch.object(type(base), "same_prompts", Base.same_prompts)
    with setting:
        for _ in sys.stdin:
            clock, cpu = time.perf_counter(), time.process_time()
            states, _ = trajectories.solve(base, conditioning, noise, grid, TEACHER.guidance_scale)
            cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
            bits = sha256(states.numpy().tobytes()).hexdigest()
            result = Round(cpu / num_steps, clock / num_steps, resident_peak_mb(), bits)
            print(json.dumps(asdict(result)), flush=True)


def environment_of(variant: Variant) -> dict[str, str]:
    """Return the environment of a variant's process: none of the settings that are compared but its own."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MALLOC_"))}
    threads = {"OMP_NUM_THREADS": str(variant.num_threads)}
    return usual | {"PYTHONPATH": str(ROOT)} | threads | variant.environment


def measure(title: str, names: Iterable[str], rounds: int, num_steps: int, batch_size: int) -> dict[str, list[Round]]:
    """Return what each round of each variant took, the first round, which warms up, left out."""
    processes = {name: process_of(name, num_steps, batch_size) for name in names}
    results: dict[str, list[Round]] = {name: [] for name in processes}
    for _ in track(range(rounds + 1), title, console=Console(stderr=True)):
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            results[name].append(Round(**json.loads(process.stdout.readline())))
    for process in processes.values():
        process.communicate()
    return {name: each[1:] for name, each in results.items()}


def process_of(name: str, num_steps: int, batch_size: int) -> "subprocess.Popen[str]":
    """Return the process of a variant, which waits for its first turn."""
    command = [sys.executable, __file__, "--only", name, "--steps", str(num_steps), "--batch-size", str(batch_size)]
    return subprocess.Popen(
        command,
        env=environment_of(VARIANTS[name]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def table_of(title: str, results: dict[str, list[Round]]) -> Table:
    """Return a row a variant: seconds a step by processor and by the clock, ratios, peak memory, and its bits."""
    table = table_of_figures(title, "s a step", "CPU", "ratio", "clock", "ratio", "peak MB", "bits")
    medians = {name: medians_of((one.cpu, one.clock) for one in rounds) for name, rounds in results.items()}
    first = next(iter(results))
    for name, rounds in results.items():
        peak = statistics.median(one.peak_mb for one in rounds)
        is_same = {one.bits for one in rounds} == {results[first][0].bits}
        seconds = with_ratios(medians[name], medians[first], digits=3)
        table.add_row(name, *seconds, f"{peak:.0f}", "same" if is_same else "other")
    return table


def whole_stages(size: int, rounds: int) -> Table:
    """Return seconds of `mlcm run` over `size` trajectories, by one process and by two."""
    ways: dict[str, list[str]] = {
        "one process": [],
        "two processes": ["--launch", str(ROOT / "recipes/launch/cpu2.yaml")],
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    environment = {key: value for key, value in environment_of(Variant()).items() if key[:4] != "OMP_"}
    with tempfile.TemporaryDirectory() as place:
        recipe = Path(place, "recipe.yaml")
        recipe.write_text(RECIPE.format(root=ROOT, prompts=PROMPTS, size=size), encoding="utf-8")
        for count in track(range(rounds), "whole stages", console=Console(stderr=True)):
            for name, options in ways.items():
                command = [sys.executable, "-m", "mlcm_rl", "run", str(recipe), f"runs={place}/{name}{count}", *options]
                clock, cpu = time.perf_counter(), of_children()
                output_of(command, environment)
                seconds[name].append((of_children() - cpu, time.perf_counter() - clock))
    title = "A stage of trajectories"
    table = table_of_figures(title, f"s, {size} trajectories", "CPU", "ratio", "clock", "ratio")
    medians = {name: medians_of(each) for name, each in seconds.items()}
    for name, own in medians.items():
        table.add_row(name, *with_ratios(own, medians["one process"], digits=2))
    return table


def medians_of(seconds: Iterable[tuple[float, float]]) -> list[float]:
    """Return the medians of seconds by processor and by the clock."""
    return [statistics.median(values) for values in zip(*seconds, strict=True)]


def with_ratios(seconds: list[float], reference: list[float], digits: int) -> list[str]:
    """Return the cells of `seconds`, each with its ratio to that of `reference`."""
    pairs = zip(seconds, reference, strict=True)
    return [cell for one, other in pairs for cell in (f"{one:.{digits}f}", f"{one / other:.2f}")]


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
        results = measure(title, variants, arguments.rounds, arguments.steps, arguments.batch_size)
        size = f"batch {arguments.batch_size}, {arguments.steps} guided steps"
        console.print(table_of(f"{title}, {size}", results))
    if arguments.trajectories:
        console.print(whole_stages(arguments.trajectories, max(1, arguments.rounds // 2)))


if __name__ == "__main__":
    main()
