"""Students from elsewhere: published layouts add what stock diffusers adds, and exports come back as they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from mlcm_rl.models import student_files, students, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.models.client_keys import kohya_names
from mlcm_rl.models.export import export
from mlcm_rl.models.gammas import own_gamma
from mlcm_rl.models.unet import LORA_TARGETS
from mlcm_rl.pipeline.fingerprint import student_content
from mlcm_rl.recipe import Full, Lora, StudentSource, Teacher
from mlcm_rl.recipe.student_sources import find, refuse_unstated
from teacher_loras import as_kohya, fused_by_diffusers, relative, write

AS_LCM: dict[str, Any] = {"gamma": 1.0, "grid": "lcm"}


def inputs(base: Base):
    noise = base.noise(torch.Generator().manual_seed(3), 2)
    return noise, torch.tensor([999, 374]), base.encode_prompts(["a cat", "红苹果"])


def taken_in(base: Base, out: Path, path: Path, **stated: Any) -> students.Student:
    student_files.take_in(base, StudentSource(path=str(path), **stated), out)
    return students.load_student(base, out)


def weights_of(student: students.Student) -> dict[str, Tensor]:
    return students.merged(student, torch.float32).state_dict()


# ---- published LoRAs ----


def in_stability_blocks(file: Path, out: Path, base: Base) -> Path:
    """Write a LoRA file of kohya's over diffusers' blocks with Stability AI's names, as sd-scripts does for SDXL."""
    modules = [name for name, module in base.denoiser.named_modules() if hasattr(module, "weight")]
    names = kohya_names([name for name in modules if "norm" not in name], base.denoiser, True)
    by_plain = {f"lora_unet_{module.replace('.', '_')}": name for module, name in names.items()}
    tensors = {f"{by_plain[key.split('.')[0]]}.{key.partition('.')[2]}": v for key, v in load_file(file).items()}
    save_file(tensors, out)
    return out


def in_old_names(file: Path, out: Path) -> Path:
    """Write attention's LoRA with diffusers' names before PEFT: `attn1.processor.to_q_lora.down.weight`."""
    tensors = {}
    for key, value in load_file(file).items():
        module, _, factor = key.partition(".lora_")
        if module.endswith((".to_q", ".to_out.0")):
            block, _, layer = module.removesuffix(".0").rpartition(".")
            direction = "down" if factor.startswith("A") else "up"
            tensors[f"{block}.processor.{layer}_lora.{direction}.weight"] = value
    save_file(tensors, out)
    return out


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "stability", "old"])
def test_a_published_lora_has_the_weights_that_stock_diffusers_fuses(sdxl, teachers, layout, tmp_path):
    file = write(teachers["sdxl"], tmp_path / "lora", texts=())
    if layout in ("kohya", "stability"):
        file = as_kohya(file, tmp_path / "kohya.safetensors", "sdxl")
    if layout == "stability":
        file = in_stability_blocks(file, tmp_path / "stability.safetensors", sdxl)
    if layout == "old":
        file = in_old_names(file, tmp_path / "old.safetensors")
    expected = fused_by_diffusers(teachers["sdxl"], file, 1.0)
    actual = weights_of(student := taken_in(sdxl, tmp_path / "student", file, **AS_LCM))
    assert (student.default_gamma, student.grid.times(4)) == (1.0, [999, 759, 499, 259])
    assert max(relative(sdxl.denoiser.state_dict()[name], value) for name, value in actual.items()) > 1e-2
    for name, value in actual.items():
        assert relative(value, expected[f"unet.{name}"]) < 1e-6, name


