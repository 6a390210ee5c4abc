"""The logs of a few short runs of every training stage, stored: a refactor leaves them, a change of maths changes this
file with a reason.

MLCM_RL_UPDATE_GOLDEN=1 pytest tests/golden      writes curves.json anew
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

import runs
import text_adapters
from mlcm_rl import pipeline
from mlcm_rl.recipe import Stage, TrainControl, TrainPerceptual, TrainReward, TrainTeacher

CURVES = Path(__file__).with_name("curves.json")
# Counts, and small differences of large figures, which another processor's rounding shows in.
LEFT_OUT = {
    "step",
    "accuracy",
    "clipped",
    "margin",
    "log_ratio_chosen",
    "log_ratio_rejected",
    "held_out_accuracy",
    "held_out_accuracy/seen_one",
    "held_out_accuracy/unseen_one",
    "guard/trained_gain",
    "guard/held_out_gain",
    "guard/win_rate/brightness",
    "guard/win_rate/colourfulness",
    "drop/sharpness",
    "guard/drop/sharpness",
    "multiplier/sharpness",
}

DISTILLED = {
    "progressive-lora": {"num_segments": [8, 4, 2, 1], "target": "consistency", "space": ["z", "z", "z", "x0"]},
    "conditioned-full": {
        "num_segments": [8, 1],
        "condition_on_target": True,
        "adapter": {"kind": "full"},
        "distance": "huber",
    },
    "random-skip-average": {
        "num_segments": [1],
        "target": "consistency",
        "pair": "random",
        "target_ema": 0.9,
        "num_steps": 3,
    },
    "second-stage": {"num_segments": [1], "method": "inter_segment", "num_steps": 3},
    "budgets": {"num_segments": [1], "condition_on_target": True, "budgets": [2, 3, 4, 6, 8], "distance": "log_l2"},
    "online": {"num_segments": [2], "source": "online", "prompts": "prompts", "target": "consistency"},
    "features": {"num_segments": [1], "target": "trajectory", "distance": "features", "feature_time": 20},
    "matching-adversarial": {
        "num_segments": [1],
        "method": "inter_segment",
        "renoise": "student",
        "prompts": "prompts",
        "space": "x0",
        "num_student_steps": 2,
        "matching": {"weight": 0.5, "fake": {"rank": 2, "alpha": 2.0, "num_updates": 2}},
        "adversarial": {"width": 4, "gradient_penalty": 0.01},
    },
    "simulation": {
        "num_segments": [1],
        "method": "simulation",
        "prompts": "prompts",
        "num_student_steps": 2,
        "matching": {"weight": 1.0, "fake": {"rank": 2, "alpha": 2.0}},
        "adversarial": {"width": 4, "loss": "softplus", "real": "images"},
        "images": "images",
    },
    "milestones-relativistic": {
        "num_segments": [2],
        "starts": "milestones",
        "target": "trajectory",
        "adversarial": {"width": 4, "jumps": "all", "sees_start": True, "loss": "relativistic"},
    },
    "data": {"num_segments": [1], "source": "data", "images": "images", "target": "consistency", "distance": "huber"},
}
TUNED = {
    "feedback-last": {},
    "feedback-draft-k": {"num_grad_steps": 2, "anchor": 0.5, "shape": "hinge", "threshold": 5.0},
    "feedback-refl": {"gradient": "random", "num_grad_steps": 2, "gamma": 1.0, "kl": 0.5},
    "feedback-low-variance": {"gradient": "low_variance", "anchor": 0.5, "consistency": 0.5},
    "feedback-bounded": {"form": "bounded", "gradient": "random", "num_grad_steps": 2},
    "feedback-matching": {"gradient": "low_variance", "matching": {"weight": 0.5, "fake": {"rank": 2, "alpha": 2.0}}},
    "feedback-surrogate": {"surrogate": {"num_generations": 2, "width": 4, "head_start": 1}},
    "feedback-constraint": {"rewards": ["brightness", {"name": "sharpness", "max_drop": 0.0}], "multiplier_rate": 5.0},
    "dpo-endpoint": {},
    "dpo-diffusion": {"form": "diffusion_dpo", "loss_type": "conservative", "label_smoothing": 0.1, "space": "x0"},
    "dpo-pso": {"form": "pso", "gamma": 1.0, "loss_type": "robust", "label_smoothing": 0.1},
    "dpo-table": {"pairs": "pairs", "form": "diffusion_dpo", "kappa": 0.1},
    "policy": {"beta": 0.1, "num_iterations": 2},
}
REWARDS = {backbone: {"backbone": backbone} for backbone in ("efficientnet_lite0", "mobilenet_v2")}
ADAPTED = {
    "adapt-text": {"features": 3.0, "outputs": 0.5},
    "adapt-text-features": {"outputs": 0.0, "num_layers": 2, "warmup_steps": 1},
}
TEACHERS = {"teacher-random": {"prompt_dropout": 0.5}, "teacher-min-snr": {"start": "teacher", "min_snr_gamma": 5.0}}
CONTROLS = {"control": {}}
PERCEPTUAL = {
    "perceptual": {"widths": [4, 6], "depths": [1, 1], "distortions": ["blur"], "held_out_distortions": ["noise"]}
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("golden")
    return runs.write_inputs(folder) | {
        "parallel": text_adapters.write_parallel(folder),
        "encoder": text_adapters.encoder(folder / "encoder"),
    }


def stages_of(name: str, inputs: dict[str, str]) -> list[Stage]:
    """The stages of a run, of which the last is the one that is looked at."""
    given = DISTILLED.get(name) or TUNED.get(name) or REWARDS.get(name) or TEACHERS.get(name) or {}
    changes = {key: inputs.get(key, value) for key, value in given.items()}
    steps = {"num_steps": 3, "log_every": 1}
    if name in REWARDS:
        return [TrainReward(pairs=inputs["pairs"], batch_size=3, held_out=0.3, held_out_every=1, **steps, **changes)]
    if name in TEACHERS:
        return [TrainTeacher(images=inputs["images"], batch_size=4, warmup_steps=1, **steps, **changes)]
    if name in PERCEPTUAL:
        settings = {"images": inputs["images"], "batch_size": 4, "num_held_out_pairs": 4, "warmup_steps": 1}
        return [TrainPerceptual(**steps, **settings, **PERCEPTUAL[name])]
    if name in ADAPTED:
        adapted = text_adapters.stage(inputs["parallel"], inputs["encoder"], **ADAPTED[name])
        return [runs.trajectories(inputs["parallel"]), adapted]
    store = runs.trajectories(inputs["prompts"])
    if name in CONTROLS:
        return [store, TrainControl(batch_size=4, warmup_steps=1, learning_rate=1e-3, **steps)]
    if name in DISTILLED:
        return [store, runs.distill(**changes)]
    tuned = runs.tuning(name.split("-")[0], inputs["prompts"], **steps, **changes)
    return [store, runs.distill(num_segments=[2], adapter={"kind": "lora", "rank": 2, "alpha": 2.0}), tuned]


def figures(tiny_sdxl: Path, inputs: dict[str, str], name: str) -> dict[str, list[float]]:
    """What the run's log says of its steps, by the figure's name."""
    recipe = runs.recipe(tiny_sdxl, Path(inputs["prompts"]).parent, stages_of(name, inputs))
    log = pipeline.run(recipe)[-1].folder / "log.jsonl"
    found = defaultdict(list)
    for line in log.read_text().splitlines():
        for figure, value in json.loads(line).items():
            found[figure].append(value)
    return {figure: values for figure, values in found.items() if figure not in LEFT_OUT}


@pytest.mark.parametrize("name", [*DISTILLED, *TUNED, *ADAPTED, *REWARDS, *TEACHERS, *CONTROLS, *PERCEPTUAL])
def test_figures_are_those_stored(tiny_sdxl, inputs, name):
    found = figures(tiny_sdxl, inputs, name)
    stored = json.loads(CURVES.read_text()) if CURVES.is_file() else {}
    if os.environ.get("MLCM_RL_UPDATE_GOLDEN"):
        CURVES.write_text(json.dumps(stored | {name: found}, indent=1) + "\n")
        return
    # Another processor sums in another order: equal to a thousandth everywhere, to the last digit on one machine.
    assert found.keys() == stored[name].keys()
    for figure, values in found.items():
        assert values == pytest.approx(stored[name][figure], rel=1e-3), figure
