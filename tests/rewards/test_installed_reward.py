"""The reward model of docs/add_a_reward.md, installed as another distribution by pip, runs through the command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import reward_models
from mlcm_rl.cli.app import app
from mlcm_rl.rewards import find

ROOT = Path(__file__).resolve().parents[2]
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "warm-pictures"
version = "1.0"

[project.entry-points."mlcm_rl.reward_models"]
warmth = "warm_pictures:Warmth"

[tool.setuptools]
py-modules = ["warm_pictures"]
"""


@pytest.fixture(scope="module")
def example() -> str:
    """The file that the page shows."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "add_a_reward.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (block,) = [block for block in blocks if "class Warmth" in block]
    return block


@pytest.fixture(scope="module")
def site(example, tmp_path_factory) -> Path:
    """A folder for sys.path that pip has installed the distribution to; nothing is fetched to build it."""
    source, site = tmp_path_factory.mktemp("warm-pictures"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "warm_pictures.py").write_text(example)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True)
    return site


@pytest.fixture
def mlcm(site, monkeypatch):
    """The command in a Python that has the distribution."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_the_readme_shows_a_reward_in_fewer_than_25_lines(example):
    assert len(example.splitlines()) < 25


def test_an_installed_distribution_adds_a_reward_that_passes_every_check(mlcm):
    result = mlcm("rewards", "check", "warmth", "--setting", "strength=2")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^ \w.*? ok  ", result.stdout, re.MULTILINE)) == 7


def test_it_is_listed_beside_our_own(mlcm):
    lines = [line.split() for line in mlcm("rewards", "list").stdout.splitlines()]
    assert ["warmth", "yes", "not", "used"] in [words[:4] for words in lines]
    assert "colourfulness" in [word for words in lines for word in words]


def test_the_same_file_dropped_into_reward_models_is_a_reward(example, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_models, "__path__", [*reward_models.__path__, str(tmp_path)])
    (tmp_path / "warmth.py").write_text(example)
    image = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    warmth = find("warmth")(torch.device("cpu"), torch.float32, strength=2.0)
    assert warmth(image, [""]).item() == 1.5
