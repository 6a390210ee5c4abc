"""Engines that hold a student in parts (ZeRO, FSDP2): the steps of one process, and checkpoints for any number of them.

One launch of two processes a mode trains a step, saves, reads that back and trains another.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands import launch
from launched_runs import LAUNCHES, ROOT, SECONDS, distance, weights
from safetensors.torch import load_file
from train_twice import train

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import students, teachers

MODES = ["zero1", "zero2", "zero3", "fsdp2"]
FULL = {"adapter": {"kind": "full"}, "target_ema": 0.5, "gradient_accumulation": 2}
SETTINGS = {
    "full": FULL,
    "lora": {"condition_on_target": True},
    "checkpointing": {**FULL, "gradient_checkpointing": True},
    "terms": {
        **{"method": "inter_segment", "num_segments": [1], "num_teacher_steps": 1, "num_student_steps": 2},
        "matching": {"fake": {"rank": 2, "alpha": 2.0, "num_updates": 2}},
        "adversarial": {"width": 4},
        "gradient_accumulation": 2,
    },
}
TUNING = {
    "feedback": {
        **{"gradient_accumulation": 2, "num_grad_steps": 2, "anchor": 1.0, "consistency": 1.0},
        "matching": {"fake": {"rank": 2, "alpha": 2.0, "num_updates": 2}},
    },
    "dpo": {"gamma": 1.0},
    "policy": {"num_iterations": 2},
}


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory):
    """A store of trajectories that every test of distillation here starts from."""
    folder = tmp_path_factory.mktemp("store")
    return pipeline.run(runs.recipe(tiny_sdxl, folder, [runs.trajectories(runs.write_prompts(folder))]))[0].folder


def distillation(name: str) -> dict:
    own = SETTINGS[name]
    return {"num_segments": [2], **({} if "method" in own else {"target": "consistency"}), **own}


def state(folder: Path) -> dict:
    return load_file(sorted(folder.glob("checkpoints/*/state.safetensors"))[-1])


def train_alone(teacher: Path, folder: Path, kind: str, parents: dict[str, Path], settings: dict) -> tuple[Path, Path]:
    """One process's two steps, with a save after the first; and the same folder once it has gone on to a third."""
    two, three = folder / "two", folder / "three"
    for num_steps in (1, 2):
        train(teacher, two, kind, parents, num_steps, settings)
    shutil.copytree(two, three)
    train(teacher, three, kind, parents, 3, settings)
    return two, three


@pytest.fixture(scope="module")
def alone(tiny_sdxl, store, tmp_path_factory):
    """What one process makes of a distillation's settings, once for all engines."""

    @cache
    def of(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(f"alone-{name}")
        return train_alone(tiny_sdxl, folder, "distill", {"trajectories": store}, distillation(name))

    return of


def check_mode(
    mode: str,
    teacher: Path,
    together: Path,
    kind: str,
    parents: dict[str, Path],
    settings: dict,
    alone: tuple[Path, Path],
) -> None:
    """Train in two processes under `mode`, go on in one from what they have saved, and compare with one process."""
    if mode.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    script = [str(ROOT / "tests" / "training" / "train_twice.py"), str(teacher), str(together), kind]
    places = json.dumps({name: str(path) for name, path in parents.items()})
    command = [sys.executable, launch.__file__, "--config_file", str(LAUNCHES / f"{mode}.yaml"), *script, places]
    builds = together / "builds"
    place = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    place["TORCH_EXTENSIONS_DIR"] = str(builds)
    process = subprocess.run(
        [*command, json.dumps(settings)], env=os.environ | place, capture_output=True, text=True, timeout=SECONDS
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert not builds.exists()  # nothing was compiled

    assert_same_training(alone[0], together)
    base = teachers.load(runs.recipe(teacher, together, [runs.distill()]).teacher, "cpu")
    assert students.load_student(base, together / "student").num_segments == settings.get("num_segments", [2])[-1]
    train(teacher, together, kind, parents, 3, settings)
    assert_same_training(alone[1], together)


def assert_same_training(alone: Path, together: Path) -> None:
    """Same losses and gradient norms, and same weights, averages and moments by name in checkpoint and student.

    A policy's loss is what is left of terms near one that cancel: their rounding is its absolute tolerance.
    """
    for expected, actual in zip(runs.records(alone), runs.records(together), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert distance(state(alone), state(together)) < 1e-4
    assert distance(weights(alone), weights(together)) < 1e-4


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode == "fsdp2" else pytest.mark.slow) for mode in MODES]
)
def test_two_processes_train_save_and_reload_as_one(mode, tiny_sdxl, store, alone, tmp_path):
    check_mode(mode, tiny_sdxl, tmp_path, "distill", {"trajectories": store}, distillation("full"), alone("full"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "checkpointing", "terms"])
@pytest.mark.parametrize("mode", [*MODES, "cpu2", "zero2_offload"])
def test_every_kind_of_student_trains_under_every_engine(mode, name, tiny_sdxl, store, alone, tmp_path):
    check_mode(mode, tiny_sdxl, tmp_path, "distill", {"trajectories": store}, distillation(name), alone(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "distilled", [{"kind": "lora", "rank": 2, "alpha": 2.0}, {"kind": "full"}], ids=lambda one: one["kind"]
)
@pytest.mark.parametrize("kind", TUNING)
def test_preference_learning_under_zero3_trains_saves_and_reloads_as_one_process(kind, distilled, tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[2], adapter=distilled)]
    stages_alone = pipeline.run(runs.recipe(tiny_sdxl, tmp_path, stages))
    parents = {"trajectories": stages_alone[0].folder, "distill": stages_alone[1].folder}
    settings = {"prompts": prompts, **TUNING[kind]}
    alone = train_alone(tiny_sdxl, tmp_path / "alone", kind, parents, settings)
    check_mode("zero3", tiny_sdxl, tmp_path / "together", kind, parents, settings, alone)
