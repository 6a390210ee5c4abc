"""A picture of the tuning study: reward against drift, and against scored pictures, at the guard's looks."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from mlcm_rl.recipe import Tuning
from mlcm_rl.report.guard_history import history
from mlcm_rl.report.plots import COLOURS

SIZE, DOTS_PER_INCH = (15.0, 4.4), 110
PLOTS = (  # x, y of a look, and what the axes are called
    ("guard/distance", "guard/trained_gain", "distance to the reference", "gain, trained on"),
    ("guard/distance", "guard/held_out_gain", "distance to the reference", "gain, held out"),
    ("calls", "guard/trained_gain", "scored pictures", "gain, trained on"),
)


def draw(tuned: list[tuple[str, Tuning, Path]], out: Path) -> None:
    """Write the PNG `out`: curves of every row (name, stage, finished folder), its seeds averaged look by look.

    Gains are in the reference's standard deviations, distances mean squares in latents, from the same noise.
    """
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots(1, len(PLOTS))
    rows = {row: stage for row, stage, _ in tuned}
    for colour, (row, stage) in zip([*COLOURS, "#555555", "#aaaaaa"], rows.items(), strict=False):
        looks = averaged([folder for name, _, folder in tuned if name == row], stage.batch_size)
        for one, (x, y, x_label, y_label) in zip(axes, PLOTS, strict=True):
            one.plot([look[x] for look in looks], [look[y] for look in looks], color=colour, marker=".", label=row)
            one.set(xlabel=x_label, ylabel=y_label)
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(out, dpi=DOTS_PER_INCH)


def averaged(folders: list[Path], batch_size: int) -> list[dict[str, float]]:
    """The looks of a row's seeds that all of them have, each the mean, beginning with the reference itself."""
    by_step: dict[int, list[dict]] = defaultdict(list)
    for folder in folders:
        for look in history(folder):
            by_step[look["step"]].append(look)
    keys = [key for plot in PLOTS for key in plot[:2] if key != "calls"]
    means = [
        {key: fmean(look[key] for look in looks) for key in keys} | {"calls": float(step * batch_size)}
        for step, looks in sorted(by_step.items())
        if len(looks) == len(folders)
    ]
    return [dict.fromkeys([*keys, "calls"], 0.0), *means]
