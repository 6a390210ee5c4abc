"""What a plan says of stages that were begun, of disk, and of what could not be predicted."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import runs
from mlcm_rl import pipeline
from mlcm_rl.cli import plan_table
from mlcm_rl.cost.gpus import DEVICES, Device, kind_for
from mlcm_rl.cost.launches import Launch
from mlcm_rl.data.trajectory_store import FORMAT
from mlcm_rl.pipeline.fingerprint import locate
from mlcm_rl.pipeline.planning import planned_stages
from mlcm_rl.pipeline.results import share_done
from mlcm_rl.recipe import Evaluate, Recipe
from mlcm_rl.recipe.file import load
from mlcm_rl.storage import checkpoints, files


def shown(recipe: Recipe, stages: list, device: Device | None = None) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    plan_table.show(console, recipe, stages, Launch(), device, kind_for("cpu", device))
    return console.export_text()


def evaluation(prompts: str, **changes) -> Evaluate:
    settings = {"num_prompts": 4, "sampling_steps": [1], "gammas": [0.0], "teacher_steps": [2], "batch_size": 2}
    return Evaluate(prompts=prompts, **(settings | changes))


def test_a_stage_that_was_begun_is_planned_with_what_is_left(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    stages = [runs.trajectories(prompts, shard_size=2), runs.distill(num_segments=[2, 1], num_steps=[6, 4])]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    store, student = planned_stages(recipe)
    assert (store.share_done, student.share_done) == (0.0, 0.0)
    record = {"provenance": {"format": FORMAT}, "shard_size": 2, "num_prompts": 6, "prompts": {}}
    record["shards"] = {"one": [1, ""], "two": [1, ""]}
    (store.folder / "shard-0000004.safetensors.json").parent.mkdir(parents=True)
    (store.folder / "shard-0000004.safetensors.json").touch()  # of a file that is not in the record yet
    files.write_json(store.folder / "store.json", record)
    for step in (2, 4):
        checkpoints.save_state(student.folder, step, {"value": torch.ones(1)})
    begun = planned_stages(recipe)
    assert [one.share_done for one in begun] == [6 / 8, 4 / 10]
    text = shown(recipe, begun)
    assert "75% done" in text
    assert "40% done" in text
    left = sum(one.network_evaluations * (1 - one.share_done) for one in begun)
    assert f"{round(left):,}" in text.split("still to do")[1].splitlines()[0]


def test_what_is_damaged_counts_as_nothing_done(tiny_sdxl, tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    folder = locate(stage, recipe, []).folder
    folder.mkdir(parents=True)
    (folder / "store.json").write_text("{")
    assert share_done(stage, folder) == 0.0


def test_an_evaluation_takes_at_most_the_disk_that_is_planned(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[1]), evaluation(prompts)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    planned = planned_stages(recipe)[2].disk_bytes
    saved = planned_stages(recipe.model_copy(update={"stages": [*stages[:2], evaluation(prompts, keep_pictures=True)]}))
    assert saved[2].disk_bytes == planned + 3 * 16 * 16 * 4 * 3  # four pictures of three rows
    result = pipeline.run(recipe)[2].folder
    pictures = [path for place in (result, Path(recipe.runs) / "rows") for path in place.rglob("*.png")]
    decoded = 3 * 16 * 16 * len(pictures)
    assert pictures
    assert decoded <= planned


def test_a_stage_that_could_not_be_predicted_has_a_question_mark_and_a_reason(tiny_sdxl, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])
    (stage,) = planned_stages(recipe)
    text = shown(recipe, [replace(stage, unknown="TypeError: forward() takes [2] arguments")])
    assert "?" in text.splitlines()[1]
    assert "memory and time of trajectories could not be predicted: TypeError: forward() takes [2] arguments" in text


def test_shapes_that_come_with_the_package_are_said_to(monkeypatch):
    recipe = load("recipes/sd15_mlcm.yaml")
    text = shown(recipe, planned_stages(recipe))
    assert "Shapes of stable-diffusion-v1-5/stable-diffusion-v1-5 are those published" in text


@pytest.mark.parametrize("name", ["Memory is that of tensors", "its allocator keeps more"])
def test_what_memory_leaves_out_is_said(tiny_sdxl, tmp_path, name):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])
    assert name in shown(recipe, planned_stages(recipe, "cpu"))
    assert name not in shown(recipe, planned_stages(recipe))


def test_memory_that_is_a_cpus_is_said_to_be_where_a_gpu_takes_less(tiny_sdxl, tmp_path):
    message = "Memory is as on a CPU"
    stages = [runs.trajectories(runs.write_prompts(tmp_path)), runs.distill(precision="bf16")]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    assert message in shown(recipe, planned_stages(recipe, "cpu"))
    assert message not in shown(recipe, planned_stages(recipe, "cuda", device=DEVICES["h100"]), DEVICES["h100"])
    plain = recipe.model_copy(update={"stages": stages[:1]})
    assert message not in shown(plain, planned_stages(plain, "cpu"))
