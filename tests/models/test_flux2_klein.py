"""FLUX.2-klein-base alone: its shift, its autoencoder's statistics, its published shapes (see test_families)."""

import json
from math import exp
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.models import sampler, students
from mlcm_rl.models.export import export
from mlcm_rl.models.families.flux2_klein import Family
from mlcm_rl.pipeline.planning import is_lora_target
from mlcm_rl.recipe import Full, Lora, teacher_check
from mlcm_rl.recipe.file import check
from mlcm_rl.recipe.paths import Folders
from tiny_families.flux2_klein import CASE, flux2_klein

PROMPTS = list(CASE.prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return CASE.write(tmp_path_factory.mktemp("flux2_klein") / "teacher")


@pytest.fixture(scope="module")
def base(folder) -> Family:
    return CASE.load(folder)


# ---- the shift ----


def test_the_shift_is_the_stock_pipelines_at_its_default_number_of_steps(base, folder):
    """At 50 steps the stock pipeline visits our grid, sigma by sigma, and so it draws the teacher's trajectory."""
    stock, noise = CASE.stock(folder), CASE.noise(base)
    expected = CASE.draw(base, stock, noise, {"num_inference_steps": 50, **CASE.guidance})
    times = [1000 * (50 - i) // 50 - 1 for i in range(50)]
    torch.testing.assert_close(stock.scheduler.sigmas[:-1], base.schedule.sigma[times], atol=1e-6, rtol=1e-6)
    inputs = (base.encode_prompts(PROMPTS), base.unconditional(2), noise, times)
    x0 = sampler.sample_teacher(base, *inputs, CASE.guidance_scale)
    torch.testing.assert_close(x0, expected, atol=1e-4, rtol=1e-4)


def test_one_shift_stands_in_the_store_and_in_an_export(base, folder, tmp_path):
    recipe = runs.recipe(folder, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))], "flux2_klein")
    (stage_run,) = pipeline.run(recipe.model_copy(update={"teacher": CASE.teacher(folder)}))
    stored = json.loads((stage_run.folder / "store.json").read_text())["provenance"]["scheduler"]
    assert stored == {"num_train_timesteps": 1000, "shift": exp(compute_empirical_mu(36, 50))}
    scheduler = base.stock_scheduler(0.0).config
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (stored["shift"], False)


def test_a_teacher_with_a_shift_of_its_own_keeps_it(tmp_path):
    folder = CASE.write(tmp_path / "teacher")
    CASE.load(folder).stock_scheduler(0.0).from_config({"shift": 4.5}).save_pretrained(folder / "scheduler")
    assert CASE.load(folder).shift == 4.5


def test_the_published_shift_is_7_6():
    assert exp(compute_empirical_mu(4096, 50)) == pytest.approx(7.6, abs=0.05)


# ---- latents ----


def test_a_renoising_student_is_the_stock_pipelines_where_noise_is_drawn_as_tokens(base, tmp_path, monkeypatch):
    denoiser = students.student(base, Lora(rank=8, alpha=8.0), 0)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1, scale=0.02)
    students.save_student(denoiser, tmp_path / "student", {"num_segments": 1, **students.expected_of(base)})
    stock, noise, times = CASE.stock(export(tmp_path / "student", base, tmp_path / "out")), CASE.noise(base), [999, 499]
    torch.manual_seed(7)
    expected = CASE.draw(base, stock, noise, base.stock_call(times) | base.stock_guidance)
    tokens = Flux2KleinPipeline._pack_latents(noise).shape

    def as_tokens(generator: torch.Generator, count: int) -> torch.Tensor:
        return torch.randn(tokens, generator=generator).transpose(1, 2).reshape(noise.shape)

    monkeypatch.setattr(base, "noise", as_tokens)
    drawn = torch.Generator().manual_seed(7)
    with torch.no_grad():
        x0 = sampler.sample(base, denoiser, base.encode_prompts(PROMPTS), noise, times, 1.0, drawn)
    torch.testing.assert_close(x0, expected, atol=2e-5, rtol=1e-5)


def test_tiles_of_the_autoencoder_are_of_its_own_latents(folder):
    base = CASE.load(folder)
    latents = CASE.noise(base)
    whole = base.autoencoder.decode(latents)
    base.autoencoder.use_tiles(32)  # above the picture's 24 pixels
    assert (base.autoencoder.vae.tile_sample_min_size, base.autoencoder.vae.tile_latent_min_size) == (32, 16)
    assert torch.equal(base.autoencoder.decode(latents), whole)
    base.autoencoder.use_tiles(16)
    in_tiles = base.autoencoder.decode(latents)
    assert in_tiles.shape == whole.shape
    assert not torch.equal(in_tiles, whole)
    assert base.autoencoder.encode(whole).shape == latents.shape


def test_no_target_time_is_rounded_in_half_precision(folder):
    base = CASE.load(folder)
    denoiser = students.student(base, Full(), 0, condition_on_target=True)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    x_t, t, conditioning = CASE.noise(base)[[0, 0]], torch.tensor([999, 999]), base.encode_prompts(PROMPTS[:1] * 2)
    near_targets = torch.tensor([873, 874])  # one number in half precision
    first, second = base.predict(denoiser.bfloat16(), x_t, t, conditioning, near_targets)
    assert not torch.equal(first, second)


# ---- published ----


@pytest.mark.parametrize(
    ("settings", "blocks", "count", "adapted"),
    [
        ({"num_attention_heads": 24, "joint_attention_dim": 7680}, (5, 20), 3_875_544_576, 96_337_920),
        ({"num_attention_heads": 32, "joint_attention_dim": 12_288}, (8, 24), 9_078_581_248, 174_063_616),
    ],
    ids=["4B", "9B"],
)
def test_both_published_sizes_have_their_counts_and_an_adapters(settings, blocks, count, adapted):
    layers = {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        denoiser = Flux2Transformer2DModel(guidance_embeds=False, **layers, **settings)
    weights = denoiser.state_dict()
    assert sum(value.numel() for value in weights.values()) == count
    targets = Family.adapted_modules(denoiser.config)
    assert 64 * sum(sum(value.shape) for name, value in weights.items() if is_lora_target(name, targets)) == adapted


# ---- distilled ----


def test_the_distilled_klein_is_refused_when_the_recipe_is_read(tmp_path):
    folder = flux2_klein(tmp_path / "klein", is_distilled=True)
    line = "model_index.json: is_distilled: true is of a model that is distilled to a few steps already; "
    expected = f"{line}name the model that it was made from, FLUX.2-klein-base"
    assert teacher_check.problems(folder, "flux2_klein") == [expected]
    recipe = runs.recipe(folder, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))], "flux2_klein")
    (problem,) = check(recipe, Folders(tmp_path, tmp_path))
    assert (problem.key, problem.text) == (("teacher", "path"), f"{folder}: {expected}")


def test_an_exported_student_says_that_it_is_distilled_so_that_no_scale_guides_it_again(base, tmp_path):
    denoiser = students.student(base, Full(), 0)
    students.save_student(denoiser, tmp_path / "student", {"num_segments": 1, **students.expected_of(base)})
    out = export(tmp_path / "student", base, tmp_path / "out", gamma=0.0)
    assert json.loads((out / "model_index.json").read_text())["is_distilled"] is True
    assert base.pipeline.config["is_distilled"] is False
    stock, noise, call = CASE.stock(out), CASE.noise(base), base.stock_call(sampling_times(2))
    drawn = [CASE.draw(base, stock, noise, call | {"guidance_scale": scale}) for scale in (0.0, 4.0)]
    assert torch.equal(*drawn)
