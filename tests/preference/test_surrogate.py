"""A learned reward: its gradient by hand, what it learns, a reward without gradient that rises through it."""

import json

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl.models import students, teachers
from mlcm_rl.preference import tuning
from mlcm_rl.preference.surrogate import LearnedReward
from mlcm_rl.stages import feedback
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.seeding import generator

SURROGATE = {"num_generations": 2, "width": 8, "head_start": 3, "num_updates": 8, "learning_rate": 1e-2}


def test_the_gradient_is_that_of_the_prediction_and_reaches_neither_heads_nor_student(distilled, tmp_path):
    recipe, folder = distilled
    stage = runs.tuning("feedback", recipe.stages[0].prompts, surrogate=SURROGATE | {"head_start": 0})
    student = tuning.load(stage, teachers.load(recipe.teacher, "cpu"), folder / "student", seed=0)
    learned = LearnedReward(stage, student, Runtime(recipe, stage, tmp_path), "a cat", seed=0)
    prompts = tuning.Prompts(stage, student.base, 0)
    x0 = torch.randn(2, *student.base.latent_shape, generator=generator(2))

    def start():
        return tuning.start(student.base, prompts.draw(0, 2), [generator(0), generator(1)])

    predicted, gradient = learned.gradient(x0, start(), torch.zeros(2))
    assert all(value.grad is None for value in [*learned.heads.parameters(), *student.denoiser.parameters()])
    assert all(value.requires_grad for value in learned.heads.parameters())
    step = 0.02 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        up, down = (learned.predict(x0 + sign * step, start()) for sign in (1.0, -1.0))
    slopes = 0.04 * gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(up - down, slopes, rtol=2e-2, atol=1e-6)
    with students.as_reference(student.denoiser), torch.no_grad():
        torch.testing.assert_close(learned.predict(x0, start()), predicted)


def test_the_gradient_of_a_large_picture_survives_a_teacher_in_float16(distilled, tmp_path, monkeypatch):
    """Of 4096 times as many places each has so much less of it, which float16 would round to 0."""
    places, original = 4096, LearnedReward._predict
    monkeypatch.setattr(LearnedReward, "_predict", lambda self, *args: original(self, *args) / places)
    recipe, folder = distilled
    stage = runs.tuning("feedback", recipe.stages[0].prompts, surrogate=SURROGATE | {"head_start": 0})
    gradients = []
    for dtype in ("float32", "float16"):
        teacher = recipe.teacher.model_copy(update={"dtype": dtype})
        student = tuning.load(stage, teachers.load(teacher, "cpu"), folder / "student", seed=0)
        learned = LearnedReward(stage, student, Runtime(recipe, stage, tmp_path / dtype), "a cat", seed=0)
        prompts = tuning.Prompts(stage, student.base, 0)
        start = tuning.start(student.base, prompts.draw(0, 2), [generator(0), generator(1)])
        x0 = torch.randn(2, *student.base.latent_shape, generator=generator(2))
        gradients.append(learned.gradient(x0, start, torch.zeros(2))[1])
    exact, half = gradients
    assert (half - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("form", ["direct", pytest.param("bounded", marks=pytest.mark.slow)])
def test_a_reward_without_gradient_rises_through_what_has_learned_it(distilled, tmp_path, monkeypatch, form):
    monkeypatch.setattr("reward_models.brightness.Brightness.differentiable", False)
    monkeypatch.setattr(
        "reward_models.brightness.Brightness.__call__", lambda self, images, _: images.detach().mean((1, 2, 3))
    )
    recipe, folder = distilled
    settings = {"num_steps": 24, "learning_rate": 1e-2, "batch_size": 8, "surrogate": SURROGATE, "form": form}
    guard = {"rewards": ["colourfulness"], "num_prompts": 4, "every": 3, "patience": 100}
    stage = runs.tuning("feedback", recipe.stages[0].prompts, guard=guard, **settings)
    feedback.run(stage, recipe, {"distill": folder}, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [one["reward_calls"] for one in log] == [8.0 * one["step"] for one in log]
    assert log[2]["guard/trained_gain"] == pytest.approx(0.0, abs=1e-5)  # the heads alone have learned
    assert [one["learning_rate"] > 0 for one in log[:4]] == [False, False, False, True]
    state = load_file(max(tmp_path.glob("checkpoints/*/state.safetensors")))
    counted = {int(value) for name, value in state.items() if name.startswith("optimizer.") and name.endswith(".step")}
    assert counted == {24 - 3}, "Adam counts its updates since its moments were last fresh"
    assert sum(one["surrogate/correlation"] for one in log[-6:]) / 6 > 0.3
    assert log[-1]["guard/trained_gain"] > 0.3
