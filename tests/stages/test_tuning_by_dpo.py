"""DPO: pairs ranked from samples or read from a table, their margins, offline PSO by kappa."""

from dataclasses import replace

import pytest
import torch
from tuning_runs import VARIANTS, records, tune

import runs
import tiny
from mlcm_rl.equations.preference import offline_pso_log_ratios
from mlcm_rl.models import teachers
from mlcm_rl.preference import tuning
from mlcm_rl.preference.constraints import Constraints
from mlcm_rl.rewards import combine
from mlcm_rl.stages import dpo


@pytest.mark.parametrize("variant", ["dpo", "dpo-ipo", "dpo-pso"])
def test_the_chosen_samples_are_the_brighter_ones_and_become_more_likely(distilled, variant):
    """Steps on one batch of pairs widen the margin between chosen and rejected, whatever the form."""
    recipe, (_, folder) = distilled
    stage = runs.tuning("dpo", recipe.stages[0].prompts, num_generations=3, **VARIANTS[variant])
    student = tuning.load(stage, teachers.load(recipe.teacher, "cpu"), folder / "student", seed=0)
    rewards = combine(stage.rewards, "cpu")
    prompts = tuning.Prompts(stage, student.base, 0)
    (begun,) = prompts.starts(student.base, 0, 4, 12, copies=3)
    pairs = dpo.rank_samples(stage, student, rewards, Constraints(stage, student, {}), begun, tuning.Scores())
    chosen, rejected = (student.base.autoencoder.decode(x0).mean((1, 2, 3)) for x0 in pairs.x0)
    assert (chosen > rejected).all()
    optimizer = torch.optim.Adam(student.parameters.values(), lr=1e-4)
    logged = []
    for _ in range(8):
        scores = tuning.Scores()
        noise = tuning.sample_generators(0, stage, 0, range(4))  # the same in every step
        dpo.loss(stage, student, replace(pairs, generators=noise), scores).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(scores.means())
    assert logged[0]["margin"] == pytest.approx(0.0, abs=1e-3)  # at the reference, by definition
    assert logged[-1]["margin"] > logged[0]["margin"]
    assert logged[-1]["log_ratio_chosen"] > logged[-1]["log_ratio_rejected"]


@pytest.fixture
def stored(distilled, tmp_path):
    """A stage on a table of pairs, its student and its pairs."""
    recipe, (_, folder) = distilled
    stage = runs.tuning("dpo", recipe.stages[0].prompts, pairs=runs.write_pairs(tmp_path / "pairs"))
    student = tuning.load(stage, teachers.load(recipe.teacher, "cpu"), folder / "student", seed=0)
    return stage, student, dpo.StoredPairs(stage, student.base, seed=0)


def test_pairs_of_a_table_are_its_pictures_encoded_and_their_prompts(stored):
    stage, student, source = stored
    (pairs,) = source.batches(0, Constraints(stage, student, {}), tuning.Scores())
    sampled = [source.prompts[i] for i in source.order.draw(0, 4).tolist()]
    for i, prompt in enumerate(sampled):
        number = runs.PROMPTS.index(prompt.prompt)
        for x0, colour in zip(pairs.x0[:, i], ((200 + 5 * number, 220, 210), (30, 10 + 5 * number, 20)), strict=True):
            picture = torch.tensor(colour).float().div(255).view(1, 3, 1, 1).expand(1, 3, 16, 16)
            torch.testing.assert_close(x0[None], student.base.autoencoder.encode(picture), rtol=0, atol=1e-5)
        alone = student.base.encode_prompts([prompt.prompt])
        torch.testing.assert_close(pairs.conditioning["context"][i : i + 1], alone["context"], rtol=0, atol=1e-5)
    assert pairs.weight.tolist() == [1.0] * 4


def test_pairs_of_a_table_are_those_of_the_languages_that_are_tuned_for(stored):
    stage, student, _ = stored
    source = dpo.StoredPairs(stage.model_copy(update={"languages": {"zh": 1.0}}), student.base, seed=0)
    assert [prompt.prompt for prompt in source.prompts] == ["红苹果", "熊猫"]
    assert source.x0.shape[:2] == (2, 2)


