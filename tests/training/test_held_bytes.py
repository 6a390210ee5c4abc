"""The predicted bytes of an engine are the sum of its tensors, in each of two processes on the CPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands import launch
from launched_runs import LAUNCHES, ROOT, SECONDS

import runs
from mlcm_rl.cost.launches import held, outline, read_launch
from mlcm_rl.models import students, teachers
from mlcm_rl.recipe import Distill


def measured(mode: str, teacher: Path, folder: Path, settings: dict) -> list[dict[str, int]]:
    """Return the bytes of each process under the launch file `mode`."""
    script = [str(ROOT / "tests" / "training" / "held_bytes.py"), str(teacher), str(folder), json.dumps(settings)]
    command = [sys.executable, launch.__file__, "--config_file", str(LAUNCHES / f"{mode}.yaml"), *script]
    place = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=SECONDS)
    assert process.returncode == 0, process.stdout + process.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("mode", ["cpu2", "zero1", "zero2", "zero3", "fsdp2"])
def test_tensors_of_an_engine_add_up_to_what_is_predicted(mode, adapter, tiny_sdxl, tmp_path):
    if mode.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    stage: Distill = runs.distill(adapter={"kind": adapter})
    base = teachers.skeleton(runs.recipe(tiny_sdxl, tmp_path, [stage]).teacher)
    student = students.student(base, stage.adapter, 0)
    launch_settings = read_launch(LAUNCHES / f"{mode}.yaml")
    sizes = outline(student, base.denoiser, launch_settings.blocks)
    expected = held(sizes, launch_settings)
    for actual in measured(mode, tiny_sdxl, tmp_path, stage.model_dump(mode="json")):
        assert actual["gradients"] == pytest.approx(expected.gradients, rel=0.02)
        assert actual["optimiser"] == pytest.approx(expected.optimiser, rel=0.02)
        assert actual["parameters"] == pytest.approx(sizes.weights / (2 if launch_settings.level == 3 else 1), rel=0.02)
        if launch_settings.level == 3:
            assert actual["originals"] == 0  # of the weights as they were loaded, frozen ones too
        if mode.startswith("zero"):
            assert actual["exchange"] == pytest.approx(expected.exchange, rel=0.02)  # the same for every student
