"""The card of an export: metadata, claims, what it says of other tools. Its code is run in test_stock_export."""

import ast
import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from ruamel.yaml import YAML

import tiny
from mlcm_rl import recipe
from mlcm_rl.models import model_card, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.client_files import KOHYA_FILE
from mlcm_rl.models.export import export
from mlcm_rl.models.students import Student
from mlcm_rl.models.teachers import load
from mlcm_rl.recipe import Full, Lora

CARD = "---\nlicense: other\nlicense_name: a-licence\nlanguage:\n- en\n- zh\ntags:\n- theirs\n---\nÉmilie's teacher\n"


def exported(base: Base, root: Path, adapter: Lora | Full, conditioned: bool = False, **described) -> Path:
    """The export `root/out` of a student; the student itself is in `root/student`."""
    denoiser = students.student(base, adapter, 0, conditioned)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type} | described
    students.save_student(denoiser, root / "student", description)
    return export(root / "student", base, root / "out")


def card(base: Base, student: Student, folder: Path, gamma: float | None = None) -> str:
    return model_card.card(base, student, "out", student.default_gamma if gamma is None else gamma, None, folder)


def metadata(card: str) -> dict:
    return YAML(typ="safe", pure=True).load(card.split("---\n")[1])


@pytest.fixture(scope="module")
def lora(loaded, tmp_path_factory) -> tuple[Base, Student, Path]:
    root = tmp_path_factory.mktemp("lora")
    out = exported(loaded["sdxl"], root, Lora(rank=4, alpha=8.0))
    return loaded["sdxl"], students.load_student(loaded["sdxl"], root / "student"), out


@pytest.fixture(scope="module")
def told(loaded, tmp_path_factory) -> tuple[Base, Student, Path]:
    """A conditioned student of budgets without 4."""
    root = tmp_path_factory.mktemp("told")
    out = exported(loaded["sdxl"], root, Lora(rank=4, alpha=8.0), True, budgets=[2, 3, 8])
    return loaded["sdxl"], students.load_student(loaded["sdxl"], root / "student"), out


def of_teacher(base: Base, **changes) -> Base:
    """`base` as if its recipe named its teacher otherwise."""
    other = copy.copy(base)
    other.teacher = base.teacher.model_copy(update=changes)
    return other


def of_published_shape(base: Base) -> Base:
    """`base` as if its denoiser were as wide as SDXL's."""
    other = copy.copy(base)
    other.denoiser = SimpleNamespace(config=FrozenDict(block_out_channels=[320, 640, 1280]))
    return other


# Metadata


