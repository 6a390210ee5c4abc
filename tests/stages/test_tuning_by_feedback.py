"""Feedback: the gradient through decoders and tiles, the reward that rises, the hinge of two prompts, refusals."""

import pytest
import torch
from tuning_runs import AT_THE_END, adapter_of, records, scored_by_length, student_of, tune

import runs
import tiny
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.preference import tuning
from mlcm_rl.preference.constraints import Constraints
from mlcm_rl.preference.guard import HackingGuard
from mlcm_rl.rewards import Combined, Member, combine
from mlcm_rl.stages import feedback
from mlcm_rl.training.seeding import generator


def reference_scores(distilled, **changes) -> dict[str, torch.Tensor]:
    """What a guard sees before the first step."""
    student, stage = (
        student_of(distilled, **changes),
        runs.tuning("feedback", distilled[0].stages[0].prompts, **changes),
    )
    rewards = combine(stage.rewards, "cpu")
    return HackingGuard(runs.outside_training(), stage, student, student.parameters, rewards).reference_scores


def test_a_small_decoder_moves_the_gradient_and_never_what_the_guard_sees(distilled, tmp_path):
    small = tiny.small_decoder(tmp_path / "decoder")
    seen = [reference_scores(distilled, **changes) for changes in ({}, {"small_decoder": small})]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in ("brightness", "colourfulness"))
    real = tune(distilled, tmp_path / "real", "feedback", num_steps=1)
    sampled = tune(distilled, tmp_path / "small", "feedback", num_steps=1, small_decoder=small)
    norms = [[record["grad_norm"] for record in records(folder)] for folder in (real, sampled)]
    assert min(norms[1]) > 0
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)


def test_in_tiles_that_hold_the_picture_a_step_is_the_same_to_the_bit_and_in_smaller_ones_not(distilled, tmp_path):
    sizes = {"whole": None, "one": 16, "many": 8}
    folders = [tune(distilled, tmp_path / k, "feedback", num_steps=1, autoencoder_tiles=v) for k, v in sizes.items()]
    whole, one, many = ({k: v for k, v in records(folder)[0].items() if "norm" in k} for folder in folders)
    assert whole == one
    assert many["grad_norm"] > 0
    assert many != whole
    weights = [adapter_of(folder) for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("variant", ["feedback", "feedback-all-steps", "feedback-bounded"])
def test_the_reward_rises(distilled, tmp_path, variant):
    settings = {"num_steps": 15, "learning_rate": 1e-2, "shape": "negative", "threshold": 0.0}
    folder = tune(distilled, tmp_path, variant, **settings, **AT_THE_END)
    assert records(folder)[-1]["guard/trained_gain"] > 0.5
    assert records(folder)[-1]["guard/win_rate/brightness"] == 1.0


def test_the_papers_hinge_by_hand(distilled, monkeypatch):
    """relu(16 - s) + relu(s'), of raw scores of MPS, where a recipe says no more than the shape."""
    table = {"a cat": 10.0, "a dog": 20.0, "红苹果": -3.0}

    class Mps:
        differentiable, needs_prompt, languages = True, True, ("en", "zh")

        def __call__(self, images, prompts):
            return torch.tensor([table[prompt] for prompt in prompts])

    stage = runs.tuning("feedback", "unused", shape="mps_hinge", rewards=[{"name": "mps"}])
    rewards = Combined([Member("mps", Mps())], stage.normalise)
    texts = [Prompt(text, "en") for text in table]
    student = student_of(distilled)
    begun = tuning.start(student.base, texts, [generator(i) for i in range(3)])
    assert begun.next_prompts == ["a dog", "红苹果", "a cat"]
    constraints = Constraints(stage, student, {})
    scoring = feedback.Scoring(rewards, constraints, None, tuning.Scores())
    losses = feedback.lagrangian(stage, scoring, torch.zeros(3, 3, 16, 16), begun, 1)
    assert losses.tolist() == [6.0 + 20.0, 0.0 + 0.0, 19.0 + 10.0]


def test_the_gradient_of_a_bounded_target_is_the_rewards_own_of_one_size_in_every_sample(distilled, monkeypatch):
    """-2 bound g / rms(g) / d by x0: along the direct form's gradient, with samples of all slopes alike."""
    student = student_of(distilled)
    prompts = tuning.Prompts(runs.tuning("feedback", distilled[0].stages[0].prompts), student.base, 0)
    begun = tuning.start(student.base, prompts.draw(0, 2), [generator(0), generator(1)])
    x0 = torch.randn(2, *student.base.latent_shape, generator=generator(2)).requires_grad_()
    gradients = {}
    for form in ("direct", "bounded"):
        stage = runs.tuning("feedback", "unused", form=form)
        rewards = combine(stage.rewards, "cpu", normalise=False)
        constraints = Constraints(stage, student, {})
        scoring = feedback.Scoring(rewards, constraints, None, tuning.Scores())
        losses = feedback.reward_loss(stage, student, scoring, x0, begun)
        (gradients[form],) = torch.autograd.grad(losses.sum(), x0)
    direct, bounded = (gradients[form].flatten(1) for form in ("direct", "bounded"))
    assert bounded.square().mean(1).sqrt().tolist() == pytest.approx([2 * 0.1 / direct.shape[1]] * 2, rel=1e-4)
    assert torch.cosine_similarity(direct, bounded).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_an_irrelevant_prompt_is_the_next_one_of_another_text():
    texts = {text: Prompt(text, "en") for text in "abc"}
    a, b, c = texts.values()
    assert tuning.others([a, b, c]) == [b, c, a]
    assert tuning.others([a, a, b, a]) == [b, b, a, b]
    assert tuning.others([a, a], [a, c, b]) == [c, c]
    assert tuning.others([a, a]) == [a, a]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_irrelevant_prompts_are_those_of_the_whole_step_however_it_is_split(distilled, size):
    student, stage = student_of(distilled), runs.tuning("feedback", distilled[0].stages[0].prompts)
    prompts = tuning.Prompts(stage, student.base, 0)
    texts = prompts.texts(0, 4)  # of one pass over the prompts: all different
    result = [text for one in prompts.starts(student.base, 0, 4, size) for text in one.next_prompts]
    assert result == [texts[1], texts[2], texts[3], texts[0]]


def test_a_micro_batch_of_one_has_an_irrelevant_prompt_too(distilled, tmp_path, monkeypatch):
    """Under its own prompt the two hinges would cancel each other."""
    scored_by_length(monkeypatch)
    changes = {"shape": "mps_hinge", "threshold": 5.0, "normalise": False, "gradient_accumulation": 4}
    folder = tune(distilled, tmp_path, "feedback", **changes)
    assert all(record["grad_norm"] > 0 for record in records(folder))


def test_a_reward_without_gradient_is_refused_by_feedback(distilled, tmp_path, monkeypatch):
    monkeypatch.setattr("reward_models.brightness.Brightness.differentiable", False)
    with pytest.raises(ValueError, match="rewards with a gradient"):
        tune(distilled, tmp_path, "feedback")


def test_a_reward_that_needs_no_prompt_is_refused_by_the_hinge_that_asks_for_another(distilled, tmp_path):
    with pytest.raises(ValueError, match="rewards that depend on the prompt"):
        tune(distilled, tmp_path, "feedback", shape="mps_hinge", threshold=1.0)
