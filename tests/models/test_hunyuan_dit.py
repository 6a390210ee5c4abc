"""Hunyuan-DiT: what its suite of all families does not ask."""

import json
import re

import pytest
import torch
from diffusers import HunyuanDiT2DModel

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.models import sampler, students
from mlcm_rl.models.export import export
from mlcm_rl.models.families.hunyuan_dit import Family, TimesAndTexts
from mlcm_rl.models.published_teachers import FOLDER
from mlcm_rl.recipe import Full, Lora, Teacher, TrainTeacher, teacher_check
from mlcm_rl.recipe.file import check
from mlcm_rl.recipe.paths import Folders
from tiny_families.hunyuan_dit import CASE, write

PUBLISHED = FOLDER / "hunyuan-dit-v1.2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hunyuan") / "teacher")


@pytest.fixture(scope="module")
def base(folder) -> Family:
    return CASE.load(folder)


def test_the_published_configuration_has_its_count_its_adapters_names_and_its_blocks():
    with torch.device("meta"):
        denoiser = HunyuanDiT2DModel.from_config(HunyuanDiT2DModel.load_config(PUBLISHED / "transformer"))
    assert sum(value.numel() for value in denoiser.parameters()) == 1_499_952_032
    modules = dict(denoiser.named_modules())
    for target in Family.lora_targets:
        assert any(name.endswith(f".{target}") for name in modules), target
    assert sum(type(module).__name__ == "HunyuanDiTBlock" for module in modules.values()) == 40
    shapes = Family.conditioning_shapes(denoiser.config, num_tokens=77)
    assert shapes == {"context": (77, 1024), "mask": (77,), "t5_context": (256, 2048), "t5_mask": (256,)}
    assert teacher_check.problems(PUBLISHED, "hunyuan_dit") == []


def test_positions_of_another_resolution_are_stretched_as_in_the_stock_pipeline(folder, base):
    """Positions of a picture of 512 pixels are those of every other."""
    larger = Family(Teacher(path=str(folder), family="hunyuan_dit", resolution=96), torch.device("cpu"), base.pipeline)
    stock, times = CASE.stock(folder), sampling_times(4)
    noise = larger.noise(torch.Generator().manual_seed(4), 2)
    expected = CASE.draw(larger, stock, noise, CASE.guided_call(larger, stock, times))
    inputs = larger.encode_prompts(list(CASE.prompts)), larger.unconditional(2), noise, times
    torch.testing.assert_close(sampler.sample_teacher(larger, *inputs, 5.0), expected, atol=2e-5, rtol=0.0)


def test_times_are_exact_in_half_precision(folder):
    """The stock pipeline would give 1000 for 999, and 248 for 249, to a transformer in bfloat16."""
    teacher = Teacher(path=str(folder), family="hunyuan_dit", dtype="bfloat16")
    base = Family(teacher, torch.device("cpu"), CASE.stock(folder).to(torch.bfloat16))
    conditioning = base.encode_prompts(list(CASE.prompts))
    x_t = base.noise(torch.Generator().manual_seed(4), 2)
    given = []
    embedding = base.denoiser.time_extra_emb
    assert type(embedding) is TimesAndTexts
    embedding.time_proj.register_forward_pre_hook(lambda module, times: given.append(times[0]))
    base.predict(base.denoiser, x_t, torch.tensor([999, 249]), conditioning)
    assert [times.tolist() for times in given] == [[999, 249]]


def test_a_students_adapter_is_merged_in_every_folder_and_the_card_says_so(base, tmp_path):
    denoiser = students.student(base, Lora(rank=4, alpha=4.0), 0, condition_on_target=False)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(denoiser, tmp_path / "student", description)
    out = export(tmp_path / "student", base, tmp_path / "out", snapshots={4: tmp_path / "student"})
    assert not list(out.glob("**/*lora*"))
    HunyuanDiT2DModel.from_pretrained(out / "steps-4" / "transformer")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "merged into the weights here: `HunyuanDiTPipeline` loads no adapters" in card
    assert "use_resolution_binning=False" in card
    assert re.search(r"default grid; the others are for `mlcm sample` alone", card)
    assert "- lora" not in card


def test_a_full_student_is_not_said_to_be_merged(base, tmp_path):
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(students.student(base, Full(), 0), tmp_path / "student", description)
    out = export(tmp_path / "student", base, tmp_path / "out")
    assert "loads no adapters" not in (out / "README.md").read_text(encoding="utf-8")


def test_checkpoints_which_diffusers_lacks_give_the_same_gradients(base):
    gradients = []
    for has_checkpoints in (False, True):
        denoiser = students.student(base, Lora(rank=4, alpha=4.0), 0, condition_on_target=True)
        if has_checkpoints:
            base.checkpoint_blocks(denoiser)
        tiny.perturb(students.trainable_parameters(denoiser), seed=1)
        x_t, t = base.noise(torch.Generator().manual_seed(4), 2), torch.tensor([999, 374])
        conditioning = base.encode_prompts(list(CASE.prompts))
        base.predict(denoiser, x_t, t, conditioning, t - 250).square().mean().backward()
        gradients.append([value.grad for value in students.trainable_parameters(denoiser)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_stage_with_checkpoints_ends_with_the_same_bits_and_a_plan_of_less_memory(folder, tmp_path):
    ends, needs = [], []
    for has_checkpoints in (False, True):
        place = tmp_path / str(has_checkpoints)
        place.mkdir()
        training = {"num_segments": [1], "gradient_checkpointing": has_checkpoints, "precision": "bf16"}
        stages = [runs.trajectories(runs.write_prompts(place)), runs.distill(**training)]
        recipe = runs.recipe(folder, place, stages, "hunyuan_dit")
        needs.append(pipeline.plan(recipe, "cpu")[1].memory.activations)
        (student,) = pipeline.run(recipe)[-1].folder.glob("student/*.safetensors")
        ends.append(student.read_bytes())
    assert ends[0] == ends[1]
    assert needs[1] < needs[0]


def test_a_new_teacher_is_trained(folder, tmp_path):
    prompts, images = runs.write_prompts(tmp_path), runs.write_images(tmp_path)
    stages = [TrainTeacher(images=images, num_steps=2, batch_size=2), runs.trajectories(prompts)]
    pipeline.run(runs.recipe(folder, tmp_path, stages, "hunyuan_dit"))


# ---- refused ----


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "transformer/config.json",
            {"use_style_cond_and_image_meta_size": True},
            r"before 1\.2.*name Hunyuan-DiT 1\.2",
        ),
        (
            "transformer/config.json",
            {"use_style_cond_and_image_meta_size": None},
            r"before 1\.2.*name Hunyuan-DiT 1\.2",
        ),
        ("transformer/config.json", {"learn_sigma": False}, "learn_sigma: expected True, found False"),
        ("transformer/config.json", {"in_channels": 9}, "takes latents of 9 channels and the autoencoder has 4"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type: expected 'epsilon'"),
    ],
)
def test_another_model_is_refused_when_the_recipe_is_read(tmp_path, file, changes, message):
    folder = write(tmp_path / "teacher")
    edit(folder / file, **changes)
    recipe = runs.recipe(folder, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))], "hunyuan_dit")
    problems = check(recipe, Folders(tmp_path, tmp_path))
    assert any(re.search(message, problem.text) for problem in problems), problems
