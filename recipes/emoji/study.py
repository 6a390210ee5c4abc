"""The study behind the README's table: every variant on one teacher, the same samples, one report a seed.

    python recipes/emoji/study.py [--seeds 3] [--prompts 1000] [--steps 2000] [--rows progressive,...] [KEY=VALUE ...]

Each row is the recipe `recipes/emoji_mlcm.yaml` with other distill settings; all train on the same number of samples.
Interrupted, it goes on where it was: finished stages are found again.
"""

import argparse
from pathlib import Path

from rich.console import Console

from mlcm_rl import pipeline
from mlcm_rl.recipe import Distill, Evaluate, Recipe
from mlcm_rl.recipe_file import load

HERE = Path(__file__).parent
LORA = {"kind": "lora", "rank": 64, "alpha": 64}
PROGRESSIVE = {"segments": [8, 4, 2, 1], "space": ["z", "z", "z", "x0"]}
ONE = {"segments": [1], "space": "x0"}
CONDITIONED = {"segments": [8, 4, 2, 1], "target": "trajectory", "condition_on_target": True}

# Row -> distill settings beside batch size, rate and steps, which all share.
ROWS = {
    "progressive": PROGRESSIVE | {"target": "consistency"},
    "progressive_trajectory": PROGRESSIVE | {"target": "trajectory"},
    "fixed_8": {"segments": [8], "target": "consistency"},
    "single": ONE | {"target": "consistency"},
    "single_random_skip": ONE | {"target": "consistency", "pair": "random"},
    "single_trajectory": ONE | {"target": "trajectory"},
    "lcm": ONE | {"source": "data", "images": "data/emoji_64", "target": "consistency", "target_ema": 0.95},
    "fixed_4_trajectory": {"segments": [4], "target": "trajectory"},
    "fixed_2_trajectory": {"segments": [2], "target": "trajectory"},
    "conditioned": CONDITIONED,
    "conditioned_lora": CONDITIONED | {"adapter": LORA},
    "online": PROGRESSIVE
    | {"source": "online", "prompts": "recipes/emoji/prompts/train.jsonl", "target": "consistency"},
}
SECOND_STAGE = {"progressive_second_stage": "progressive"}  # row -> the row whose student it starts from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", default=",".join([*ROWS, *SECOND_STAGE]))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        base = load(HERE.parent / "emoji_mlcm.yaml", [f"seed={seed}", *arguments.overrides])
        folder = study(base, arguments.rows.split(","), arguments.steps, arguments.prompts)
        Console().print(f"seed {seed}: {folder / 'report.html'}", soft_wrap=True)


def study(base: Recipe, rows: list[str], num_steps: int, num_prompts: int) -> Path:
    """Train every row from `base` and put them into one report; returns its folder."""
    students = {row: pipeline.run(recipe_of(base, row, num_steps))[-1].folder for row in rows}
    evaluate = next(stage for stage in base.stages if isinstance(stage, Evaluate))
    changes = {"num_prompts": num_prompts, "students": "snapshots", "also": [str(path) for path in students.values()]}
    stages = [evaluate.model_copy(update=changes)]
    return pipeline.run(base.model_copy(update={"name": f"study-{base.seed}", "stages": stages}))[-1].folder


def recipe_of(base: Recipe, row: str, num_steps: int) -> Recipe:
    """The recipe of one row: the base's trajectories, then its distillation, and for a second stage one more."""
    trajectories, given = base.stages[0], base.stages[1]
    first = distill_stage(given, SECOND_STAGE.get(row, row), num_steps)
    stages = [trajectories, first]
    if row in SECOND_STAGE:
        second = {"method": "inter_segment", "segments": [1], "space": "x0", "num_steps": num_steps // 5}
        stages.append(Distill(**second, **shared_settings(given), learning_rate=1e-4))
    name = f"study-{base.seed}-{row.replace('_', '-')}"
    return base.model_copy(update={"name": name, "stages": stages})


def distill_stage(given: Distill, row: str, num_steps: int) -> Distill:
    """The distill stage of `row`: `num_steps` shared evenly among its phases."""
    settings = ROWS[row]
    return Distill(
        num_steps=num_steps // len(settings["segments"]),
        learning_rate=given.learning_rate,
        **(shared_settings(given) | settings),
    )


def shared_settings(given: Distill) -> dict:
    return {"batch_size": given.batch_size, "adapter": given.adapter.model_dump(), "sample_every": 500}


if __name__ == "__main__":
    main()