def test_a_base_model_is_named_where_the_hub_has_it_alone(lora):
    base, student, out = lora
    assert "base_model" not in metadata(card(*lora))
    hub = of_teacher(base, path="owner/model", revision="0" * 40)
    text = card(hub, student, out)
    assert metadata(text)["base_model"] == "owner/model"
    assert f'DiffusionPipeline.from_pretrained("owner/model", revision="{"0" * 40}")' in text
    assert metadata(text)["tags"] == ["stable-diffusion-xl", "consistency-distillation", "few-step", "lora"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_licence_and_languages_are_taken_over_from_a_card_in_any_encoding(encoding, lora, tmp_path):
    base, student, out = lora
    (tmp_path / "README.md").write_bytes(CARD.encode(encoding))
    text = card(of_teacher(base, path=str(tmp_path)), student, out)
    found = metadata(text)
    assert (found["license"], found["license_name"], found["language"]) == ("other", "a-licence", ["en", "zh"])
    assert "theirs" not in found["tags"]
    assert "## Licence\n\nAs its teacher's: other." in text


def test_languages_of_the_measured_prompts_stand_in_for_those_that_the_teacher_does_not_state(lora, tmp_path):
    base, student, out = lora
    measured = model_card.card(base, student, "out", 1.0, None, out, ["zh", "en", "Old\nNorse"])
    assert metadata(measured)["language"] == ["zh", "en"]
    (tmp_path / "README.md").write_text(CARD)
    stating = of_teacher(base, path=str(tmp_path))
    assert metadata(model_card.card(stating, student, "out", 1.0, None, out, ["de"]))["language"] == ["en", "zh"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        CARD.encode("utf-16"),
        b"\xff\xfe\x00---\x80",
        b"# A teacher\n\n---\nlicense: mit\n---\n",
        b"| a |\n|---|\n| license: mit |\n",
        b"---\nlicense: mit\nno end",
        b'---\nlicense: "in\ntwo lines"\n---\n',
        b"---\nlicence: &mine mit\nlicense: *mine\n---\n",
        b"---\nlicense: mit\nlicense: apache-2.0\n---\n",
        b"---\nlicense: !!python/object:os.system x\n---\n",
        b"---\nlicense: " + b"[" * 9000 + b"\n---\n",
        b"---\nlicense: mit\nlanguage:\n" + b"- en\n" * 10**5 + b"---\n",
    ],
)
def test_a_card_without_front_matter_states_nothing(content, lora, tmp_path):
    base, student, out = lora
    (tmp_path / "README.md").write_bytes(content)
    text = card(of_teacher(base, path=str(tmp_path)), student, out)
    assert "license" not in metadata(text)
    assert "## Licence\n\nThat of its teacher." in text


def test_a_name_with_quotes_is_still_code(lora, told):
    name = """it's \"mine\" [v1]"""
    for base, student, out in (lora, told):
        teacher = of_teacher(base, path=f"teachers/{name}")
        text = model_card.card(teacher, student, name, 0.3, None, out)
        blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
        named = {
            node.value for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)
        }
        assert {name, f"teachers/{name}"} <= named


def test_a_folder_of_licences_stays_where_it_is(loaded, tmp_path):
    teacher = tmp_path / "teacher"
    (teacher / "LICENSES").mkdir(parents=True)
    (teacher / "LICENSE").write_text("Do as you like.")
    out = exported(of_teacher(loaded["sdxl"], path=str(teacher)), tmp_path, Lora(rank=1))
    assert [path.name for path in out.glob("LICENSE*")] == ["LICENSE"]


# Claims


@pytest.mark.parametrize(
    ("described", "claim"),
    [
        ({}, "It was then tuned to preferences; both are in its weights."),
        ({"tuned_steps": 80}, "It was then tuned to preferences; both are in its weights."),
        ({"tuned_steps": 0}, "Tuning it to preferences found nothing better: it is as it was distilled."),
    ],
)
def test_a_student_that_the_guard_left_alone_is_not_called_tuned(described, claim, lora, tmp_path):
    base, student, out = lora
    shutil.copytree(student.folder, tmp_path / "student")
    file = tmp_path / "student" / students.DESCRIPTION_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preference": {}} | described))
    tuned = dataclasses.replace(student, tuned=True, folder=tmp_path / "student")
    text = card(base, tuned, out)
    assert claim in text
    assert ("was then tuned" in text) == (described.get("tuned_steps") != 0)


def test_the_code_draws_in_as_many_steps_as_were_learned(told):
    text = card(*told)
    assert "num_inference_steps=3" in text.split("```")[1]
    assert "Without `num_inference_steps` it draws in 3." in text
    assert "num_inference_steps=4" not in text


