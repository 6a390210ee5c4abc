"""Short runs of the three stages of preference learning over one distilled student, which is made once a session."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import students, teachers
from mlcm_rl.preference import tuning
from mlcm_rl.recipe import Full, Lora
from mlcm_rl.stages import dpo, feedback, policy

STAGES = {"feedback": feedback, "dpo": dpo, "policy": policy}
CONSTRAINED = ["brightness", {"name": "sharpness", "max_drop": 0.05}]
VARIANTS = {
    "feedback": {},
    "feedback-all-steps": {"num_grad_steps": 2, "anchor": 0.5, "shape": "hinge", "threshold": 5.0},
    "feedback-refl": {"gradient": "random", "num_grad_steps": 2, "gamma": 1.0, "kl": 0.5},
    "feedback-low-variance": {"gradient": "low_variance", "anchor": 0.5, "shape": "hinge", "threshold": 2.0},
    "feedback-consistency": {"consistency": 0.5},
    "feedback-bounded": {"form": "bounded", "gradient": "random", "num_grad_steps": 2},
    "feedback-surrogate": {
        "surrogate": {"num_generations": 2, "width": 4, "head_start": 0},
        "form": "bounded",
        "rewards": CONSTRAINED,
    },
    "feedback-constraint": {"rewards": CONSTRAINED, "gradient": "low_variance", "multiplier_rate": 5.0},
    "dpo": {},
    "dpo-ipo": {"form": "diffusion_dpo", "loss_type": "ipo", "space": "x0"},
    "dpo-pso": {"form": "pso", "gamma": 1.0, "loss_type": "robust", "label_smoothing": 0.1},
    "dpo-constraint": {"rewards": CONSTRAINED},
    "dpo-table": {"pairs": "pairs", "form": "diffusion_dpo", "kappa": 0.1},
    "dpo-table-endpoint": {"pairs": "pairs", "loss_type": "hinge", "languages": {"en": 1.0, "zh": 2.0}},
    "policy": {"beta": 0.1, "num_iterations": 2},
    "policy-constraint": {"rewards": CONSTRAINED},
}


# A look and a checkpoint at the end alone, for tests that train for longer.
AT_THE_END = {
    "guard": {"rewards": [{"name": "colourfulness"}], "num_prompts": 4, "every": 1000},
    "save_every": 1000,
}


@pytest.fixture(scope="session", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def distilled(request, tiny_sdxl, tmp_path_factory):
    """A recipe with a store and a distilled student, and their folders: an adapter, or weights of its own."""
    folder = tmp_path_factory.mktemp(f"distilled-{request.param}")
    adapter = Lora(rank=2, alpha=2.0) if request.param == "lora" else Full()
    stages = [runs.trajectories(runs.write_prompts(folder)), runs.distill(num_segments=[2], adapter=adapter)]
    recipe = runs.recipe(tiny_sdxl, folder, stages)
    return recipe, [stage.folder for stage in pipeline.run(recipe)]


def over_both(variants: Iterable[str], *over_full: str, soon: Collection[str] | None = None) -> list:
    """(distilled, variant): over an adapter and over full weights.

    Those over full weights that are not in `over_full` are slow, and those over an adapter that are not in `soon`, if
    it is given.
    """
    kinds = {"lora": list(variants) if soon is None else soon, "full": over_full}
    return [
        pytest.param(kind, one, marks=[pytest.mark.slow] * (one not in quick))
        for kind, quick in kinds.items()
        for one in variants
    ]


def tune(distilled, folder: Path, variant: str, **changes) -> Path:
    recipe, (store, student) = distilled
    settings = VARIANTS[variant] | changes
    if "pairs" in settings:
        settings["pairs"] = runs.write_pairs(folder / settings["pairs"])
    stage = runs.tuning(variant.split("-")[0], recipe.stages[0].prompts, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    STAGES[stage.kind].run(stage, recipe, {"trajectories": store, "distill": student}, folder)
    return folder


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / students.PREFERENCE_FILE)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def student_of(distilled, **changes) -> tuning.TunableStudent:
    recipe, (_, student) = distilled
    stage = runs.tuning("feedback", recipe.stages[0].prompts, **changes)
    return tuning.load(stage, teachers.load(recipe.teacher, "cpu"), student / "student", seed=0)


def scored_by_length(monkeypatch, languages: tuple[str, ...] = ("en", "zh")) -> None:
    """Let brightness depend on its prompt: longer ones count more."""

    def scores(self, images, prompts):
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=images.device)
        return images.mean((1, 2, 3)) * 0.1 * lengths

    monkeypatch.setattr("reward_models.brightness.Brightness.__call__", scores)
    monkeypatch.setattr("reward_models.brightness.Brightness.needs_prompt", True)
    monkeypatch.setattr("reward_models.brightness.Brightness.languages", languages)
