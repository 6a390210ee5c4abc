"""Seconds and memory of training steps on one GPU, SDXL-shaped with random weights, against a plain script in one run.

    python tests/benchmarks/sdxl_step.py [--steps 5] [--shape sdxl] [--device cuda] [--out FOLDER]

1024-pixel latents, bfloat16. The teacher's rows are guided steps of its solver; distillation reads stored states;
feedback goes through the autoencoder and a ViT of BLIP-large's size; the baseline (plain_script.py) encodes pixels and
text, evaluates the teacher twice and keeps a target of its own. Shares are of the rate that one large product of random
matrices reaches on the same device: `useful_share` of the operations that the step needs, `hardware_share` of those
that it does, recomputation by checkpointing among them. `predicted_gib` is what `mlcm plan` says of the same step.
Quality cannot be compared: there are no weights. The result goes to <out>/<device's name>.json with the versions, after
every row. `--steps 3 --batches 1 4` takes about five minutes of an H200. `--shape tiny --device cpu` takes the
same code through a small shape, and its numbers mean nothing.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from plain_script import PlainScript
from random_sdxl import SHAPES, Reward, Shape, random_base
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_step import DistillationStep, TrainingStep, recipe_of

from mlcm_rl.data.training_points import Batch
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.equations.solver import ddim_step
from mlcm_rl.models import sampler, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from mlcm_rl.models.files import MEMORY_FORMATS
from mlcm_rl.models.grids import SamplingGrid
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.preference.tuning import Scores, TunableStudent
from mlcm_rl.recipe import Distill, Dpo, Feedback, Full, Lora, Recipe, Stage
from mlcm_rl.recipe.file import load
from mlcm_rl.stages import dpo

RESULTS = Path(__file__).parent / "results"
TUNING: dict[str, object] = {
    "prompts": "unused",
    "num_steps": 1,
    "rewards": [{"name": "brightness"}],
    "guard": {"rewards": [{"name": "sharpness"}]},
    "gradient_checkpointing": True,
    "precision": "bf16",
}
Step = Callable[[], None]


class Steps:
    """What is timed: each method makes a function that takes one whole step."""

    def __init__(self, base: Base, shape: Shape, folder: Path):
        self.base, self.reward, self.folder = base, Reward(shape, base.device), folder
        self.undo: Step = lambda: None  # what the row before did to the teacher

    def guided(self, batch_size: int, memory_format: str, is_compiled: bool) -> Step:
        """A guided step of the teacher's solver, as stage trajectories takes the first of a trajectory."""
        base = self.base
        base.denoiser.to(memory_format=MEMORY_FORMATS[memory_format])
        x_t, t, conditioning = self._points(batch_size)
        unconditional, s = base.unconditional(batch_size), t - 20
        forward = base.denoiser.forward
        if is_compiled:
            base.denoiser.forward = torch.compile(forward)

        @torch.no_grad()
        def step() -> None:
            with base.same_prompts(base.denoiser):
                x0 = base.guided_x0(x_t, t, conditioning, unconditional, base.teacher.guidance_scale)
                ddim_step(x_t, x0, t, s, base.schedule)

        def undo() -> None:
            base.denoiser.forward = forward
            base.denoiser.to(memory_format=MEMORY_FORMATS["contiguous"])

        self.undo = undo
        return step

    def distil(self, stage: Distill) -> Step:
        """A step on stored states, as stage distill takes it."""
        training = DistillationStep(self._recipe(stage), stage, self.base, self.folder)
        x_t, t, conditioning = self._points(stage.batch_size)
        batch = Batch(x_t, x_t, x_t, t, t - 20, torch.zeros_like(t), conditioning)
        return lambda: training.learn(batch)

    def plain(self, adapter: Lora | Full, batch_size: int, checkpointing: bool) -> Step:
        """The plain script's step."""
        script = PlainScript(self.base, adapter)
        if checkpointing:
            script.student.enable_gradient_checkpointing()
        side, draws = self.base.resolution, torch.Generator().manual_seed(0)
        images = torch.rand(batch_size, 3, side, side, generator=draws).to(self.base.device)

        def step() -> None:
            with torch.autocast(self.base.device.type, torch.bfloat16):
                script.step(images, ["panda"] * batch_size, draws)

        return step

    def feedback(self, stage: Feedback) -> Step:
        """A reward's gradient through the autoencoder and the last of four steps; everything checkpointed."""
        student, times = self._with_preference(stage), sampling_times(stage.sampling_steps)
        noise, _, conditioning = self._points(stage.batch_size)

        def loss() -> Tensor:
            x0 = sampler.sample(self.base, student, conditioning, noise, times, 0.0, grad_steps=stage.num_grad_steps)
            return -self.reward(self.base.autoencoder.decode(x0))

        return self._trained(stage, student, loss)

    def online_dpo(self, stage: Dpo) -> Step:
        """Four samples a pair, drawn, decoded and scored; then the loss on best and worst at every time."""
        student, times = self._with_preference(stage), sampling_times(stage.sampling_steps)
        tuned = TunableStudent(self.base, student, times, 0.0, False, 1, SamplingGrid())
        num_pairs, copies = stage.batch_size, stage.num_generations
        noise, _, conditioning = self._points(num_pairs * copies)
        draws = [torch.Generator().manual_seed(i) for i in range(num_pairs)]

        def loss() -> Tensor:
            with torch.no_grad():
                x0 = sampler.sample(self.base, student, conditioning, noise, times, 0.0)
                scores = [self.reward(self.base.autoencoder.decode(part)) for part in x0.split(1)]
                groups = torch.cat(scores).unflatten(0, (num_pairs, copies))
            first = torch.arange(num_pairs, device=x0.device) * copies
            index = torch.stack([first + groups.argmax(1), first + groups.argmin(1)])
            given = {name: value[first] for name, value in conditioning.items()}
            pairs = dpo.PairBatch(None, x0[index], given, torch.ones(num_pairs, device=x0.device), draws)
            return dpo.loss(stage, tuned, pairs, Scores())

        return self._trained(stage, student, loss)

    def _with_preference(self, stage: Feedback | Dpo) -> nn.Module:
        distilled = students.student(self.base, Lora(), seed=0)
        student = students.with_preference(self.base, distilled, stage.adapter, seed=0)
        self.base.checkpoint_blocks(student)
        self.base.autoencoder.checkpoint_blocks()
        return student

    def _points(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Random states, times and conditioning of `count` samples, as a store would give them."""
        x_t = self.base.noise(torch.Generator().manual_seed(0), count)
        return x_t, torch.full((count,), 999, device=self.base.device), self.base.encode_prompts(["panda"] * count)

    def _trained(self, stage: Feedback | Dpo, student: nn.Module, loss: Callable[[], Tensor]) -> Step:
        training = TrainingStep(self._recipe(stage), stage, student, self.folder)
        return lambda: training.update(loss)

    def _recipe(self, stage: Stage) -> Recipe:
        is_on_gpu = self.base.device.type == "cuda"
        return recipe_of(stage, teacher=self.base.teacher, device="cuda" if is_on_gpu else "cpu")


@dataclass(frozen=True)
class Row:
    """One row of the table: what makes its step, the samples of a step, and the row whose operations a sample needs.

    `stage` is the recipe's, for the prediction of its memory.
    """

    make: Callable[[], Step]
    samples: int
    needs: str | None = None  # default: its own
    stage: Stage | None = None


def measure(steps: Steps, row: Row, num_steps: int, rate: float, needed: dict[str, float]) -> dict[str, float]:
    """Return median seconds of a step after one to warm up, its shares of `rate`, and peak memory on a GPU.

    `needed` is operations a sample by the row's name; a row without checkpointing enters its own there.
    """
    device = steps.base.device
    steps.undo()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = row.make()
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = [timed(step, device) for _ in range(num_steps)]
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    median, done = statistics.median(seconds), counter.get_total_flops()
    useful = needed.get(row.needs or "", done / row.samples) * row.samples
    result = {"seconds": median, "samples_a_second": row.samples / median}
    result |= {"useful_share": useful / median / rate, "hardware_share": done / median / rate}
    result["operations_a_sample"] = done / row.samples
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def predicted_gib(stage: Stage) -> float:
    """Return what `mlcm plan` says of the memory of `stage` over SDXL as it is published, on a GPU, in GiB."""
    recipe = load(Path(__file__).resolve().parents[2] / "recipes" / "sdxl_mlcm.yaml")
    teacher = recipe.teacher.model_copy(update={"dtype": "bfloat16"})
    samples = recipe.samples.model_copy(update={"prompts": []})
    store, distilled, *_ = recipe.stages
    stages = [store, stage] if isinstance(stage, Distill) else [store, distilled, stage]
    whole = recipe.model_copy(update={"teacher": teacher, "samples": samples, "stages": stages})
    return Sizes(whole).memory(stage, "cuda").total / 2**30


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return seconds of `step`, the device's work included."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_rate(size: int, device: torch.device) -> float:
    """Return operations a second of a product of two square bfloat16 matrices."""
    matrix = torch.randn(size, size, device=device).bfloat16()  # of zeros and ones a card makes more of them
    for _ in range(3):
        matrix @ matrix
    return 2 * size**3 / min(timed(lambda: matrix @ matrix, device) for _ in range(10))


def rows(steps: Steps, batches: list[int], is_compiled: bool) -> dict[str, Row]:
    """Return the rows by name; those without checkpointing come before those with it."""
    made: dict[str, Row] = {}
    for batch in [size for size in batches if size > 1] or batches:
        for memory_format in MEMORY_FORMATS:
            for compiled in (False, True)[: 1 + is_compiled]:
                name = f"teacher, guided step, {memory_format}{', compiled' * compiled}, batch {batch}"
                made[name] = Row(partial(steps.guided, batch, memory_format, compiled), batch)
    adapters: tuple[Lora | Full, ...] = (Lora(), Full())
    for adapter in adapters:
        first = f"{adapter.kind}, no checkpointing, batch {batches[0]}"
        for checkpointing in (False, True):
            for batch in batches:
                name = f"{adapter.kind}, {'' if checkpointing else 'no '}checkpointing, batch {batch}"
                stage = Distill(
                    adapter=adapter,
                    num_segments=[1],
                    num_steps=1,
                    batch_size=batch,
                    gradient_checkpointing=checkpointing,
                    precision="bf16",
                )
                plain = partial(steps.plain, adapter, batch, checkpointing)
                made[f"plain script, {name}"] = Row(plain, batch, f"plain script, {first}")
                made[f"distil, {name}"] = Row(partial(steps.distil, stage), batch, f"distil, {first}", stage)
    for grad_steps in (1, 2):
        for batch in (1, 2):
            tuned = Feedback.model_validate(TUNING | {"num_grad_steps": grad_steps, "batch_size": batch})
            made[f"feedback, K = {grad_steps}, batch {batch}"] = Row(partial(steps.feedback, tuned), batch, stage=tuned)
    pairs = Dpo.model_validate(TUNING | {"batch_size": 2})
    made["dpo online, 2 pairs"] = Row(partial(steps.online_dpo, pairs), 2)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--shape", choices=list(SHAPES), default="sdxl")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--compile", action="store_true", help="the teacher's rows compiled too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU and this machine has none; --shape tiny --device cpu tries its code")
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    hardware = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU {platform.machine()}"
    rate = matrix_rate(shape.product, device)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "cuda": torch.version.cuda}
    results: dict[str, dict[str, float]] = {}
    record = {
        "hardware": hardware,
        "shape": arguments.shape,
        "versions": versions | {"transformers": transformers.__version__, "python": platform.python_version()},
        "matrix_rate_tflops": rate / 1e12,
        "rows": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}-{arguments.shape}.json"
    needed: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        steps = Steps(random_base(shape, device), shape, Path(place))
        for name, row in rows(steps, arguments.batches, arguments.compile).items():
            results[name] = result = measure(steps, row, arguments.steps, rate, needed)
            needed.setdefault(name, result.get("operations_a_sample", 0.0))
            if row.stage is not None and arguments.shape == "sdxl":
                result["predicted_gib"] = predicted_gib(row.stage)
            print(name, json.dumps(result), flush=True)
            file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
