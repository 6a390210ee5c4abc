"""FLUX.1-dev alone: a guidance scale that is an input, packed latents, its published shape (see test_families)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.models import sampler, students, teachers
from mlcm_rl.models.export import export
from mlcm_rl.models.families.flux import Family
from mlcm_rl.pipeline.planning import is_lora_target
from mlcm_rl.recipe import Lora, Teacher, teacher_check
from tiny_families.flux import CASE, flux

PROMPTS = list(CASE.prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return CASE.write(tmp_path_factory.mktemp("flux") / "teacher")


@pytest.fixture(scope="module")
def base(folder) -> Family:
    return CASE.load(folder)


@pytest.fixture(scope="module")
def stock(folder) -> FluxPipeline:
    return CASE.stock(folder)


# ---- guidance ----


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_a_guided_pass_is_one_with_the_scale_as_an_input(base, stock, guidance_scale, monkeypatch):
    """Scale 1 is a scale like others, and nothing is guided away from."""
    scales = []
    forward = base.denoiser.time_text_embed.forward
    watched = lambda t, guidance, text: scales.append(guidance / 1000) or forward(t, guidance, text)  # noqa: E731
    monkeypatch.setattr(base.denoiser.time_text_embed, "forward", watched)
    times, noise, conditioning = sampling_times(2), CASE.noise(base), base.encode_prompts(PROMPTS)
    x0 = sampler.sample_teacher(base, conditioning, {}, noise, times, guidance_scale)
    assert torch.cat(scales).tolist() == pytest.approx([guidance_scale] * 2 * len(PROMPTS))
    expected = CASE.draw(base, stock, noise, base.stock_call(times) | {"guidance_scale": guidance_scale})
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=1e-5)


def test_a_recipe_counts_one_evaluation_for_it(folder):
    assert Teacher(path=str(folder), family="flux", guidance_scale=3.5).evaluations == 1


def test_a_student_is_given_the_scale_it_learned_and_refused_under_another(base, folder, tmp_path):
    description = {"num_segments": 1, **students.expected_of(base)}
    assert description["guidance_scale"] == CASE.guidance_scale
    students.save_student(students.student(base, Lora(rank=2, alpha=2.0), 0), tmp_path / "student", description)
    other = CASE.teacher(folder).model_copy(update={"guidance_scale": 2.0})
    with pytest.raises(ValueError, match=r"student: the student's guidance_scale is 5\.0, the teacher's 2\.0"):
        students.load_student(teachers.load(other, "cpu"), tmp_path / "student")
    card = (export(tmp_path / "student", base, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "- Say `guidance_scale=5`: the scale is an input of the denoiser, and the student learned no other." in card
    assert "guides a second time" not in card
    assert 'pipe(prompt="a red apple", num_inference_steps=4, sigmas=' in card
    assert "guidance_scale=5, height=16, width=16, generator=seed" in card


# ---- latents and times ----


def test_a_renoising_student_is_the_stock_pipelines_where_noise_is_drawn_as_tokens(base, tmp_path, monkeypatch):
    denoiser = students.student(base, Lora(rank=8, alpha=8.0), 0)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1, scale=0.02)
    students.save_student(denoiser, tmp_path / "student", {"num_segments": 1, **students.expected_of(base)})
    stock, noise, times = CASE.stock(export(tmp_path / "student", base, tmp_path / "out")), CASE.noise(base), [999, 499]
    torch.manual_seed(7)
    expected = CASE.draw(base, stock, noise, base.stock_call(times) | base.stock_guidance)
    tokens = CASE.to_stock(base, noise).shape

    def as_tokens(generator: torch.Generator, count: int) -> torch.Tensor:
        return CASE.from_stock(base, torch.randn(tokens, generator=generator))

    monkeypatch.setattr(base, "noise", as_tokens)
    drawn = torch.Generator().manual_seed(7)
    with torch.no_grad():
        x0 = sampler.sample(base, denoiser, base.encode_prompts(PROMPTS), noise, times, 1.0, drawn)
    torch.testing.assert_close(x0, expected, atol=2e-5, rtol=1e-5)


def test_the_shift_is_that_of_the_number_of_tokens_and_a_store_says_it(folder, base, stock, tmp_path):
    assert base.shift == pytest.approx(torch.tensor(0.5 + 0.65 * (16 - 256) / (4096 - 256)).exp().item())
    scheduler = base.stock_scheduler(0.0).config
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (base.shift, False)
    recipe = runs.recipe(folder, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))], "flux")
    (stage_run,) = pipeline.run(recipe.model_copy(update={"teacher": CASE.teacher(folder)}))
    stored = json.loads((stage_run.folder / "store.json").read_text())
    assert stored["provenance"]["scheduler"] == {"num_train_timesteps": 1000, "shift": base.shift}


def test_half_precision_rounds_times_as_the_stock_pipeline_does_and_no_target_time(folder, monkeypatch):
    teacher = CASE.teacher(folder).model_copy(update={"dtype": "bfloat16"})
    base, stock, times = teachers.load(teacher, "cpu"), CASE.stock(folder).to(torch.bfloat16), sampling_times(8)
    given = []
    forward = stock.transformer.forward
    monkeypatch.setattr(stock.transformer, "forward", lambda **inputs: given.append(inputs) or forward(**inputs))
    CASE.draw(base, stock, CASE.noise(base).bfloat16(), base.stock_call(times) | base.stock_guidance)
    assert torch.stack([one["timestep"][0] for one in given]).equal(
        base.divided_times(torch.tensor(times), torch.bfloat16)
    )
    denoiser = students.student(base, Lora(rank=2, alpha=2.0), 0, condition_on_target=True)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    x_t, t, conditioning = CASE.noise(base)[[0, 0]], torch.tensor([999, 999]), base.encode_prompts(PROMPTS[:1] * 2)
    near_targets = torch.tensor([873, 874])  # one number in half precision
    first, second = base.predict(denoiser, x_t, t, conditioning, near_targets)
    assert not torch.equal(first, second)


# ---- published ----


def test_an_adapter_of_rank_64_has_262_million_weights():
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(guidance_embeds=True)
    shapes = [value.shape for name, value in denoiser.state_dict().items() if is_lora_target(name, Family.lora_targets)]
    assert 64 * sum(sum(shape) for shape in shapes if len(shape) == 2) == 261_689_344


def test_other_channels_are_refused(tmp_path):
    folder = flux(tmp_path / "flux")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 96}))
    line = "transformer/config.json: in_channels: the denoiser takes latents of 24 channels and the autoencoder has 6; "
    assert teacher_check.problems(folder, "flux") == [f"{line}only plain text-to-image teachers can be distilled"]


def test_a_distilled_teacher_is_refused(tmp_path):
    folder = flux(tmp_path / "schnell", is_dev=False)
    line = "transformer/config.json: guidance_embeds: false is of a model that is distilled to a few steps already; "
    assert teacher_check.problems(folder, "flux") == [f"{line}name the model that it was made from, FLUX.1-dev"]


def test_a_distilled_teacher_of_the_hub_is_refused_when_it_is_loaded(tmp_path, monkeypatch):
    """Its files cannot be read before."""
    folder = flux(tmp_path / "schnell", is_dev=False)
    monkeypatch.setattr(teacher_check, "refuse", lambda *arguments: None)
    with pytest.raises(ValueError, match=r"transformer\.guidance_embeds is False, as of .* made from, FLUX\.1-dev"):
        CASE.load(folder)
