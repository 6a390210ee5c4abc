"""The table of the tuning study: a row a way to tune, its seeds averaged prompt by prompt, errors over prompts."""

from pathlib import Path

import torch
from torch import Tensor

import kept_values
import tuning_looks
from mlcm_rl.equations.statistics import mean_and_error, paired_difference

BEFORE = "student"  # the name in a report of the student before tuning
UNITS = {"teacher_kid": 1e-3}  # of metrics that are small

Values = dict[str, Tensor]  # metric -> (P,)


def text(folder: Path, order: list[str], columns: dict[str, str]) -> str:
    """Return the table as Markdown of the tuned students in `folder`, rows in this `order`, others last.

    `columns` are metrics and the heads of their columns; one that no student has is left out. After each figure is its
    paired difference to the student before tuning, measured beside it under the same sampler. Before them are the steps
    that the guard kept, and the drift: the distance to the student before tuning at the guard's last look.
    """
    rows, looks = measured(folder, order), tuning_looks.read(folder, order)
    if not rows:
        return f"No student in {folder.name} is measured yet."
    begun = {metric: mean_of([before for seeds in rows.values() for before, _ in seeds], metric) for metric in columns}
    columns = {metric: head for metric, head in columns.items() if begun[metric].numel()}
    heads = ["row", "step kept, last", "drift at the last look", *columns.values()]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|--:|{'--:|' * len(columns)}"]
    cells = [said(*mean_and_error(begun[metric])) for metric in columns]
    lines.append(f"| before tuning | - | 0 | {' | '.join(cells)} |")
    for row, seeds in rows.items():
        before, after = ([pair[i] for pair in seeds] for i in (0, 1))
        cells = [both(mean_of(after, metric), mean_of(before, metric)) for metric in columns]
        of_guard = looks.get(row, [])
        steps = ", ".join(f"{one['kept_step']} of {one['looks'][-1]['step']}" for one in of_guard)
        lines.append(f"| {row} | {steps} | {drift(of_guard)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(folder: Path, order: list[str]) -> dict[str, list[tuple[Values, Values]]]:
    """Return by row what each of its seeds measured, of the student before tuning and of the tuned one."""
    files = kept_values.files_of(folder, order)
    return {row: [before_and_after(path) for path in paths] for row, paths in files.items()}


def before_and_after(path: Path) -> tuple[Values, Values]:
    """Return what the student before tuning measured, and the tuned one."""
    pair: tuple[Values, Values] = ({}, {})
    for (name, _, _, metric), values in kept_values.read(path).items():
        pair[name != BEFORE][metric] = values
    return pair


def mean_of(seeds: list[Values], metric: str) -> Tensor:
    """Return the values (P,) of `metric` averaged over the seeds that have it, prompt by prompt; (0,) of none."""
    values = [one[metric] / UNITS.get(metric, 1.0) for one in seeds if metric in one]
    return torch.stack(values).mean(0) if values else torch.zeros(0)


def both(tuned: Tensor, before: Tensor) -> str:
    """Return the mean of `tuned` (P,), and its paired difference to `before`."""
    if not tuned.numel():
        return ""
    change, error = paired_difference(tuned, before)
    return f"{said(*mean_and_error(tuned))} ({change:+.3f} +- {error:.3f})"


def said(mean: float, error: float) -> str:
    return f"{mean:.3f} +- {error:.3f}"


def drift(looks: list[dict]) -> str:
    """Return the mean distance to the student before tuning at the last looks of a row's seeds."""
    if not looks:
        return ""
    return f"{sum(one['looks'][-1]['guard/distance'] for one in looks) / len(looks):.4f}"
