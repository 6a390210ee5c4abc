"""What single changes save: the way it was before against the way it is, in one run.

    python tests/benchmarks/before_after.py [--repeats 9]        (or: make benchmark)

CPU seconds of this process, one thread, the two ways in turn; medians and their ratio. The last row is peak
memory, each way in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from distillation import PROMPTS, TEACHER
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.data.training_points import NoisedData
from mlcm_rl.models import students, teachers
from mlcm_rl.recipe import Distill, Full, Lora, Recipe
from mlcm_rl.stages import distill
from mlcm_rl.storage import checkpoints
from mlcm_rl.storage.tensors import read_tensors
from mlcm_rl.training import states
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.seeding import generator

Ways = tuple[Callable[[], object], Callable[[], object]]  # before and after
NUM_PICTURES = 256  # noise in their place, with a caption each


def captions(batch_size: int = 32) -> Ways:
    """An LCM step, its captions encoded in it, or before the first step."""
    ways = []
    texts = [[prompt.prompt] for prompt in read_prompts(PROMPTS)[:NUM_PICTURES]]
    for ahead in (False, True):
        stage = Distill(
            source="data",
            images="unused",
            target="consistency",
            num_segments=[1],
            num_steps=1000,
            batch_size=batch_size,
            adapter=Full(),
        )
        recipe = Recipe(name="benchmark", teacher=TEACHER, stages=[stage], trackers=[])
        base = teachers.load(TEACHER, "cpu")
        student = students.student(base, stage.adapter, seed=0)
        latents = torch.randn(NUM_PICTURES, *base.latent_shape, generator=generator("benchmark"))
        source = NoisedData(stage, base, latents, texts, 0)
        if ahead:
            distill.encode_ahead(stage, recipe, base, source)
        rt = Runtime(recipe, stage, Path(tempfile.mkdtemp()))
        optimizer = torch.optim.AdamW(students.trainable_parameters(student), lr=1e-5, fused=True)
        rt.prepare(student, optimizer)
        ways.append(lcm_step(rt, base, student, source, optimizer))
    return ways[0], ways[1]


def lcm_step(rt: Runtime, base, student: torch.nn.Module, source: NoisedData, optimizer) -> Callable[[], object]:
    """Return a function that makes the same step again and again."""
    settings = distill.PhaseSettings(rt.stage, 0)

    def step() -> None:
        batch = source.realise(source.draw(0, 1, "next", generator("benchmark", 0)))
        distance = distill.make_distances(rt.stage, rt.recipe, base, {}).of(settings.distance, 0)
        distill.loss(rt, rt.stage, settings, base, student, {}, batch, distance).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def switches() -> Ways:
    """The preference adapter off and on again, by PEFT's own switches or by ours."""
    base = teachers.load(TEACHER, "cpu")
    denoiser = students.with_preference(base, students.student(base, Full(), seed=0), Lora(rank=16, alpha=16.0), seed=0)

    def by_peft() -> None:
        for enabled in (False, True):
            for layer in denoiser.modules():
                if isinstance(layer, BaseTunerLayer):
                    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
                    layer.enable_adapters(enabled)
                    for parameter, requires_grad in flags:
                        parameter.requires_grad_(requires_grad)

    def ours() -> None:
        with students.as_reference(denoiser):
            pass

    return by_peft, ours


def in_turn(ways: Ways, repeats: int) -> tuple[float, float]:
    """Return the median CPU seconds of both ways, after one turn to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for way, spent in zip(ways, seconds, strict=True):
            started = time.process_time()
            way()
            spent.append(time.process_time() - started)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def resume(folder: Path, whole: bool) -> float:
    """Return the MB by which this process's peak grows as a student and its optimiser are filled from `folder`.

    With `whole`, all tensors are read first.
    """
    weights, optimizer = full_student()
    before = resident_mb("VmRSS")
    checkpoint = checkpoints.load_state(folder)
    assert checkpoint is not None
    tensors = read_tensors(checkpoint[1].path) if whole else checkpoint[1]
    for name, value in states.under_prefix("student", tensors).items():
        weights[name].data.copy_(value)
    states.load_optimizer(optimizer, tensors)
    return resident_mb("VmHWM") - before


def resident_mb(which: str) -> float:
    """Return this process's resident set in MB, now (VmRSS) or at its largest (VmHWM): Linux alone has both."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def full_student() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Return the weights of a stack of layers, 160 MB, and their optimiser."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(40)))
    return dict(layers.named_parameters()), torch.optim.AdamW(layers.parameters(), fused=True)


def peaks() -> Iterator[float]:
    """Yield the growth of the peak in MB, before and after."""
    with tempfile.TemporaryDirectory() as place:
        weights, optimizer = full_student()
        for value in weights.values():
            value.grad = torch.zeros_like(value)
        optimizer.step()
        tensors = states.optimizer_tensors(optimizer) | states.add_prefix("student", weights)
        checkpoints.save_state(Path(place), 1, tensors)
        for way in ("whole", "by tensor"):
            command = [sys.executable, __file__, "--resume", place, "--way", way]
            yield float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--resume", type=Path, help="fill from this stage's folder, and print the growth of the peak")
    parser.add_argument("--way", choices=("whole", "by tensor"), default="by tensor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.resume:
        print(resume(arguments.resume, arguments.way == "whole"))
        return
    table = Table("", title="Before and after", box=SIMPLE_HEAD)
    for head in ("before", "after", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    rows = {"captions encoded once, LCM step of 32": captions, "switch to the reference and back": switches}
    for name, ways in rows.items():
        before, after = in_turn(ways(), arguments.repeats)
        table.add_row(name, f"{1000 * before:.1f} ms", f"{1000 * after:.1f} ms", f"{after / before:.2f}")
    before, after = peaks()
    name = "resume of 160 MB of weights, peak"
    table.add_row(name, f"{before:.0f} MB", f"{after:.0f} MB", f"{after / before:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
