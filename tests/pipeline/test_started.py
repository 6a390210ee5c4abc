"""Tuning that starts from a student from elsewhere, or from the one of the stage before."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import students, teachers
from mlcm_rl.pipeline import RunError, finished_runs, results
from mlcm_rl.recipe import Evaluate, Full, Lora, Recipe
from mlcm_rl.storage.files import read_json
from teacher_loras import as_kohya, write

GUARD = {"rewards": [{"name": "colourfulness"}], "num_prompts": 2, "every": 1, "patience": 100}


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def distilled(request, tiny_sdxl, tmp_path_factory) -> tuple[Recipe, Path]:
    """A recipe of a store and a student, and the folder of its run."""
    folder = tmp_path_factory.mktemp(f"started-{request.param}")
    adapter = Lora(rank=2, alpha=1.0) if request.param == "lora" else Full()
    stages = [runs.trajectories(runs.write_prompts(folder)), runs.distill(num_segments=[2], adapter=adapter)]
    recipe = runs.recipe(tiny_sdxl, folder, stages)
    pipeline.run(recipe)
    return recipe, Path(recipe.runs) / recipe.name


def tuning(kind: str, recipe: Recipe, **changes):
    return runs.tuning(kind, recipe.stages[0].prompts, num_steps=1, batch_size=2, guard=GUARD, **changes)


def of(recipe: Recipe, stages: list, name: str = "tuned") -> Recipe:
    return recipe.model_copy(
        update={"name": name, "stages": Recipe.model_validate(recipe.model_dump() | {"stages": stages}).stages}
    )


def x0_of(recipe: Recipe, folder: Path) -> torch.Tensor:
    """What the student in `folder` makes of one noise."""
    base = teachers.load(recipe.teacher, "cpu")
    student = students.load_student(base, folder)
    noise = base.noise(torch.Generator().manual_seed(0), 2)
    with torch.no_grad():
        return base.x0(student.denoiser, noise, torch.tensor([999, 499]), base.encode_prompts(["a cat", "熊猫"]))


def test_a_recipe_of_one_stage_tunes_the_student_of_a_run_as_if_it_had_distilled_it_itself(distilled, tmp_path):
    recipe, run = distilled
    one = of(recipe, [tuning("feedback", recipe, start=str(run))])
    assert [stage.kind for stage in one.stages] == ["start", "feedback"]
    start, feedback = pipeline.run(one)
    *_, whole = pipeline.run(of(recipe, [*recipe.stages, tuning("feedback", recipe)], "whole"))
    assert torch.equal(x0_of(recipe, start.folder / "student"), x0_of(recipe, run / "01-distill" / "student"))
    assert torch.equal(x0_of(recipe, feedback.folder / "student"), x0_of(recipe, whole.folder / "student"))
    assert read_json(feedback.folder / "manifest.json")["parents"] == {"start": start.folder.name}
    assert whole.fingerprint != feedback.fingerprint
    # a stage's folder is the same student
    stage = of(recipe, [tuning("feedback", recipe, start=str(run / "01-distill"))])
    assert [one.done for one in pipeline.plan(stage)] == [True, True]


def test_stages_chain_and_a_tuned_student_is_tuned_again(distilled):
    recipe, _ = distilled
    chain = [tuning("feedback", recipe, gamma=0.5), tuning("dpo", recipe, start="previous")]
    evaluate = Evaluate(
        prompts=recipe.stages[0].prompts, num_prompts=2, sampling_steps=[1, 2], gammas=[0.0], teacher_steps=[2]
    )
    *_, feedback, dpo, report = pipeline.run(of(recipe, [*recipe.stages, *chain, evaluate]))
    manifest = read_json(dpo.folder / "manifest.json")
    assert manifest["parents"] == {"start": feedback.folder.name}
    assert finished_runs.own_gamma(dpo.folder / "student") == 0.5  # that of the tuning before
    assert not (dpo.folder / "checkpoints").exists()
    table = json.loads((report.folder / "report.json").read_text())
    assert [(one["name"], one["reference"]) for one in table["tuned"]] == [("feedback", "student"), ("dpo", "feedback")]


def test_a_changed_start_is_another_stage_and_a_damaged_one_is_refused(distilled, tmp_path):
    recipe, run = distilled
    copy = tmp_path / "copy"
    shutil.copytree(run / "01-distill", copy)
    stages = [tuning("feedback", recipe, start=str(copy))]
    before = pipeline.plan(of(recipe, stages))
    file = next(iter((copy / "student").rglob("*.safetensors")))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    after = pipeline.plan(of(recipe, stages))
    assert {one.fingerprint for one in before}.isdisjoint({one.fingerprint for one in after})
    with pytest.raises(RunError, match=r"stages\[0\] \(start\): .*is damaged"):
        pipeline.run(of(recipe, stages))


@pytest.mark.slow
def test_evaluate_puts_a_student_from_elsewhere_into_its_table(distilled):
    recipe, run = distilled
    evaluate = Evaluate(
        student={"path": str(run), "gamma": 0.25},
        prompts=recipe.stages[0].prompts,
        num_prompts=2,
        sampling_steps=[2],
        gammas=[0.0],
        teacher_steps=[2],
    )
    _, report = pipeline.run(of(recipe, [evaluate]))
    rows = json.loads((report.folder / "report.json").read_text())["rows"]
    own = [row for row in rows if row["role"] == "student"]
    assert [(row["name"], row["gamma"], row["default"]) for row in own] == [
        ("start", 0.25, True),
        ("start", 0.0, False),
    ]
    assert all(row["training"] is None for row in own)


def test_fingerprints_of_stages_without_a_start_are_what_they_were(distilled):
    recipe, _ = distilled
    stage = tuning("feedback", recipe)
    assert "start" not in stage.parents
    assert stage.parents[-1] == "distill"
    from mlcm_rl.pipeline.fingerprint import settings

    assert "start" not in settings(stage)
    assert "student" not in settings(Evaluate(prompts="prompts.txt"))


def test_pairs_and_a_published_lora_are_all_that_dpo_needs(tiny_sdxl, tmp_path):
    file = as_kohya(write(tiny_sdxl, tmp_path / "lora", texts=()), tmp_path / "kohya.safetensors", "sdxl")
    stage = runs.tuning(
        "dpo",
        runs.write_prompts(tmp_path),
        start={"path": str(file), "gamma": 1.0, "grid": [999, 499]},
        pairs=runs.write_pairs(tmp_path / "pairs"),
        num_steps=1,
        guard=GUARD,
    )
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    plan = pipeline.plan(recipe, memory=True)
    assert [one.kind for one in plan] == ["start", "dpo"]
    *_, dpo = pipeline.run(recipe)
    tuned = read_json(dpo.folder / "student" / "student.json")
    assert (tuned["grid"], tuned["gamma"], tuned["source"]) == ([999, 499], 1.0, "kohya.safetensors")
    assert {one.state for one in results.stages(tmp_path / "runs")} == {"done"}
    assert all(one.is_needed for one in results.stages(tmp_path / "runs"))
    pictures = finished_runs.sample(Path(recipe.runs) / recipe.name, ["a cat"], [2], 0, None, tmp_path / "out")
    assert len(pictures) == 1
    with pytest.raises(RunError, match="in 2 steps, and not in 4"):
        finished_runs.sample(Path(recipe.runs) / recipe.name, ["a cat"], [4], 0, None, tmp_path / "out")
