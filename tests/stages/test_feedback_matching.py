"""Distribution matching in `feedback`: its gradient by hand, what the fake score learns from, resumption, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tuning_runs import AT_THE_END, records, tune

import runs
import tiny
from mlcm_rl.equations.consistency import squared_l2
from mlcm_rl.equations.prediction import prediction_from_x0
from mlcm_rl.models import students, teachers
from mlcm_rl.models.terms import matching_of
from mlcm_rl.models.terms_of_step import MatchingOfStep, training_of
from mlcm_rl.preference import tuning
from mlcm_rl.preference.constraints import Constraints
from mlcm_rl.recipe import Feedback, Lora
from mlcm_rl.rewards import combine
from mlcm_rl.stages import feedback
from mlcm_rl.training.loop import Runtime

FAKE = {"rank": 2, "alpha": 2.0, "learning_rate": 1e-3, "num_updates": 2}
MATCHING = {"weight": 0.5, "fake": FAKE}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(folder.glob("checkpoints/*/state.safetensors"))[-1])


class Step:
    """One step of a stage with `settings`, to be taken by the stage's own loss, and what it takes."""

    def __init__(self, distilled, folder: Path, **settings):
        recipe, (_, place) = distilled
        self.recipe, self.place = recipe, place / "student"
        self.stage = runs.tuning("feedback", recipe.stages[0].prompts, **settings)
        self.base = teachers.load(recipe.teacher, "cpu")
        self.student = tuning.load(self.stage, self.base, self.place, recipe.seed)
        self.parameters = students.trainable_parameters(self.student.denoiser)
        tiny.perturb(self.parameters, seed=3)  # the student is neither the reference nor the teacher
        self.rt = Runtime(recipe, self.stage, folder)
        self.rt.prepare(self.student.denoiser, torch.optim.AdamW(self.parameters, lr=0.0, fused=True))
        self.rewards = combine(self.stage.rewards, "cpu", normalise=False)
        self.prompts = tuning.Prompts(self.stage, self.base, recipe.seed)
        self.matching = matching_of(self.stage, self.base, recipe.seed)
        self.matched = None
        if self.matching is not None:
            fake = [value for value in self.matching.network.parameters() if value.requires_grad]
            tiny.perturb(fake, seed=5)  # and the fake score has learned something
            trained = self.matching, training_of(self.rt, self.matching)
            self.matched = MatchingOfStep(self.rt, trained, 0, self.stage.batch_size, self.stage.copies_scored)

    def losses(self) -> torch.Tensor:
        """The stage's own loss of the step's one micro-batch, (B,)."""
        (start,) = self.prompts.starts(self.base, 0, self.stage.batch_size, self.stage.batch_size)
        scoring = feedback.Scoring(self.rewards, Constraints(self.stage, self.student, {}), None, tuning.Scores())
        return feedback.loss(self.stage, self.student, scoring, start, None, len(self.student.times) - 1, self.matched)

    def gradient(self) -> torch.Tensor:
        """The gradient of the mean loss by all trained weights."""
        found = torch.autograd.grad(self.losses().mean(), self.parameters)
        return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("gradient", ["last", "low_variance"])
def test_the_gradient_of_a_step_is_the_rewards_and_that_of_matching_composed_by_hand(distilled, tmp_path, gradient):
    """d loss = d reward + w / (n B N) sum (x_fake - x_real) / mean |x - x_real| dx, guidance by hand."""
    plain, step = (Step(distilled, tmp_path, gradient=gradient, **term) for term in ({}, {"matching": MATCHING}))
    base, student, matching, copies = step.base, step.student, step.matching, step.stage.copies_scored
    (start,) = step.prompts.starts(base, 0, 4, 4)
    _, x0, _, n = feedback.graded_sample(step.stage, student, start, len(student.times) - 1)
    assert (n, len(x0)) == (copies, 4 * copies)
    (noised,) = step.matched.noised
    conditioning, x = start.repeated(copies), x0.detach()
    alpha, sigma = (table[noised.t][:, None, None, None] for table in (base.schedule.alpha, base.schedule.sigma))
    x_t = alpha * x + sigma * noised.noise

    def eps(network, given):
        with torch.no_grad():
            return base.predict(network, x_t, noised.t, given)

    empty, scale = base.unconditional(len(x)), step.recipe.teacher.guidance_scale
    without = eps(base.denoiser, empty)
    guided = without + scale * (eps(base.denoiser, conditioning) - without)
    real, fake = ((x_t - sigma * one) / alpha for one in (guided, eps(matching.network, conditioning)))
    slope = (fake - real) / (x - real).abs().flatten(1).mean(1)[:, None, None, None]
    weight = MATCHING["weight"] / (len(x) * x[0].numel())
    term = torch.autograd.grad(x0, step.parameters, weight * slope)
    expected = plain.gradient() + torch.cat([one.flatten() for one in term])
    torch.testing.assert_close(step.gradient(), expected, rtol=1e-3, atol=1e-6)
    assert (expected - plain.gradient()).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("gradient", ["last", "random", "low_variance"])
