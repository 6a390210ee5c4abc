"""What a study says: every (student, sampler) over its seeds, and whether the targets are met, from its results.

    python recipes/emoji/study/variant_summary.py recipes/emoji/study-2000

Pairs are picked on the first fifth of the prompts and measured on the rest. A student of several seeds is the mean of
their values prompt by prompt, so that errors are over prompts and differences are paired; how far the seeds lie apart
is said beside it: the standard deviation of their own means, in percent of the mean, at the budget where it is largest.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import variant_values
from mlcm_rl.metrics import mean_and_error, paired_difference

PICKING_SHARE = 5  # one prompt in so many
BUDGETS = (2, 4, 8)  # evaluations at which students are set against the undistilled teacher and LCM
SINGLE_BUDGETS = (2, 3, 4, 6, 8)  # at which one student is set against the dedicated ones
RECALL_AT, RECALL_KEPT = 4, 0.95  # evaluations, and of the reference's R@5
REFERENCE = ("teacher", "DDIM, guided", 100)
DEDICATED = ("fixed_8", "fixed_8_trajectory", "fixed_4_trajectory", "fixed_2_trajectory")
LCM = ("lcm", "lcm_long")  # of fewer evaluations than a student of stored states and its store, and of a few more
DEARER = ("budgets_long", "progressive_second_stage", "online")  # trained on more samples, or evaluations, than LCM
SINGLE = ("budgets", "budgets_long", "budgets_lora", "conditioned")
NAME = re.compile(r"(?P<row>.+)-(?P<seed>\d+)")

Pair = tuple[str, str]  # a student and its sampler
Values = dict[Pair, dict[int, Tensor]]  # pair -> evaluations -> (P,) mean over seeds, or (S, P) of each seed


def main(folder: Path) -> None:
    Console().print(text(folder), soft_wrap=True)


def text(folder: Path) -> str:
    """The table of distances and the targets in words, as Markdown, of all results in `folder`."""
    seeds = read(folder, "distance")
    students = averaged(seeds)
    teachers = of_teacher(folder, "distance")
    budgets = sorted({n for row in students.values() for n in row})
    lines = [
        f"| student, sampler | seeds | apart | {' | '.join(map(str, budgets))} |",
        f"|---|--:|--:{'|--:' * len(budgets)}|",
    ]
    for (name, sampler), row in [*students.items(), *teachers.items()]:
        cells = [said(measured(row[n])) if n in row else "-" for n in budgets]
        how_many = spread(seeds[name, sampler]) if (name, sampler) in seeds else "- | -"
        lines.append(f"| {name}, {sampler} | {how_many} | {' | '.join(cells)} |")
    recalls = averaged(read(folder, "r@5")), of_teacher(folder, "r@5", None)
    return "\n".join([*lines, "", *targets(students, teachers), *recall_target(students, *recalls)])


def read(folder: Path, metric: str) -> Values:
    """Every pair's `metric`, (S, P): of each seed, prompt by prompt."""
    found: dict[Pair, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.safetensors")):
        named = NAME.fullmatch(path.stem)
        for (name, sampler, n, which), values in variant_values.read(path).items() if named else ():
            if which == metric:
                found[name.replace("student", named["row"]), sampler][n].append(values)
    return {pair: {n: torch.stack(seeds) for n, seeds in sorted(row.items())} for pair, row in found.items()}


def averaged(seeds: Values) -> Values:
    """The mean over the seeds, (P,), of every pair's values (S, P)."""
    return {pair: {n: values.mean(0) for n, values in row.items()} for pair, row in seeds.items()}


def spread(row: dict[int, Tensor]) -> str:
    """How many seeds, and how far they lie apart, as two cells."""
    means = [torch.stack([measured(seed).nanmean() for seed in values]) for values in row.values()]
    if len(means[0]) == 1:
        return "1 | -"
    return f"{len(means[0])} | {max((one.std() / one.mean()).item() for one in means):.0%}"


def of_teacher(folder: Path, metric: str, most: int | None = max(SINGLE_BUDGETS)) -> Values:
    """The teacher's rows of at most so many evaluations."""
    found: Values = defaultdict(dict)
    for (name, sampler, n, which), values in variant_values.read(
        folder / f"{variant_values.TEACHER}.safetensors"
    ).items():
        if which == metric and (most is None or n <= most):
            found[name, sampler][n] = values
    return dict(found)


def recall_target(distances: Values, students: Values, teachers: Values) -> list[str]:
    """A line on the share of the reference's R@5 that the student has which is best by distance."""
    best = picked(distances, RECALL_AT)
    if best is None:
        return []
    own, reference = measured(students[best][RECALL_AT]), measured(teachers[REFERENCE[:2]][REFERENCE[2]])
    kept = (own.nanmean() / reference.nanmean()).item()
    verdict = "met" if kept >= RECALL_KEPT else "missed"
    return [
        f"- {RECALL_AT} evaluations, {', '.join(best)}: R@5 {said(own)}, {kept:.3f} of the {said(reference)} of the "
        f"teacher's {REFERENCE[2] // 2} guided steps: {verdict}"
    ]


def targets(students: Values, teachers: Values) -> list[str]:
    """A line for each target: the best student against the teacher, and against LCM at equal training cost; one student
    against the dedicated ones."""
    lcm = {pair: row for pair, row in students.items() if pair[0] in LCM}
    lines = []
    at_equal_cost = {pair: row for pair, row in students.items() if pair[0] not in DEARER}
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
