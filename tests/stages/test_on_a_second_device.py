"""Every stage and family on a device beside the CPU, on a machine that has none: second_device.cpp."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
STAGES = sorted({path.name for path in (TESTS / "stages").glob("test_*.py")} - {"test_on_gpu.py", Path(__file__).name})
COMPILER = os.environ.get("CXX", "g++")
ON_THE_CPU = (  # what these tests make themselves, or expect to the last bit
    "test_its_first_loss_is_by_hand_that_of_the_network_read_as_x0",
    "test_a_batch_of_8_in_1_2_or_4_parts_draws_the_same_and_makes_the_same_update",
)
REFUSED = """
import pytest, torch
import second_device

def test_two_devices_do_not_meet():
    here, x, rows = torch.device(second_device.NAME, 0), torch.ones(2, 2), torch.tensor([1, 0])
    for operation in (torch.add, torch.matmul, torch.equal, torch.nn.functional.linear, torch.index_select):
        with pytest.raises(RuntimeError, match="same device"):
            operation(x.to(here), *([0, rows] if operation is torch.index_select else [x]))
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.conv1d(x[None].to(here), x[None])
    with pytest.raises(RuntimeError, match="drawn on the CPU"):
        torch.randn(2, generator=torch.Generator(), device=here)
    assert torch.equal((x.to(here) @ x.to(here))[rows].cpu(), x @ x)
    with torch.autocast(here.type, torch.bfloat16):
        product = x.to(here) @ x.to(here)
        assert (product.dtype, torch.nn.functional.layer_norm(product, (2,)).dtype) == (torch.bfloat16, torch.float32)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, and there is no {COMPILER} here"),
]


def on_second_device(*arguments: str) -> None:
    """Run pytest on tests in a process of that device; assert that all pass."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    python_path = os.pathsep.join(str(folder) for folder in (TESTS.parent, TESTS, TESTS / "stages"))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore", "-p", "second_device", *arguments]
    environment = os.environ | {"PATH": path, "PYTHONPATH": python_path}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_device_refuses_what_a_gpu_refuses(tmp_path):
    file = tmp_path / "test_refused.py"
    file.write_text(REFUSED, encoding="utf-8")
    on_second_device(str(file))


@pytest.mark.parametrize("file", STAGES)
def test_stages_run_on_it(file):
    on_second_device(str(TESTS / "stages" / file), "-k", " and ".join(f"not {name}" for name in ON_THE_CPU))


def test_guards_and_evaluations_run_on_it():
    on_second_device(str(TESTS / "preference"), str(TESTS / "evaluation"))


def test_every_family_goes_the_whole_way_on_it():
    families = str(TESTS / "models" / "test_families.py")
    on_second_device(families, "-m", "slow or not slow", "-k", "every_stage_runs and lora")


@pytest.mark.parametrize("file", ["recipes_of_rivals", "chinese_recipes", "tune_published_student"])
def test_recipes_run_on_it_in_their_own_precisions(file):
    on_second_device(str(TESTS / "pipeline" / f"test_{file}.py"), "-m", "slow or not slow")
