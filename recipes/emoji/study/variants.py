"""The study behind the table of docs/results.md: every variant on one teacher, over several seeds, in one table.

    python recipes/emoji/study/variants.py [--seeds 3] [--prompts 1000] [--steps 2000] [--rows lcm,...] [KEY=VALUE ...]

Each row is the recipe `recipes/emoji_mlcm.yaml` with other distill settings. All train on the same number of samples,
but for `budgets_long` and `lcm_long` (four times as many and more) and `progressive_second_stage` (a fifth more).
What a student measured is kept, prompt by prompt, in a file of its own in `--results`, and a student that has one is
done: the study may be cut off, go on elsewhere, or be shared among machines (`--seeds 1 --first-seed 2`). Its table,
`variants.tsv` in that folder, is of all files that are there. Finished stages are reused too.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from mlcm_rl.recipe import Distill, Evaluate, Recipe, Stage, Trajectories
from mlcm_rl.recipe.distill import RECOMMENDED
from mlcm_rl.recipe.file import load

sys.path.append(str(Path(__file__).parents[2] / "study"))  # what all studies share

import kept_values
import protocol
import variant_summary
import variant_table

RECIPES = Path(__file__).parents[2]
LORA = {"kind": "lora", "rank": 64, "alpha": 64}
PROGRESSIVE = {"num_segments": [8, 4, 2, 1], "space": ["z", "z", "z", "x0"]}
ONE = {"num_segments": [1], "space": "x0"}
CONDITIONED = {"target": "trajectory", "condition_on_target": True}
BUDGETS = CONDITIONED | RECOMMENDED
LCM = ONE | {"source": "data", "images": "data/emoji_64", "target": "consistency", "target_ema": 0.95}

# Row -> distill settings beside batch size, rate and steps, which all share.
ROWS: dict[str, dict[str, Any]] = {
    "lcm": LCM,
    "lcm_long": LCM,
    "fixed_8": {"num_segments": [8], "target": "consistency"},
    "fixed_8_trajectory": {"num_segments": [8], "target": "trajectory"},
    "fixed_4_trajectory": {"num_segments": [4], "target": "trajectory"},
    "fixed_2_trajectory": {"num_segments": [2], "target": "trajectory"},
    "budgets": BUDGETS,
    "budgets_long": BUDGETS,
    "progressive_trajectory": PROGRESSIVE | {"target": "trajectory"},
    "progressive": PROGRESSIVE | {"target": "consistency"},
    "progressive_log_l2": {"num_segments": [8, 4, 2, 1], "target": "trajectory", "distance": "log_l2"},
    "progressive_kept": PROGRESSIVE | {"target": "trajectory", "keep_segments": True},
    "conditioned_kept": CONDITIONED | {"num_segments": [8, 4, 2, 1], "keep_segments": True},
    "single_trajectory": ONE | {"target": "trajectory"},
    "single_random_skip": ONE | {"target": "consistency", "pair": "random"},
    "single": ONE | {"target": "consistency"},
    "conditioned": CONDITIONED | {"num_segments": [8, 4, 2, 1]},
    "budgets_lora": BUDGETS | {"adapter": LORA},
    "online": PROGRESSIVE
    | {"source": "online", "prompts": "recipes/emoji/prompts/train.jsonl", "target": "consistency"},
}
# `budgets_long`: as long as the dedicated students that it stands for are together; `lcm_long`: at 400 steps of 32 as
# many network evaluations as a student of stored states, the store's 96 a trajectory among them.
LONGER = {"budgets_long": 4, "lcm_long": 4.25}
SECOND_STAGE = {"progressive_second_stage": "progressive"}  # row -> the row whose student it starts from
UNASKED = ("conditioned", "online")  # rows of whose earlier phases nothing is asked
NUM_STEPS = [2, 3, 4, 6, 8]  # of the samplers measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=1000, help="a fifth picks samplers, the rest measures")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=1, help="of a prompt; two or more also measure diversity")
    parser.add_argument("--rows", default=",".join([*ROWS, *SECOND_STAGE]))
    parser.add_argument("--results", type=Path, help="folder of the files [runs/study-<steps>]")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_args()
    base = load(RECIPES / "emoji_mlcm.yaml", arguments.overrides)
    results = arguments.results or Path(base.runs) / f"study-{arguments.steps}"
    base = with_pictures(base, arguments.pictures)
    kept_values.keep(teacher_recipe(base, arguments.prompts), results / f"{kept_values.TEACHER}.safetensors")
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for row in arguments.rows.split(","):
            recipe = recipe_of(base, row, seed, arguments.steps, arguments.prompts)
            kept_values.keep(recipe, results / f"{row}-{seed}.safetensors")
    table = results / "variants.tsv"
    variant_table.write(variant_table.of_values(results), table)
    variant_summary.main(table)
    Console().print(str(table), soft_wrap=True)


def teacher_recipe(base: Recipe, num_prompts: int) -> Recipe:
    """The rows without a student; the reference is reused by the students' evaluations."""
    return base.model_copy(
        update={
            "name": kept_values.TEACHER,
            "stages": [evaluate_stage(base, num_prompts, solvers=["ddim", "dpmpp", "unipc"])],
        }
    )


