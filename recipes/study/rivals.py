"""The rivals by one protocol: LCM, PCM, SDXL-Lightning, Hyper-SD, DMD2 and ours on one teacher, in equal evaluations.

    python recipes/study/rivals.py emoji [--seeds 2] [--steps 2000] [--prompts 128] [--rows ours,...] [KEY=VALUE ...]
    python recipes/study/rivals.py scenes

Every row costs what `ours` costs in `--steps` optimiser steps: network evaluations, with those of the store if the row
reads one, as `mlcm plan` counts them. All rows take batch, adapter and precision of the base recipe, and are measured
with 1 to 8 steps on the same prompts and noises; a student of one step that predicts x0 with that one alone. A method
that makes a student for each number of steps is measured with these. Which keys
each method is in, and how it differs from what was published: docs/rivals.md. `lcm` and `dmd2` read captioned pictures,
which `recipes/emoji/build/rebuild.py --only pictures captions` and `recipes/scenes/build/scene_pictures.py` make; the
others read the teacher alone.
Finished stages are reused: the study may be stopped and started. The table is written beside the runs, and printed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import protocol
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.recipe import Distill, Evaluate, Feedback, Recipe, Samples, Stage, Trajectories
from mlcm_rl.recipe.distill import RECOMMENDED
from mlcm_rl.recipe.families import layout_of

BASES = {"emoji": "emoji_demo.yaml", "scenes": "scenes_demo.yaml"}
DATA = protocol.RECIPES.parent / "data"
PICTURES = {"emoji": DATA / "emoji_64", "scenes": DATA / "scenes_128"}
SAMPLING_STEPS = [1, 2, 3, 4, 6, 8]

# Heads that learn at 1e-4 are at chance after the steps that there are: an adversary of these says nothing.
HEADS = {"adversarial": {"weight": 0.1, "jumps": "all", "learning_rate": 1e-3}}
PAIRS = {"adversarial": HEADS["adversarial"] | {"sees_start": True, "times": (0.0, 0.1)}}  # of SDXL-Lightning
SEGMENTS = {"target": "consistency", "ends": "random", "target_ema": 0.95}  # of Hyper-SD
WHOLE = {"starts": "milestones", "target": "trajectory"}  # of SDXL-Lightning
ONE_STEP = WHOLE | {"num_segments": [1], "prediction": "x0"}  # of its student of one step


class Part(NamedTuple):
    """A stage of a row: its share of the row's optimiser steps, the factor of the base's rate, and its settings.

    A method that publishes a student for each number of steps is measured with that one, at `sampling_steps`; without
    any, a part's student is only what the next one starts from. That of the last part is for all that are left.
    """

    share: float
    rate: float
    settings: dict[str, Any]
    sampling_steps: tuple[int, ...] = ()


ROWS: dict[str, list[Part]] = {
    "lcm": [
        Part(
            1.0,
            1.0,
            {
                "source": "data",
                "num_segments": [1],
                "target": "consistency",
                "target_ema": 0.95,
                "space": "x0",
                "distance": "huber",
            },
        )
    ],
    "pcm": [Part(1.0, 1.0, {"num_segments": [4], "target": "consistency", "distance": "huber"} | HEADS)],
    "lightning": [
        Part(0.3, 1.0, WHOLE | {"num_segments": [8]}),
        Part(0.2, 1.0, WHOLE | {"num_segments": [8]} | PAIRS, (6, 8)),
        Part(0.25, 1.0, WHOLE | {"num_segments": [4]} | PAIRS, (3, 4)),
        Part(0.25, 1.0, WHOLE | {"num_segments": [2]} | PAIRS),
    ],
    "lightning_one_step": [
        Part(0.2, 1.0, WHOLE | {"num_segments": [2]}),
        Part(0.5, 1.0, ONE_STEP),
        Part(0.3, 0.3, ONE_STEP | PAIRS),
    ],
    "hyper_sd": [
        Part(0.25, 1.0, SEGMENTS | {"num_segments": [8]}, (6, 8)),
        Part(0.25, 1.0, SEGMENTS | {"num_segments": [4]}, (3, 4)),
        Part(0.25, 0.5, SEGMENTS | {"num_segments": [2]} | HEADS, (2,)),
        Part(0.25, 0.5, SEGMENTS | {"num_segments": [1]} | HEADS),
    ],
    "dmd2": [
        Part(
            1.0,
            0.1,
            {
                "method": "simulation",
                "num_segments": [1],
                "num_student_steps": 4,
                "matching": {"weight": 1.0, "fake": {"num_updates": 5, "learning_rate": 1e-3}},
                "adversarial": {"weight": 5e-3, "loss": "softplus", "real": "images", "learning_rate": 1e-3},
            },
        )
    ],
    "ours": [Part(1.0, 1.0, RECOMMENDED)],
}
# A row's student, tuned by the base's feedback stage as an adapter of its own, for one step in ten of distillation;
# without `consistency`, which is distillation.
TUNING_SHARE = 0.1
TUNED = {"hyper_sd_feedback": "hyper_sd", "ours_feedback": "ours"}
COLUMNS = {
    "emoji": (
        *("distance", "teacher_kid", "teacher_patch_kid", "diversity", "r@1", "r@5"),
        *("reward/emoji_style_judge", "reward/emoji_alignment"),
    ),
    "scenes": (
        *("distance", "teacher_kid", "teacher_patch_kid", "diversity", "right@all"),
        *("reward/scene_match", "reward/scene_count"),
    ),
}


def main() -> None:
    protocol.run(str(__doc__), BASES, [*ROWS, *TUNED], COLUMNS, "rivals", 2000, recipe_of)


def recipe_of(base: Recipe, subject: str, row: str, seed: int, num_steps: int, num_prompts: int) -> Recipe:
    """Return the recipe of one row, of as many evaluations as `ours` has in `num_steps`; the seed is of training."""
    base = base.model_copy(update={"samples": Samples()})  # whose grids are evaluations too
    budget = evaluations(base, stages_of(base, subject, "ours", seed, num_steps))
    steps = steps_within(budget, lambda steps: evaluations(base, stages_of(base, subject, row, seed, steps)))
    stages, left = list[Stage](), list(SAMPLING_STEPS)
    parts = iter(ROWS.get(row, []))  # a tuned row is measured at its end alone
    for stage in stages_of(base, subject, row, seed, steps):
        stages.append(stage)
        part = next(parts, None) if isinstance(stage, Distill) else None
        if part and part.sampling_steps:
            stages.append(protocol.evaluate_stage(base, subject, num_prompts, list(part.sampling_steps)))
            left = [steps for steps in left if steps not in part.sampling_steps]
    stages.append(protocol.evaluate_stage(base, subject, num_prompts, left))
    return base.model_copy(update={"name": f"rivals-{row.replace('_', '-')}-{seed}", "stages": stages})


def stages_of(base: Recipe, subject: str, row: str, seed: int, num_steps: int) -> list[Stage]:
    """Return the stages of `row` that cost something: the store if it reads one, its chain of about `num_steps`."""
    trajectories, peak = protocol.first_of(base, Trajectories), protocol.rate_of(base)
    shared = protocol.training_settings(base, seed, num_steps)
    chain: list[Stage] = []
    for share, rate, settings, _ in ROWS[TUNED.get(row, row)]:
        files = {}
        if layout_of(base.teacher.family).is_flow:  # its velocity is x_t - x0 at the noisiest time: nothing to swap
            settings = {name: value for name, value in settings.items() if name != "prediction"}
        if settings.get("method") == "simulation":
            files["prompts"] = trajectories.prompts
        if "source" in settings or settings.get("adversarial", {}).get("real") == "images":
            files["images"] = str(PICTURES[subject])
        steps = max(1, round(num_steps * share))
        chain.append(Distill(num_steps=steps, learning_rate=peak * rate, **shared, **files, **settings))
    if row in TUNED:
        tuning = protocol.first_of(base, Feedback)
        steps = max(1, round(num_steps * TUNING_SHARE))
        chain.append(protocol.changed(tuning, {"consistency": 0.0, "seed": seed, "num_steps": steps}))
    reads = any(isinstance(stage, Distill) and stage.reads_trajectories for stage in chain)
    return [trajectories, *chain] if reads else chain


def evaluations(base: Recipe, stages: list[Stage]) -> int:
    """Return the network evaluations of `stages`, in a recipe of the base's teacher."""
    recipe = base.model_copy(update={"stages": stages})
    return sum(network_evaluations(stage, recipe) for stage in stages if not isinstance(stage, Evaluate))


def steps_within(budget: int, cost: Callable[[int], int]) -> int:
    """Return the steps (1 or more) whose cost, which grows with them, is nearest to `budget`.

    Raise ValueError where one step is past it: what does not depend on steps takes more than there is.
    """
    if cost(1) > budget:
        raise ValueError(f"what is before the first step takes {cost(1):,} evaluations of {budget:,}: raise --steps")
    low, high = 1, 2
    while cost(high) < budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < budget else (low, middle)
    return min((low, high), key=lambda steps: abs(cost(steps) - budget))


if __name__ == "__main__":
    main()
