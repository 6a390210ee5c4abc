"""PixArt-Sigma: what the suite of all families does not ask."""

import json
import re
from inspect import signature

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

import runs
import tiny
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.models import sampler, students
from mlcm_rl.models.export import export
from mlcm_rl.models.families.pixart_sigma import Family
from mlcm_rl.models.published_teachers import FOLDER
from mlcm_rl.recipe import Full, Teacher, teacher_check
from mlcm_rl.recipe.file import check
from mlcm_rl.recipe.paths import Folders
from tiny_families.pixart_sigma import CASE, write

PUBLISHED = FOLDER / "pixart-sigma-xl-2-1024"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pixart") / "teacher")


@pytest.fixture(scope="module")
def base(folder) -> Family:
    return CASE.load(folder)


def test_the_published_configuration_has_its_count_its_adapters_names_and_its_blocks():
    with torch.device("meta"):
        denoiser = PixArtTransformer2DModel.from_config(PixArtTransformer2DModel.load_config(PUBLISHED / "transformer"))
    assert sum(value.numel() for value in denoiser.parameters()) == 610_856_096
    modules = dict(denoiser.named_modules())
    for target in Family.lora_targets:
        assert any(name.endswith(f".{target}") for name in modules), target
    assert sum(type(module).__name__ == "BasicTransformerBlock" for module in modules.values()) == 28
    shapes = Family.conditioning_shapes(denoiser.config, num_tokens=77)
    assert shapes == {"context": (300, 4096), "lengths": ()}
    assert teacher_check.problems(PUBLISHED, "pixart_sigma") == []


def test_tokens_after_a_prompts_own_change_nothing(base):
    """The stock pipeline passes 300 tokens and a mask; only the prompt's own are stored."""
    conditioning = base.encode_prompts(list(CASE.prompts))
    assert conditioning["lengths"].tolist() == [17, 300]  # a mark of the start of a word, fifteen letters, the end
    x_t, t = base.noise(torch.Generator().manual_seed(4), 2), torch.tensor([999, 374])
    together = base.predict(base.denoiser, x_t, t, conditioning)
    alone = base.predict(base.denoiser, x_t[:1], t[:1], base.encode_prompts([CASE.prompts[0]]))
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=1e-5)


def test_an_export_at_another_resolution_has_the_teachers_positions(folder, base, tmp_path):
    """They are computed from sample_size, which is not the default size alone here."""
    larger = Family(Teacher(path=str(folder), family="pixart_sigma", resolution=24), torch.device("cpu"), base.pipeline)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(students.student(larger, Full(), 0), tmp_path / "student", description)
    out = export(tmp_path / "student", larger, tmp_path / "out")
    assert json.loads((out / "transformer" / "config.json").read_text())["sample_size"] == 8
    stock, student = CASE.stock(out), students.load_student(larger, tmp_path / "student")
    noise, conditioning = larger.noise(torch.Generator().manual_seed(4), 2), larger.encode_prompts(list(CASE.prompts))
    expected = sampler.sample(larger, student.denoiser, conditioning, noise, sampling_times(1), 1.0)
    actual = CASE.draw(larger, stock, noise, larger.stock_call(sampling_times(1)) | larger.stock_guidance)
    torch.testing.assert_close(actual / expected.abs().max(), expected / expected.abs().max(), atol=1e-5, rtol=0.0)
    assert "height=24, width=24, use_resolution_binning=False" in (out / "README.md").read_text(encoding="utf-8")


def test_a_prompt_is_read_without_the_cleaning_that_depends_on_what_is_installed(base):
    assert signature(PixArtSigmaPipeline.__call__).parameters["clean_caption"].default is True
    assert base.stock_call([999])["clean_caption"] is False


# ---- refused ----


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"use_additional_conditions": True}, "of PixArt-alpha.*name PixArt-Sigma"),
        (
            "transformer/config.json",
            {"use_additional_conditions": None, "sample_size": 128},
            "absent at sample_size 128.*name PixArt-Sigma",
        ),
        ("transformer/config.json", {"norm_type": "ada_norm_zero"}, "norm_type: expected 'ada_norm_single'"),
        ("transformer/config.json", {"in_channels": 9}, "takes latents of 9 channels and the autoencoder has 4"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "prediction_type: expected"),
        (
            "model_index.json",
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            "PixArtTransformer2DModel, found",
        ),
    ],
)
def test_another_model_is_refused_when_the_recipe_is_read(tmp_path, file, changes, message):
    folder = write(tmp_path / "teacher")
    edit(folder / file, **changes)
    recipe = runs.recipe(folder, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))], "pixart_sigma")
    problems = check(recipe, Folders(tmp_path, tmp_path))
    assert any(re.search(message, problem.text) for problem in problems), problems


def test_checkpoints_give_the_same_gradients(base):
    gradients = []
    for has_checkpoints in (False, True):
        denoiser = students.student(base, Full(), 0, condition_on_target=True)
        if has_checkpoints:
            denoiser.enable_gradient_checkpointing()
        tiny.perturb(students.trainable_parameters(denoiser), seed=1)
        x_t, t = base.noise(torch.Generator().manual_seed(4), 2), torch.tensor([999, 374])
        conditioning = base.encode_prompts(list(CASE.prompts))
        base.predict(denoiser, x_t, t, conditioning, t - 250).square().mean().backward()
        gradients.append([value.grad for value in denoiser.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
