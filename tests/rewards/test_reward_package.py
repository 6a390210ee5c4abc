"""A folder `reward_models` in the working directory adds to the shipped rewards and replaces none in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINE = """
from torch import Tensor


class {name}:
    differentiable, needs_prompt, languages = True, False, ()

    def __init__(self, device, dtype):
        pass

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""


@pytest.fixture
def mlcm(tmp_path):
    """`python -m mlcm_rl` as a user types it, in a folder of their own with a reward model `mine`."""
    (tmp_path / "reward_models").mkdir()
    (tmp_path / "reward_models" / "__init__.py").touch()
    (tmp_path / "reward_models" / "mine.py").write_text(MINE.format(name="Mine"))
    place = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def command(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mlcm_rl", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True)

    return command


def test_a_users_folder_adds_to_ours_and_its_rewards_are_checked(mlcm):
    listing = mlcm("rewards", "list")
    assert "mine" in listing.stdout, listing.stderr
    assert "brightness" in listing.stdout
    check = mlcm("rewards", "check", "mine")
    assert check.returncode == 0, check.stdout + check.stderr


def test_a_file_of_a_shipped_name_is_refused_in_words(mlcm, tmp_path):
    (tmp_path / "reward_models" / "brightness.py").write_text(MINE.format(name="Brightness"))
    refused = mlcm("rewards", "check", "brightness")
    assert refused.returncode != 0
    output = refused.stdout + refused.stderr
    assert "claimed twice, by reward_models/brightness.py and by" in output
    assert "rename one of them" in output