def test_a_safety_checker_that_is_left_out_is_said_to_be(teachers, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teachers["sd15"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"requires_safety_checker": True, "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    base = load(recipe.Teacher(path=str(folder), family="sd"), "cpu")
    out = exported(base, tmp_path, Full())
    assert "safety checker is not in this folder" in (out / "README.md").read_text()
    assert json.loads((out / "model_index.json").read_text())["requires_safety_checker"] is False
    assert StableDiffusionPipeline.from_pretrained(out).safety_checker is None
    assert base.pipeline.config.requires_safety_checker  # of the teacher's own pipeline


def test_what_goes_wrong_with_diffusers_defaults_is_said(lora, told):
    plain, conditioned = card(*lora), card(*told)
    for text in ("Say `num_inference_steps`, 1 to 8", "Say `guidance_scale=0`", "Take the scheduler of this folder"):
        assert text in plain
    for text in ("`guidance_scale` and `negative_prompt` have no effect", "class_labels\n  should be provided"):
        assert text in conditioned
    assert 'leave `variant="fp16"` out' in plain
    assert "safety checker" not in plain


# Other tools


def table(text: str) -> list[list[str]]:
    """The rows of the table of files for ComfyUI."""
    lines = text.split("## ComfyUI and other tools")[1].split("## Grids")[0].splitlines()
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]


def test_other_tools_are_told_of_models_that_they_know_alone(lora):
    assert "ComfyUI" not in card(*lora)


def test_an_adapter_goes_to_comfyui_with_the_sampler_of_its_gamma(lora):
    base, student, out = lora
    (row,) = table(card(of_published_shape(base), student, out))
    assert (row[0], row[1], row[3], row[4]) == (KOHYA_FILE, "models/loras", "lcm", "1, 2, 4, 8")
    assert (out / row[0]).is_file()


def test_a_conditioned_student_goes_to_comfyui_by_its_folders(told):
    base, student, out = told
    rows = table(card(of_published_shape(base), student, out))
    assert [(row[0], row[3], row[4]) for row in rows] == [
        (f"steps-2/{KOHYA_FILE}", "euler", "2"),
        ("steps-8/unet/diffusion_pytorch_model.safetensors", "euler", "8"),
    ]
    assert all((out / row[0]).is_file() for row in rows)


def test_full_weights_go_to_comfyui_in_one_file(loaded, tmp_path):
    base = loaded["sdxl"]
    out = exported(base, tmp_path, Full(), num_segments=2)
    student = students.load_student(base, tmp_path / "student")
    (row,) = table(card(of_published_shape(base), student, out))
    assert row[:2] == ["unet/diffusion_pytorch_model.safetensors", "models/diffusion_models"]
    assert row[3] == "euler"
    (out / row[0]).unlink()  # as if diffusers had written it in parts
    assert "in parts" in table(card(of_published_shape(base), student, out))[0][2]


def test_a_gamma_between_has_no_sampler_elsewhere(lora):
    base, student, out = lora
    text = card(of_published_shape(base), student, out, gamma=0.3)
    assert "No sampler of other tools is known that puts noise back as `eta=0.3` does" in text


# A teacher with a LoRA of its own


def test_a_lora_of_the_teacher_is_said_to_be_inside_once(lora, told, tmp_path):
    base, student, out = lora
    with_lora = of_teacher(base, lora=str(tmp_path / "style.safetensors"), lora_weight=0.7)
    text = card(with_lora, student, out)
    assert "sdxl` with the LoRA `style.safetensors` at weight 0.7 for" in text
    assert "Or the adapter alone, over the teacher's checkpoint, with its LoRA inside:" in text
    assert str(tmp_path) not in text
    assert 'load_lora_weights("style' not in text
    tools = card(of_published_shape(with_lora), student, out)
    assert "do not load it over them again" in tools
    assert "strength_clip 0.7" in " ".join(tools.split())
    assert "LoRA is" not in card(of_published_shape(base), student, out)
    base, student, out = told  # at 8 steps it is a denoiser, beside which the text encoders have to be the teacher's
    text = card(of_teacher(base, lora="style.safetensors", lora_weight=0.7), student, out)
    fused = ['load_lora_weights("style.safetensors")', "fuse_lora(lora_scale=0.7)", "unload_lora_weights()", "unet ="]
    assert text.count("\n".join(f"pipe.{line}" for line in fused)) == 1
