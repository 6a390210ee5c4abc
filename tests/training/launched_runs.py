"""Runs of two processes on the CPU, through the command as a user starts it, and what is compared of them.

Two processes sum in another order than one, and Adam's first steps are about the learning rate times the gradient's
sign, so that single weights of nearly zero gradient may differ by a step: what must agree are losses, norms, and
weights as a whole.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.recipe import Evaluate, Recipe

ROOT = Path(__file__).resolve().parents[2]
LAUNCHES = ROOT / "recipes" / "launch"
SECONDS = 900  # a save that hangs must not hang the tests; ZeRO-3 on busy cores takes minutes


def all_stages(prompts: str) -> list:
    """Every kind of stage that a launch shares among processes, small."""
    return [
        runs.trajectories(prompts, shard_size=2),
        runs.distill(num_segments=[2], num_steps=3, condition_on_target=True),
        runs.tuning("feedback", prompts, gradient_accumulation=2, num_grad_steps=2),
        runs.tuning("dpo", prompts, gamma=1.0),
        runs.tuning("policy", prompts, num_iterations=2),
        Evaluate(prompts=prompts, num_prompts=4, sampling_steps=[1, 2], teacher_steps=[3, 4], batch_size=2),
    ]


def command_of(recipe: Recipe, folder: Path, mode: str) -> list[str]:
    """`mlcm run RECIPE --launch MODE`, to be called in `folder`, where the recipe is written."""
    file = folder / f"{recipe.name}.yaml"
    YAML().dump(recipe.model_dump(mode="json"), file)
    return [sys.executable, "-m", "mlcm_rl", "run", file.name, "--launch", str(LAUNCHES / f"{mode}.yaml")]


def environment(**changes: str) -> dict[str, str]:
    """This process's, with one thread and without the hub."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def launch(recipe: Recipe, folder: Path, mode: str, **changes: str) -> subprocess.CompletedProcess:
    """`mlcm run RECIPE --launch MODE` in `folder`, one thread a process."""
    command, place = command_of(recipe, folder, mode), environment(**changes)
    return subprocess.run(command, cwd=folder, env=place, capture_output=True, text=True, timeout=SECONDS)


def launched(recipe: Recipe, folder: Path, mode: str) -> None:
    process = launch(recipe, folder, mode)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("done  ") == 1  # one process speaks


def stage_folders(recipe: Recipe) -> list[Path]:
    return sorted((Path(recipe.runs) / recipe.name).iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.resolve().glob("student/**/*.safetensors"))
    return {f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()}


def records(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of all weights together."""
    assert one.keys() == other.keys()
    squares = [((one[name] - other[name]).square().sum(), one[name].square().sum()) for name in one]
    apart, size = (torch.stack(values).sum().sqrt().item() for values in zip(*squares, strict=True))
    return apart / size


def assert_alike(alone: Recipe, together: Recipe) -> None:
    """Same fingerprints, logs and students, up to the order of sums."""
    for one, other in zip(stage_folders(alone), stage_folders(together), strict=True):
        assert one.resolve().name == other.resolve().name  # the launch is not part of the fingerprint
        assert len(records(one)) == len(records(other))
        for expected, actual in zip(records(one), records(other), strict=True):
            assert actual["step"] == expected["step"]
            assert actual.keys() == expected.keys()
            for name in {"loss", "grad_norm", "held_out_loss"} & expected.keys():
                assert actual[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), (one.name, name)
        if weights(one):
            assert distance(weights(one), weights(other)) < 1e-4


def whole_and_launched(
    teacher: Path,
    folder: Path,
    stages: list,
    mode: str,
    family: str = "sdxl",
    resolution: int | None = None,
    quantise: str | None = None,
) -> tuple[Recipe, Recipe]:
    """One recipe, run in this process and in two."""
    alone, together = (
        runs.recipe(teacher, folder, stages, family, resolution, quantise, name="small", runs=str(folder / name))
        for name in ("alone", "together")
    )
    pipeline.run(alone)
    launched(together, folder, mode)
    return alone, together
