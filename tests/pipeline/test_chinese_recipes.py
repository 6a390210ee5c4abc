"""The recipes that tune for Chinese prompts: what they share with the students' own, and a tiny run of each."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ChineseCLIPConfig, ChineseCLIPModel, SiglipConfig, SiglipModel

from mlcm_rl import pipeline
from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.recipe import Evaluate, Recipe, Reward, Tuning
from mlcm_rl.recipe.file import load
from mlcm_rl.rewards import checked_class
from mlcm_rl.storage.manifest import verify
from reward_models import ocr
from rewards import test_published_chinese_clip, test_published_siglip2
from tiny_families import CASES

FAMILIES = pytest.mark.parametrize("family", ["kolors", "z_image", "qwen_image"])
RECIPES = Path("recipes")
HELD_OUT = {"evaluation.jsonl", "written_test.jsonl"}


@FAMILIES
def test_the_student_is_that_of_the_familys_own_recipe(family):
    tuned, distilled = (load(RECIPES / f"{family}_{name}.yaml") for name in ("chinese", "mlcm"))
    assert tuned.teacher == distilled.teacher
    assert tuned.stages[:2] == distilled.stages[:2]  # so that what is finished is used, not made again
    assert [stage.kind for stage in tuned.stages[2:]] == ["feedback", "policy", "evaluate", "evaluate"]


@FAMILIES
def test_rewards_read_the_prompts_that_they_are_given_and_none_is_tuned_on_the_evaluation(family):
    for stage in load(RECIPES / f"{family}_chinese.yaml").stages[2:]:
        assert (Path(stage.prompts).name in HELD_OUT) == isinstance(stage, Evaluate)
        languages = {prompt.language for prompt in read_prompts(stage.prompts)}
        assert languages == {"en", "zh"}
        for reward in stage.reward_models:
            model = checked_class(reward)
            if isinstance(stage, Tuning) and model.needs_prompt:
                assert {"zh"} == set(stage.languages) <= set(model.languages)


class Recogniser:
    """In place of the recogniser's weights: it sees in every picture one character, grey as its mean."""

    def __init__(self, weights):
        characters = sorted({one for name in ("train", "test") for one in _characters(name)})
        self.metadata = {"character": "\n".join(characters)}

    def __call__(self, pixels):
        num_labels = len(self.metadata["character"].splitlines()) + 2
        logits = pixels.mean((1, 2, 3))[:, None, None] * torch.linspace(0, 8, num_labels) * torch.ones(1, 40, 1)
        return logits.softmax(-1)


def _characters(name: str) -> str:
    return "".join(
        prompt.concept.removeprefix("written-") for prompt in read_prompts(f"recipes/prompts/written_{name}.jsonl")
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Tiny networks with random weights, by the names of the rewards that read their folders."""
    root = tmp_path_factory.mktemp("rewards")
    configs = {"chinese_clip": test_published_chinese_clip.CONFIG, "siglip2": test_published_siglip2.CONFIG}
    ChineseCLIPModel(ChineseCLIPConfig(**configs["chinese_clip"])).save_pretrained(root / "chinese_clip")
    vocabulary = "\n".join(test_published_chinese_clip.WORDS) + "\n"
    (root / "chinese_clip" / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    SiglipModel(SiglipConfig(**configs["siglip2"])).save_pretrained(root / "siglip2")
    test_published_siglip2.tiny_tokenizer().save_pretrained(root / "siglip2")
    return {name: str(root / name) for name in configs}


def small(recipe: Recipe, case, teacher: Path, folder: Path, folders: dict[str, str]) -> Recipe:
    """Return `recipe` on a tiny teacher, a few steps of everything; colourfulness is in the place of aesthetic."""

    def reward(one: str | Reward) -> Reward:
        one = Reward(name=one) if isinstance(one, str) else one
        if one.name == "aesthetic":
            return one.model_copy(update={"name": "colourfulness"})
        return one.model_copy(update={"settings": {"folder": folders[one.name]}}) if one.name in folders else one

    steps = {"num_steps": 1, "precision": "no", "log_every": 1, "adapter": {"rank": 2, "alpha": 2.0}}
    changes = {
        "trajectories": {
            "num_trajectories": 4,
            "num_held_out": 1,
            "solver_steps": 8,
            "batch_size": 4,
            "dtype": "float32",
        },
        "distill": {
            **steps,
            "adapter": {"kind": "lora", "rank": 2, "alpha": 2.0},
            "batch_size": 4,
            "gradient_accumulation": 1,
        },
        "feedback": {**steps, "batch_size": 2, "gradient_accumulation": 1},
        "policy": {**steps, "batch_size": 4, "gradient_accumulation": 1},
        "evaluate": {"num_prompts": 4, "teacher_steps": [2], "batch_size": 4},
    }
    stages = []
    for stage in recipe.stages:
        settings = stage.model_dump() | changes[stage.kind]
        if stage.kind == "distill":
            settings["budgets"] = [4]
        if isinstance(stage, Tuning):
            settings["rewards"] = [reward(one).model_dump() for one in stage.rewards]
            guard = {"rewards": [reward(one).model_dump() for one in stage.guard.rewards], "num_prompts": 2, "every": 1}
            settings["guard"] |= guard
        elif isinstance(stage, Evaluate):
            settings["rewards"] = [reward(one).model_dump() for one in stage.rewards]
        stages.append(type(stage).model_validate(settings))
    update = {"teacher": case.teacher(teacher), "stages": stages, "runs": str(folder), "device": "cpu", "trackers": []}
    return recipe.model_copy(update=update)


@pytest.mark.slow
@FAMILIES
def test_a_tiny_run_of_the_whole_recipe(family, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "OnnxNetwork", Recogniser)
    monkeypatch.setattr(ocr.Ocr, "weights", ())
    case = CASES[family]
    recipe = small(load(RECIPES / f"{family}_chinese.yaml"), case, case.write(tmp_path / "teacher"), tmp_path, folders)
    planned = pipeline.plan(recipe, True)
    assert all(one.unknown is None for one in planned)
    finished = pipeline.run(recipe)
    for one in finished:
        verify(one.folder)
    reports = [json.loads((one.folder / "report.json").read_text(encoding="utf-8")) for one in finished[-2:]]
    for report, rewards in zip(
        reports, (["siglip2", "chinese_clip", "colourfulness"], ["ocr", "siglip2"]), strict=True
    ):
        assert {row["name"] for row in report["rows"]} >= {"student", "feedback", "policy"}
        assert set(report["rows"][0]["metrics"]) >= {f"reward/{name}" for name in rewards}
    values = reports[0]["rows"][0]["metrics"]["reward/chinese_clip"]["values"]
    assert [value is None for value in values] == [True, False] * 2  # it reads no English
