"""What the studies of this folder share: the settings of training, the protocol of measuring, the table of students."""

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kept_values
from mlcm_rl.equations.statistics import mean_and_error
from mlcm_rl.recipe import Distill, Evaluate, Recipe
from mlcm_rl.recipe.file import load
from mlcm_rl.storage.files import replacing

RECIPES = Path(__file__).parents[1]
GAMMAS = {"emoji": [0.0, 0.5, 1.0], "scenes": [0.0, 0.5]}  # subject -> those that students are sampled at
LESS_IS_BETTER = ("distance", "teacher_kid", "teacher_patch_kid")
IN_THOUSANDTHS = {"teacher_kid": "KID", "teacher_patch_kid": "KID of patches"}
UNRANKED = ("diversity",)  # neither more nor less of it is better


def run(
    description: str,
    bases: dict[str, str],
    rows: Sequence[str],
    columns: dict[str, tuple[str, ...]],
    name: str,
    num_steps: int,
    recipe_of: Callable[[Recipe, str, str, int, int, int], Recipe],
) -> None:
    """Run the study of the command line: `rows` on a subject of `bases`, each by `recipe_of`, then print its tables.

    `recipe_of` is given the base, the subject, the row, the seed of training, the optimiser steps, and the prompts.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=bases)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=num_steps)
    parser.add_argument("--rows", default=",".join(rows))
    parser.add_argument("--results", type=Path, help=f"folder of what is measured [runs/{name}-<subject>-<steps>]")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is measured, and run nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_intermixed_args()
    base, subject = load(RECIPES / bases[arguments.subject], arguments.overrides), arguments.subject
    results = arguments.results or Path(base.runs) / f"{name}-{subject}-{arguments.steps}"
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for row in [] if arguments.tables else arguments.rows.split(","):
            recipe = recipe_of(base, subject, row, seed, arguments.steps, arguments.prompts)
            kept_values.keep(recipe, results / f"{row}-{seed}.safetensors", columns[subject])
    write_tables(results, columns[subject], list(rows))


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


def evaluate_stage(base: Recipe, subject: str, num_prompts: int, sampling_steps: list[int]) -> Evaluate:
    """Return the base's evaluation of `num_prompts`: the last student in `sampling_steps`, beside the teacher's 50."""
    evaluate = next(stage for stage in base.stages if isinstance(stage, Evaluate))
    measured = {
        "num_prompts": num_prompts,
        "images_per_prompt": 2,  # whose difference is the diversity
        "sampling_steps": sampling_steps,
        "gammas": GAMMAS[subject],
        "grids": ["milestones"],
        "teacher_steps": [50],
        "teacher_solvers": ["ddim"],
        "students": "last",
        "distribution": True,
    }
    return evaluate.model_copy(update=measured)


def write_tables(folder: Path, columns: tuple[str, ...], order: Sequence[str]) -> None:
    """Write the table of the students in `folder` to `table.tsv` there; print it, and one of each column by steps."""
    lines = table_of(folder, columns, order)
    path = folder / "table.tsv"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(lines)
    show(lines)
    for column in (one for one in columns if one not in UNRANKED):
        Console().print(f"\n{title_of(column)}\n\n{markdown(by_steps(lines, column))}", soft_wrap=True)
    Console().print(f"\n{path}", soft_wrap=True)


def table_of(folder: Path, columns: tuple[str, ...], order: Sequence[str] = ()) -> list[list[str]]:
    """Return the head and a row for each (student, sampler, steps): means over prompts and seeds, with their errors.

    A student of several seeds is the mean of theirs prompt by prompt. A student that was tuned
    has the name of its stage behind the row's. Students are in the `order` of their rows, others after them; the
    teacher's own rows come last.
    """
    rows = kept_values.files_of(folder, order)
    files = [(place, row, path) for place, (row, paths) in enumerate(rows.items()) for path in paths]
    files.append((len(rows), "", folder / f"{kept_values.TEACHER}.safetensors"))
    found: dict[tuple[int, str, str, int], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for place, row, path in files:
        for (name, sampler, evaluations, metric), values in kept_values.read(path).items():
            label = name if not row else row if name == "student" else f"{row} ({name})"
            found[place, label, sampler, evaluations][metric].append(values)
    head = ["student", "sampler", "evaluations", "seeds", *columns]
    return [head, *(line(point[1:], found[point], columns) for point in sorted(found))]


def line(point: tuple[str, str, int], seeds: dict[str, list[Tensor]], columns: tuple[str, ...]) -> list[str]:
    """Return the row of one (student, sampler, steps), of the values (P,) of each seed by metric."""
    student, sampler, evaluations = point
    num_seeds = max(map(len, seeds.values()))
    return [student, sampler, str(evaluations), str(num_seeds), *(cell(seeds.get(column, [])) for column in columns)]


def cell(seeds: list[Tensor]) -> str:
    """Return "mean +- error" of the values (P,) of seeds; the error of prompts is taken after the mean over seeds."""
    if not seeds:
        return ""
    mean, error = mean_and_error(torch.stack(seeds).mean(0))
    return "" if math.isnan(mean) else f"{mean:.4f} +- {error:.4f}"


def by_steps(lines: list[list[str]], column: str) -> list[list[str]]:
    """Return the table of `column` with a row for each student and a column for each number of steps.

    A cell is that of the student's best sampler: the one with the least distance or KID, the most of what is right.
    """
    head, *rows = lines
    place, sign = head.index(column), -1 if column in LESS_IS_BETTER else 1
    best: dict[tuple[str, str], str] = {}
    for row in rows:
        key = row[0], row[2]
        if row[place] and (key not in best or sign * mean_in(row[place]) > sign * mean_in(best[key])):
            best[key] = row[place]
    steps = sorted({row[2] for row in rows}, key=int)
    seeds = {row[0]: row[3] for row in rows}
    short = {key: shortened(written, column) for key, written in best.items()}
    table = [[name, number, *(short.get((name, step), "-") for step in steps)] for name, number in seeds.items()]
    return [["student", "seeds", *steps], *table]


def title_of(column: str) -> str:
    """Return what a table by steps is of, a sentence."""
    name = f"1,000 {IN_THOUSANDTHS[column]} to the teacher" if column in IN_THOUSANDTHS else column
    return f"{name[0].upper()}{name[1:]}, by network evaluations, each student under its best sampler:"


def shortened(written: str, column: str) -> str:
    """Return a cell to a thousandth, and KID in thousandths to a tenth of one."""
    factor, digits = (1000, 1) if column in IN_THOUSANDTHS else (1, 3)
    return " +- ".join(f"{factor * float(part):.{digits}f}" for part in written.split(" +- "))


def mean_in(written: str) -> float:
    """Return the mean of a cell."""
    return float(written.split(" ")[0])


def markdown(lines: list[list[str]]) -> str:
    """Return the table as Markdown."""
    head, *rows = lines
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def show(lines: list[list[str]]) -> None:
    """Print the table."""
    table = Table(*lines[0], box=None, header_style="bold")
    for cells in lines[1:]:
        table.add_row(*cells)
    Console(width=200).print(table)
