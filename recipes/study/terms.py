"""What each term of distillation is worth, in LogCD's order, by one protocol: a table of students of one teacher.

    python recipes/study/terms.py emoji [--seeds 2] [--steps 400] [--prompts 128] [--rows local,...] [KEY=VALUE ...]
    python recipes/study/terms.py scenes

A row is a chain of distill stages that share `--steps` optimiser steps: the local stage (8 segments), the global one
after it (a fifth of the steps, at a tenth of the rate), or one student that is told its target (`budgets`). All rows
learn from the same trajectories and are measured on the same prompts and noises. A student that has been measured is
not trained again: the study may be stopped and started. The table is written beside the runs, and printed.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mlcm_rl import pipeline
from mlcm_rl.equations.statistics import mean_and_error
from mlcm_rl.recipe import Distill, Evaluate, Recipe
from mlcm_rl.recipe.file import load
from mlcm_rl.storage.files import replacing

RECIPES = Path(__file__).parents[1]
BASES = {"emoji": "emoji_mlcm.yaml", "scenes": "scenes_demo.yaml"}
GLOBAL_SHARE = 5  # one step in so many is of the second stage

LOCAL = {"num_segments": [8], "target": "trajectory", "distance": "l2"}
FEATURES = {"distance": "features"}
GLOBAL = {"method": "inter_segment", "renoise": "student", "num_segments": [1], "space": "x0"}
BUDGETS = {"condition_on_target": True, "num_segments": [1], "budgets": [2, 3, 4, 6, 8], "distance": "log_l2"}
ADVERSARIAL = {"adversarial": {"weight": 0.1}}
MATCHING = {"matching": {"weight": 1.0}}

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
}
COLUMNS = {
    "emoji": ("distance", "teacher_kid", "teacher_patch_kid", "diversity", "r@1", "r@5"),
    "scenes": ("distance", "teacher_kid", "teacher_patch_kid", "diversity", "right@all", "reward/scene_match"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=BASES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_intermixed_args()
    base = load(RECIPES / BASES[arguments.subject], arguments.overrides)
    rows = arguments.rows.split(",")
    found: dict[str, list[dict]] = {row: [] for row in rows}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for row in rows:
            recipe = recipe_of(base, row, seed, arguments.steps, arguments.prompts)
            report = pipeline.run(recipe)[-1].folder / "report.json"
            found[row].append(json.loads(report.read_text(encoding="utf-8")))
    table = table_of(found, COLUMNS[arguments.subject])
    path = Path(base.runs) / f"terms-{arguments.subject}-{arguments.steps}.tsv"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(table)
    show(table)
    Console().print(str(path), soft_wrap=True)


def recipe_of(base: Recipe, row: str, seed: int, num_steps: int, num_prompts: int) -> Recipe:
    """Return the recipe of one row: the base's trajectories, the chain of `row`, and what it is measured by.

    The seed is that of the training alone.
    """
    trajectories, given = base.stages[0], next(stage for stage in base.stages if isinstance(stage, Distill))
    chain, second = ROWS[row], num_steps // GLOBAL_SHARE
    shared = {
        "batch_size": given.batch_size,
        "precision": given.precision,
        "adapter": given.adapter.model_dump(),
        "sample_every": num_steps,
        "seed": seed,
    }
    first = num_steps - second * (len(chain) - 1)
    stages = [trajectories, Distill(num_steps=first, learning_rate=given.learning_rate, **shared, **chain[0])]
    for settings in chain[1:]:
        prompts = {"prompts": trajectories.prompts} if settings.get("renoise") == "student" else {}
        rate = given.learning_rate / 10
        stages.append(Distill(num_steps=second, learning_rate=rate, **shared, **prompts, **settings))
    evaluate = next(stage for stage in base.stages if isinstance(stage, Evaluate))
    measured = {
        "num_prompts": num_prompts,
        "images_per_prompt": 2,  # whose difference is the diversity
        "sampling_steps": [2, 4, 8],
        "gammas": [0.0, 0.5, 1.0],
        "grids": ["milestones"],
        "teacher_steps": [50],
        "teacher_solvers": ["ddim"],
        "students": "last",
        "distribution": True,
    }
    stages.append(evaluate.model_copy(update=measured))
    return base.model_copy(update={"name": f"terms-{row.replace('_', '-')}-{seed}", "stages": stages})


def table_of(found: dict[str, list[dict]], columns: tuple[str, ...]) -> list[list[str]]:
    """Return the head and a row for each (student, sampler, steps): means over prompts and seeds, with their errors.

    A student of several seeds is the mean of theirs prompt by prompt. The teacher's own rows come last.
    """
    lines = [["student", "sampler", "evaluations", "seeds", *columns]]
    reports = [(row, of_seeds, True) for row, of_seeds in found.items()]
    reports.append(("teacher", next(iter(found.values()))[:1], False))
    for name, of_seeds, of_students in reports:
        for i, row in enumerate(of_seeds[0]["rows"]):
            if (row["role"] == "student") != of_students:
                continue
            same = [report["rows"][i] for report in of_seeds]
            cells = [cell([one["metrics"].get(column) for one in same]) for column in columns]
            lines.append([name, row["sampler"], str(row["num_evaluations"]), str(len(same)), *cells])
    return lines


def cell(summaries: list[dict | None]) -> str:
    """Return "mean +- error" of one metric over seeds; the error of prompts is taken after the mean over seeds."""
    known = [one for one in summaries if one is not None and one["mean"] is not None]
    if not known:
        return ""
    if all(one["values"] for one in known):
        values = torch.tensor([[float("nan") if v is None else v for v in one["values"]] for one in known])
        mean, error = mean_and_error(values.double().mean(0))
    else:
        mean, error = (sum(one[key] for one in known) / len(known) for key in ("mean", "se"))
    return f"{mean:.4f} +- {error:.4f}"


def show(lines: list[list[str]]) -> None:
    """Print the table."""
    table = Table(*lines[0], box=None, header_style="bold")
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
