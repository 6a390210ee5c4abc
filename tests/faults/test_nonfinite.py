"""NaN and infinity: what is computed becomes no file where it holds them, and the error says where they come from."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.store_writer import Writer
from mlcm_rl.data.trajectory_store import Provenance
from mlcm_rl.models import pictures, students, teachers
from mlcm_rl.pipeline import RunError
from mlcm_rl.recipe import Distill, Evaluate, Full, TrainTeacher
from mlcm_rl.stages import train_teacher
from mlcm_rl.storage import files, finite
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.storage.tensors import write_tensors


def spoiled(teacher: Path, folder: Path, part: str, value: float) -> Path:
    """A copy of `teacher` with `value` in the place of one weight of the last layer of `part`."""
    copy = shutil.copytree(teacher, folder / "spoiled")
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    name = {"unet": "conv_out.weight", "vae": "quant_conv.weight"}.get(part) or next(
        name for name in tensors if name.endswith("final_layer_norm.weight")
    )
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    return copy


def failed(recipe) -> str:
    with pytest.raises(RunError) as error:
        pipeline.run(recipe)
    return str(error.value)


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (torch.nan, "float32", "not finite in float32; the largest float32 is 3.4e38: its weights are damaged"),
        (3e38, "float32", "not finite in float32; the largest float32 is 3.4e38: its weights are damaged"),
        (
            6e4,
            "float16",
            "not finite in float16; the largest float16 is 65,504: set teacher.dtype: float32 or bfloat16",
        ),
    ],
)
def test_a_state_that_is_no_number_is_told_with_prompt_and_step_before_a_shard_is_written(
    tiny_sdxl, tmp_path, value, dtype, words
):
    recipe = runs.recipe(
        spoiled(tiny_sdxl, tmp_path, "unet", value), tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))]
    )
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": dtype})})
    said = failed(recipe)
    assert "stages[0] (trajectories): prompt 'a cat': step 1 of 8 of the solver, from t = 999 to 874" in said
    assert words in said
    assert not list(tmp_path.rglob("shard-*.safetensors"))


def test_a_prompt_that_is_encoded_to_no_number_is_told(tiny_sdxl, tmp_path):
    teacher = spoiled(tiny_sdxl, tmp_path, "text_encoder_2", torch.inf)
    prompts = runs.write_prompts(tmp_path)
    report = Evaluate(prompts=prompts, num_prompts=2, sampling_steps=[1], teacher_steps=[2])
    for stage in (runs.trajectories(prompts), report):
        said = failed(runs.recipe(teacher, tmp_path, [stage]))
        assert "prompt 'a cat': what the text encoders make of it is not finite in float32" in said
        assert not list(tmp_path.rglob("*-0*.safetensors"))
    base = teachers.load(runs.recipe(teacher, tmp_path, [report]).teacher, "cpu")
    with pytest.raises(ValueError, match="what the text encoders make of it"):
        base.encode_ahead(["a dog"])


def test_states_that_the_stores_precision_does_not_hold_are_told(tmp_path):
    provenance = Provenance("", {}, "epsilon", "ddim", [999, 0], 1.0, "", 2, 0, 0, "float16", 1)
    writer = Writer(tmp_path, provenance, num_prompts=2, shard_size=2, batch_size=2)
    with pytest.raises(ValueError, match=r"trajectories 0 to 1: their states do not fit float16, .*set dtype: float32"):
        writer.write(range(2), torch.full((2, 2, 1, 1, 1), 1e6), torch.zeros(2, 1, 1, 1))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["store.json"]


def test_pictures_that_are_encoded_to_no_number_are_told(tiny_sdxl, tmp_path):
    teacher = spoiled(tiny_sdxl, tmp_path, "vae", torch.nan)
    images = runs.write_images(tmp_path)
    own = {"batch_size": 2, "num_steps": 1}
    stages = [TrainTeacher(images=images, **own), Distill(source="data", target="consistency", images=images, **own)]
    for stage in stages:
        said = failed(runs.recipe(teacher, tmp_path, [stage]))
        assert "picture 1: its latents by the autoencoder of" in said
        assert "are not finite: the autoencoder's weights are damaged" in said


def test_what_a_network_draws_is_told_with_its_prompt_before_it_is_measured(tiny_sdxl, tmp_path):
    teacher = spoiled(tiny_sdxl, tmp_path, "unet", torch.nan)
    report = Evaluate(prompts=runs.write_prompts(tmp_path), num_prompts=2, sampling_steps=[1], teacher_steps=[2])
    said = failed(runs.recipe(teacher, tmp_path, [report]))
    assert "row teacher-2: the teacher draws NaN or infinity for the prompt 'a cat'" in said
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(ValueError, match="a sampled picture is not finite"):
        pictures.save_png(pictures.to_pil(torch.full((3, 2, 2), torch.nan)), tmp_path / "nan.png")


def test_weights_that_do_not_fit_the_precision_they_are_written_in_are_told(tiny_sdxl, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])
    base = teachers.load(recipe.teacher, "cpu")
    denoiser = students.student(base, Full(), seed=0)
    with torch.no_grad():
        denoiser.conv_out.bias[0] = 1e6
    with pytest.raises(
        ValueError, match=r"the trained teacher: conv_out\.bias is not made of finite numbers in float16"
    ):
        train_teacher.write_teacher(denoiser, "unet", tiny_sdxl, tmp_path / "teacher")
    student = students.Student(denoiser, 1, False, tmp_path)
    assert finite.first_nonfinite(students.merged(student, torch.float32).state_dict()) is None
    with pytest.raises(
        ValueError, match=r"the student folded into the teacher: conv_out\.bias .* \(lower learning_rate\)"
    ):
        students.merged(student, torch.float16)
    with torch.no_grad():
        denoiser.conv_out.bias[0] = torch.inf
    described = {"num_segments": 1, "family": "sdxl", "prediction_type": "epsilon"}
    with pytest.raises(ValueError, match=r"the student: conv_out\.bias is not made of finite numbers in float32"):
        students.save_student(denoiser, tmp_path / "student", described)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_neither_tensors_nor_json_are_written_with_nan_or_infinity(tmp_path):
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(CheckpointError, match=r"one\.safetensors was not written: b is not made of finite numbers"):
            write_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2), "b": torch.tensor([1.0, value])})
        with pytest.raises(CheckpointError, match=r"one\.json was not written: it would hold NaN or infinity"):
            files.write_json(tmp_path / "one.json", {"b": value})
    assert not list(tmp_path.iterdir())
    whole = {"empty": torch.empty(0), "half": torch.ones(3, dtype=torch.bfloat16), "index": torch.arange(3)}
    write_tensors(tmp_path / "one.safetensors", whole)
