"""The table of the tuning study: a row a way to tune, its seeds averaged prompt by prompt, errors over prompts."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlcm_rl.equations.statistics import mean_and_error, paired_difference
from mlcm_rl.report.guard_history import history
from mlcm_rl.storage.files import read_json

# Metric of the report -> head of its column; those that the report has not are left out.
COLUMNS = {
    "right@all": "judge, all that is asked",
    "reward/scene_match": "`scene_match`",
    "reward/scene_count": "`scene_count`",
    "distance": "distance to the teacher",
    "diversity": "diversity",
}


def text(report: dict[str, Any], tuned: list[tuple[str, Path]]) -> str:
    """The table as Markdown of tuned students (row, folder), with the step that the guard kept and the last drift.

    After each figure is its paired difference to the student before tuning, under the same sampler.
    """
    rows = [row for row in report["rows"] if row["role"] == "student"]
    before = values(next(row for row in rows if row["name"] == "student"))
    after = {row["name"]: values(row) for row in rows}
    columns = {key: head for key, head in COLUMNS.items() if key in before}
    heads = ["row", "step kept, last", "drift at the last look", *columns.values()]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|--:|{'--:|' * len(columns)}"]
    lines.append(f"| before tuning | - | 0 | {' | '.join(said(*mean_and_error(before[key])) for key in columns)} |")
    for row in dict.fromkeys(row for row, _ in tuned):
        folders = [folder for one, folder in tuned if one == row]
        seeds = [after[reported_name(folder)] for folder in folders]
        cells = [both(torch.stack([one[key] for one in seeds]).mean(0), before[key]) for key in columns]
        lines.append(f"| {row} | {', '.join(map(steps, folders))} | {drift(folders):.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def values(row: dict[str, Any]) -> dict[str, Tensor]:
    """Metric -> (P,) of a report's row."""
    return {
        key: torch.tensor([math.nan if one is None else one for one in metric["values"]], dtype=torch.float64)
        for key, metric in row["metrics"].items()
        if metric.get("values")
    }


def reported_name(folder: Path) -> str:
    """The name of the student in `folder` in a report: that of the recipe which tuned it first."""
    return read_json(folder / "manifest.json", recipe=dict)["recipe"]["name"]


def both(tuned: Tensor, before: Tensor) -> str:
    """The mean of `tuned` (P,), and its paired difference to `before`."""
    change, error = paired_difference(tuned, before)
    return f"{said(*mean_and_error(tuned))} ({change:+.3f} +- {error:.3f})"


def said(mean: float, error: float) -> str:
    return f"{mean:.3f} +- {error:.3f}"


def steps(folder: Path) -> str:
    """The step that the guard in `folder` kept, and the last one."""
    return f"{read_json(folder / 'guard.json', kept_step=int)['kept_step']} of {history(folder)[-1]['step']}"


def drift(folders: list[Path]) -> float:
    """The mean distance to the reference at the last look."""
    return sum(history(folder)[-1]["guard/distance"] for folder in folders) / len(folders)
