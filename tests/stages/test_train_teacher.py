"""The loss that a teacher is trained by, and the folder that it becomes."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.equations.averaging import ema_decay
from mlcm_rl.equations.prediction import min_snr_weight
from mlcm_rl.models import teachers
from mlcm_rl.recipe import Samples, Teacher, TrainTeacher
from mlcm_rl.stages import train_teacher
from mlcm_rl.storage import hashing


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_min_snr_weight_is_that_of_what_the_teacher_predicts(tmp_path, kind):
    base = teachers.load(Teacher(path=str(tiny.sd(tmp_path / "sd", kind)), family="sd"), "cpu")
    x0, eps = torch.randn(2, 3, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    t, conditioning = torch.tensor([10, 500, 990]), base.unconditional(3)

    def loss(**changes) -> torch.Tensor:
        stage = TrainTeacher(images="unused", num_steps=1, batch_size=3, **changes)
        return train_teacher.loss(stage, base, base.denoiser, x0, eps, t, conditioning)

    with torch.no_grad():
        weight = loss(min_snr_gamma=5.0) / loss()
    torch.testing.assert_close(weight, min_snr_weight(t, base.schedule, kind, 5.0))


def test_times_are_drawn_as_the_stage_says():
    draws = torch.Generator().manual_seed(0)
    shares = {}
    for times in ("uniform", "logit_normal"):
        stage = TrainTeacher(images="unused", num_steps=1, batch_size=20_000, times=times)
        t = train_teacher.draw_times(stage, 1000, draws)
        assert t.dtype == torch.int64
        assert 0 <= t.min() <= t.max() < 1000
        shares[times] = [((t >= low) & (t < low + 100)).float().mean().item() for low in (0, 450, 900)]
    assert shares["uniform"] == pytest.approx([0.1, 0.1, 0.1], abs=0.01)
    ends = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([0.1, 0.45, 0.55]).logit())
    expected = [ends[0].item(), (ends[2] - ends[1]).item(), ends[0].item()]
    assert shares["logit_normal"] == pytest.approx(expected, abs=0.01)


REVISION = "0123456789" * 4


@pytest.fixture
def on_the_hub(tiny_sdxl, tmp_path, monkeypatch) -> str:
    """The name of a hub model whose pinned revision was fetched earlier: files are links into the cache, as there."""
    cache = tmp_path / "hub"
    place = cache / "models--someone--model" / "snapshots" / REVISION
    shutil.copytree(tiny_sdxl, cache / "blobs")
    for file in sorted(path for path in (cache / "blobs").rglob("*") if path.is_file()):
        link = place / file.relative_to(cache / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return "someone/model"


@pytest.mark.parametrize("origin", ["folder", "hub"])
def test_a_teacher_is_trained_to_a_whole_folder_that_is_a_teacher(request, tiny_sdxl, tmp_path, origin):
    stages = [
        TrainTeacher(images=runs.write_images(tmp_path), num_steps=1, batch_size=2, start="teacher"),
        runs.trajectories(runs.write_prompts(tmp_path)),
    ]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    if origin == "hub":
        name = request.getfixturevalue("on_the_hub")
        teacher = recipe.teacher.model_copy(update={"path": name, "revision": REVISION})
        recipe = recipe.model_copy(update={"teacher": teacher})
    made = pipeline.run(recipe)[0].folder / "teacher"
    assert not any(path.is_symlink() for path in made.rglob("*"))
    there = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    assert there == {path.relative_to(tiny_sdxl) for path in Path(tiny_sdxl).rglob("*") if path.is_file()}
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert hashing.sha256(made / name / weights(name)) == hashing.sha256(tiny_sdxl / name / weights(name))


def test_what_is_written_is_the_average_of_the_weights_by_hand(tiny_sdxl, tmp_path, monkeypatch):
    """After every step the average moves to the trained weights by 1 - decay, from the weights that it began with."""
    seen: list[list[torch.Tensor]] = []
    update = train_teacher.ema_update_

    def recorded(average, trained, decay):
        average, trained = list(average), list(trained)
        seen.extend([[value.clone() for value in average]] if not seen else [])
        seen.append([value.detach().clone() for value in trained])
        update(average, trained, decay)

    monkeypatch.setattr(train_teacher, "ema_update_", recorded)
    stage = TrainTeacher(
        images=runs.write_images(tmp_path), num_steps=3, batch_size=2, start="teacher", learning_rate=1e-2,
        ema_decay=0.5, warmup_steps=0,
    )  # fmt: skip
    made = pipeline.run(runs.recipe(tiny_sdxl, tmp_path, [stage]))[0].folder / "teacher"
    names = [name for name, _ in UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet").named_parameters()]
    by_hand, *steps = (dict(zip(names, values, strict=True)) for values in seen)
    assert len(steps) == 3
    for step, trained in enumerate(steps):
        decay = ema_decay(step, 0.5)
        by_hand = {name: decay * by_hand[name] + (1 - decay) * trained[name] for name in names}
    written = load_file(made / "unet" / weights("unet"))
    assert any(not torch.equal(by_hand[name].half(), steps[-1][name].half()) for name in names)
    for name in names:
        torch.testing.assert_close(written[name], by_hand[name].half(), rtol=1e-3, atol=1e-6)


def weights(part: str) -> str:
    return "model.safetensors" if part.startswith("text_encoder") else SAFETENSORS_WEIGHTS_NAME


def test_files_are_as_large_as_diffusers_makes_them(tmp_path):
    """Large models are not cut into files of a few megabytes."""
    sizes = {"block_out_channels": (128, 512), "norm_num_groups": 8, "attention_head_dim": 8}
    denoiser = UNet2DConditionModel(**tiny._unet_settings(4, 40) | sizes)
    assert sum(value.numel() for value in denoiser.parameters()) * 2 > 28e6
    train_teacher.write_teacher(denoiser, "unet", tiny.sd(tmp_path / "sd"), tmp_path / "teacher")
    assert [path.name for path in (tmp_path / "teacher" / "unet").glob("*.safetensors")] == [SAFETENSORS_WEIGHTS_NAME]


def test_the_teacher_is_back_in_its_place_when_a_sample_fails(tmp_path, monkeypatch):
    base = teachers.load(Teacher(path=str(tiny.sd(tmp_path / "sd")), family="sd"), "cpu")
    own, other, seen = base.denoiser, torch.nn.Identity(), []

    def fails(base, *_):
        seen.append(base.denoiser)
        raise KeyboardInterrupt

    monkeypatch.setattr("mlcm_rl.models.sampler.sample_teacher", fails)
    recipe = runs.recipe(tmp_path, tmp_path, [runs.distill()], samples=Samples(prompts=["a cat"]))
    with pytest.raises(KeyboardInterrupt):
        train_teacher.save_samples(None, recipe, base, other, 0)
    assert seen == [other]
    assert base.denoiser is own
