"""docs/my_finetune.md: its commands, as they stand, on a tiny single-file SDXL with a LoRA of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import original_layout
import runs
import tiny
from mlcm_rl.models import students, teachers
from mlcm_rl.models.client_files import KOHYA_FILE
from mlcm_rl.models.export import target_time_update
from mlcm_rl.models.lora_files import LORA_FILE
from mlcm_rl.recipe import Teacher
from teacher_loras import fused_by_diffusers, relative
from teacher_loras import write as write_lora

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("device=cpu", "teacher.dtype=float32", "teacher.lora=my_style.safetensors", "teacher.lora_weight=0.8"),
    *("stages.trajectories.num_trajectories=4", "stages.trajectories.solver_steps=8", "stages.distill.num_steps=2"),
    *("stages.distill.batch_size=4", "stages.evaluate.num_prompts=2", "stages.evaluate.teacher_steps=[2]"),
]


def commands() -> list[str]:
    block = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "my_finetune.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line.partition("#")[0].strip() for line in block[1].splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder in which the commands of the page have run."""
    place = tmp_path_factory.mktemp("finetune")
    folder = tiny.sdxl(place / "original")
    original_layout.write(DiffusionPipeline.from_pretrained(folder), place / "my_model.safetensors")
    shutil.copytree(folder, place / "sdxl_base", ignore=shutil.ignore_patterns("*.safetensors"))
    write_lora(folder, place / "lora").rename(place / "my_style.safetensors")
    runs.write_prompts(place)
    (place / "prompts.txt").rename(place / "my_prompts.txt")
    shutil.copyfile(place / "my_prompts.txt", place / "my_test_prompts.txt")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    for command in commands():
        words = command.split()
        assert words[0] == "mlcm"
        words += SMALL if words[1] in ("run", "plan") else []
        run = [sys.executable, "-m", "mlcm_rl", *words[1:]]
        done = subprocess.run(run, cwd=place, env=environment, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return place


def test_the_commands_of_the_page_make_a_lora_for_every_number_of_steps(place):
    out = place / "my_lora"
    assert sorted(path.name for path in out.glob("steps-*")) == ["steps-4", "steps-8"]
    assert all((folder / file).is_file() for folder in out.glob("steps-*") for file in (KOHYA_FILE, LORA_FILE))
    assert "the LoRA `my_style.safetensors` at weight 0.8" in (out / "README.md").read_text(encoding="utf-8")


def test_over_the_plain_checkpoint_the_lora_is_the_fused_teacher_with_the_student(place):
    settings = {"family": "sdxl", "lora": str(place / "my_style.safetensors"), "lora_weight": 0.8}
    base = teachers.load(Teacher(path=str(place / "my_model"), **settings), "cpu")
    student = students.load_student(base, place / "runs" / "my_finetune" / "01-distill" / "student")
    expected = students.merged(student, torch.float32).state_dict()
    up, down = target_time_update(base, student, 4, 0.0)
    expected["time_embedding.linear_1.weight"] += up @ down
    actual = fused_by_diffusers(place / "my_model", place / "my_lora" / "steps-4" / KOHYA_FILE, 1.0)
    names = [name for name in expected if "cond_proj" not in name]
    assert max(relative(actual[f"unet.{name}"], expected[name]) for name in names) < 1e-6
    texts = {name: value for name, value in actual.items() if name.startswith("text_encoder.")}
    own = base.pipeline.text_encoder.state_dict()
    assert max(relative(value, own[name.removeprefix("text_encoder.")]) for name, value in texts.items()) < 1e-6
