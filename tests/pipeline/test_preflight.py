"""What later stages need is looked at before the first one runs."""

import json
from pathlib import Path

import pytest

import runs
from mlcm_rl import pipeline
from mlcm_rl.pipeline import RunError, running
from mlcm_rl.recipe import Evaluate
from mlcm_rl.storage.manifest import finish


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The kinds of the stages that were run, which do nothing here."""
    kinds: list[str] = []

    def run_stage(stage, recipe, done, result, skip_damaged):
        kinds.append(stage.kind)
        result.folder.mkdir(parents=True)
        finish(result.folder, {"kind": stage.kind, "fingerprint": result.fingerprint})

    monkeypatch.setattr(running, "run_stage", run_stage)
    return kinds


def recipe(teacher, folder, kind="feedback", num_prompts=4, **changes):
    prompts = runs.write_prompts(folder)
    tuned = runs.tuning(kind, prompts, **changes)
    evaluate = Evaluate(prompts=prompts, num_prompts=num_prompts, sampling_steps=[1], teacher_steps=[2])
    return runs.recipe(teacher, folder, [runs.trajectories(prompts), runs.distill(), tuned, evaluate])


@pytest.mark.parametrize(
    ("changes", "message"),
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
        ({"num_prompts": 7}, r"stages\[3\] \(evaluate\): prompts: .* holds 6 prompts, num_prompts is 7"),
    ],
)
def test_what_a_later_stage_would_stop_at_is_told_before_the_first_runs(
    tiny_sdxl, tmp_path, monkeypatch, started, changes, message
):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(RunError, match=message):
        pipeline.run(recipe(tiny_sdxl, tmp_path, **changes))
    assert started == []


@pytest.fixture
def refusing(monkeypatch):
    """Brightness is a reward that no prompt about a dog or a panda suits."""

    def refuse_prompt(self, prompt, aspect):
        if prompt in ("a dog", "熊猫"):
            raise ValueError(f"the prompt {prompt!r} has no such thing")

    monkeypatch.setattr("reward_models.brightness.Brightness.refuse_prompt", refuse_prompt, raising=False)


REFUSED = r"cannot score 2 of the prompts: .*prompts\.txt:2: the prompt 'a dog' .*prompts\.txt:5: the prompt '熊猫'"
GUARD = {"rewards": [{"name": "brightness"}], "num_prompts": 2}
OTHER = [{"name": "colourfulness"}]


@pytest.mark.parametrize("kind", ["feedback", "dpo", "policy"])
def test_every_prompt_is_tried_on_the_rewards_before_the_first_stage(tiny_sdxl, tmp_path, started, refusing, kind):
    with pytest.raises(RunError, match=rf"stages\[2\] \({kind}\): rewards\[0\]: reward brightness {REFUSED}"):
        pipeline.run(recipe(tiny_sdxl, tmp_path, kind))
    assert started == []


def test_a_guard_is_asked_for_the_prompts_that_it_watches_and_no_others(tiny_sdxl, tmp_path, started, refusing):
    watched = tmp_path / "watched.txt"
    changes = {"rewards": OTHER, "guard": GUARD, "guard_prompts": str(watched)}
    watched.write_text("a cat\na dog\na dog\n")
    told = r"guard\.rewards\[0\]: reward brightness cannot score 2 of the prompts: .*watched\.txt:2: .*watched\.txt:3: "
    with pytest.raises(RunError, match=told):
        pipeline.run(recipe(tiny_sdxl, tmp_path, **changes))
    watched.write_text("a cat\na bird\na dog\n")
    pipeline.run(recipe(tiny_sdxl, tmp_path, **changes))
    assert started == ["trajectories", "distill", "feedback", "evaluate"]


def test_an_evaluations_prompts_are_tried_too(tiny_sdxl, tmp_path, refusing):
    stage = Evaluate(
        prompts=runs.write_prompts(tmp_path),
        num_prompts=4,
        sampling_steps=[1],
        teacher_steps=[2],
        rewards=["brightness"],
    )
    told = r"stages\[0\] \(evaluate\): rewards\[0\]: reward brightness cannot score 1 of the prompts: .*txt:2"
    with pytest.raises(RunError, match=told):
        running.refuse_unready(runs.recipe(tiny_sdxl, tmp_path, [stage]))


def test_an_evaluation_with_a_detector_needs_tasks_and_for_colours_a_clip(tiny_sdxl, tmp_path):
    """Not after the hours of distillation before it."""
    path = tmp_path / "tasks.jsonl"
    stage = Evaluate(
        prompts=str(path), num_prompts=1, sampling_steps=[1], teacher_steps=[2], detector=str(tmp_path / "detector")
    )
    line = {"prompt": "a red cat", "tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    for record, message in ((line, "which needs clip"), ({"prompt": "a cat"}, "tasks.jsonl:1: tag must be the name")):
        path.write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(RunError, match=rf"stages\[0\] \(evaluate\): prompts: .*{message}"):
            running.refuse_unready(runs.recipe(tiny_sdxl, tmp_path, [stage]))


def test_prompts_of_a_language_that_a_reward_does_not_read_are_told_by_line(tiny_sdxl, tmp_path, monkeypatch):
    """An evaluation leaves them without a score."""
    monkeypatch.setattr("reward_models.brightness.Brightness.needs_prompt", True)
    monkeypatch.setattr("reward_models.brightness.Brightness.languages", ("en",))
    told = r"rewards\[0\]: reward brightness .*txt:3: brightness reads prompts in en, not in zh; .*txt:5"
    asked = recipe(tiny_sdxl, tmp_path, rewards=[{"name": "brightness"}])
    with pytest.raises(RunError, match=told):
        running.refuse_unready(asked)
    running.refuse_unready(recipe(tiny_sdxl, tmp_path, languages={"en": 1.0}))
    evaluate = asked.stages[-1].model_copy(update={"rewards": ["brightness"]})
    running.refuse_unready(runs.recipe(tiny_sdxl, tmp_path, [evaluate]))


def test_languages_are_compared_before_weights_are_asked_for(tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(RunError, match="image_reward reads prompts in en, not in zh"):
        running.refuse_unready(recipe(tiny_sdxl, tmp_path, rewards=[{"name": "image_reward"}]))


def test_what_several_stages_lack_is_told_once_with_all_their_places(tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path / "empty"))
    prompts = runs.write_prompts(tmp_path)
    changes = {"rewards": [{"name": "image_reward"}], "languages": {"en": 1.0}}
    stages = [runs.tuning(kind, prompts, **changes) for kind in ("feedback", "dpo")]
    with pytest.raises(RunError) as raised:
        running.refuse_unready(runs.recipe(tiny_sdxl, tmp_path, stages))
    (line,) = str(raised.value).splitlines()
    assert line.startswith("stages[0] (feedback): rewards[0], stages[1] (dpo): rewards[0]: ")
    assert "`mlcm rewards fetch image_reward`" in line


def test_a_table_of_pairs_is_opened_before_the_first_stage_and_its_prompts_are_for_no_reward(
    tiny_sdxl, tmp_path, refusing
):
    folder = Path(runs.write_pairs(tmp_path / "pairs"))
    prompts = runs.write_prompts(tmp_path)
    stage = runs.tuning("dpo", prompts, pairs=str(folder), guard={"rewards": OTHER, "num_prompts": 2})
    asked = runs.recipe(tiny_sdxl, tmp_path, [stage.model_copy(update={"guard_prompts": str(tmp_path / "good.txt")})])
    (tmp_path / "good.txt").write_text("a cat\na bird\n")
    running.refuse_unready(asked)
    (folder / "0-dark.png").unlink()
    (folder / "3-light.png").unlink()
    told = r"stages\[0\] \(dpo\): pairs: .*jsonl:1: there is no picture .*0-dark\.png; .*jsonl:4: .*3-light\.png"
    with pytest.raises(RunError, match=told):
        running.refuse_unready(asked)


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
    running.refuse_unready(runs.recipe(tiny_sdxl, tmp_path, [tuned]))
