"""What a study says: every (student, sampler) over its seeds, and whether the targets are met, from report.json.

    python recipes/emoji/study_summary.py runs/study/00-evaluate

Pairs are picked on the first fifth of the prompts and measured on the rest. A student of several seeds is the mean of
their values prompt by prompt, so that errors are over prompts and differences are paired.
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mlcm_rl.metrics import mean_and_error, paired_difference

PICKING_SHARE = 5  # one prompt in so many
BUDGETS = (2, 4, 8)  # evaluations at which students are set against the undistilled teacher and LCM
SINGLE_BUDGETS = (2, 3, 4, 6, 8)  # at which one student is set against the dedicated ones
DEDICATED = ("fixed-8", "fixed-8-trajectory", "fixed-4-trajectory", "fixed-2-trajectory")
LONGER = ("budgets-long",)  # trained for more than LCM is
SINGLE = ("budgets", "budgets-long", "budgets-lora", "conditioned")
NAME = re.compile(r"(?P<row>.+)-(?P<seed>\d+)(?P<phase>(?: phase-\d+-K\d+)?)")

Pair = tuple[str, str]  # a student and its sampler
Values = dict[Pair, dict[int, Tensor]]  # pair -> evaluations -> (P,) mean over seeds


def main(folder: Path) -> None:
    Console().print(text(json.loads((folder / "report.json").read_text(encoding="utf-8"))), soft_wrap=True)


def text(report: dict, metric: str = "distance") -> str:
    """The table and the targets in words, as Markdown."""
    students, teachers = values(report, "student", metric), values(report, "undistilled", metric)
    budgets = sorted({n for row in students.values() for n in row})
    lines = [f"| student, sampler | {' | '.join(map(str, budgets))} |", f"|---{'|--:' * len(budgets)}|"]
    for (name, sampler), row in [*students.items(), *teachers.items()]:
        cells = [said(measured(row[n])) if n in row else "-" for n in budgets]
        lines.append(f"| {name}, {sampler} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *targets(students, teachers)])


def values(report: dict, role: str, metric: str) -> Values:
    """Every pair of `role` in `report`, its seeds averaged."""
    seeds: dict[Pair, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for row in report["rows"]:
        if row["role"] == role:
            found = NAME.fullmatch(row["name"])
            name = found["row"] + found["phase"] if found else row["name"]
            kept = [math.nan if value is None else value for value in row["metrics"][metric]["values"]]
            seeds[name, row["sampler"]][row["num_evaluations"]].append(torch.tensor(kept, dtype=torch.float64))
    return {pair: {n: torch.stack(found).mean(0) for n, found in row.items()} for pair, row in seeds.items()}


def targets(students: Values, teachers: Values) -> list[str]:
    """A line for each target: the best student against the teacher, and against LCM at equal training cost; one student
    against the dedicated ones."""
    lcm = {pair: row for pair, row in students.items() if pair[0] == "lcm"}
    lines = []
    at_equal_cost = {pair: row for pair, row in students.items() if pair[0] not in LONGER}
    for n in BUDGETS:
        for name, rows, others in (("the undistilled teacher", students, teachers), ("LCM", at_equal_cost, lcm)):
            best, other = picked(rows, n), picked(others, n)
            if best and other:
                difference, error = paired_difference(measured(students[best][n]), measured(others[other][n]))
                verdict = "met" if difference < -2.0 * error else "missed"
                lines.append(
                    f"- {n} evaluations, {', '.join(best)} against {name} ({', '.join(other)}): "
                    f"{difference:.4f} +- {error:.4f}, {verdict}"
                )
    dedicated = {pair: row for pair, row in students.items() if pair[0] in DEDICATED}
    for single in SINGLE:
        own = {pair: row for pair, row in students.items() if pair[0] == single}
        ratios = {n: ratio(own, dedicated, n) for n in SINGLE_BUDGETS if picked(own, n) and picked(dedicated, n)}
        if ratios:
            verdict = "met" if all(value <= 1.1 for value in ratios.values()) else "missed"
            shown = ", ".join(f"{value:.2f} at {n}" for n, value in ratios.items())
            lines.append(f"- {single} over the best dedicated student: {shown}: within 10 % {verdict}")
    return lines


def ratio(own: Values, others: Values, n: int) -> float:
    """Mean of the best of `own` over that of the best of `others` at `n` evaluations."""
    mine, theirs = picked(own, n), picked(others, n)
    return (measured(own[mine][n]).nanmean() / measured(others[theirs][n]).nanmean()).item()


def picked(rows: Values, n: int) -> Pair | None:
    """The pair with the lowest mean at `n` evaluations on the picking prompts; None of none."""
    found = {pair: row[n] for pair, row in rows.items() if n in row}
    return min(found, key=lambda pair: found[pair][: len(found[pair]) // PICKING_SHARE].nanmean().item(), default=None)


def measured(column: Tensor) -> Tensor:
    """The values (P,) of the prompts that nothing was picked on."""
    return column[len(column) // PICKING_SHARE :]


def said(column: Tensor) -> str:
    mean, error = mean_and_error(column)
    return f"{mean:.4f} +- {error:.4f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
