"""Several processes of one recipe make what one process makes; what cannot be launched is said in words."""

import pytest
from launched_runs import LAUNCHES, assert_alike, launch, launched, stage_folders, whole_and_launched

import runs
from mlcm_rl import distributed
from mlcm_rl.distributed import launch as launcher
from mlcm_rl.recipe import Evaluate


def test_two_processes_make_what_one_makes(tiny_sdxl, tmp_path):
    stages = [
        runs.trajectories(runs.write_prompts(tmp_path), shard_size=2),
        runs.distill(segments=[2], num_steps=3, gradient_accumulation=2, target="consistency", target_ema=0.9),
    ]
    alone, together = whole_and_launched(tiny_sdxl, tmp_path, stages, "cpu2")
    assert_alike(alone, together)
    shards = [sorted(stage_folders(recipe)[0].resolve().glob("shard-*")) for recipe in (alone, together)]
    assert [shard.read_bytes() for shard in shards[0]] == [shard.read_bytes() for shard in shards[1]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cpu2", "zero2", "zero3", "fsdp2"])
def test_every_stage_runs_in_two_processes(tiny_sdxl, tmp_path, mode):
    prompts = runs.write_prompts(tmp_path)
    stages = [
        runs.trajectories(prompts, shard_size=2),
        runs.distill(segments=[2], num_steps=3, condition_on_target=True),
        runs.tuning("feedback", prompts, gradient_accumulation=2, num_grad_steps=2),
        runs.tuning("dpo", prompts, gamma=1.0),
        runs.tuning("policy", prompts, num_iterations=2),
        Evaluate(prompts=prompts, num_prompts=4, num_steps=[1, 2], teacher_steps=[3, 4], batch_size=2),
    ]
    alone, together = whole_and_launched(tiny_sdxl, tmp_path, stages, mode)
    assert_alike(alone, together)
    launched(together, tmp_path, mode)  # again: every stage is found, none is run
    tables = [stage_folders(recipe)[-1] / "report.md" for recipe in (alone, together)]
    assert all("DDIM" in table.read_text(encoding="utf-8") for table in tables)


@pytest.mark.slow
def test_an_error_in_every_process_is_said_without_a_traceback(tiny_sdxl, tmp_path):
    stages = [
        runs.trajectories(runs.write_prompts(tmp_path)),
        runs.distill(segments=[1], batch_size=3, num_steps=1),
    ]
    failed = launch(runs.recipe(tiny_sdxl, tmp_path, stages), tmp_path, "cpu2")
    assert failed.returncode == 1
    assert "stages[1] (distill): 3 samples cannot be shared evenly by 2 processes" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_process_takes_its_rows_and_its_items(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.rows(6) == slice(3, 6)
    assert distributed.share(range(5)) == [1, 3]
    with pytest.raises(ValueError, match="5 samples cannot be shared evenly by 2 processes: choose batch_size"):
        distributed.rows(5)


def test_a_group_of_samples_stays_in_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.rows(8, together=4) == slice(4, 8)
    with pytest.raises(ValueError, match="3 groups of 2 samples cannot be shared evenly by 2 processes"):
        distributed.rows(6, together=2)


@pytest.mark.parametrize("path", sorted(LAUNCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_configurations_of_accelerate(path):
    assert launcher.read(path)["num_processes"] == (1 if path.stem == "one_gpu" else 2)


def test_deepspeed_missing_is_an_error_in_words(monkeypatch):
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    with pytest.raises(launcher.LaunchError, match="DeepSpeed is not installed: pip install"):
        launcher.run_under(LAUNCHES / "zero2.yaml", ["recipe.yaml"])


def test_a_file_that_is_no_launch_file_is_an_error_in_words(tmp_path):
    for text, problem in (("a: [", "is not YAML"), ("a: 1", "is no accelerate configuration")):
        (tmp_path / "launch.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(launcher.LaunchError, match=problem):
            launcher.read(tmp_path / "launch.yaml")