def recipe_of(base: Recipe, row: str, seed: int, num_steps: int, num_prompts: int) -> Recipe:
    """The recipe of one row: the base's trajectories, its distillation, for a second stage one more, its measures.

    The seed is that of the training alone: all students learn from the same trajectories.
    """
    given = protocol.first_of(base, Distill)
    student = distill_stage(given, SECOND_STAGE.get(row, row), num_steps, seed)
    stages: list[Stage] = [protocol.first_of(base, Trajectories), student]
    if row in SECOND_STAGE:
        second: dict[str, Any] = {
            "method": "inter_segment",
            "num_segments": [1],
            "space": "x0",
            "num_steps": num_steps // 5,
            "seed": seed,
        }
        student = Distill(**second, **shared_settings(given), learning_rate=given.learning_rate)
        stages.append(student)
    gammas = [0.0, 1.0] if student.default_gamma == 1.0 else [0.0]
    students = "last" if row in UNASKED else "snapshots"
    stages.append(evaluate_stage(base, num_prompts, students, gammas))
    return base.model_copy(update={"name": f"{row.replace('_', '-')}-{seed}", "stages": stages})


def distill_stage(given: Distill, row: str, num_steps: int, seed: int) -> Distill:
    """The distill stage of `row`: `num_steps`, or a multiple of them, shared evenly among its phases."""
    settings = ROWS[row]
    return Distill(
        seed=seed,
        num_steps=int(num_steps * LONGER.get(row, 1)) // len(settings["num_segments"]),
        learning_rate=given.learning_rate,
        **(shared_settings(given) | settings),
    )


def with_pictures(base: Recipe, num_pictures: int) -> Recipe:
    """The base with so many pictures of each prompt in its evaluation."""
    settings = {"images_per_prompt": num_pictures}
    stages = [protocol.changed(one, settings) if isinstance(one, Evaluate) else one for one in base.stages]
    return base.model_copy(update={"stages": stages})


def shared_settings(given: Distill) -> dict:
    return {
        "batch_size": given.batch_size,
        "precision": given.precision,
        "adapter": given.adapter.model_dump(),
        "sample_every": 500,
    }


def evaluate_stage(base: Recipe, num_prompts: int, students="snapshots", gammas=(), solvers=()) -> Evaluate:
    """The base's evaluation of what the study compares: `students` under `gammas`, or the teacher's `solvers`."""
    given = protocol.first_of(base, Evaluate)
    chosen = {
        "sampling_steps": NUM_STEPS,
        "gammas": list(gammas) or [0.0],
        "grids": ["milestones"],
        "teacher_steps": [50],
        "distribution": True,  # KID to the teacher's own pictures, whole and on patches
    }
    kept = {"num_prompts": num_prompts, "students": students, "teacher_solvers": list(solvers)}
    return protocol.changed(given, chosen | kept)


if __name__ == "__main__":
    main()