@pytest.mark.parametrize("form", ["diffusion_dpo", "endpoint"])
def test_kappa_makes_the_log_ratios_those_of_offline_pso(stored, form):
    """Diffusion-DPO's are half of them; the endpoint form's are their sum over the times of the sampler."""
    stage, student, source = stored
    stage = stage.model_copy(update={"form": form, "kappa": 0.1})
    tiny.perturb(list(student.parameters.values()))
    (pairs,) = source.batches(0, Constraints(stage, student, {}), tuning.Scores())
    result = dpo.log_ratios(stage, student, pairs)
    draws, factor = tuning.sample_generators(0, stage, 0, range(4)), 1.0
    steps = [torch.full((4,), step) for step in range(len(student.times))]
    if form == "diffusion_dpo":
        steps, factor = [tuning.draw_steps(len(student.times), draws)], 0.5
    eps = student.base.noise(draws, 4)
    expected = torch.zeros(2, 4)
    for step in steps:
        own, reference = dpo.denoising_errors(stage, student, pairs, step, eps)
        expected += factor * torch.stack(offline_pso_log_ratios(own[0], reference[0], own[1], reference[1], 0.1))
    torch.testing.assert_close(torch.stack(result), expected)
    assert result[1].abs().min() > 0


@pytest.mark.parametrize("variant", ["dpo-table", "dpo-table-endpoint"])
def test_the_chosen_pictures_of_a_table_become_more_likely_than_the_rejected(stored, variant):
    stage, student, source = stored
    stage = stage.model_copy(update={**VARIANTS[variant], "pairs": stage.pairs})
    optimizer = torch.optim.Adam(student.parameters.values(), lr=1e-4)
    margins = []
    for _ in range(8):
        scores = tuning.Scores()
        (pairs,) = source.batches(0, Constraints(stage, student, {}), scores)
        dpo.loss(stage, student, pairs, scores).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        margins.append(scores.means()["margin"])
    assert margins[0] == pytest.approx(0.0, abs=1e-3)
    assert margins[-1] > margins[0]


def test_equal_rewards_make_no_pair(distilled, tmp_path):
    folder = tune(distilled, tmp_path, "dpo", min_margin=1e6)
    assert [record["pairs_kept"] for record in records(folder)] == [0.0, 0.0]
    assert [record["grad_norm"] for record in records(folder)] == [0.0, 0.0]


@pytest.mark.parametrize("form", ["diffusion_dpo", "pso"])
def test_the_log_is_of_the_pairs_that_are_kept(distilled, form):
    """In a group of equal scores chosen and rejected are one sample, which neither is right nor wrong."""
    recipe, (_, folder) = distilled
    stage = runs.tuning("dpo", recipe.stages[0].prompts, form=form, gamma=1.0, sampling_steps=3, num_generations=2)
    student = tuning.load(stage, teachers.load(recipe.teacher, "cpu"), folder / "student", seed=0)
    tiny.perturb(list(student.parameters.values()))
    (begun,) = tuning.Prompts(stage, student.base, 0).starts(student.base, 0, 4, 8, copies=2)
    limits = Constraints(stage, student, {})
    pairs = dpo.rank_samples(stage, student, combine(stage.rewards, "cpu"), limits, begun, tuning.Scores())
    kept = pairs.weight.new_tensor([1.0, 0.0, 1.0, 0.0])
    logged = []
    for weight in (pairs.weight, kept, torch.zeros(4)):
        scores = tuning.Scores()
        noise = tuning.sample_generators(0, stage, 0, range(4))
        dpo.loss(stage, student, replace(pairs, weight=weight, generators=noise), scores)
        logged.append((scores.values, scores.means()))
    (every, _), (_, means), (_, none) = logged
    margins = every["margin"][0].unflatten(0, (-1, 4))[:, kept > 0]
    assert means["margin"] == pytest.approx(margins.mean().item())
    assert means["accuracy"] == (margins > 0).float().mean().item()
    assert (means["pairs_kept"], none) == (0.5, {"pairs_kept": 0.0})
