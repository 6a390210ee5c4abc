"""What later stages need is looked at before the first one runs."""

import pytest

import runs
from mlcm_rl import pipeline
from mlcm_rl.checkpoint import finish
from mlcm_rl.pipeline import RunError
from mlcm_rl.recipe import Evaluate


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The kinds of the stages that were run, which do nothing here."""
    kinds: list[str] = []

    def run_stage(stage, recipe, done, found, skip_damaged):
        kinds.append(stage.kind)
        found.folder.mkdir(parents=True)
        finish(found.folder, {"kind": stage.kind, "fingerprint": found.fingerprint})

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    return kinds


def recipe(teacher, folder, kind="feedback", num_prompts=4, **changes):
    prompts = runs.write_prompts(folder)
    tuned = runs.tuning(kind, prompts, **changes)
    evaluate = Evaluate(prompts=prompts, num_prompts=num_prompts, num_steps=[1], teacher_steps=[2])
    return runs.recipe(teacher, folder, [runs.trajectories(prompts), runs.distill(), tuned, evaluate])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"rewards": [{"name": "safety"}]},
            r"stages\[2\] \(feedback\): rewards\[0\]: .* with a gradient, which safety",
        ),
        (
            {"rewards": [{"name": "brightness", "settings": {"bright": 1}}]},
            r"stages\[2\] \(feedback\): rewards\[0\]: reward brightness: unknown setting 'bright'",
        ),
        (
            {"guard": {"rewards": [{"name": "ocr"}]}},
            r"stages\[2\] \(feedback\): guard.rewards\[0\]: .*`mlcm rewards fetch ocr`",
        ),
        ({"languages": {"fr": 1.0}}, r"stages\[2\] \(feedback\): prompts: languages: .* holds no prompt in fr"),
        ({"num_prompts": 7}, r"stages\[3\] \(evaluate\): prompts: .* holds 6 prompts, num_prompts asks for 7"),
    ],
)
def test_what_a_later_stage_would_stop_at_is_told_before_the_first_runs(
    tiny_sdxl, tmp_path, monkeypatch, started, changes, told
):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(RunError, match=told):
        pipeline.run(recipe(tiny_sdxl, tmp_path, **changes))
    assert started == []


def test_all_that_stages_lack_is_told_together(tiny_sdxl, tmp_path, started):
    with pytest.raises(RunError) as raised:
        pipeline.run(recipe(tiny_sdxl, tmp_path, languages={"fr": 1.0}, num_prompts=7))
    assert len(str(raised.value).splitlines()) == 2


def test_a_stage_that_is_done_needs_nothing_more(tiny_sdxl, tmp_path, monkeypatch, started):
    asked = recipe(tiny_sdxl, tmp_path)
    pipeline.run(asked)
    monkeypatch.setattr("reward_models.brightness.Brightness.differentiable", False)
    pipeline.run(asked)
    assert started == ["trajectories", "distill", "feedback", "evaluate"]


def test_a_reward_that_the_recipe_makes_itself_is_not_missed(tiny_sdxl, tmp_path):
    tuned = runs.tuning("dpo", runs.write_prompts(tmp_path), rewards=[{"name": "trained"}])
    pipeline.refuse_unready(runs.recipe(tiny_sdxl, tmp_path, [tuned]))
