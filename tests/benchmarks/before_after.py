"""What single changes save: the plain way, which comes before, against the way that is taken, in one run.

    python tests/benchmarks/before_after.py [--repeats 9] [--batch-size 32]        (or: make benchmark)

CPU seconds of this process, one thread, the two ways in turn; medians and their ratio. The last row is peak
memory, each way in a process of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import in_own_process, table_of_figures
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import Tensor
from training_step import PROMPTS, TEACHER, DistillationStep, recipe_of

from mlcm_rl.data.prompts import first_prompts
from mlcm_rl.data.training_points import NoisedData
from mlcm_rl.models import students, teachers
from mlcm_rl.recipe import Distill, Full, Lora
from mlcm_rl.stages import distill
from mlcm_rl.storage import checkpoints
from mlcm_rl.storage.tensors import read_tensors
from mlcm_rl.training import states
from mlcm_rl.training.seeding import generator

Ways = tuple[Callable[[], object], Callable[[], object]]  # before and after
NUM_PICTURES = 256  # noise in their place, with a caption each


def captions(batch_size: int, folder: Path) -> Ways:
    """Return an LCM step whose captions are encoded in it, and one whose captions are encoded before the first step."""
    return lcm_step(batch_size, folder, ahead=False), lcm_step(batch_size, folder, ahead=True)


def lcm_step(batch_size: int, folder: Path, ahead: bool) -> Callable[[], object]:
    """Return a function that makes the same step again and again."""
    stage = Distill(
        source="data",
        images="unused",
        target="consistency",
        num_segments=[1],
        num_steps=1000,
        batch_size=batch_size,
        adapter=Full(),
    )
    recipe = recipe_of(stage, device="cpu")
    base = teachers.load(TEACHER, "cpu")
    texts = [[prompt.prompt] for prompt in first_prompts(PROMPTS, NUM_PICTURES)]
    latents = torch.randn(NUM_PICTURES, *base.latent_shape, generator=generator("benchmark"))
    source = NoisedData(stage, base, latents, texts, recipe.seed)
    training = DistillationStep(recipe, stage, base, folder)
    if ahead:
        distill.encode_ahead(stage, recipe, base, source, real=None)
    return lambda: training.learn(training.points(source, 0))


def switches() -> Ways:
    """Return the preference adapter off and on again, by PEFT's own switches and by ours."""
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


def full_student() -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Return the weights of a stack of layers, 160 MB, and their optimiser."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(40)))
    weights: dict[str, Tensor] = dict(layers.named_parameters())
    return weights, torch.optim.AdamW(layers.parameters(), fused=True)


def peaks(folder: Path) -> tuple[float, float]:
    """Return the growth of the peak in MB, before and after; the checkpoint is written to `folder`."""
    weights, optimizer = full_student()
    for value in weights.values():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    checkpoints.save_state(folder, 1, states.optimizer_tensors(optimizer) | states.add_prefix("student", weights))
    ways = ("whole", "by tensor")
    before, after = (in_own_process(__file__, "--resume", str(folder), "--way", way)["growth_mb"] for way in ways)
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=32, help="of the LCM step")
    parser.add_argument("--resume", type=Path, help="fill from this stage's folder, and print the growth of the peak")
    parser.add_argument("--way", choices=("whole", "by tensor"), default="by tensor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.resume:
        print(json.dumps({"growth_mb": resume(arguments.resume, arguments.way == "whole")}))
        return
    table = table_of_figures("Before and after", "", "before", "after", "ratio")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows: dict[str, Callable[[], Ways]] = {
            f"captions encoded once, LCM step of {arguments.batch_size}": partial(
                captions, arguments.batch_size, folder
            ),
            "switch to the reference and back": switches,
        }
        for name, ways in rows.items():
            before, after = in_turn(ways(), arguments.repeats)
            table.add_row(name, f"{1000 * before:.1f} ms", f"{1000 * after:.1f} ms", f"{after / before:.2f}")
        before, after = peaks(folder)
    table.add_row("resume of 160 MB of weights, peak", f"{before:.0f} MB", f"{after:.0f} MB", f"{after / before:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
