"""The tables of a study: what its students measured, prompt by prompt, as means with their errors."""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kept_values
from mlcm_rl.equations.statistics import mean_and_error
from mlcm_rl.storage.files import replacing

LESS_IS_BETTER = ("distance", "teacher_kid", "teacher_patch_kid")
IN_THOUSANDTHS = {"teacher_kid": "KID", "teacher_patch_kid": "KID of patches"}
NAMES = {"right@all": "all that is asked is right, by the judge"}
UNRANKED = ("diversity",)  # neither more nor less of it is better

Mean = tuple[float, float]  # with its standard error


@dataclass(frozen=True)
class Line:
    """What a student, or the teacher, measured under a sampler: means by metric, of as many seeds of training."""

    student: str
    sampler: str
    evaluations: int
    num_seeds: int
    means: dict[str, Mean]


def write(folder: Path, columns: tuple[str, ...], order: Sequence[str]) -> None:
    """Write the table of the students in `folder` to `table.tsv` there; print it, and one of each column by steps."""
    lines = lines_of(folder, columns, order)
    if not lines:
        Console().print(f"No student in {folder} is measured yet.", soft_wrap=True)
        return
    whole = in_words(lines, columns)
    path = folder / "table.tsv"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(whole)
    table = Table(*whole[0], box=None, header_style="bold")
    for cells in whole[1:]:
        table.add_row(*cells)
    Console(width=200).print(table)
    for column in (one for one in columns if one not in UNRANKED):
        Console().print(f"\n{title_of(column)}\n\n{markdown(by_steps(lines, column))}", soft_wrap=True)
    Console().print(f"\n{path}", soft_wrap=True)


def lines_of(folder: Path, columns: tuple[str, ...], order: Sequence[str] = ()) -> list[Line]:
    """Return a line for each (student, sampler, steps): means over prompts and seeds, with their errors.

    A student of several seeds is the mean of theirs prompt by prompt. A student that was tuned has the name of its
    stage behind the row's. Students are in the `order` of their rows, others after them; the teacher's own rows come
    last.
    """
    rows = kept_values.files_of(folder, order)
    files = [(place, row, path) for place, (row, paths) in enumerate(rows.items()) for path in paths]
    teacher = folder / f"{kept_values.TEACHER}.safetensors"
    files += [(len(rows), "", teacher)] * teacher.is_file()
    found: dict[tuple[int, str, str, int], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for place, row, path in files:
        for (name, sampler, evaluations, metric), values in kept_values.read(path).items():
            label = name if not row else row if name == "student" else f"{row} ({name})"
            found[place, label, sampler, evaluations][metric].append(values)
    return [
        Line(*point[1:], max(map(len, seeds.values())), means_of(seeds, columns))
        for point, seeds in sorted(found.items(), key=lambda pair: pair[0])
    ]


def means_of(seeds: dict[str, list[Tensor]], columns: tuple[str, ...]) -> dict[str, Mean]:
    """Return the means of the `columns` that there are, of the values (P,) of each seed by metric.

    The error of prompts is taken after the mean over seeds.
    """
    means = {name: mean_and_error(torch.stack(seeds[name]).mean(0)) for name in columns if name in seeds}
    return {name: mean for name, mean in means.items() if not math.isnan(mean[0])}


def in_words(lines: list[Line], columns: tuple[str, ...]) -> list[list[str]]:
    """Return the head and a row for each of the `lines`; a cell is empty where nothing was measured."""
    rows = [
        [
            *(line.student, line.sampler, str(line.evaluations), str(line.num_seeds)),
            *("{:.4f} +- {:.4f}".format(*line.means[name]) if name in line.means else "" for name in columns),
        ]
        for line in lines
    ]
    return [["student", "sampler", "evaluations", "seeds", *columns], *rows]


def by_steps(lines: list[Line], column: str) -> list[list[str]]:
    """Return the table of `column` with a row for each student and a column for each number of steps.

    A cell is that of the student's best sampler: the one with the least distance or KID, the most of what is right.
    """
    sign = -1 if column in LESS_IS_BETTER else 1
    best: dict[tuple[str, int], Mean] = {}
    for line in lines:
        key, mean = (line.student, line.evaluations), line.means.get(column)
        if mean and (key not in best or sign * mean[0] > sign * best[key][0]):
            best[key] = mean
    steps = sorted({line.evaluations for line in lines})
    seeds = {line.student: str(line.num_seeds) for line in lines}
    cells = {key: shortened(mean, column) for key, mean in best.items()}
    table = [[name, number, *(cells.get((name, step), "-") for step in steps)] for name, number in seeds.items()]
    return [["student", "seeds", *map(str, steps)], *table]


def title_of(column: str) -> str:
    """Return what a table by steps is of, a sentence."""
    name = NAMES.get(column, column)
    if column in IN_THOUSANDTHS:
        name = f"1,000 {IN_THOUSANDTHS[column]} to the teacher"
    return f"{name[0].upper()}{name[1:]}, by network evaluations, each student under its best sampler:"


def shortened(mean: Mean, column: str) -> str:
    """Return a mean with its error to a thousandth, and KID in thousandths to a tenth of one."""
    factor, digits = (1000, 1) if column in IN_THOUSANDTHS else (1, 3)
    return " +- ".join(f"{factor * part:.{digits}f}" for part in mean)


def markdown(lines: list[list[str]]) -> str:
    """Return the table as Markdown."""
    head, *rows = lines
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])
