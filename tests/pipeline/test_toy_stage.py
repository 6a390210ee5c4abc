"""A new kind of stage, added as a contributor would: its type, its loop, and its name in the list of stages.

The two files are in `toy/`, laid out as in the package; EDITS is the rest of the diff, in mlcm_rl/recipe/experiment.py.
They are put into a copy of the package, and all that a user does with a stage is done with the new one: nothing else
is touched. Its tests would come third.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).parent / "toy"
EDITS = {
    "from .evaluation import Evaluate\n": "from .evaluation import Evaluate\nfrom .imitate import Imitate\n",
    "    | Evaluate,\n": "    | Evaluate\n    | Imitate,\n",
}
RECIPE = """
name: toy
teacher: {{path: {teacher}, family: sdxl, guidance_scale: 3.0}}
device: cpu
trackers: []
runs: {runs}
samples: {{prompts: [a cat], sampling_steps: [1]}}
stages:
  - {{kind: trajectories, prompts: {prompts}, num_trajectories: 4, solver_steps: 8}}
  - {{kind: distill, adapter: {{kind: lora, rank: 2}}, num_steps: 2, batch_size: 2}}
  - {{kind: imitate, adapter: {{kind: lora, rank: 2}}, prompts: {prompts}, num_steps: 3, batch_size: 4}}
  - {{kind: evaluate, prompts: {prompts}, num_prompts: 2, sampling_steps: [1], gammas: [0.0], teacher_steps: [2]}}
"""
ASK = """
import sys
from pathlib import Path
from mlcm_rl.evaluation.training_cost import of_student
print(of_student(Path(sys.argv[1])).record().model_dump_json())
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The folder of a copy of the package with the new stage in it."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("mlcm_rl", "reward_models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TOY, folder / "mlcm_rl", dirs_exist_ok=True)
    file = folder / "mlcm_rl" / "recipe" / "experiment.py"
    text = file.read_text()
    for before, after in EDITS.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    file.write_text(text)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_sdxl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    prompts = runs.write_prompts(folder)
    file = folder / "toy.yaml"
    file.write_text(RECIPE.format(teacher=tiny_sdxl, runs=folder / "runs", prompts=prompts))
    return file


def python(package: Path, *arguments: object, code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(package), "MLCM_RL_ESTIMATES": str(package / "estimates")}
    environment["COLUMNS"] = "200"
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_what_its_type_requires_is_looked_for_in_the_recipe(package, recipe, tmp_path, command):
    lines = [line for line in recipe.read_text().splitlines() if "kind: distill" not in line]
    (tmp_path / "toy.yaml").write_text("\n".join(lines))
    told = python(package, "-m", "mlcm_rl", command, tmp_path / "toy.yaml", code=2)
    assert "imitate needs an earlier distill stage" in " ".join(told.split())


@pytest.mark.slow
def test_a_stage_is_its_type_its_loop_and_its_name_in_one_list(package, recipe):
    planned = json.loads(python(package, "-m", "mlcm_rl", "plan", recipe, "--json", "--device", "h100"))["stages"]
    toy, evaluation = planned[2], planned[3]
    assert (toy["kind"], toy["done"], toy["unknown"]) == ("imitate", False, None)
    assert toy["network_evaluations"] == 3 * 4 * (2 + 1)  # the teacher's guess counts two
    assert toy["disk_bytes"] > 0
    assert toy["seconds"] > 0
    assert min(toy["memory"][part] for part in ("parameters", "gradients", "optimiser", "activations")) > 0
    assert toy["memory"]["averages"] == 0
    assert evaluation["network_evaluations"] == 2 * (2 * 2 + 1 + 2)  # reference, undistilled teacher, two students

    python(package, "-m", "mlcm_rl", "run", recipe)
    folder = Path(toy["folder"])
    assert folder.name == f"imitate-{toy['fingerprint']}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["network_evaluations"] == toy["network_evaluations"]
    assert manifest["parents"] == {"distill": Path(planned[1]["folder"]).name}
    assert manifest["memory"]["predicted"]
    report = json.loads((Path(evaluation["folder"]) / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["teacher", "teacher", "student", "imitate"]
    cost = json.loads(python(package, "-c", ASK, folder / "student"))
    assert cost["samples"] == 2 * 2 + 3 * 4
    assert (cost["store"], cost["online"], cost["student"]) == (4 * 8 * 2, 3 * 4 * 2, 2 * 2 + 3 * 4)

    again = json.loads(python(package, "-m", "mlcm_rl", "plan", recipe, "--json"))["stages"]
    assert [stage["done"] for stage in again] == [True] * 4
    changed = package / "mlcm_rl" / "recipe" / "imitate.py"
    changed.write_text(changed.read_text().replace("maths: ClassVar[int] = 7", "maths: ClassVar[int] = 8"))
    moved = json.loads(python(package, "-m", "mlcm_rl", "plan", recipe, "--json"))["stages"]
    assert [stage["done"] for stage in moved] == [True, True, False, False]
