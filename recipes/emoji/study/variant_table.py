"""One table of a study of variants: a row for each (student, sampler, evaluations), from the values of every prompt.

A student of several seeds is the mean of their values prompt by prompt, so that errors are over prompts, and
differences are paired: the same prompts, the same noise. The first fifth of the prompts is for picking, the rest is
measured, so that what is picked as the best is not measured on what it was picked for.
"""

import csv
import math
import sys
from collections import defaultdict
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor

from mlcm_rl.equations.statistics import mean_and_error, paired_difference
from mlcm_rl.storage.files import replacing

sys.path.append(str(Path(__file__).parents[2] / "study"))  # what all studies share

import kept_values

PICKING_SHARE = 5  # one prompt in so many
LCM = ("lcm", "lcm_long")  # of fewer evaluations than a student of stored states and its store, and of a few more

Point = tuple[str, str, int]  # student, sampler, evaluations
Values = dict[Point, Tensor]


@dataclass(frozen=True)
class Row:
    """Mean and standard error over the measured prompts; nan where there is no such value.

    `seeds` is 0 for the teacher. `apart` is the standard deviation of the seeds' means over their mean, `picking` the
    distance on the picking prompts, `recall` R@5. `over_teacher` and `over_lcm` are this distance less that of the
    undistilled teacher, and of LCM, as many evaluations each, under whichever sampler picks best. `kid` and `patch_kid`
    are to the teacher's own pictures, whole and on patches, `kid_picking` and `patch_kid_picking` those on the picking
    prompts; `over_nearest` and the like are less that of the student whose distance picks best at as many evaluations.
    A table of before has none of these.
    """

    student: str
    sampler: str
    evaluations: int
    seeds: int
    apart: float
    picking: float
    distance: float
    distance_error: float
    recall: float
    recall_error: float
    over_teacher: float
    over_teacher_error: float
    over_lcm: float
    over_lcm_error: float
    over_nearest: float = math.nan
    over_nearest_error: float = math.nan
    kid_picking: float = math.nan
    kid: float = math.nan
    kid_error: float = math.nan
    kid_over_nearest: float = math.nan
    kid_over_nearest_error: float = math.nan
    patch_kid_picking: float = math.nan
    patch_kid: float = math.nan
    patch_kid_error: float = math.nan
    patch_kid_over_nearest: float = math.nan
    patch_kid_over_nearest_error: float = math.nan
    diversity: float = math.nan
    diversity_error: float = math.nan

    @property
    def pair(self) -> tuple[str, str]:
        return self.student, self.sampler


def of_values(folder: Path) -> list[Row]:
    """Return the table of all values in `folder`, students in the order of their files, the teacher last."""
    seeds, recalls = (values(folder, metric) for metric in ("distance", "r@5"))
    means = {point: column.mean(0) for point, column in seeds.items()}
    kids, patch_kids, diversities = (
        {point: column.mean(0) for point, column in values(folder, metric).items()}
        for metric in ("teacher_kid", "teacher_patch_kid", "diversity")
    )
    nearest = {point[2]: nearest_student(means, point[2]) for point in means}
    pairs = list(dict.fromkeys(point[:2] for point in means))
    return [
        Row(
            *point,
            0 if point[0] == kept_values.TEACHER else len(seeds[point]),
            apart(seeds[point]),
            means[point][: picking_prompts(means[point])].nanmean().item(),
            *mean_and_error(measured(means[point])),
            *mean_and_error(measured(recalls[point].mean(0))),
            *over_the_best(means, point, (kept_values.TEACHER,)),
            *over_the_best(means, point, LCM),
            *over(means, point, nearest[point[2]]),
            *of_distribution(kids, point, nearest[point[2]]),
            *of_distribution(patch_kids, point, nearest[point[2]]),
            *(mean_and_error(measured(diversities[point])) if point in diversities else (math.nan, math.nan)),
        )
        for point in sorted(means, key=lambda point: (pairs.index(point[:2]), point[2]))
    ]


def values(folder: Path, metric: str) -> Values:
    """Return `metric` of every point, (S, P): of each seed, prompt by prompt; one seed of the teacher."""
    found: dict[Point, list[Tensor]] = defaultdict(list)
    students = {path: row for row, paths in kept_values.files_of(folder).items() for path in paths}
    teacher = folder / f"{kept_values.TEACHER}.safetensors"
    for path, row in {**students, **({teacher: None} if teacher.is_file() else {})}.items():
        for (name, sampler, evaluations, which), column in kept_values.read(path).items():
            if which == metric:
                found[name.replace("student", row) if row else name, sampler, evaluations].append(column)
    return {point: torch.stack(columns) for point, columns in found.items()}


def picking_prompts(column: Tensor) -> int:
    return len(column) // PICKING_SHARE


def measured(column: Tensor) -> Tensor:
    """Return the values (P,) of the prompts that nothing was picked on."""
    return column[picking_prompts(column) :]


def apart(seeds: Tensor) -> float:
    """Return how far the means of seeds (S, P) lie apart, over their mean; nan of one."""
    means = torch.stack([measured(seed).nanmean() for seed in seeds])
    return (means.std() / means.mean()).item() if len(means) > 1 else math.nan


def over_the_best(means: Values, point: Point, others: tuple[str, ...]) -> tuple[float, float]:
    """Return the paired difference, and its error, to the best of `others` at as many evaluations; nan of none."""
    rivals = [means[other] for other in means if other[0] in others and other[2] == point[2]]
    if not rivals:
        return math.nan, math.nan
    best = min(rivals, key=lambda column: column[: picking_prompts(column)].nanmean().item())
    return paired_difference(measured(means[point]), measured(best))


def nearest_student(means: Values, evaluations: int) -> Point | None:
    """Return the student whose distance is least on the picking prompts, of so many evaluations; None of none."""
    students = [one for one in means if one[0] != kept_values.TEACHER and one[2] == evaluations]
    return min(students, key=lambda one: means[one][: picking_prompts(means[one])].nanmean().item(), default=None)


def over(columns: Values, point: Point, other: Point | None) -> tuple[float, float]:
    """Return the paired difference of two points, and its error; nan without either."""
    if other is None or other not in columns or point not in columns:
        return math.nan, math.nan
    return paired_difference(measured(columns[point]), measured(columns[other]))


def of_distribution(kids: Values, point: Point, nearest: Point | None) -> tuple[float, float, float, float, float]:
    """Return a point's KID on the picking prompts and on the others with its error, and that over the nearest student.

    Its values are the jackknife's of each prompt, so that those of some prompts have the mean of a KID of theirs.
    """
    if point not in kids:
        return (math.nan,) * 5
    picking = kids[point][: picking_prompts(kids[point])].mean().item()
    return picking, *mean_and_error(measured(kids[point])), *over(kids, point, nearest)


def write(rows: list[Row], path: Path) -> None:
    """Write the rows as tab-separated text, numbers to six digits."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, delimiter="\t", lineterminator="\n")
        lines.writerow(field.name for field in fields(Row))
        for row in rows:
            lines.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(row))


def read(path: Path) -> list[Row]:
    """Return the rows of a table that `write` wrote."""
    kinds = get_type_hints(Row)
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(**{name: kind(line[name]) for name, kind in kinds.items() if name in line})
            for line in csv.DictReader(file, delimiter="\t")
        ]
