"""A LoRA of the teacher's own: each of its tensors adds what stock diffusers adds, or it is refused in words.

An export's adapter holds it and the student together, so that one file over the plain checkpoint draws what the fused
pipeline draws.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import runs
import tiny
from mlcm_rl.models import students, teacher_lora, teachers
from mlcm_rl.models.client_files import KOHYA_FILE
from mlcm_rl.models.export import denoiser_for_steps, export
from mlcm_rl.models.lora_files import LORA_FILE, METADATA_KEY
from mlcm_rl.pipeline.fingerprint import locate
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.recipe import Lora, Teacher
from mlcm_rl.storage.files import CheckpointError
from teacher_loras import as_kohya, fused_by_diffusers, metadata_of, relative, stock_of, weights_of, write
from tiny_families import CASES

MAKE = {"sdxl": tiny.sdxl, "sd": tiny.sd, "sd3": tiny.sd3}
WEIGHT = 0.7


@pytest.fixture(scope="module", params=MAKE)
def teacher(request, tmp_path_factory) -> tuple[str, Path]:
    """Family and folder of a tiny teacher, which no test changes."""
    return request.param, MAKE[request.param](tmp_path_factory.mktemp("teacher") / request.param)


def named(teacher: tuple[str, Path], file: Path | str | None, **settings: Any) -> Teacher:
    family, folder = teacher
    return Teacher(path=str(folder), family=family, guidance_scale=3.0, lora=file and str(file), **settings)


# ---- fused ----


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_the_fused_teacher_has_the_weights_that_stock_diffusers_fuses(teacher, layout, tmp_path):
    family, folder = teacher
    file = write(folder, tmp_path / "lora")
    if layout == "kohya":
        if family == "sd3":
            pytest.skip("diffusers reads no LoRA of SD3 in kohya's layout")
        file = as_kohya(file, tmp_path / "kohya.safetensors", family)
    expected = fused_by_diffusers(folder, file, WEIGHT)
    base = teachers.load(named(teacher, file, lora_weight=WEIGHT), "cpu")
    parts = list(dict.fromkeys(name.split(".")[0] for name in expected))
    actual, plain = weights_of(base.pipeline, parts), weights_of(stock_of(folder), parts)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(actual[name], value) < 1e-6, name
    changed = {name.split(".")[0] for name in plain if not torch.equal(plain[name], actual[name])}
    assert changed >= {base.denoiser_part, "text_encoder"}
    assert changed == set(teacher_lora.updates(stock_of(folder), base.teacher))
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_kohyas_alphas_count_where_diffusers_forgets_those_of_attention(family, tmp_path):
    """Where alphas differ, diffusers 0.42 takes the most frequent one for all of attention, and says nothing."""
    folder = MAKE[family](tmp_path / "teacher")
    file = as_kohya(write(folder, tmp_path / "lora"), tmp_path / "kohya.safetensors", family, alpha_of_queries=9.0)
    found = teacher_lora.updates(stock_of(folder), named((family, folder), file))
    scales = {module.rpartition(".")[2]: update.scale for module, update in found["unet"].items()}
    assert (scales["to_q"], scales["conv1"]) == (9.0 / 2, 3.0 / 4)


@pytest.mark.parametrize("family", ["flux", "flux2_klein", "kolors", "sana", "sd3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_alphas_among_diffusers_names_count(family, dtype, tmp_path):
    """diffusers reads FLUX's, and refuses such files of the other families."""
    case = CASES[family]
    base = case.load(case.write(tmp_path / "teacher"))
    module = next(name for name, _ in base.denoiser.named_modules() if name.endswith(".to_q"))
    weight, rank, name = base.denoiser.get_submodule(module).weight, 4, f"{base.denoiser_part}.{module}"
    down, up = torch.randn(rank, weight.shape[1]), torch.randn(len(weight), rank)
    factors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(factors | {f"{name}.alpha": torch.tensor(3.0, dtype=dtype)}, tmp_path / "lora.safetensors")
    teacher = base.teacher.model_copy(update={"lora": str(tmp_path / "lora.safetensors"), "lora_weight": WEIGHT})
    fused = teachers.load(teacher, "cpu").denoiser.get_submodule(module).weight
    assert relative(fused, weight + WEIGHT * 3 / rank * up @ down) < 1e-6
    save_file(factors | {f"{name}.alpha": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=rf"the alpha of {name} is no number: \[1.0, 1.0\]"):
        teachers.load(teacher, "cpu")


def test_each_half_precision_weight_is_the_float32_sum_rounded_once(teacher, tmp_path):
    _, folder = teacher
    file = write(folder, tmp_path / "lora")
    whole = teachers.load(named(teacher, None), "cpu")
    base = teachers.load(named(teacher, file, dtype="bfloat16"), "cpu")
    updates = teacher_lora.updates(whole.pipeline, base.teacher)[base.denoiser_part]
    for module, update in updates.items():
        weight = whole.denoiser.get_submodule(module).weight.bfloat16().float()
        assert torch.equal(base.denoiser.get_submodule(module).weight, (weight + update.total()).bfloat16())


def test_a_weight_of_zero_is_the_teacher_itself(teacher, tmp_path):
    file = write(teacher[1], tmp_path / "lora")
    plain, fused = (teachers.load(one, "cpu") for one in (named(teacher, None), named(teacher, file, lora_weight=0.0)))
    assert all(
        torch.equal(value, plain.denoiser.state_dict()[name]) for name, value in fused.denoiser.state_dict().items()
    )


# ---- refused ----


def retyped(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    tensors, header = load_file(file), metadata_of(file)
    save_file(change(tensors), file, header)
    return file


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no prefix": (
        lambda tensors: {name.partition(".")[2]: value for name, value in tensors.items()},
        r"belong to no module of the teacher .*trained over another base, or is in a layout",
    ),
    "an unknown module": (
        lambda tensors: (
            tensors | {"unet.other.lora_A.weight": torch.ones(2, 3), "unet.other.lora_B.weight": torch.ones(3, 2)}
        ),
        r"2 of \d+ tensors belong to no module.*unet\.other\.lora_A\.weight",
    ),
    "a half": (
        lambda tensors: {name: value for name, value in tensors.items() if name != first(tensors, "lora_B.weight")},
        r"factors of \[\d+, \d+.*\] do not fit the weight",
    ),
    "another width": (
        lambda tensors: tensors | {first(tensors, "to_q.lora_A.weight"): torch.ones(2, 999)},
        r"do not fit the weight of .*trained over another base",
    ),
    "DoRA": (
        lambda tensors: tensors | {"unet.mid_block.x.lora_magnitude_vector": torch.ones(3)},
        r"1 tensors are not those of a plain LoRA.*\(DoRA, LoHa, LoKr\)",
    ),
    "nothing": (lambda tensors: {}, r"it has no tensors"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_tensors_that_do_not_fit_are_refused_in_words(tiny_sdxl, kind, tmp_path):
    change, words = WRONG[kind]
    file = retyped(write(tiny_sdxl, tmp_path / "lora"), change)
    with pytest.raises(ValueError, match=f"teacher.lora {file}: .*{words}"):
        teachers.load(named(("sdxl", tiny_sdxl), file), "cpu")


def test_a_lora_over_another_family_and_a_damaged_one_are_refused(tiny_sdxl, tmp_path):
    file = write(tiny.sd3(tmp_path / "sd3"), tmp_path / "lora")
    with pytest.raises(ValueError, match="belong to no module of the teacher"):
        teachers.load(named(("sdxl", tiny_sdxl), file), "cpu")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged"):
        teachers.load(named(("sdxl", tiny_sdxl), file), "cpu")


def test_a_header_that_is_no_configuration_is_refused(tiny_sdxl, tmp_path):
    file = write(tiny_sdxl, tmp_path / "lora")
    save_file(load_file(file), file, {METADATA_KEY: "[1"})
    with pytest.raises(ValueError, match="its header holds no configuration of PEFT's"):
        teachers.load(named(("sdxl", tiny_sdxl), file), "cpu")


def test_names_of_both_layouts_in_one_file_are_refused_where_diffusers_drops_one(tiny_sdxl, tmp_path):
    tensors = {}
    for name in ("lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_input_blocks_1_0_in_layers_2"):
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(2, 12, 3, 3),
            f"{name}.lora_up.weight": torch.ones(12, 2, 1, 1),
        }
    save_file(tensors, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="diffusers would leave some of its 4 tensors aside"):
        teachers.load(named(("sdxl", tiny_sdxl), tmp_path / "both.safetensors"), "cpu")


def test_a_weight_that_overflows_is_refused(tiny_sdxl, tmp_path):
    file = write(tiny_sdxl, tmp_path / "lora")
    with pytest.raises(ValueError, match="is not made of finite numbers in float16 with it added: lower"):
        teachers.load(named(("sdxl", tiny_sdxl), file, dtype="float16", lora_weight=1e6), "cpu")


# ---- identity and plan ----


def test_the_lora_and_its_weight_are_part_of_the_teacher_and_its_place_is_not(tiny_sdxl, tmp_path):
    file = write(tiny_sdxl, tmp_path / "lora")
    other = write(tiny_sdxl, tmp_path / "other", seed=1)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(file.read_bytes())
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])

    def identities(lora: Path | None, **settings: Any) -> tuple[str, str]:
        teacher = recipe.teacher.model_copy(update={"lora": lora and str(lora), **settings})
        changed = recipe.model_copy(update={"teacher": teacher})
        return teachers.teacher_hash(teacher), locate(recipe.stages[0], changed, []).fingerprint

    without, with_it = identities(None), identities(file)
    assert without == (teachers.teacher_hash(recipe.teacher), locate(recipe.stages[0], recipe, []).fingerprint)
    assert identities(moved) == with_it
    several = [without, with_it, identities(other), identities(file, lora_weight=0.5)]
    assert [len(set(each)) for each in zip(*several, strict=True)] == [4, 4]


