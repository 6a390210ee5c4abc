"""Loading a teacher, its schedule, its two passes, its pictures, its noise."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines import pipeline_utils
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
from diffusers.utils.torch_utils import randn_tensor

import tiny
from mlcm_rl import recipe
from mlcm_rl.models import teachers as bases
from mlcm_rl.models.teachers import skeleton
from mlcm_rl.models.vp import schedule_of
from mlcm_rl.training.progress import say_once


def load(folder, family="sdxl", **settings):
    return bases.load(recipe.Teacher(path=str(folder), family=family, **settings), "cpu")


def copy_of(folder, to):
    return shutil.copytree(folder, to / folder.name)


def edit(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def inputs(base, batch_size=2):
    generator = torch.Generator().manual_seed(3)
    conditioning = base.encode_prompts(["a cat", "红苹果"][:batch_size])
    return base.noise(generator, batch_size), torch.tensor([999, 374][:batch_size]), conditioning


# Loading


def test_missing_teacher_is_refused_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*model_index\.json"):
        load(tmp_path / "nowhere")


def test_teacher_of_another_family_is_refused_with_both_names(teachers):
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline.*family sdxl loads StableDiffusionXLPipeline"):
        load(teachers["sd15"], "sdxl")
    with pytest.raises(ValueError, match=r"XLPipeline, and family sd loads StableDiffusionPipeline; set"):
        skeleton(recipe.Teacher(path=str(teachers["sdxl"]), family="sd"))  # as `plan` does


def test_a_student_in_the_teachers_place_is_refused(teachers, tmp_path):
    folder = copy_of(teachers["sdxl"], tmp_path)
    edit(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    for loader in (load, lambda path: skeleton(recipe.Teacher(path=str(path), family="sdxl"))):
        with pytest.raises(ValueError, match=r"is a student, for a few steps, already: .* names LCMScheduler"):
            loader(folder)


def test_missing_component_is_named(teachers, tmp_path):
    folder = copy_of(teachers["sdxl"], tmp_path)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(FileNotFoundError, match="text_encoder_2"):
        load(folder)


def test_pickled_weights_are_refused(teachers, tmp_path):
    folder = copy_of(teachers["sdxl"], tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet: its weights are \.bin files, .* download the \.safetensors"):
        load(folder)


def test_denoiser_of_other_channels_than_the_autoencoder_is_refused(teachers, tmp_path):
    folder = copy_of(teachers["sdxl"], tmp_path)
    settings = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(settings, in_channels=9).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="maps 9 channels to 4"):
        load(folder)


def test_teacher_with_a_guidance_embedding_is_refused(teachers, tmp_path):
    folder = copy_of(teachers["sdxl"], tmp_path)
    settings = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(settings, time_cond_proj_dim=8).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="distilled already"):
        load(folder)


def test_safety_checker_and_image_encoder_of_a_published_folder_are_not_needed(teachers, tmp_path):
    folder = copy_of(teachers["sd15"], tmp_path)
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    assert load(folder, "sd").pipeline.safety_checker is None


def test_resolution_sets_the_latent_shape_and_must_be_a_multiple(teachers):
    assert load(teachers["sdxl"], resolution=24).latent_shape == (4, 12, 12)
    with pytest.raises(ValueError, match="resolution 18 is not a multiple of 4"):
        load(teachers["sdxl"], resolution=18)


def test_every_weight_of_a_loaded_teacher_is_frozen(base):
    modules = [part for part in base.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 3
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


def test_half_precision_teacher_answers_in_float32_and_decodes_in_float32(teachers):
    half, full = load(teachers["sdxl"], dtype="bfloat16"), load(teachers["sdxl"])
    x_t, t, conditioning = inputs(full)
    predicted = half.predict(half.denoiser, x_t, t, half.encode_prompts(["a cat", "红苹果"]))
    assert (half.denoiser.dtype, half.autoencoder.vae.dtype, predicted.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    torch.testing.assert_close(predicted, full.predict(full.denoiser, x_t, t, conditioning), atol=0.1, rtol=0.1)
    assert torch.equal(half.autoencoder.decode(x_t), full.autoencoder.decode(x_t))


def test_a_teacher_of_another_number_of_times_is_refused(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "short")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": 500}))
    with pytest.raises(ValueError, match="num_train_timesteps: expected 1000, found 500"):
        bases.load(recipe.Teacher(path=str(folder), family="sdxl"), "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_a_teacher_encodes_and_denoises_in_its_own_precision_under_autocast_too(teachers, family, dtype):
    teacher = load(teachers[{"sdxl": "sdxl", "sd": "sd15"}[family]], family, dtype=dtype)

    def outputs() -> list[torch.Tensor]:
        x_t, t, conditioning = inputs(teacher)
        unconditional = teacher.unconditional(2)
        x0 = [teacher.guided_x0(x_t, t, conditioning, unconditional, scale) for scale in (1.0, 3.0)]
        return [*x0, *conditioning.values(), *unconditional.values()]

    expected = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = outputs()
    assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))


# The schedule


@pytest.mark.parametrize(
    "settings",
    [
        tiny.BETAS,
        tiny.BETAS | {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        tiny.BETAS | {"num_train_timesteps": 100},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        tiny.BETAS | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_schedule_is_the_one_of_the_teachers_scheduler(settings):
    scheduler = DDIMScheduler(**settings)
    schedule = schedule_of(scheduler.config)
    torch.testing.assert_close(schedule.alpha**2, scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(schedule.num_times))


def test_zero_terminal_snr_with_epsilon_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no signal at the last time"):
        schedule_of(DDIMScheduler(**tiny.BETAS, rescale_betas_zero_snr=True).config)


def test_unknown_beta_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match="squaredcos_cap_v2"):
        schedule_of(DDIMScheduler(beta_schedule="squaredcos_cap_v2").config)


def test_a_denoiser_is_given_the_schedules_network_time(base, monkeypatch):
    """The index itself for these families; whatever the table says for others."""
    times = []
    forward = base.denoiser.forward
    monkeypatch.setattr(base.denoiser, "forward", lambda x, t, **others: times.append(t) or forward(x, t, **others))
    x_t, t, conditioning = inputs(base)
    base.x0(base.denoiser, x_t, t, conditioning)
    monkeypatch.setattr(base, "schedule", replace(base.schedule, network_time=torch.arange(1000) / 1000))
    base.x0(base.denoiser, x_t, t, conditioning)
    assert torch.equal(times[0], t)
    assert times[0].dtype == t.dtype
    assert times[1].tolist() == pytest.approx([0.999, 0.374])


# Guidance


def test_guidance_in_one_batch_is_the_formula_on_two_passes(base):
    x_t, t, conditional = inputs(base)
    unconditional = base.unconditional(2)
    with_prompt = base.predict(base.denoiser, x_t, t, conditional)
    without = base.predict(base.denoiser, x_t, t, unconditional)
    by_hand = without + 3.0 * (with_prompt - without)
    alpha, sigma = (value[t].reshape(-1, 1, 1, 1) for value in (base.schedule.alpha, base.schedule.sigma))
    by_hand = (x_t - sigma * by_hand) / alpha if base.prediction_type == "epsilon" else alpha * x_t - sigma * by_hand
    torch.testing.assert_close(base.guided_x0(x_t, t, conditional, unconditional, 3.0), by_hand, atol=1e-3, rtol=1e-4)


def test_guidance_of_one_is_the_conditional_pass_alone(base, monkeypatch):
    x_t, t, conditional = inputs(base)
    expected = base.x0(base.denoiser, x_t, t, conditional)
    assert torch.equal(base.guided_x0(x_t, t, conditional, {}, 1.0), expected)


def test_dropped_prompt_is_zeros_where_the_model_says_so_and_the_empty_prompt_elsewhere(sdxl, tmp_path):
    zeros = sdxl.unconditional(3)
    assert {name: tuple(value.shape) for name, value in zeros.items()} == {"context": (3, 24, 56), "pooled": (3, 20)}
    assert not any(value.any() for value in zeros.values())
    other = load(tiny.sdxl(tmp_path / "other", force_zeros_for_empty_prompt=False))
    for name, value in other.encode_prompts([""]).items():
        assert value.any()
        torch.testing.assert_close(other.unconditional(1)[name], value)


def test_one_text_tower_is_as_good_as_two(tmp_path):
    base = load(tiny.sdxl(tmp_path / "one", num_towers=1))
    x_t, t, conditional = inputs(base)
    assert conditional["context"].shape[-1] == 32
    assert base.guided_x0(x_t, t, conditional, base.unconditional(2), 4.0).shape == x_t.shape


# Pictures and noise


def test_decoding_is_the_autoencoders_and_carries_gradient(base):
    latents = 0.1 * base.noise(torch.Generator().manual_seed(0), 2)
    latents.requires_grad_(True)
    images, vae = base.autoencoder.decode(latents), base.autoencoder.vae
    expected = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, expected.clamp(0, 1))
    images.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_encoding_is_the_posterior_mean_scaled_and_draws_with_a_generator(base):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    posterior = base.autoencoder.vae.encode(2 * images - 1).latent_dist
    latents = base.autoencoder.encode(images)
    torch.testing.assert_close(latents, posterior.mean * base.autoencoder.vae.config.scaling_factor)
    samples = [base.autoencoder.encode(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], latents)


def test_latent_statistics_of_the_autoencoder_are_undone_and_applied(teachers, tmp_path):
    folder = copy_of(teachers["sdxl"], tmp_path)
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5]
    edit(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    plain, scaled = load(teachers["sdxl"]), load(folder)
    latents = 0.1 * plain.noise(torch.Generator().manual_seed(0), 2)
    plain, scaled = plain.autoencoder, scaled.autoencoder
    shape, factor = (1, 4, 1, 1), plain.vae.config.scaling_factor
    by_hand = (latents / factor - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape) * factor
    torch.testing.assert_close(scaled.decode(by_hand), plain.decode(latents), atol=1e-5, rtol=1e-5)
    images = plain.decode(latents)
    by_hand = (plain.encode(images) / factor - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)
    torch.testing.assert_close(scaled.encode(images), by_hand * factor, atol=1e-5, rtol=1e-5)


def test_noise_of_a_sample_does_not_depend_on_its_batch(base):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = base.noise(generators(5, 6, 7), 3)
    assert torch.equal(together[1:2], base.noise(generators(6), 1))
    assert torch.equal(together, randn_tensor((3, *base.latent_shape), generator=generators(5, 6, 7)))
    alone = base.noise(torch.Generator().manual_seed(5), 2)
    assert torch.equal(alone, randn_tensor((2, *base.latent_shape), generator=torch.Generator().manual_seed(5)))
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        base.noise(generators(1, 2), 3)


# Prompts encoded ahead


@pytest.mark.parametrize(("name", "dtype"), [("sdxl", "float32"), ("sd15", "bfloat16")])
def test_prompts_encoded_ahead_are_the_same_and_the_text_encoders_leave(teachers, name, dtype):
    base = load(teachers[name], "sdxl" if name == "sdxl" else "sd", dtype=dtype)
    prompts = ["a cat", "红苹果", "a dog"]
    expected, encoder = base.encode_prompts(prompts), weakref.ref(base.pipeline.text_encoder)
    base.encode_ahead([*prompts, "a cat"])
    result = base.encode_prompts([prompts[2], prompts[0]])
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name][[2, 0]]) for name in result)
    gc.collect()
    assert encoder() is None
    with pytest.raises(KeyError, match="a snowman"):
        base.encode_prompts(["a snowman"])


def test_shapes_of_a_teacher_without_its_safety_checker_are_read_without_a_word(tmp_path, monkeypatch):
    folder = tiny.sd(tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    warnings: list[str] = []
    monkeypatch.setattr(pipeline_stable_diffusion.logger, "warning", warnings.append)
    teacher = recipe.Teacher(path=str(folder), family="sd")
    skeleton(teacher)
    assert warnings == []
    bases.load(teacher, "cpu")
    assert "safety checker" in warnings[0]  # this one draws pictures, so that the licence matters


def test_float16_on_a_cpu_is_one_line_of_what_to_do(teachers, monkeypatch, capsys):
    warnings: list[str] = []
    monkeypatch.setattr(pipeline_utils.logger, "warning", warnings.append)
    say_once.cache_clear()
    bases.load(recipe.Teacher(path=str(teachers["sdxl"]), family="sdxl", dtype="float16"), "cpu", computes=False)
    assert capsys.readouterr().out == ""  # to export it, say
    for _ in range(2):
        base = load(teachers["sdxl"], dtype="float16")
    assert base.denoiser.dtype == torch.float16
    assert warnings == []
    assert capsys.readouterr().out == (
        "teacher.dtype float16 is for GPUs: a CPU computes in it slowly; set teacher.dtype=float32\n"
    )
