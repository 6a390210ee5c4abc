"""A step of preference learning is the same however it is split: prompts, noise, the rewards' scale, the update."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.models import base, teachers
from mlcm_rl.preference import tuning
from mlcm_rl.recipe import Lora
from mlcm_rl.stages import dpo, feedback, policy
from mlcm_rl.training import processes as distributed
from mlcm_rl.training.processes import micro_batches
from mlcm_rl.training.seeding import generator

STAGES = {"feedback": feedback, "dpo": dpo, "policy": policy}
SPLITS = (1, 2, 4)  # micro-batches that a batch of 8 is split into
VARIANTS = {
    "feedback": {"gamma": 1.0, "shape": "hinge", "threshold": 1.0},
    "feedback-refl": {"gradient": "random", "num_grad_steps": 2, "gamma": 1.0, "kl": 0.5},
    "feedback-constraint": {"gamma": 1.0, "max_drops": {"sharpness": 0.0}, "multiplier_rate": 5.0},
    "feedback-surrogate": {"gamma": 1.0, "surrogate": {"num_generations": 2, "width": 4, "head_start": 0}},
    "feedback-low-variance": {"gradient": "low_variance", "consistency": 0.5},
    "feedback-matching": {
        "gradient": "low_variance",
        "matching": {"fake": {"rank": 2, "alpha": 2.0, "num_updates": 2}},
    },
    "dpo": {"num_generations": 2},
    "dpo-diffusion": {"num_generations": 2, "form": "diffusion_dpo"},
    "dpo-table": {"form": "diffusion_dpo", "pairs": "pairs"},
    "policy": {"num_iterations": 2},
}
SOON = ("feedback", "feedback-matching")


@pytest.fixture(scope="module")
def distilled(tiny_sdxl, tmp_path_factory):
    """A recipe with a store and a distilled student, and their folders."""
    folder = tmp_path_factory.mktemp("distilled")
    stages = [
        runs.trajectories(runs.write_prompts(folder)),
        runs.distill(num_segments=[2], adapter=Lora(rank=2, alpha=2.0)),
    ]
    recipe = runs.recipe(tiny_sdxl, folder, stages)
    return recipe, [stage.folder for stage in pipeline.run(recipe)]


def tuned(distilled, folder: Path, kind: str, **settings) -> tuple[list[dict], torch.Tensor]:
    """The log of two steps on batches of 8, and all weights of the adapter that they end with."""
    recipe, (store, student) = distilled
    guard = {"rewards": [{"name": "colourfulness"}], "num_prompts": 4, "every": 4}
    rewards = [{"name": "brightness"}, {"name": "sharpness", "weight": 0.5}]
    if limits := settings.pop("max_drops", {}):
        rewards = [{"name": "brightness"}, *({"name": name, "max_drop": limit} for name, limit in limits.items())]
    settings = {"batch_size": 8, "num_steps": 2, "guard": guard, "rewards": rewards} | settings
    stage = runs.tuning(kind, recipe.stages[0].prompts, **settings)
    folder.mkdir(parents=True)
    STAGES[kind].run(stage, recipe, {"trajectories": store, "distill": student}, folder)
    newest = sorted(folder.glob("checkpoints/*/state.safetensors"))[-1]
    weights = {name: value for name, value in load_file(newest).items() if name.startswith("student.")}
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return records, torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize(
    "variant", [pytest.param(one, marks=[pytest.mark.slow] * (one not in SOON)) for one in VARIANTS]
)
def test_a_batch_of_8_in_1_2_or_4_parts_draws_the_same_and_makes_the_same_update(
    distilled, tmp_path, monkeypatch, variant
):
    settings = dict(VARIANTS[variant])
    if "pairs" in settings:
        settings["pairs"] = runs.write_pairs(tmp_path / "pairs")
    noises: list[torch.Tensor] = []
    original = base.Base.noise

    def noise(self, generators, count):
        sampled = original(self, generators, count)
        noises.extend(sampled)
        return sampled

    monkeypatch.setattr(base.Base, "noise", noise)
    sampled, result = [], []
    for parts in SPLITS:
        noises.clear()
        kind = variant.split("-")[0]
        result.append(tuned(distilled, tmp_path / str(parts), kind, gradient_accumulation=parts, **settings))
        sampled.append(sorted(one.double().sum().item() for one in noises))
    first_records, first_weights = result[0]
    for noise_of_split, (records, weights) in zip(sampled[1:], result[1:], strict=True):
        assert noise_of_split == sampled[0]
        for one, other in zip(first_records, records, strict=True):
            same = [name for name in one if name.startswith(("reward/", "matching", "fake_"))]
            for name in ("loss", "grad_norm", *same):
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
        assert (weights - first_weights).norm() < 1e-3 * first_weights.norm()


@pytest.mark.parametrize("kind", ["feedback", "dpo", "policy"])
def test_what_a_sample_starts_from_is_its_own_whatever_the_split_and_the_number_of_processes(
    distilled, monkeypatch, kind
):
    recipe, (_, folder) = distilled
    stage = runs.tuning(kind, recipe.stages[0].prompts)
    student = tuning.load(stage, teachers.load(recipe.teacher, "cpu"), folder / "student", seed=0)
    prompts = tuning.Prompts(stage, student.base, 0)

    def starts(size: int, processes: int = 1) -> dict[int, tuple[str, torch.Tensor, torch.Tensor]]:
        """By number in the step: prompt, noise, and what its generator gives next."""
        found = {}
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts = micro_batches(8, size, 2)
            for rows, one in zip(parts, prompts.starts(student.base, 3, 4, size, copies=2), strict=True):
                later = student.base.noise(one.generators, len(rows))
                found |= dict(zip(rows, zip(one.prompts, one.noise, later, strict=True), strict=True))
        return found

    whole = starts(8)
    assert sorted(whole) == list(range(8))
    assert len({noise.sum().item() for _, noise, _ in whole.values()}) == 8
    for other in (starts(4), starts(2), starts(8, processes=2), starts(4, processes=2)):
        assert other.keys() == whole.keys()
        for number, (prompt, noise, later) in whole.items():
            assert other[number][0] == prompt
            assert torch.equal(other[number][1], noise)
            assert torch.equal(other[number][2], later)


def test_the_rewards_take_in_the_scores_of_all_micro_batches_and_processes(monkeypatch):
    others = torch.tensor([7.0, 8.0])
    monkeypatch.setattr(distributed, "gather", lambda part: torch.cat([part, others]))
    scores = tuning.Scores()
    for part in ([1.0, 2.0], [3.0]):
        scores.add_rewards({"brightness": torch.tensor(part)})
        scores.add({"kl": torch.zeros(len(part))})
    found = scores.rewards()
    assert {name: values.tolist() for name, values in found.items()} == {"brightness": [1.0, 2.0, 3.0, 7.0, 8.0]}


# ---- prompts by language ----


class Counted(Prompt):
    """A prompt whose language is counted as often as it is asked for."""

    asked = 0

    def __getattribute__(self, name: str):
        if name == "language":
            Counted.asked += 1
        return super().__getattribute__(name)


def test_languages_are_counted_once_however_many_prompts_and_steps_there_are():
    stage = runs.tuning("feedback", "unused", languages={"en": 1.0, "zh": 3.0})
    prompts = [Counted(str(number), ("en", "zh", "en")[number % 3]) for number in range(3000)]
    Counted.asked = 0
    order = tuning.Order(prompts, stage, 0)
    for step in range(20):
        order.draw(step, 8)
    assert Counted.asked == len(prompts)


def test_prompts_by_language_are_those_of_weights_counted_one_by_one():
    stage = runs.tuning("feedback", "unused", languages={"en": 1.0, "zh": 0.3, "fr": 2.0})
    languages = [("en", "zh", "en", "fr", "en", "zh", "en")[number % 7] for number in range(100)]
    order = tuning.Order([Prompt(str(number), one) for number, one in enumerate(languages)], stage, 5)
    weights = torch.tensor([stage.languages[one] / languages.count(one) for one in languages])
    for step in range(10):
        draws = generator(5, "feedback", "prompts", step)
        assert torch.equal(order.draw(step, 8), torch.multinomial(weights, 8, replacement=True, generator=draws))


def test_the_late_step_of_refl_is_one_for_all_micro_batches_of_a_step(distilled, tmp_path, monkeypatch):
    """A walk is of one length, so samples cannot have one each; one every micro-batch would depend on the split."""
    seen, original = [], feedback.loss

    def loss(stage, student, scoring, start, stored, last, *others):
        seen.append(last)
        return original(stage, student, scoring, start, stored, last, *others)

    monkeypatch.setattr(feedback, "loss", loss)
    settings = {"gradient": "random", "num_grad_steps": 2, "gradient_accumulation": 4, "num_steps": 4}
    tuned(distilled, tmp_path / "run", "feedback", **settings)
    assert len(seen) == 16
    assert all(len(set(seen[i : i + 4])) == 1 for i in range(0, 16, 4))
