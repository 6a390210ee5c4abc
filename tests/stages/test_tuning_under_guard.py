"""The guard around a whole stage: when it stops a run, which student stays, and where that is said."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tuning_runs import adapter_of, records, tune

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import student_description, students
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.recipe import Evaluate
from mlcm_rl.storage import files
from mlcm_rl.storage.files import CheckpointError


def test_the_guard_stops_a_run_that_hacks_its_reward_and_keeps_the_student_from_before(
    distilled, tmp_path, monkeypatch
):
    """Held out is darkness itself: whatever brightness gains, it loses."""
    monkeypatch.setattr(
        "reward_models.colourfulness.Colourfulness.__call__", lambda self, images, prompts: -images.mean((1, 2, 3))
    )
    folder = tune(
        distilled,
        tmp_path,
        "feedback",
        num_steps=30,
        learning_rate=1e-2,
        guard={
            "rewards": [{"name": "colourfulness"}],
            "num_prompts": 4,
            "every": 2,
            "patience": 3,
        },
    )
    verdict = json.loads((folder / "guard.json").read_text())
    assert verdict["stopped"]
    assert verdict["kept_step"] == 0
    assert records(folder)[-1]["step"] == 6
    assert len(verdict["warnings"]) == 3
    assert "step 0 kept" in verdict["warnings"][-1]
    ups = [value for name, value in adapter_of(folder).items() if "lora_B" in name]
    assert all(not value.any() for value in ups)  # the kept student is the distilled one


def test_the_guard_keeps_the_step_that_was_best(distilled, tmp_path):
    folder = tune(distilled, tmp_path, "feedback", num_steps=6, learning_rate=1e-2)
    verdict = json.loads((folder / "guard.json").read_text())
    gains = {record["step"]: record["guard/held_out_gain"] for record in records(folder)}
    best = max(gains, key=gains.get)
    assert verdict["kept_step"] == (best if gains[best] > 0 else 0)


def test_a_guard_that_keeps_step_0_is_told_wherever_its_student_goes(tiny_sdxl, tmp_path, capsys):
    prompts = runs.write_prompts(tmp_path)
    guard = {"rewards": [{"name": "colourfulness", "weight": 0.0}], "num_prompts": 2, "every": 1}  # no look is better
    tuned = runs.tuning("feedback", prompts, guard=guard)
    evaluate = Evaluate(
        prompts=prompts, num_prompts=2, sampling_steps=[4], gammas=[0.0], teacher_steps=[2], rewards=["brightness"]
    )
    recipe = runs.recipe(
        tiny_sdxl, tmp_path, [runs.trajectories(prompts), runs.distill(num_segments=[2]), tuned, evaluate]
    )
    result = pipeline.run(recipe)[2].folder
    lines = capsys.readouterr().out.splitlines()
    last = next(i for i, line in enumerate(lines) if line.startswith("evaluate ->")) - 1
    assert lines[last].startswith("guard kept step 0 of 2: by the held-out reward no look was better")
    assert files.read_json(result / "manifest.json")["tuned_steps"] == 0
    assert files.read_json(result / "student" / "student.json")["tuned_steps"] == 0
    run = Path(recipe.runs, recipe.name)
    report = (run / "03-evaluate" / "report.md").read_text()
    assert "It is the student as it was distilled: the guard of feedback kept step 0." in report
    (picture,) = finished_runs.sample(run, ["a cat"], [2], 0, None, tmp_path / "tuned")
    assert "its guard kept step 0: this is the student as it was distilled" in capsys.readouterr().out
    (other,) = finished_runs.sample(run / "01-distill", ["a cat"], [2], 0, None, tmp_path / "distilled")
    assert Image.open(picture).tobytes() == Image.open(other).tobytes()
    assert "kept step 0" not in capsys.readouterr().out


def test_the_step_that_a_guard_kept_is_told_and_recorded(tiny_sdxl, tmp_path, capsys):
    prompts = runs.write_prompts(tmp_path)
    guard = {"rewards": [{"name": "colourfulness", "weight": -1.0}], "num_prompts": 2, "every": 1}
    tuned = runs.tuning("feedback", prompts, num_steps=3, learning_rate=1e-2, guard=guard)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), runs.distill(num_segments=[2]), tuned])
    found = pipeline.run(recipe)[2].folder
    kept = files.read_json(found / "guard.json")["kept_step"]
    assert kept > 0
    assert f"guard kept step {kept} of 3" in capsys.readouterr().out
    assert student_description.tuned_steps(found / "student") == kept
    older = files.read_json(found / "student" / "student.json")
    del older["tuned_steps"]
    files.write_json(found / "student" / "student.json", older)
    assert student_description.tuned_steps(found / "student") is None
    files.write_json(found / "student" / "student.json", older | {"tuned_steps": -1})
    with pytest.raises(CheckpointError, match="tuned_steps must be a whole number from 0, is -1"):
        students.describe(found / "student")


def test_one_watched_prompt_is_refused_in_words(distilled, tmp_path):
    (tmp_path / "one.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match=r"one\.txt holds 1 prompt to watch"):
        tune(distilled, tmp_path, "feedback", guard_prompts=str(tmp_path / "one.txt"))
