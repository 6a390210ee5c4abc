"""Kolors alone: its 1100 times, ChatGLM's states and tokenizer, its own class for conditioned students."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import KolorsPipeline, LCMScheduler, TCDScheduler, UNet2DConditionModel

import tiny
from mlcm_rl.equations.schedule import at_indices, betas_of, vp_schedule
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.evaluation import undistilled
from mlcm_rl.models import files, sampler, students, teachers
from mlcm_rl.models.export import export
from mlcm_rl.models.families.kolors import Family
from mlcm_rl.models.published_teachers import FOLDER
from mlcm_rl.recipe import Lora, Teacher, families, teacher_check
from tiny_families.kolors import kolors

PROMPTS = ["红苹果在桌子上", "a small blue house by the sea"]
LORA = Lora(rank=8, alpha=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return kolors(tmp_path_factory.mktemp("kolors") / "teacher")


@pytest.fixture(scope="module")
def base(folder) -> Family:
    return teachers.load(Teacher(path=str(folder), family="kolors", guidance_scale=5.0), "cpu")


# ---- times ----


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_indices_stand_for_the_times_that_stock_schedulers_visit(base, gamma):
    scheduler = base.stock_scheduler(gamma)
    assert type(scheduler) is (LCMScheduler if gamma else TCDScheduler)
    assert scheduler.config.num_train_timesteps == 1100
    for num_steps in range(1, 9):
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.tolist() == base.schedule.network_time[sampling_times(num_steps)].tolist()
    assert base.schedule.network_time[sampling_times(8)].tolist() == [1095, 958, 821, 684, 547, 410, 273, 136]
    alpha_squared = scheduler.alphas_cumprod[base.schedule.network_time]
    torch.testing.assert_close(base.schedule.alpha**2, alpha_squared, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(base.schedule.sigma**2, 1 - alpha_squared, atol=1e-6, rtol=1e-5)


def test_times_by_hand_from_the_first_to_the_last(base):
    times = base.schedule.network_time
    assert times[[0, 1, 124, 999]].tolist() == [0, 1, 136, 1095]
    assert all(int(n) == round((t + 1) * 137 / 125) - 1 for t, n in enumerate(times))
    assert torch.all(times.diff() > 0)


def test_a_schedule_of_our_own_length_is_its_own_rows():
    schedule = vp_schedule(torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64))
    rows = at_indices(schedule)
    assert torch.equal(rows.alpha, schedule.alpha)
    assert torch.equal(rows.network_time, schedule.network_time)
    torch.testing.assert_close(vp_schedule(betas_of(schedule)).sigma, schedule.sigma, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
def test_stock_solvers_come_to_the_teachers_own_end(base, solver):
    """At many steps they agree with DDIM's at more, on the times of our indices."""
    noise = base.noise(torch.Generator().manual_seed(4), 2)
    inputs = (base, base.encode_prompts(PROMPTS), base.unconditional(2), noise)
    finest = undistilled.sample(*inputs, "ddim", 333, 1.0)
    errors = [(undistilled.sample(*inputs, solver, n, 1.0) - finest).square().mean().sqrt() for n in (4, 30)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.05 * finest.square().mean().sqrt()


# ---- students of its own class ----


def exported(base: Family, place: Path, condition: bool, gamma: float | None = None) -> Path:
    denoiser = students.student(base, LORA, 0, condition)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1, scale=0.02)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(denoiser, place / "student", description)
    return export(place / "student", base, place / "out", gamma=gamma)


