"""Students composed with other inputs, drawn as `mlcm sample` draws them, and stock pipelines at the same times."""

import torch

import tiny
from mlcm_rl.models import students
from mlcm_rl.models.composition import Composition
from mlcm_rl.models.grids import SamplingGrid
from mlcm_rl.recipe import Lora

PROMPTS, SEED = ["a red apple", "熊猫"], 5


def student_of(base):
    """A LoRA student whose adapter acts."""
    denoiser = students.student(base, Lora(rank=4, alpha=8.0), 0)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    return denoiser.requires_grad_(False)


def draw(base, denoiser, num_steps=4, gamma=1.0, **inputs):
    """Latents (B, C, H, W), as `mlcm sample` draws them, and the composition."""
    composition = Composition(base, denoiser, **inputs)
    generator = torch.Generator().manual_seed(SEED)
    noise, times = base.noise(generator, len(PROMPTS)), SamplingGrid().times(num_steps, composition.strength)
    return composition.sample(base.encode_prompts(PROMPTS), noise, times, gamma, generator), composition


def call(pipe, times, **settings):
    """Latents (B, C, H, W) of a stock pipeline from the same noise, without guidance."""
    generator = torch.Generator().manual_seed(SEED)
    common = {"guidance_scale": 0.0, "generator": generator, "output_type": "latent", "timesteps": times}
    return pipe(PROMPTS, **common, **settings).images


def near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5 * expected.abs().max().item(), rtol=1e-4)
