"""What each term of distillation is worth, in LogCD's order, by one protocol: a table of students of one teacher.

    python recipes/study/terms.py emoji [--seeds 2] [--steps 400] [--prompts 128] [--rows local,...] [KEY=VALUE ...]
    python recipes/study/terms.py scenes

A row is a chain of distill stages that share `--steps` optimiser steps: the local stage (8 segments), the global one
after it (a fifth of the steps, at a tenth of the rate), or one student that is told its target (`budgets`). All rows
learn from the same trajectories and are measured on the same prompts and noises. A student that has been measured is
not trained again: the study may be stopped and started. The table is written beside the runs, and printed.
"""

import protocol
from mlcm_rl.recipe import Distill, Recipe, Stage, Trajectories
from mlcm_rl.recipe.distill import RECOMMENDED

BASES = {"emoji": "emoji_demo.yaml", "scenes": "scenes_demo.yaml"}
GLOBAL_SHARE = 5  # one step in so many is of the second stage

LOCAL = {"num_segments": [8], "target": "trajectory", "distance": "l2"}
FEATURES = {"distance": "features"}
GLOBAL = {"method": "inter_segment", "renoise": "student", "num_segments": [1], "space": "x0"}
BUDGETS = RECOMMENDED
ADVERSARIAL = {"adversarial": {"weight": 0.1, "learning_rate": 1e-3}}  # at 1e-4 its heads stay at chance
MATCHING = {"matching": {"weight": 1.0, "fake": {"learning_rate": 1e-3}}}
# Beside the gradient of `log_l2`, which does not shrink with the error, terms of these weights move nothing.
ADVERSARIAL_10 = {
    "adversarial": {"weight": 10.0, "learning_rate": 1e-3, "jumps": "all", "sees_start": True, "loss": "relativistic"}
}
MATCHING_10 = {"matching": MATCHING["matching"] | {"weight": 10.0}}
WARM_UP_SHARE = 5  # in one step in so many of a second stage the fake score learns alone

# Row -> the settings of its stages; the second stage has a fifth of the steps and a tenth of the rate.
ROWS: dict[str, list[dict]] = {
    "local_consistency": [LOCAL | {"target": "consistency"}],
    "local": [LOCAL],
    "local_features": [LOCAL | FEATURES],
    "global": [LOCAL | FEATURES, GLOBAL | FEATURES],
    "global_adversarial": [LOCAL | FEATURES, GLOBAL | FEATURES | ADVERSARIAL],
    "global_matching": [LOCAL | FEATURES, GLOBAL | FEATURES | ADVERSARIAL | MATCHING],
    "budgets": [BUDGETS],
    "budgets_features": [BUDGETS | {"distance": "log_features"}],
    "budgets_twice": [BUDGETS, BUDGETS],
    "budgets_adversarial": [BUDGETS, BUDGETS | ADVERSARIAL],
    "budgets_matching": [BUDGETS, BUDGETS | MATCHING],
    "budgets_adversarial_10": [BUDGETS, BUDGETS | ADVERSARIAL_10],
    "budgets_matching_10": [BUDGETS, BUDGETS | MATCHING_10],
}
COLUMNS = {
    "emoji": ("distance", "teacher_kid", "teacher_patch_kid", "diversity", "r@1", "r@5"),
    "scenes": ("distance", "teacher_kid", "teacher_patch_kid", "diversity", "right@all", "reward/scene_match"),
}


def main() -> None:
    protocol.run(str(__doc__), BASES, list(ROWS), COLUMNS, "terms", 400, recipe_of)


def recipe_of(base: Recipe, subject: str, row: str, seed: int, num_steps: int, num_prompts: int) -> Recipe:
    """Return the recipe of one row: the base's trajectories, the chain of `row`, and what it is measured by.

    The seed is that of the training alone.
    """
    trajectories, rate = protocol.first_of(base, Trajectories), protocol.rate_of(base)
    chain, second = ROWS[row], num_steps // GLOBAL_SHARE
    shared = protocol.training_settings(base, seed, num_steps)
    first = num_steps - second * (len(chain) - 1)
    stages: list[Stage] = [trajectories, Distill(num_steps=first, learning_rate=rate, **shared, **chain[0])]
    for settings in chain[1:]:
        prompts = {"prompts": trajectories.prompts} if settings.get("renoise") == "student" else {}
        if "matching" in settings:
            fake = {**settings["matching"]["fake"], "warmup_steps": second // WARM_UP_SHARE}
            settings = settings | {"matching": settings["matching"] | {"fake": fake}}
        stages.append(Distill(num_steps=second, learning_rate=rate / 10, **shared, **prompts, **settings))
    stages.append(protocol.evaluate_stage(base, subject, num_prompts, [2, 4, 8]))
    return base.model_copy(update={"name": f"terms-{row.replace('_', '-')}-{seed}", "stages": stages})


if __name__ == "__main__":
    main()
