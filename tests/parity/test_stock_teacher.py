"""Our teacher beside the stock pipeline that opens the same folder: prompts, guided trajectories, pictures."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from mlcm_rl.models import sampler

NAMES = ["sdxl", "sdxl-one-tower", "sdxl-no-zeros", "sd15", "sd21"]
PROMPTS = ["a red apple, 3d", "红苹果", "x" * 60]  # the last is longer than the towers read
TIMES = [999, 874, 749, 624, 499, 374, 249, 124]  # what DDIMScheduler's trailing spacing makes of 8 steps


@pytest.fixture(scope="module", params=NAMES)
def pair(request, teachers, loaded):
    stock = DiffusionPipeline.from_pretrained(teachers[request.param])
    stock.set_progress_bar_config(disable=True)
    return loaded[request.param], stock


def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(pair):
    base, stock = pair
    encoded = stock.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ("context", "pooled") if base.family == "sdxl" else ("context",)
    conditional, unconditional = base.encode_prompts(PROMPTS), base.unconditional(len(PROMPTS))
    assert set(conditional) == set(unconditional) == set(names)
    for i, name in enumerate(names):
        torch.testing.assert_close(conditional[name], encoded[2 * i], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(unconditional[name], encoded[2 * i + 1], atol=1e-6, rtol=1e-6)


def test_guided_ddim_trajectory_is_the_stock_pipelines(pair):
    base, stock = pair
    noise = base.noise(torch.Generator().manual_seed(4), 2)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    expected = stock(
        PROMPTS[:2], latents=noise, num_inference_steps=8, guidance_scale=6.0, output_type="latent"
    ).images  # fmt: skip
    assert stock.scheduler.timesteps.tolist() == TIMES
    conditional, unconditional = base.encode_prompts(PROMPTS[:2]), base.unconditional(2)
    found = sampler.sample_teacher(base, conditional, unconditional, noise, TIMES, 6.0)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


def test_pictures_are_decoded_as_the_stock_pipeline_decodes_them(pair):
    base, stock = pair
    latents = 0.1 * base.noise(torch.Generator().manual_seed(4), 2)
    image = stock.vae.decode(latents / stock.vae.config.scaling_factor, return_dict=False)[0]
    expected = stock.image_processor.postprocess(image.detach(), output_type="pt")
    torch.testing.assert_close(base.autoencoder.decode(latents), expected, atol=1e-6, rtol=1e-6)