def test_a_lora_in_pefts_names_needs_its_alpha_which_is_beside_it_or_named(sdxl, teachers, tmp_path):
    """TLCM's and PCM's first files: `get_peft_model` at PEFT's defaults, tensors alone."""
    x_t, t, conditioning = inputs(sdxl)
    other = load(teachers["sdxl"])
    theirs = get_peft_model(other.denoiser, LoraConfig(r=64, target_modules=LORA_TARGETS))
    tiny.perturb([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    expected = sdxl.predict(theirs, x_t, t, conditioning)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    file.parent.mkdir()
    save_file(get_peft_model_state_dict(theirs), file)
    assert all(key.startswith("base_model.model.") for key in load_file(file))
    with pytest.raises(ValueError, match=r"does not state its alpha: write .*alpha: \.\.\..*PEFT's default is 8"):
        taken_in(sdxl, tmp_path / "without", file, **AS_LCM)
    named = taken_in(sdxl, tmp_path / "named", file, alpha=8.0, **AS_LCM)
    torch.testing.assert_close(sdxl.predict(named.denoiser, x_t, t, conditioning), expected, atol=1e-5, rtol=1e-5)
    alone = student_content(str(file))
    theirs.peft_config["default"].save_pretrained(file.parent)
    assert student_content(str(file)) != alone  # the alpha beside it is part of what it adds
    with pytest.raises(ValueError, match=r"alpha has no effect, since .* states its own"):
        taken_in(sdxl, tmp_path / "two", file, alpha=4.0, **AS_LCM)
    beside = taken_in(sdxl, tmp_path / "beside", file.parent, **AS_LCM)
    torch.testing.assert_close(sdxl.predict(beside.denoiser, x_t, t, conditioning), expected, atol=1e-5, rtol=1e-5)


def test_a_lora_of_text_encoders_too_is_none_of_a_student(sdxl, teachers, tmp_path):
    file = write(teachers["sdxl"], tmp_path / "lora")
    with pytest.raises(ValueError, match=r"it changes text_encoder, text_encoder_2 too.*teacher\.lora"):
        taken_in(sdxl, tmp_path / "student", file, **AS_LCM)


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = min(tensors)
    return tensors | {name: tensors[name] * float("nan")}


@pytest.mark.parametrize("kind", ["lora", "weights"])
def test_numbers_that_are_none_are_refused_by_the_file_that_holds_them(sdxl, teachers, kind, tmp_path):
    tensors = sdxl.denoiser.state_dict()
    if kind == "lora":
        tensors = load_file(write(teachers["sdxl"], tmp_path / "lora", texts=()))
    name = min(name for name in tensors if name.endswith("weight"))
    for changed, message in (
        (with_nan(tensors), r"bad\.safetensors: .* is not made of finite numbers: the file is damaged"),
        (tensors | {name: tensors[name].to(torch.int8)}, r"bad\.safetensors: .* is in int8: only weights in floating"),
    ):
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=message):
            taken_in(sdxl, tmp_path / "student", tmp_path / "bad.safetensors", **AS_LCM)


def test_a_lora_of_rank_0_is_refused(sdxl, teachers, tmp_path):
    tensors = load_file(write(teachers["sdxl"], tmp_path / "lora", texts=()))
    down = min(name for name in tensors if ".lora_A." in name)
    up = down.replace("lora_A", "lora_B")
    changed = tensors | {down: tensors[down][:0], up: tensors[up][:, :0].contiguous()}
    save_file(changed, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"lora_[AB]\.weight has the shape \[.*0.*\], without a number in it"):
        taken_in(sdxl, tmp_path / "student", tmp_path / "bad.safetensors", **AS_LCM)


def test_an_alpha_in_whole_numbers_counts(sdxl, teachers, tmp_path):
    """kohya's sd-scripts save the alpha that a user wrote, which may be an int."""
    file = as_kohya(write(teachers["sdxl"], tmp_path / "lora", texts=()), tmp_path / "kohya.safetensors", "sdxl")
    tensors = load_file(file)
    alphas = {name: value for name, value in tensors.items() if name.endswith(".alpha")}
    for dtype in (torch.int64, torch.float32):
        save_file(tensors | {name: torch.full_like(value, 2, dtype=dtype) for name, value in alphas.items()}, file)
        taken_in(sdxl, tmp_path / str(dtype), file, **AS_LCM)
    first, second = (
        weights_of(students.load_student(sdxl, tmp_path / str(one))) for one in (torch.int64, torch.float32)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def load(folder: Path, **settings: Any) -> Base:
    return teachers.load(Teacher(path=str(folder), family="sdxl", **settings), "cpu")


# ---- what is stated ----


def test_what_no_file_states_is_asked_for_by_name(sdxl, teachers, tmp_path):
    file = write(teachers["sdxl"], tmp_path / "lora", texts=())
    for stated, missing in (
        ({}, "gamma: ..., grid: ..."),
        ({"gamma": 0.0}, "grid: ..."),
        ({"grid": "lcm"}, "gamma: ..."),
    ):
        with pytest.raises(ValueError) as error:
            taken_in(sdxl, tmp_path / "student", file, **stated)
        assert f"write {{path: {file}, {missing}}}, where" in str(error.value)


@pytest.mark.parametrize(
    ("scheduler", "gamma", "grid"),
    [
        ({"_class_name": "LCMScheduler", "original_inference_steps": 50}, 1.0, "lcm"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 8}, 1.0, "milestones"),
        ({"_class_name": "TCDScheduler", "original_inference_steps": 50}, None, "lcm"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, 0.0, "trailing"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, None, None),
    ],
)
def test_a_pipeline_states_how_it_is_sampled_by_its_scheduler(scheduler, gamma, grid, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    found = find(tmp_path)
    assert (found.kind, found.gamma, found.grid) == ("pipeline", gamma, grid)
    if gamma is None:
        with pytest.raises(ValueError, match=r"gamma: 1 .as LCM-LoRA., 0 .as SDXL-Lightning., or TCD's eta between"):
            refuse_unstated(found, StudentSource(path=str(tmp_path)))


def test_paths_that_lead_to_no_student_say_why(tmp_path):
    for name in ("one", "two"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several files, of which one has to be named: one\.safetensors, two"):
        find(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        find(tmp_path / "model.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no student: name a run"):
        find(tmp_path / "empty")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "01-distill").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="gone or unfinished"):
        find(tmp_path / "run")
    whole = (tmp_path / "one.safetensors").read_bytes()
    for name, content in (("short", whole[:-1]), ("long", whole + b"x"), ("empty", b""), ("huge", b"\xff" * 99)):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged"):
            find(tmp_path / f"{name}.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"none\.safetensors holds no tensors"):
        find(tmp_path / "none.safetensors")
    for other in ("lora_unet_conv_in.hada_w1_a", "lora_unet_conv_in.dora_scale", "unet.conv_in.lora_magnitude_vector"):
        save_file({other: torch.zeros(1), "lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "kind.safetensors")
        with pytest.raises(ValueError, match=r"no plain LoRA: .*DoRA, LoHa, LoKr"):
            find(tmp_path / "kind.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(ValueError, match=r"two\.safetensors is damaged"):
        find(tmp_path / "two.safetensors")


# ---- whole denoisers, pipelines, exports ----


def moved(base: Base, adapter: Lora | Full, conditioned: bool = False) -> Any:
    denoiser = students.student(base, adapter, 0, conditioned)
    tiny.perturb(students.trainable_parameters(denoiser))
    return denoiser


def description(base: Base) -> dict[str, Any]:
    return {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}


def test_a_few_step_denoiser_comes_from_a_file_a_folder_and_a_pipeline(sdxl, teachers, tmp_path):
    theirs = moved(sdxl, Full())
    stock = StableDiffusionXLPipeline.from_pretrained(teachers["sdxl"])
    stock.unet.load_state_dict(theirs.state_dict())
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    stock.save_pretrained(tmp_path / "pipeline")
    file = tmp_path / "lightning.safetensors"
    save_file({name: value.half() for name, value in theirs.state_dict().items()}, file)
    as_lightning = {"gamma": 0.0, "grid": "trailing"}
    for name, path, stated, tolerance in (
        ("file", file, as_lightning, 1e-3),  # half precision
        ("folder", tmp_path / "pipeline" / "unet", as_lightning, 0),
        ("pipeline", tmp_path / "pipeline", {}, 0),
    ):
        student = taken_in(sdxl, tmp_path / "taken" / name, path, **stated)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(student.denoiser.state_dict()[key], value, atol=tolerance, rtol=0)
        assert isinstance(student_files.adapter_of(StudentSource(path=str(path))), Full)
        assert (student.default_gamma, student.grid.name) == ((1.0, "lcm") if name == "pipeline" else (0.0, "trailing"))


def test_denoisers_of_another_kind_are_refused_in_words(sdxl, teachers, tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(3)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the denoiser of .*`mlcm convert` makes a folder of"):
        taken_in(sdxl, tmp_path / "student", tmp_path / "one.safetensors", **AS_LCM)
    unet = tmp_path / "unet"
    shutil.copytree(teachers["sdxl"] / "unet", unet)
    config = json.loads((unet / "config.json").read_text()) | {"time_cond_proj_dim": 256}
    (unet / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="takes a guidance scale as an input"):
        taken_in(sdxl, tmp_path / "student", unet, **AS_LCM)
    other = StableDiffusionXLPipeline.from_pretrained(teachers["sdxl-v-5-channels"])
    other.scheduler = LCMScheduler.from_config(other.scheduler.config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"says prediction_type v_prediction, the teacher .* predicts epsilon"):
        taken_in(sdxl, tmp_path / "student", tmp_path / "other")


@pytest.mark.parametrize(("adapter", "conditioned"), [(Lora(rank=3, alpha=2), False), (Full(), False), (Full(), True)])
def test_an_export_comes_back_as_the_student_that_it_was_made_of(sdxl, adapter, conditioned, tmp_path):
    x_t, t, conditioning = inputs(sdxl)
    s = torch.tensor([499, 0]) if conditioned else None
    students.save_student(moved(sdxl, adapter, conditioned), tmp_path / "student", description(sdxl))
    before = students.load_student(sdxl, tmp_path / "student")
    after = taken_in(sdxl, tmp_path / "back", export(tmp_path / "student", sdxl, tmp_path / "out"))
    expected = sdxl.predict(before.denoiser, x_t, t, conditioning, s)
    torch.testing.assert_close(sdxl.predict(after.denoiser, x_t, t, conditioning, s), expected, atol=1e-5, rtol=1e-5)
    assert (after.default_gamma, after.conditioned) == (before.default_gamma, conditioned)
    assert isinstance(student_files.adapter_of(StudentSource(path=str(tmp_path / "out"))), type(adapter))
    if conditioned:
        with pytest.raises(ValueError, match="told the times that it jumps to, which are milestones: leave grid out"):
            taken_in(sdxl, tmp_path / "other", tmp_path / "out", grid="lcm")


# ---- tuned again ----


@pytest.mark.parametrize("adapter", [Lora(rank=3, alpha=2), Full()], ids=["lora", "full"])
def test_a_tuned_student_becomes_one_that_is_tuned_again_and_draws_the_same(sdxl, adapter, tmp_path):
    x_t, t, conditioning = inputs(sdxl)
    students.save_student(moved(sdxl, adapter), tmp_path / "start", description(sdxl))
    base = load(Path(sdxl.teacher.path))
    tuned = students.for_preference(base, Lora(rank=2, alpha=4), 0, tmp_path / "start")
    tiny.perturb(students.trainable_parameters(tuned), scale=0.1)
    students.save_tuned(tuned, tmp_path / "start", tmp_path / "tuned", 3)
    for manifest in ("", '{"name": "of something else"}'):  # without its stage's, nothing states its tuning's gamma
        if manifest:
            (tmp_path / "manifest.json").write_text(manifest)
        assert find(tmp_path / "tuned").unstated == ["gamma"]
        assert own_gamma(tmp_path / "tuned") == 1.0
    (tmp_path / "manifest.json").write_text('{"kind": "feedback", "parents": {}, "stage": {"gamma": 0.5}}')
    assert (find(tmp_path / "tuned").unstated, own_gamma(tmp_path / "tuned")) == ([], 0.5)
    (tmp_path / "manifest.json").unlink()
    described = student_files.untuned_description(tmp_path / "tuned")
    student_files.write_untuned(tmp_path / "tuned", tmp_path / "again", described)
    with torch.no_grad():
        expected = sdxl.predict(tuned, x_t, t, conditioning)
        before = sdxl.predict(students.load_student(sdxl, tmp_path / "start").denoiser, x_t, t, conditioning)
        again = students.for_preference(sdxl, Lora(rank=1, alpha=1), 0, tmp_path / "again")
        actual = sdxl.predict(again, x_t, t, conditioning)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    assert not students.load_student(sdxl, tmp_path / "again").tuned
    with pytest.raises(ValueError, match="holds a tuned student"):
        students.for_preference(sdxl, Lora(rank=1, alpha=1), 0, tmp_path / "tuned")