def test_a_plan_has_the_sizes_of_the_teacher_without_it(tiny_sdxl, tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path))
    plain = runs.recipe(tiny_sdxl, tmp_path, [stage])
    with_lora = plain.model_copy(update={"teacher": named(("sdxl", tiny_sdxl), write(tiny_sdxl, tmp_path / "lora"))})
    one, two = (Sizes(recipe) for recipe in (plain, with_lora))
    assert (one.disk(stage), one.memory(stage, "cpu")) == (two.disk(stage), two.memory(stage, "cpu"))


# ---- exported ----


@pytest.mark.parametrize("texts", [(), ("text_encoder", "text_encoder_2")], ids=["plain", "with-text-encoders"])
def test_one_adapter_over_the_plain_checkpoint_is_teacher_and_student(teacher, texts, tmp_path):
    _, folder = teacher
    file = write(folder, tmp_path / "lora", texts)
    base = teachers.load(named(teacher, file, lora_weight=WEIGHT), "cpu")
    denoiser = students.student(base, Lora(rank=3, alpha=2.0), 0)
    tiny.perturb(students.trainable_parameters(denoiser), 1, 0.3)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(denoiser, tmp_path / "student", description)
    out = export(tmp_path / "student", base, tmp_path / "out")
    merged = stock_of(out)
    parts = [base.denoiser_part, *(name for name in base.pipeline._lora_loadable_modules if name.startswith("text"))]
    expected = weights_of(merged, parts)
    for name in (LORA_FILE, KOHYA_FILE):
        if name == KOHYA_FILE and base.comfyui.reads_adapters:
            continue
        actual = fused_by_diffusers(folder, out / name, 1.0)
        worst = max(relative(actual[key], value) for key, value in expected.items())
        assert worst < 1e-6, name
    has_kohya = not base.comfyui.reads_adapters
    assert (out / KOHYA_FILE).is_file() == has_kohya
    prefixes = {key.split("_")[1] for key in load_file(out / KOHYA_FILE)} if has_kohya else set()
    texts_of = {"sdxl": {"te1", "te2"}, "sd": {"te"}, "sd3": set()}[base.family]
    assert prefixes == ({"unet"} | (texts_of if texts else set()) if has_kohya else set())


def test_the_steps_of_a_conditioned_student_hold_the_teachers_lora_too(tiny_sdxl, tmp_path):
    file = write(tiny_sdxl, tmp_path / "lora", ())
    base = teachers.load(named(("sdxl", tiny_sdxl), file, lora_weight=WEIGHT), "cpu")
    denoiser = students.student(base, Lora(rank=8, alpha=2.0), 0, condition_on_target=True)
    tiny.perturb(students.trainable_parameters(denoiser), 1, 0.1)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type, "budgets": [2, 4]}
    students.save_student(denoiser, tmp_path / "student", description)
    out = export(tmp_path / "student", base, tmp_path / "out")
    student = students.load_student(base, tmp_path / "student")
    for steps in (2, 4):
        expected = denoiser_for_steps(base, student, steps, 0.0, base.dtype).state_dict()
        for name in (LORA_FILE, KOHYA_FILE):
            actual = fused_by_diffusers(tiny_sdxl, out / f"steps-{steps}" / name, 1.0)
            assert max(relative(actual[f"unet.{key}"], value) for key, value in expected.items()) < 1e-6
