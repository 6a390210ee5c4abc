"""What the studies of this folder share: the settings of training, the protocol of measuring, the table of students."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mlcm_rl import pipeline
from mlcm_rl.equations.statistics import mean_and_error
from mlcm_rl.recipe import Distill, Evaluate, Recipe
from mlcm_rl.storage.files import replacing

RECIPES = Path(__file__).parents[1]


def training_settings(base: Recipe, seed: int, num_steps: int) -> dict:
    """Return the settings of training that all rows take from the base's distill stage; the seed is theirs alone."""
    given = distill_of(base)
    return {
        "batch_size": given.batch_size,
        "precision": given.precision,
        "adapter": given.adapter.model_dump(),
        "sample_every": num_steps,
        "seed": seed,
    }


def distill_of(base: Recipe) -> Distill:
    """Return the base's distill stage."""
    return next(stage for stage in base.stages if isinstance(stage, Distill))


def evaluate_stage(base: Recipe, num_prompts: int, sampling_steps: list[int]) -> Evaluate:
    """Return the base's evaluation of `num_prompts`: the last student in `sampling_steps`, beside the teacher's 50."""
    evaluate = next(stage for stage in base.stages if isinstance(stage, Evaluate))
    measured = {
        "num_prompts": num_prompts,
        "images_per_prompt": 2,  # whose difference is the diversity
        "sampling_steps": sampling_steps,
        "gammas": [0.0, 0.5, 1.0],
        "grids": ["milestones"],
        "teacher_steps": [50],
        "teacher_solvers": ["ddim"],
        "students": "last",
        "distribution": True,
    }
    return evaluate.model_copy(update=measured)


def measure(recipes: Iterator[tuple[str, Recipe]]) -> dict[str, list[dict]]:
    """Run the recipes, each of a named row, and return the reports of every row; finished stages are reused."""
    reports: dict[str, list[dict]] = {}
    for row, recipe in recipes:
        report = pipeline.run(recipe)[-1].folder / "report.json"
        reports.setdefault(row, []).append(json.loads(report.read_text(encoding="utf-8")))
    return reports


def write_table(reports: dict[str, list[dict]], columns: tuple[str, ...], path: Path) -> None:
    """Write the table of `reports` to `path`, and print it."""
    table = table_of(reports, columns)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(table)
    show(table)
    Console().print(str(path), soft_wrap=True)


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
