"""Exported students in stock image-to-image and ControlNet pipelines, beside `mlcm sample`'s own composition."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)

import tiny
from mlcm_rl.equations.solver import ddim_step
from mlcm_rl.models import control, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.composition import Composition
from mlcm_rl.models.export import export
from mlcm_rl.recipe import Lora

PROMPTS, SEED = ["a red apple", "红苹果"], 7


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def exported(base: Base, folder: Path, conditioned: bool) -> tuple[students.Student, Path]:
    denoiser = students.student(base, Lora(rank=4, alpha=8.0), 0, conditioned)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type, "budgets": [4, 8]}
    students.save_student(denoiser, folder / "student", description)
    export(folder / "student", base, folder / "out")
    return students.load_student(base, folder / "student"), folder / "out"


def ours(base: Base, student: students.Student, **inputs) -> torch.Tensor:
    """The latents of `mlcm sample` at 4 steps; where TCD's scheduler takes over, at its end, which is index 0."""
    states = []
    hook = student.denoiser.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    generator, composition = torch.Generator().manual_seed(SEED), Composition(base, student.denoiser, **inputs)
    noise, times = base.noise(generator, 2), student.grid.times(4, composition.strength)
    gamma = student.default_gamma
    x0 = composition.sample(base.encode_prompts(PROMPTS), noise, times, gamma, generator, student.conditioned)
    hook.remove()
    assert len(states) == 4
    if gamma == 1.0:
        return x0
    ends = (torch.full((2,), t) for t in (times[-1], 0))
    return ddim_step(states[-1], x0, *ends, base.schedule)


def stock(base: Base, out: Path, conditioned: bool, steps: int):
    """The exported folder, or over the teacher what lies there for so many steps."""
    if not conditioned:
        return StableDiffusionXLPipeline.from_pretrained(out)
    pipe = StableDiffusionXLPipeline.from_pretrained(base.teacher.path)
    if (out / f"steps-{steps}" / "unet").is_dir():
        pipe.unet = UNet2DConditionModel.from_pretrained(out / f"steps-{steps}", subfolder="unet")
    else:
        pipe.load_lora_weights(out / f"steps-{steps}", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = TCDScheduler.from_pretrained(out / f"steps-{steps}", subfolder="scheduler")
    return pipe


def call(pipe, steps: int, **settings) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    common = {"guidance_scale": 0.0, "generator": generator, "output_type": "latent", "num_inference_steps": steps}
    return pipe(PROMPTS, **common, **settings).images


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=5e-5 * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "conditioned"])
def test_eight_stock_steps_at_half_strength_are_four_of_ours(loaded, tmp_path, image, conditioned):
    base = loaded["sdxl"]
    student, out = exported(base, tmp_path, conditioned)
    pipe = AutoPipelineForImage2Image.from_pipe(stock(base, out, conditioned, 8))
    encoded = base.autoencoder.encode(image).expand(2, -1, -1, -1)
    near(ours(base, student, image=image, strength=0.5), call(pipe, 8, image=encoded, strength=0.5))


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "conditioned"])
def test_a_control_net_over_an_export_is_ours(loaded, tmp_path, image, conditioned):
    base = loaded["sdxl"]
    student, out = exported(base, tmp_path, conditioned)
    network = control.new_control_net(base, 0).requires_grad_(False)
    tiny.perturb(list(network.parameters()), 0, 0.1)
    pipe = stock(base, out, conditioned, 4)
    controlled = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=network)
    near(ours(base, student, controls=[(network, image, 1.0)]), call(controlled, 4, image=image))
