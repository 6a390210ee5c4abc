"""Network evaluations that a plan counts are those that a run takes: rows of every denoiser's forward passes."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import runs
from mlcm_rl import pipeline
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.recipe import Samples
from mlcm_rl.stages import distill

MATCHING = {"matching": {"weight": 0.5, "fake": {"rank": 2, "alpha": 2.0, "num_updates": 2}}}
GLOBAL = {"num_segments": [1], "method": "inter_segment"}
DISTILLED = {
    "consistency": {"num_segments": [2], "target": "consistency"},
    "trajectory": {"num_segments": [2], "target": "trajectory"},
    "online": {"num_segments": [2], "source": "online", "prompts": "prompts", "target": "consistency"},
    "data": {"num_segments": [1], "source": "data", "images": "images", "target": "consistency"},
    "global": GLOBAL | {"num_teacher_steps": 2},
    "global-of-samples": GLOBAL | {"renoise": "student", "prompts": "prompts", "num_student_steps": 2},
    "matching": GLOBAL | MATCHING | {"num_student_steps": 3},
    "simulation": MATCHING
    | {"num_segments": [1], "method": "simulation", "prompts": "prompts", "num_student_steps": 2},
}
CONSTRAINED = ["brightness", {"name": "sharpness", "max_drop": 0.5}]
TUNED = {
    "feedback": {"sampling_steps": 3},
    "feedback-all-steps": {"num_grad_steps": 2, "kl": 0.5, "gamma": 1.0, "gradient": "random"},
    "feedback-low-variance": {"gradient": "low_variance", "anchor": 0.5},
    "feedback-consistency": {"consistency": 0.5},
    "feedback-bounded": {"form": "bounded", "gradient": "random", "num_grad_steps": 2, "anchor": 0.5},
    "feedback-matching": MATCHING,
    "feedback-surrogate": {"surrogate": {"num_generations": 2, "width": 4, "head_start": 0}},
    "feedback-constraint": {"rewards": CONSTRAINED},
    "dpo": {"num_generations": 3},
    "dpo-diffusion": {"form": "diffusion_dpo"},
    "dpo-pso": {"form": "pso", "gamma": 1.0, "sampling_steps": 3},
    "dpo-table": {"form": "diffusion_dpo", "pairs": "pairs"},
    "dpo-constraint": {"rewards": CONSTRAINED},
    "policy": {"num_iterations": 2},
    "policy-constraint": {"rewards": CONSTRAINED},
}


# Forms that draw how far a step goes: a plan has the mean of these.
DRAWN = ("online", "simulation", "feedback-all-steps", "feedback-bounded")
SOON = ("global", "matching", "feedback-constraint", "dpo-table", "policy")
SHAPES = {"feedback-surrogate": 1}  # rows that tell a new network the shapes of what it reads


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return runs.write_inputs(tmp_path_factory.mktemp("evaluations"))


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in SOON)) for one in (*DISTILLED, *TUNED)]
)
def test_a_run_takes_what_its_plan_counts(tiny_sdxl, inputs, monkeypatch, name):
    settings = {key: inputs.get(key, value) for key, value in (DISTILLED.get(name) or TUNED[name]).items()}
    given = [runs.trajectories(inputs["prompts"])]
    if name in DISTILLED:
        stage = runs.distill(**settings)
    else:
        given.append(runs.distill(num_segments=[2], adapter={"kind": "lora", "rank": 2, "alpha": 2.0}))
        stage = runs.tuning(name.split("-")[0], inputs["prompts"], **settings)
    recipe = runs.recipe(tiny_sdxl, Path(inputs["prompts"]).parent, [*given, stage], samples=Samples())
    pipeline.run(recipe.model_copy(update={"stages": given}))
    monkeypatch.setattr(distill, "held_out_loss", lambda *_: 0.0)  # a look at training, which no plan counts
    forward, rows = UNet2DConditionModel.forward, []

    def counted(self, sample: torch.Tensor, *arguments, **named):
        rows.append(0 if sample.is_meta else len(sample))  # none of the prediction of memory
        return forward(self, sample, *arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    pipeline.run(recipe)
    planned = network_evaluations(stage, recipe)
    assert sum(rows) - SHAPES.get(name, 0) == (pytest.approx(planned, rel=0.25) if name in DRAWN else planned)
