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
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipVisionConfig, BlipVisionModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' own tokenizer

from plain_script import PlainScript

import tiny
from mlcm_rl.data.training_points import Batch
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.equations.solver import ddim_step
from mlcm_rl.models import sampler, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.families.sdxl import Family
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.preference.tuning import Scores, TunableStudent
from mlcm_rl.recipe import Distill, Dpo, Feedback, Full, Lora, Recipe, Stage, Teacher
from mlcm_rl.recipe.file import load
from mlcm_rl.stages import distill, dpo
from mlcm_rl.training.loop import Runtime

CONTIGUOUS = torch.contiguous_format
RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "sdxl": {
        "widths": [320, 640, 1280],
        "layers": 2,
        "heads": [5, 10, 20],
        "transformers": [1, 2, 10],
        "autoencoder": [128, 256, 512, 512],
        "size": 128,
        "norm_groups": 32,
        "towers": ((768, 3072, 12, 12), (1280, 5120, 32, 20)),  # width, inner width, layers, heads
        "reward": (1024, 4096, 24, 16, 224),
        "time_width": 256,
        "product": 8192,
    },
    "tiny": {
        "widths": [16, 16, 32],
        "layers": 1,
        "heads": [2, 2, 2],
        "transformers": [1, 1, 1],
        "autoencoder": [8, 8, 8, 8],
        "size": 8,
        "norm_groups": 4,
        "towers": ((16, 32, 1, 2), (24, 32, 1, 2)),
        "reward": (16, 32, 1, 2, 32),
        "time_width": 8,
        "product": 256,
    },
}
PROMPTS = {"prompts": "unused", "num_steps": 1, "rewards": [{"name": "brightness"}]}
GUARD = {"guard": {"rewards": [{"name": "sharpness"}]}}


def random_base(shape: dict, device: torch.device) -> Base:
    """A pipeline of that shape with random weights, bfloat16 but for its autoencoder."""
    towers = [_tower(*sizes) for sizes in shape["towers"]]
    pooled = shape["towers"][1][0]
    down = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=shape["size"],
            down_block_types=down,
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            block_out_channels=shape["widths"],
            layers_per_block=shape["layers"],
            attention_head_dim=shape["heads"],
            norm_num_groups=shape["norm_groups"],
            cross_attention_dim=sum(sizes[0] for sizes in shape["towers"]),
            transformer_layers_per_block=shape["transformers"],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=shape["time_width"],
            projection_class_embeddings_input_dim=pooled + 6 * shape["time_width"],
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=shape["autoencoder"],
            layers_per_block=shape["layers"],
            latent_channels=4,
            norm_num_groups=shape["norm_groups"],
            scaling_factor=0.13025,
        )
        text = (CLIPTextModel(towers[0]), CLIPTextModelWithProjection(towers[1]))
    for part in (unet, *text):
        nn.Module.to(part, torch.bfloat16)
    words = tiny.tokenizer()
    scheduler = EulerDiscreteScheduler(**tiny.BETAS, prediction_type="epsilon")
    pipeline = StableDiffusionXLPipeline(vae, *text, words, words, unet, scheduler, add_watermarker=False)
    for part in (unet, vae, *text):
        part.requires_grad_(False).eval()
    teacher = Teacher(path="random", family="sdxl", guidance_scale=8.0, dtype="bfloat16")
    return Family(teacher, device, pipeline)


def _tower(width: int, inner: int, layers: int, heads: int) -> CLIPTextConfig:
    words = tiny.tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tiny.NUM_TOKENS,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


class Reward(nn.Module):
    """A vision transformer of BLIP's kind with a number at its end."""

    def __init__(self, shape: dict, device: torch.device):
        super().__init__()
        width, inner, layers, heads, self.side = shape["reward"]
        settings = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
        with torch.device(device):
            self.vision = BlipVisionModel(
                BlipVisionConfig(**settings, num_attention_heads=heads, image_size=self.side, patch_size=16)
            ).bfloat16()
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """A score (B,) of `images` (B, 3, H, W)."""
        pixels = nn.functional.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True)
        return self.vision(pixels.bfloat16()).last_hidden_state[:, 0].float().mean(1)


