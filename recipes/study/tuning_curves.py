"""A picture of the tuning study: reward against drift, and against scored pictures, at the guard's looks."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

import tuning_looks
from mlcm_rl.report.plots import COLOURS

SIZE, DOTS_PER_INCH = (15.0, 4.4), 110
MORE_COLOURS = ("#555555", "#aaaaaa", "#8c6d31", "#17becf", "#ad494a")
PLOTS = (  # x, y of a look, and what the axes are called
    ("guard/distance", "guard/trained_gain", "distance to the student before tuning", "gain, trained on"),
    ("guard/distance", "guard/held_out_gain", "distance to the student before tuning", "gain, held out"),
    ("calls", "guard/trained_gain", "scored pictures", "gain, trained on"),
)


def draw(folder: Path, order: list[str], out: Path) -> None:
    """Write the PNG `out`: curves of every row that has looks in `folder`, in this `order`, its seeds averaged.

    Gains are in the deviations of the student before tuning, distances mean squares in latents, from the same noise.
    """
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots(1, len(PLOTS))
    for number, (row, seeds) in enumerate(tuning_looks.read(folder, order).items()):
        colour, looks = [*COLOURS, *MORE_COLOURS][number % (len(COLOURS) + len(MORE_COLOURS))], averaged(seeds)
        for one, (x, y, x_label, y_label) in zip(axes, PLOTS, strict=True):
            one.plot([look[x] for look in looks], [look[y] for look in looks], color=colour, marker=".", label=row)
            one.set(xlabel=x_label, ylabel=y_label)
    for one in axes:
        one.locator_params(axis="x", nbins=6)
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(out, dpi=DOTS_PER_INCH)


def averaged(seeds: list[dict]) -> list[dict[str, float]]:
    """Return the looks of a row's seeds that all of them have, each the mean, beginning with the start itself."""
    by_step: dict[int, list[dict]] = defaultdict(list)
    for one in seeds:
        for look in one["looks"]:
            by_step[look["step"]].append(look)
    keys = [key for plot in PLOTS for key in plot[:2] if key != "calls"]
    means = [
        {key: fmean(look[key] for look in looks) for key in keys} | {"calls": float(step * seeds[0]["batch_size"])}
        for step, looks in sorted(by_step.items())
        if len(looks) == len(seeds)
    ]
    return [dict.fromkeys([*keys, "calls"], 0.0), *means]
