"""The guard's looks: drawn in micro-batches and shared, by noise of each sample's own; rewards of hardly any spread."""

import json

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import teachers
from mlcm_rl.models.autoencoder import Autoencoder
from mlcm_rl.preference import guard, tuning
from mlcm_rl.preference.guard import HackingGuard
from mlcm_rl.recipe import Lora
from mlcm_rl.rewards import combine
from mlcm_rl.stages import feedback, policy
from mlcm_rl.training import processes as distributed


@pytest.fixture(scope="module")
def distilled(tiny_sdxl, tmp_path_factory):
    """A recipe and the folder of its distilled student."""
    folder = tmp_path_factory.mktemp("distilled")
    stages = [
        runs.trajectories(runs.write_prompts(folder)),
        runs.distill(num_segments=[1], adapter=Lora(rank=2, alpha=2.0)),
    ]
    recipe = runs.recipe(tiny_sdxl, folder, stages)
    return recipe, pipeline.run(recipe)[-1].folder


def guard_of(distilled, held_out: tuple[str, ...] = ("colourfulness",), **changes) -> HackingGuard:
    recipe, folder = distilled
    watch = {"rewards": [{"name": name} for name in held_out], "num_prompts": 5}
    stage = runs.tuning("feedback", recipe.stages[0].prompts, **{"batch_size": 8, "guard": watch, **changes})
    student = tuning.load(stage, teachers.load(recipe.teacher, "cpu"), folder / "student", seed=0)
    rewards = combine(stage.rewards, "cpu")
    return HackingGuard(runs.outside_training(), stage, student, student.parameters, rewards)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """How many pictures were decoded at a time."""
    sizes, original = [], Autoencoder.decode

    def decode(self, latents, small=None):
        sizes.append(len(latents))
        return original(self, latents, small)

    monkeypatch.setattr(Autoencoder, "decode", decode)
    return sizes


@pytest.mark.parametrize(("accumulation", "sizes"), [(1, [5]), (4, [2, 2, 1]), (8, [1] * 5)])
def test_a_look_draws_and_decodes_a_micro_batch_at_a_time(distilled, decoded, accumulation, sizes):
    guard_of(distilled, gradient_accumulation=accumulation)
    assert decoded == sizes


def test_what_is_watched_does_not_depend_on_the_micro_batch(distilled):
    whole, parts = (guard_of(distilled, gradient_accumulation=one) for one in (1, 4))
    torch.testing.assert_close(parts.reference_latents, whole.reference_latents, rtol=0, atol=1e-4)
    for name, scores in whole.reference_scores.items():
        torch.testing.assert_close(parts.reference_scores[name], scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_draw_a_share_each_and_together_what_one_draws(distilled, monkeypatch, decoded, processes):
    alone = guard_of(distilled)
    decoded.clear()
    share = -(-5 // processes)
    shares: dict[int, HackingGuard] = {}
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "gather", lambda part: part)
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares[rank] = guard_of(distilled)
    assert sum(decoded) == processes * share  # as many each: weights in parts are gathered in every pass
    assert max(decoded) <= max(1, 8 // processes)
    for name, scores in alone.reference_scores.items():
        gathered = torch.cat([one.reference_scores[name] for one in shares.values()])[:5]
        torch.testing.assert_close(gathered, scores, rtol=0, atol=1e-4)


# ---- rewards of hardly any spread ----


def score_as(monkeypatch, name: str, low: float, high: float) -> None:
    """Let a reward give each sample of a batch a score of its own, evenly from `low` to `high`."""

    def scores(self, images, prompts):
        return torch.linspace(low, high, len(images))

    monkeypatch.setattr(f"reward_models.{name}.{name.capitalize()}.__call__", scores)


def held_out_gain(watching: HackingGuard, scores: dict[str, torch.Tensor]) -> float:
    return watching._gain(watching.stage.guard.rewards, scores)


@pytest.mark.parametrize("spread", [0.0, 1e-6])
def test_a_reward_that_is_constant_or_nearly_so_does_not_decide_alone_and_can_still_object(
    distilled, monkeypatch, spread
):
    score_as(monkeypatch, "sharpness", 0.9, 0.9 + spread)
    watching = guard_of(distilled, ("colourfulness", "sharpness"))
    scores = dict(watching.reference_scores)
    assert held_out_gain(watching, scores) == pytest.approx(0.0, abs=1e-4)
    colour = scores["colourfulness"]
    better = scores | {"colourfulness": colour + 0.5 * colour.std()}
    assert held_out_gain(watching, better) == pytest.approx(0.5, rel=1e-3)
    rounding = better | {"sharpness": scores["sharpness"] - 1e-6}
    assert held_out_gain(watching, rounding) == pytest.approx(0.5, abs=1e-3)
    spoiled = better | {"sharpness": scores["sharpness"] - 0.09}  # a tenth of what it was: ten hundredths
    assert held_out_gain(watching, spoiled) == pytest.approx(0.5 - 10.0, rel=1e-2)


def test_a_reward_of_a_usual_spread_is_measured_in_its_own_deviation(distilled):
    watching = guard_of(distilled)
    reference = watching.reference_scores["colourfulness"]
    assert guard.deviation(reference) == reference.std().item()


def test_a_reward_that_is_zero_throughout_is_left_out_with_a_warning_that_names_it(distilled, monkeypatch, tmp_path):
    score_as(monkeypatch, "sharpness", 0.0, 0.0)
    watching = guard_of(distilled, ("colourfulness", "sharpness"))
    (warning,) = watching.verdict.warnings
    assert warning.startswith("sharpness gives every watched sample of the distilled student 0")
    moved = watching.reference_scores | {"sharpness": torch.ones(5)}
    assert held_out_gain(watching, moved) == pytest.approx(0.0, abs=1e-6)


def test_a_guard_with_nothing_to_measure_is_refused_before_the_first_step(distilled, monkeypatch, tmp_path):
    score_as(monkeypatch, "sharpness", 0.0, 0.0)
    recipe, folder = distilled
    stage = runs.tuning(
        "feedback", recipe.stages[0].prompts, guard={"rewards": [{"name": "sharpness"}], "num_prompts": 4}
    )
    with pytest.raises(ValueError, match=r"guard\.rewards: sharpness gives every watched sample .* name a reward"):
        feedback.run(stage, recipe, {"distill": folder}, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_warning_of_the_start_is_in_what_the_guard_leaves(distilled, monkeypatch, tmp_path):
    score_as(monkeypatch, "brightness", 0.0, 0.0)
    recipe, folder = distilled
    stage = runs.tuning("policy", recipe.stages[0].prompts, num_steps=1)
    policy.run(stage, recipe, {"distill": folder}, tmp_path)
    left = json.loads((tmp_path / "guard.json").read_text())["warnings"]
    assert [one.split()[0] for one in left] == ["brightness"]


def test_a_student_that_breaks_a_constraint_is_never_kept_however_good_it_is():
    made = object.__new__(HackingGuard)
    made.weights, made.best, made.verdict = {"a": torch.ones(1)}, {"a": torch.zeros(1)}, guard.Verdict()
    made._judge(1, 1.0, 9.0, ["sharpness"])
    assert (made.verdict.kept_step, made.best["a"].item()) == (0, 0.0)
    made._judge(2, 1.0, 5.0, [])
    assert (made.verdict.kept_step, made.best["a"].item()) == (2, 1.0)
