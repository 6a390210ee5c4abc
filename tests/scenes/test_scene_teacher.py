"""The shipped teacher: stock diffusers opens it, this project too, and the measuring sampler draws the same."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

from measure_scenes import Sampler
from mlcm_rl.models import teachers
from mlcm_rl.recipe import Teacher
from scenes import SUBJECT
from train_denoiser import SHIFT, Encoder

TEACHER = SUBJECT / "teacher"
PROMPTS = ["a panda to the left of an apple", "三只企鹅，粉色背景"]


@pytest.fixture(scope="module")
def stock() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(TEACHER, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_its_files_fit_the_tree_and_are_in_half_precision():
    weights = [path for path in TEACHER.rglob("*") if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) < 25_000_000
    assert max(path.stat().st_size for path in weights) < 15_000_000
    for path in TEACHER.rglob("config.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8"))


def test_the_family_reads_its_sizes_and_its_shift():
    base = teachers.load(Teacher(path=str(TEACHER), family="sd3"), "cpu")
    assert (base.resolution, base.latent_shape, base.shift) == (128, (8, 16, 16), SHIFT)
    assert base.encode_prompts(PROMPTS)["context"].shape == (2, 36 + 256, 192)


def test_the_measuring_sampler_draws_what_the_stock_pipeline_draws(stock):
    denoiser = SD3Transformer2DModel.from_pretrained(TEACHER / "transformer", torch_dtype=torch.float32)
    sampler = Sampler(denoiser, AutoencoderKL.from_pretrained(TEACHER / "vae"), Encoder(TEACHER))
    noise = torch.stack([sampler.noise(0, place) for place in range(2)])
    sigmas = torch.linspace(1, 0, 4)[:-1].tolist()
    settings = {"height": 128, "width": 128, "guidance_scale": 3.0, "output_type": "pt"}
    expected = stock(PROMPTS, latents=noise, sigmas=sigmas, num_inference_steps=3, **settings).images
    images = sampler.draw(PROMPTS, 3, 3.0, SHIFT)
    assert expected.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-3)