class Steps:
    """What is timed: each method makes a function that takes one whole step."""

    def __init__(self, base: Base, shape: dict):
        self.base, self.reward, self.kind = base, Reward(shape, base.device), base.device.type
        self.place = tempfile.TemporaryDirectory()
        self.undo: Callable[[], object] = lambda: None  # what the row before did to the teacher

    def guided(self, batch_size: int, memory_format: str, is_compiled: bool) -> Callable[[], None]:
        """A guided step of the teacher's solver, as stage trajectories takes it."""
        base, layout = self.base, getattr(torch, memory_format)
        base.denoiser.to(memory_format=layout)
        x_t, t, conditioning = self._points(batch_size)
        unconditional, s = base.unconditional(batch_size), t - 20
        forward = base.denoiser.forward
        if is_compiled:
            base.denoiser.forward = torch.compile(forward)

        @torch.no_grad()
        def step() -> None:
            x0 = base.guided_x0(x_t, t, conditioning, unconditional, base.teacher.guidance_scale)
            ddim_step(x_t, x0, t, s, base.schedule)

        self.undo = lambda: (setattr(base.denoiser, "forward", forward), base.denoiser.to(memory_format=CONTIGUOUS))
        return step

    def distil(self, adapter: Lora | Full, batch_size: int, checkpointing: bool) -> Callable[[], None]:
        """A step on stored states, as stage distill takes it."""
        stage = Distill(adapter=adapter, num_segments=[1], num_steps=1, batch_size=batch_size)
        student, settings = self._student(adapter, checkpointing), distill.PhaseSettings(stage, 0)
        x_t, t, conditioning = self._points(batch_size)
        batch = Batch(x_t, x_t, x_t, t, t - 20, torch.zeros_like(t), conditioning)
        recipe = Recipe(name="benchmark", teacher=self.base.teacher, stages=[stage], trackers=[], device=self.kind)
        rt = Runtime(recipe, stage, Path(self.place.name))
        distance = distill.make_distances(stage, recipe, self.base, {}).of(settings.distance, 0)
        return self._trained(
            student, lambda: distill.loss(rt, stage, settings, self.base, student, {}, batch, distance).mean()
        )

    def plain(self, adapter: Lora | Full, batch_size: int, checkpointing: bool) -> Callable[[], None]:
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

    def feedback(self, num_grad_steps: int, batch_size: int) -> Callable[[], None]:
        """A reward's gradient through the autoencoder and the last of four steps; everything checkpointed."""
        student = self._with_preference()
        noise, _, conditioning = self._points(batch_size)
        times = sampling_times(4)

        def loss() -> Tensor:
            x0 = sampler.sample(self.base, student, conditioning, noise, times, 0.0, grad_steps=num_grad_steps)
            return -self.reward(self.base.autoencoder.decode(x0)).mean()

        return self._trained(student, loss)

    def online_dpo(self, num_pairs: int) -> Callable[[], None]:
        """Four samples a pair, drawn, decoded and scored; then the loss on best and worst at every time."""
        stage = Dpo(batch_size=num_pairs, **PROMPTS, **GUARD)
        student, times = self._with_preference(), sampling_times(4)
        tuned = TunableStudent(self.base, student, times, 0.0, False, 1)
        noise, _, conditioning = self._points(num_pairs * stage.num_generations)
        draws = [torch.Generator().manual_seed(i) for i in range(num_pairs)]

        def loss() -> Tensor:
            with torch.no_grad():
                x0 = sampler.sample(self.base, student, conditioning, noise, times, 0.0)
                groups = torch.cat([self.reward(self.base.autoencoder.decode(part)) for part in x0.split(1)]).unflatten(
                    0, (num_pairs, -1)
                )
            first = torch.arange(num_pairs, device=x0.device) * stage.num_generations
            index = torch.stack([first + groups.argmax(1), first + groups.argmin(1)])
            given = {name: value[first] for name, value in conditioning.items()}
            pairs = dpo.PairBatch(None, x0[index], given, torch.ones(num_pairs, device=x0.device), draws)
            return dpo.loss(stage, tuned, pairs, Scores()).mean()

        return self._trained(student, loss)

    def _student(self, adapter: Lora | Full, checkpointing: bool) -> nn.Module:
        student = students.student(self.base, adapter, seed=0)
        if checkpointing:
            student.enable_gradient_checkpointing()
        return student

    def _with_preference(self) -> nn.Module:
        student = students.with_preference(self.base, self._student(Lora(), True), Lora(rank=16, alpha=16.0), seed=0)
        self.base.autoencoder.vae.enable_gradient_checkpointing()
        return student

    def _points(self, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Random states, times and conditioning of `count` samples, as a store would give them."""
        x_t = self.base.noise(torch.Generator().manual_seed(0), count)
        return x_t, torch.full((count,), 999, device=self.base.device), self.base.encode_prompts(["panda"] * count)

    def _trained(self, student: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        parameters = students.trainable_parameters(student)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

        def step() -> None:
            with torch.autocast(self.base.device.type, torch.bfloat16):
                loss().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step


@dataclass(frozen=True)
class Row:
    """One row of the table: what makes its step, the samples of a step, and the row whose operations a sample needs.

    `stage` is the recipe's, for the prediction of its memory.
    """

    make: Callable[[], Callable[[], None]]
    samples: int
    needs: str | None = None  # default: its own
    stage: Stage | None = None


def measure(steps: Steps, row: Row, num_steps: int, rate: float, needed: dict[str, float]) -> dict[str, object]:
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
    distilled = recipe.stages[1].model_copy(update={"adapter": getattr(stage, "adapter", Lora())})
    stages = [recipe.stages[0], *([] if isinstance(stage, Distill) else [distilled]), stage]
    whole = recipe.model_copy(update={"teacher": teacher, "samples": samples, "stages": stages})
    return Sizes(whole).memory(stage, "cuda").total / 2**30


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of `step`, the device's work included."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_rate(size: int, device: torch.device) -> float:
    """Operations a second of a product of two square bfloat16 matrices."""
    matrix = torch.randn(size, size, device=device).bfloat16()  # of zeros and ones a card makes more of them
    for _ in range(3):
        matrix @ matrix
    return 2 * size**3 / min(timed(lambda: matrix @ matrix, device) for _ in range(10))


def rows(steps: Steps, batches: list[int], is_compiled: bool) -> dict[str, Row]:
    """Return the rows by name; those without checkpointing come before those with it."""
    made: dict[str, Row] = {}
    for batch in [size for size in batches if size > 1] or batches:
        for memory_format in ("contiguous_format", "channels_last"):
            for compiled in (False, True)[: 1 + is_compiled]:
                settings = (batch, memory_format, compiled)
                name = f"teacher, guided step, {memory_format.removesuffix('_format')}{', compiled' * compiled}"
                made[f"{name}, batch {batch}"] = Row(lambda s=settings: steps.guided(*s), batch)
    for adapter in (Lora(), Full()):
        for checkpointing in (False, True):
            for batch in batches:
                settings, how = (
                    (adapter, batch, checkpointing),
                    "checkpointing" if checkpointing else "no checkpointing",
                )
                name, first = (
                    f"{adapter.kind}, {how}, batch {batch}",
                    f"{adapter.kind}, no checkpointing, batch {batches[0]}",
                )
                stage = Distill(
                    adapter=adapter,
                    num_segments=[1],
                    num_steps=1,
                    batch_size=batch,
                    gradient_checkpointing=checkpointing,
                    precision="bf16",
                )
                made[f"plain script, {name}"] = Row(lambda s=settings: steps.plain(*s), batch, f"plain script, {first}")
                made[f"distil, {name}"] = Row(lambda s=settings: steps.distil(*s), batch, f"distil, {first}", stage)
    for grad_steps in (1, 2):
        for batch in (1, 2):
            name = f"feedback, K = {grad_steps}, batch {batch}"
            settings = {"num_grad_steps": grad_steps, "batch_size": batch, "gradient_checkpointing": True}
            stage = Feedback(**settings, precision="bf16", **PROMPTS, **GUARD)
            made[name] = Row(lambda k=grad_steps, b=batch: steps.feedback(k, b), batch, stage=stage)
    made["dpo online, 2 pairs"] = Row(lambda: steps.online_dpo(2), 2)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--shape", choices=list(SHAPES), default="sdxl")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--compile", action="store_true", help="the teacher's rows compiled too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU and this machine has none; --shape tiny --device cpu tries its code")
    device, shape = torch.device(asked.device), SHAPES[asked.shape]
    hardware = torch.cuda.get_device_name() if asked.device == "cuda" else f"CPU {platform.machine()}"
    rate = matrix_rate(shape["product"], device)
    steps = Steps(random_base(shape, device), shape)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "cuda": torch.version.cuda}
    found = {
        "hardware": hardware,
        "shape": asked.shape,
        "versions": versions | {"transformers": transformers.__version__, "python": platform.python_version()},
        "matrix_rate_tflops": rate / 1e12,
        "rows": {},
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / f"{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}-{asked.shape}.json"
    needed: dict[str, float] = {}
    for name, row in rows(steps, asked.batches, asked.compile).items():
        found["rows"][name] = measured = measure(steps, row, asked.steps, rate, needed)
        needed.setdefault(name, measured.get("operations_a_sample", 0.0))
        if row.stage is not None and asked.shape == "sdxl":
            measured["predicted_gib"] = predicted_gib(row.stage)
        print(name, json.dumps(found["rows"][name]), flush=True)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
