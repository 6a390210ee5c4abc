"""Z-Image: its traps, and its published configuration."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlcm_rl.models import students
from mlcm_rl.recipe import Lora
from mlcm_rl.recipe.teacher_check import problems
from tiny_families.z_image import CASE, z_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return z_image(tmp_path_factory.mktemp("z_image") / "teacher")


@pytest.fixture(scope="module")
def base(folder):
    return CASE.load(folder)


def test_the_callers_prompts_stay_as_they_are(base):
    prompts = ["红苹果"]
    base.encode_prompts(prompts)
    assert prompts == ["红苹果"]


def test_every_target_time_is_told_exactly(base):
    """The denoiser multiplies all times by t_scale; whole numbers come back."""
    s = torch.arange(1000)
    assert torch.equal((s / base.denoiser.config.t_scale * base.denoiser.t_scale).round(), s.float())


def test_the_text_encoder_may_be_saved_as_part_of_a_language_model(base, tmp_path):
    """As the published one is: its names then begin with `model.`."""
    folder = z_image(tmp_path / "teacher")
    path = folder / "text_encoder" / "model.safetensors"
    save_file({f"model.{name}": value for name, value in load_file(path).items()}, path, {"format": "pt"})
    prompts = list(CASE.prompts)
    for name, value in CASE.load(folder).encode_prompts(prompts).items():
        assert torch.equal(value, base.encode_prompts(prompts)[name])


def test_adapters_change_the_refiners_too(base):
    denoiser = students.student(base, Lora(rank=2, alpha=2.0), 0)
    trained = [name for name, value in denoiser.named_parameters() if value.requires_grad]
    for part in ("layers", "noise_refiner", "context_refiner"):
        assert any(name.startswith(f"{part}.0.feed_forward.w2") for name in trained)


def test_turbo_is_refused_by_its_shift(tmp_path):
    folder = z_image(tmp_path / "teacher", shift=3.0)
    (line,) = problems(folder, "z_image")
    assert line == (
        "scheduler/scheduler_config.json: shift: 3.0 is of a model that is distilled to a few steps already; name the "
        "model that it was made from, Z-Image, of shift 6"
    )


def test_other_channels_than_the_autoencoders_are_refused(folder, tmp_path):
    other = z_image(tmp_path / "teacher")
    path = other / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 8}))
    with pytest.raises(ValueError, match=r"8 channels|tensors are not those of config\.json"):
        CASE.load(other)
