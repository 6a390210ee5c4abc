"""Rewards that may not fall: what a step measures, multipliers, looks that are not kept, what the report says."""

import json

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import teachers
from mlcm_rl.preference import tuning
from mlcm_rl.preference.constraints import Constraints
from mlcm_rl.recipe import Evaluate
from mlcm_rl.rewards import combine
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training.seeding import generator

REWARDS = ["brightness", {"name": "sharpness", "max_drop": 0.25}]


def constraints_of(distilled, reference: torch.Tensor, **changes):
    recipe, folder = distilled
    stage = runs.tuning("feedback", recipe.stages[0].prompts, rewards=REWARDS, **changes)
    student = tuning.load(stage, teachers.load(recipe.teacher, "cpu"), folder / "student", seed=0)
    return stage, student, Constraints(stage, student, {"sharpness": reference})


def test_the_multiplier_of_two_steps_by_hand(distilled):
    """Deviation 2 of the reference's scores 1, 3, 5; a drop of 1.5 of them, then a rise."""
    _, _, found = constraints_of(distilled, torch.tensor([1.0, 3.0, 5.0]), multiplier_rate=0.4)
    assert found.penalty({"sharpness": torch.tensor([8.0])}).item() == 0.0
    for own, multiplier, measured in ((1.0, 0.5, 1.5), (6.0, 0.0, -1.0)):
        scores = tuning.Scores()
        scores.add({"reward/sharpness": torch.tensor([own, own]), "reference/sharpness": torch.tensor([5.0, 3.0])})
        logged = found.take_in(scores)
        assert logged == {"drop/sharpness": measured, "multiplier/sharpness": pytest.approx(multiplier)}
        assert found.penalty({"sharpness": torch.tensor([8.0])}).item() == pytest.approx(-multiplier * 4.0)
    with pytest.raises(CheckpointError, match="multipliers of colour"):
        found.load_state({"colour": 1.0})


def test_an_untuned_student_falls_by_nothing_and_draws_the_noise_that_it_would_have_drawn(distilled):
    stage, student, found = constraints_of(distilled, torch.tensor([0.0, 1.0]), gamma=1.0)
    prompts = tuning.Prompts(stage, student.base, 0)
    begun, again = (tuning.start(student.base, prompts.draw(0, 2), [generator(0), generator(1)]) for _ in range(2))
    scores, rewards = tuning.Scores(), combine(stage.rewards, "cpu")
    with found.reference_drawing(begun):
        reference = student.sample(begun)
        found.add_reference(reference, rewards, begun, scores)
    own, expected = student.sample(begun), student.sample(again)
    assert torch.equal(own, expected)
    scores.add_rewards(rewards.raw(student.base.autoencoder.decode(own), begun.prompts, begun.languages))
    assert found.take_in(scores)["drop/sharpness"] == pytest.approx(0.0, abs=1e-5)


def test_a_constraint_whose_reward_is_0_throughout_is_refused(distilled):
    with pytest.raises(ValueError, match=r"rewards: sharpness gives every watched sample .* no drop can be measured"):
        constraints_of(distilled, torch.zeros(3))


@pytest.mark.slow
def test_a_constraint_holds_a_reward_that_would_fall_and_the_report_says_so(tiny_sdxl, tmp_path, monkeypatch):
    """Sharpness is made darkness: it falls as brightness rises, one for one, so that nothing may be gained."""
    monkeypatch.setattr("reward_models.sharpness.Sharpness.__call__", lambda self, images, _: -images.mean((1, 2, 3)))
    prompts = runs.write_prompts(tmp_path)
    settings = {"num_steps": 16, "learning_rate": 1e-2, "multiplier_rate": 2.0, "guard": GUARD}
    free, bound = (
        runs.tuning("feedback", prompts, rewards=["brightness", sharpness], **settings, **changes)
        for sharpness, changes in (
            ({"name": "sharpness", "max_drop": 100.0}, {}),
            ({"name": "sharpness", "max_drop": 0.25}, {"seed": 1}),
        )
    )
    rewards = ["brightness", "sharpness"]
    evaluate = Evaluate(prompts=prompts, num_prompts=4, sampling_steps=[2], teacher_steps=[2], rewards=rewards)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[1]), free, bound, evaluate]
    *_, first, second, last = pipeline.run(runs.recipe(tiny_sdxl, tmp_path, stages))
    logs = [[json.loads(one) for one in (at.folder / "log.jsonl").read_text().splitlines()] for at in (first, second)]
    assert logs[0][-1]["guard/drop/sharpness"] > 1.0
    assert logs[0][-1]["multiplier/sharpness"] == 0.0
    assert max(one["multiplier/sharpness"] for one in logs[1]) > 0.5
    assert logs[1][-1]["guard/drop/sharpness"] < 0.6
    kept = [json.loads((at.folder / "guard.json").read_text())["kept_step"] for at in (first, second)]
    assert kept[1] == 0 or logs[1][kept[1] - 1]["guard/drop/sharpness"] <= 0.25
    report = (last.folder / "report.md").read_text()
    for step, limit in zip(kept, ("100", "0.25"), strict=True):
        assert (f"at most {limit} was allowed: met" if step else "there was nothing to meet") in report
    assert "Drop of sharpness and its multiplier" in (last.folder / "report.html").read_text()


GUARD = {"rewards": [{"name": "colourfulness"}], "num_prompts": 4, "every": 1, "patience": 100}
