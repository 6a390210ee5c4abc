"""The wheel: installed in an empty environment it is enough for the demo, without a clone, and claims one name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = (  # the demo, cut to a minute
    "stages.trajectories.num_trajectories=8",
    "stages.trajectories.num_held_out=2",
    "stages.trajectories.batch_size=10",
    "stages.distill.num_steps=2",
    "stages.feedback.num_steps=1",
    "stages.evaluate.num_prompts=4",
    "samples.prompts=[panda]",
)


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "mlcm_rl").rglob("__init__.py")}
    assert set(listed) - {"mlcm_rl.shipped.recipes", "mlcm_rl.shipped.reward_models"} == there


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return the `mlcm` of an environment that has the wheel, and for its requirements those of this environment."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("mlcm_rl", "reward_models", "recipes"):  # a build leaves files in its folder
        shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "scenes"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, place / "source"]
    subprocess.run([*pip, *build], check=True, env=environment())
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", symlinks=True)
    packages = next((place / "venv").glob("lib/python*/site-packages"))
    subprocess.run(
        [*pip, "--python", place / "venv" / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel],
        check=True,
        env=environment(),
    )
    (packages / "requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return place / "venv" / "bin" / "mlcm"


def environment() -> dict[str, str]:
    """Return the environment without this checkout in it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(mlcm: Path, folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [mlcm, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_the_wheel_claims_one_name_and_stays_small(installed):
    (wheel,) = installed.parents[2].glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0].split("-")[0] for name in archive.namelist()} == {"mlcm_rl"}
    assert wheel.stat().st_size < 45e6


@pytest.mark.slow
def test_the_demo_runs_in_an_empty_folder(installed, tmp_path):
    assert f"ok  {installed.parents[1]}" in run(installed, tmp_path, "validate", "emoji_demo")
    assert "emoji_style" in run(installed, tmp_path, "rewards", "list")
    run(installed, tmp_path, "recipes", "copy", "emoji_demo")
    assert "still to do" in run(installed, tmp_path, "plan", "emoji_demo.yaml", *SHORT, "--launch", "cpu2")
    assert "done" in run(installed, tmp_path, "run", "emoji_demo.yaml", *SHORT)
    run(installed, tmp_path, "sample", "runs/emoji_demo", "--prompt", "红苹果", "--out", "pictures")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert (tmp_path / "runs" / "emoji_demo" / "03-evaluate" / "report.html").is_file()


@pytest.mark.slow
def test_it_says_what_is_installed(installed, tmp_path):
    assert "Everything that a run needs is here." in run(installed, tmp_path, "doctor")