def test_the_fake_score_learns_from_the_samples_that_are_scored_under_noise_of_its_own(distilled, tmp_path, gradient):
    settings = {"gradient": gradient, "num_grad_steps": 1}
    step = Step(distilled, tmp_path, matching=MATCHING, **settings)
    step.losses()
    ((made,),) = step.matched.made
    assert made.sampled.rows.tolist() == list(range(4 * step.stage.copies_scored))
    assert not made.sampled.x0.requires_grad
    (start,) = step.prompts.starts(step.base, 0, 4, 4)
    x0 = feedback.graded_sample(step.stage, step.student, start, len(step.student.times) - 1)[1]
    assert torch.equal(made.sampled.x0, x0.detach())
    noised = step.matching.draw(torch.Generator().manual_seed(9), len(x0), step.matched.s)
    base, conditioning = step.base, start.repeated(step.stage.copies_scored)
    x_t, t = noised.on(base, x0.detach())
    prediction = base.predict(step.matching.network, x_t, t, conditioning)
    target = prediction_from_x0(x0.detach(), x_t, t, base.schedule, base.prediction_type)
    expected = squared_l2(prediction, target)
    torch.testing.assert_close(step.matching.network_loss(made, noised), expected, rtol=1e-5, atol=1e-6)
    mean = step.matched.of_samples(expected)
    assert mean.shape == (4,)
    torch.testing.assert_close(mean.mean(), expected.mean())


def test_the_log_has_the_term_as_it_adds_to_the_loss_and_the_fake_score(distilled, tmp_path):
    settings = {"num_steps": 3, "normalise": False}
    folder = tune(distilled, tmp_path, "feedback", matching=MATCHING, **settings)
    for record in records(folder):
        assert record["loss"] == pytest.approx(record["matching"] - record["reward/brightness"], rel=1e-4)
        assert min(record[name] for name in ("matching", "fake_loss", "fake_grad_norm")) > 0
    first, last = (load_file(path) for path in sorted(folder.glob("checkpoints/*/state.safetensors")))
    for prefix in ("student.", "fake."):
        assert any(not torch.equal(first[name], last[name]) for name in first if name.startswith(prefix))


@pytest.mark.parametrize(
    "update", [pytest.param(3, id="at-a-step", marks=pytest.mark.slow), pytest.param(5, id="in-the-fake")]
)
def test_stopped_between_any_updates_it_ends_with_the_same_bits(distilled, tmp_path, update):
    """Of three updates a step: the student's, and two of the fake score, which has a checkpoint and moments too."""
    settings = {"num_steps": 3, "matching": MATCHING, "gradient": "low_variance"}
    whole = tune(distilled, tmp_path / "whole", "feedback", **settings)
    with runs.crashing_at(update):
        tune(distilled, tmp_path / "cut", "feedback", **settings)
    cut = tune(distilled, tmp_path / "cut", "feedback", **settings)
    assert records(cut) == records(whole)
    expected, actual = state(whole), state(cut)
    assert {name.split(".")[0] for name in actual} == {"student", "best", "optimizer", "fake", "fake_optimizer"}
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_fake_score_that_warms_up_leaves_the_student_alone(distilled, tmp_path):
    """The student's first step is that without the term, to the bit, and the fake score learns in it."""
    settings = {"num_steps": 2, "normalise": False}
    plain = tune(distilled, tmp_path / "plain", "feedback", **settings)
    warm = {"fake": {**FAKE, "warmup_steps": 1}}
    warmed = tune(distilled, tmp_path / "warm", "feedback", matching=warm, **settings)
    (first, second), (expected, _) = records(warmed), records(plain)
    assert (first["loss"], first["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    assert first["matching"] == 0.0 < first["fake_grad_norm"]
    assert second["matching"] > 0.0


def test_the_teacher_stays_whole_and_learns_nothing(distilled, tmp_path, monkeypatch):
    """No loss leaves a gradient on another network than its own, and the teacher keeps its weights to the bit."""
    bases, left = [], []
    original_backward, original_term = Runtime.backward, feedback.matching_of

    def backward(self, losses, beside=None):
        result = original_backward(self, losses, beside)
        networks = [bases[0][0].denoiser, self.engine.student, *(one.engine.student for one in self.beside)]
        left.extend(one for network in networks for one in network.parameters() if one.grad is not None)
        return result

    def term_of(stage, base, seed):
        bases.append((base, {name: value.clone() for name, value in base.denoiser.named_parameters()}))
        return original_term(stage, base, seed)

    monkeypatch.setattr(Runtime, "backward", backward)
    monkeypatch.setattr(feedback, "matching_of", term_of)
    tune(distilled, tmp_path, "feedback", matching=MATCHING)
    ((base, before),) = bases
    assert not left
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "random", "num_grad_steps": 2, "gamma": 1.0, "kl": 0.5},
        {"form": "bounded", "anchor": 0.5, "consistency": 0.5},
        {"surrogate": {"num_generations": 2, "width": 4, "head_start": 1}, "gradient_checkpointing": True},
        {"rewards": ["brightness", {"name": "sharpness", "max_drop": 0.05}], "gradient": "low_variance"},
    ],
    ids=["refl", "bounded", "surrogate", "constraint"],
)
def test_it_goes_with_every_other_part_of_the_stage(distilled, tmp_path, settings):
    settings = {"num_steps": 3, **AT_THE_END, **settings}
    lines = records(tune(distilled, tmp_path, "feedback", matching=MATCHING, **settings))
    assert len(lines) == 3
    assert all(record[name] > 0 for record in lines for name in ("grad_norm", "matching", "fake_grad_norm"))


def test_gradient_checkpointing_changes_no_gradient(distilled, tmp_path):
    plain, saved = (
        tune(distilled, tmp_path / str(flag), "feedback", matching=MATCHING, gradient_checkpointing=flag)
        for flag in (False, True)
    )
    for name in ("grad_norm", "fake_grad_norm"):
        assert [record[name] for record in records(plain)] == [record[name] for record in records(saved)]


def test_only_a_stage_with_the_term_keeps_the_teacher():
    assert not runs.tuning("dpo", "prompts.txt").uses_teacher
    assert not runs.tuning("feedback", "prompts.txt").uses_teacher
    stage = runs.tuning("feedback", "prompts.txt", matching={})
    assert stage.uses_teacher
    assert isinstance(stage, Feedback)
    assert stage.networks(Lora(rank=2)).fake == stage.matching.fake
