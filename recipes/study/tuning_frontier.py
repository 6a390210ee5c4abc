"""A picture of the tuning study: what each row wins against what it pays, both as changes to the student before."""

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

import tuning_summary
from mlcm_rl.equations.statistics import paired_difference
from mlcm_rl.report.plots import COLOURS

SIZE, DOTS_PER_INCH = (7.0, 4.8), 110

Change = tuple[float, float]  # a paired difference and its error


def draw(folder: Path, order: list[str], axes: tuple[str, str], columns: dict[str, str], out: Path) -> None:
    """Write the PNG `out`: a point a row measured in `folder`, in this `order`, with its errors on both of `axes`.

    `axes` are the metrics that are paid in and won, `columns` the names of metrics. Rows of one kind, such as
    "weight-0.1" and "weight-1", are joined. Nothing is written where no row has both metrics.
    """
    points = changes(folder, order, axes)
    if not points:
        return
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in points:
        kinds[row.rpartition("-")[0] or row].append(row)
    figure = Figure(SIZE, layout="constrained")
    plot = figure.subplots()
    for number, rows in enumerate(kinds.values()):
        (x, x_error), (y, y_error) = (zip(*(points[row][axis] for row in rows), strict=True) for axis in (0, 1))
        colour = COLOURS[number % len(COLOURS)]
        plot.errorbar(x, y, y_error, x_error, color=colour, marker="o", linewidth=1.0, elinewidth=0.8)
    named: dict[tuple[float, float], list[str]] = defaultdict(list)  # rows whose guard kept the start are in one place
    for row, ((paid, _), (won, _)) in points.items():
        named[paid, won].append(row)
    for place, rows in named.items():
        plot.annotate("\n".join(rows), place, (6, 4), textcoords="offset points", fontsize=8)
    names = [columns[metric].replace("`", "") for metric in axes]
    plot.set(xlabel=f"change of {names[0]}", ylabel=f"change of {names[1]}")
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=DOTS_PER_INCH)


def changes(folder: Path, order: list[str], axes: tuple[str, str]) -> dict[str, tuple[Change, Change]]:
    """Return by row the change of each of `axes`, tuned less before, its seeds averaged prompt by prompt."""
    found = {}
    for row, seeds in tuning_summary.measured(folder, order).items():
        before, after = (
            [tuning_summary.mean_of([pair[i] for pair in seeds], metric) for metric in axes] for i in (0, 1)
        )
        if all(values.numel() for values in after):
            x, y = (paired_difference(*pair) for pair in zip(after, before, strict=True))
            found[row] = (x, y)
    return found