def test_a_conditioned_student_is_sampled_by_the_class_in_its_folder(base, tmp_path):
    """Its target times are those of its scheduler, as in training; LCM's grid, whose last step ends at x0."""
    out = exported(base, tmp_path, condition=True, gamma=1.0)
    place = importlib.util.spec_from_file_location("pipeline_of_kolors", out / "pipeline.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    assert issubclass(module.TargetTimePipeline, KolorsPipeline)
    stock = module.TargetTimePipeline.from_pipe(
        KolorsPipeline.from_pretrained(base.teacher.path, unet=UNet2DConditionModel.from_pretrained(out / "unet"))
    )
    stock.scheduler = LCMScheduler.from_pretrained(out / "scheduler")
    stock.set_progress_bar_config(disable=True)
    student = students.load_student(base, tmp_path / "student")
    conditioning = base.encode_prompts(PROMPTS)
    for num_steps in (1, 2, 3, 4, 8):
        generator = torch.Generator().manual_seed(4)
        noise = base.noise(generator, 2)
        with torch.no_grad():
            times = sampling_times(num_steps)
            expected = sampler.sample(base, student.denoiser, conditioning, noise, times, 1.0, generator, True)
        settings = {"num_inference_steps": num_steps, "output_type": "latent"}
        latents = stock(PROMPTS, generator=torch.Generator().manual_seed(4), **settings).images
        assert (latents - expected).abs().max() < 2e-5 * expected.abs().max()


def test_no_file_and_no_word_of_the_card_is_for_tools_that_cannot_read_it(base, tmp_path):
    out = exported(base, tmp_path, condition=False)
    assert not list(out.rglob("kohya*"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "ComfyUI" not in card
    assert "[1095, 821, 547, 136]" in card  # the paper's grid at 4 steps, in times that the scheduler takes


def test_a_gamma_between_is_refused_since_its_schedulers_times_are_others(base, tmp_path):
    with pytest.raises(ValueError, match=r"gamma 0\.3: TCDScheduler would go down to other times"):
        exported(base, tmp_path, condition=False, gamma=0.3)
    assert not (tmp_path / "out").exists()


# ---- shapes ----


def test_the_published_configuration_has_its_counts_and_the_adapters_names():
    """The text encoder's weights are published in 12,487,168,064 bytes of float16."""
    folder = FOLDER / "kolors"
    teacher = Teacher(path=str(folder), family="kolors")
    shapes = files.shapes_from_configuration(teacher, ["unet", "text_encoder"])
    counts = {name: sum(map(math.prod, weights.values())) for name, weights in shapes.items()}
    assert counts == {"unet": 2_579_458_820, "text_encoder": 12_487_168_064 // 2}
    base = teachers.skeleton(teacher)
    modules = dict(base.denoiser.named_modules())
    for target in Family.lora_targets:
        assert any(module.endswith(f".{target}") for module in modules), target
    assert sum(type(module).__name__ == "BasicTransformerBlock" for module in modules.values()) == 70
    assert Family.conditioning_shapes(base.denoiser.config, 77) == {"context": (256, 4096), "pooled": (4096,)}
    assert base.latent_shape == (4, 128, 128)


# ---- refused ----


def edited(folder: Path, file: str, **changes) -> list[str]:
    """What is wrong with `folder` where `file` has `changes`; a value of None takes the key out."""
    path = folder / file
    before = path.read_text()
    content = json.loads(before) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    try:
        return teacher_check.problems(folder, "kolors")
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1000}, "num_train_timesteps: expected 1100"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type: expected 'epsilon'"),
        ("unet/config.json", {"in_channels": 9}, "in_channels: the denoiser maps 9 channels to 4"),
        ("unet/config.json", {"encoder_hid_dim": None}, "encoder_hid_dim is missing"),
        ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type: expected 'text_proj'"),
        ("unet/config.json", {"encoder_hid_dim": 38}, "encoder_hid_dim: expected 40, the width of text_encoder"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "distilled already; name the model that it was made from"),
        ("text_encoder/config.json", {"quantization_bit": 4}, "quantization_bit: expected 0, found 4"),
        ("text_encoder/config.json", {"seq_length": 128}, "seq_length: expected at least 256"),
    ],
)
def test_other_models_are_refused_by_file_and_key(folder, file, changes, message):
    lines = edited(folder, file, **changes)
    assert any(message in line.replace("greater than or equal to", "at least") for line in lines), lines
    assert all(file in line for line in lines)


def test_a_tokenizer_need_not_say_how_long_a_prompt_is(folder):
    assert edited(folder, "tokenizer/tokenizer_config.json", model_max_length=None) == []


def test_without_its_tokenizers_library_the_extra_is_named(folder, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(families, "find_spec", lambda name: None if name == "sentencepiece" else found(name))
    message = r"kolors needs sentencepiece, which is not installed: pip install 'mlcm-rl\[kolors\]'"
    with pytest.raises(ImportError, match=message):
        teachers.class_of("kolors")
