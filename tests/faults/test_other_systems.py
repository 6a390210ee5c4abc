"""What the package needs of the system that it runs on."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import runs
from mlcm_rl.pipeline import RunError, running
from mlcm_rl.training import machine
from mlcm_rl.training.progress import say_once

ROOT = Path(__file__).resolve().parents[2]


def test_a_system_that_is_not_posix_is_refused_in_words_before_anything_is_imported():
    """A missing fcntl would be the first sign otherwise, and a missing SIGALRM the second, in the first step."""
    program = "import os; os.name = 'nt'; import mlcm_rl"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1] == (
        "ImportError: mlcm_rl runs on Linux and macOS, and this system is nt; on Windows, run it in WSL"
    )


def test_package_indexes_are_told_too():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Operating System :: POSIX" in project["classifiers"]


def test_a_run_says_once_what_is_not_tested_on_its_system(monkeypatch, capsys):
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(running, "refuse_unready", refuse)
    say_once.cache_clear()
    for _ in range(2):
        with pytest.raises(RunError, match="that is all"):
            running.run(runs.recipe(ROOT, ROOT, [runs.trajectories("prompts.txt")]))
    printed = capsys.readouterr().out
    assert printed.splitlines() == [f"system {machine.unlike_linux()}"]
    assert "docs/platforms.md" in printed
    monkeypatch.undo()
    assert machine.unlike_linux() is None  # on Linux nothing is said


def refuse(recipe) -> None:
    raise RunError("that is all")
