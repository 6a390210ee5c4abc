"""A picture of the preference study: win rates on the guard's prompts against steps and network evaluations."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from mlcm_rl.cost.evaluations import evaluations_of
from mlcm_rl.recipe import Tuning
from mlcm_rl.report.guard_history import history
from mlcm_rl.report.plots import COLOURS

SIZE, DOTS_PER_INCH = (10.0, 4.2), 110

Curve = dict[int, list[float]]  # optimiser steps -> win rate of each seed


def draw(tuned: list[tuple[str, Tuning, Path]], out: Path) -> None:
    """Write the PNG `out`: two plots of every row (name, stage, finished folder), its seeds averaged.

    Solid is the reward that a row was trained on, dashed the first that it held out. A win is over the distilled
    student, from the same noise; at step 0 half of them are.
    """
    figure = Figure(SIZE, layout="constrained")
    by_steps, by_evaluations = figure.subplots(1, 2, sharey=True)
    rows = {row: stage for row, stage, _ in tuned}
    for colour, (row, stage) in zip(COLOURS, rows.items(), strict=False):
        folders = [folder for name, _, folder in tuned if name == row]
        cost = evaluations_of(stage.step(stage.batch_size, stage.batch_size))
        for reward, dash in ((stage.rewards[0].name, "-"), (stage.guard.rewards[0].name, "--")):
            curve = win_rates(folders, reward)
            style = {"color": colour, "linestyle": dash, "marker": ".", "label": f"{row}, {reward}"}
            by_steps.plot(list(curve), [fmean(rates) for rates in curve.values()], **style)
            by_evaluations.plot(
                [cost * step / 1000 for step in curve], [fmean(rates) for rates in curve.values()], **style
            )
    by_steps.set(xlabel="optimiser steps", ylabel="win rate over the distilled student", ylim=(0, 1))
    by_evaluations.set(xlabel="network evaluations, thousands")
    for axes in (by_steps, by_evaluations):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*by_steps.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(out, dpi=DOTS_PER_INCH)


def win_rates(folders: list[Path], reward: str) -> Curve:
    """Win rates by `reward` at every look of the guards of `folders`, a seed each."""
    found: Curve = defaultdict(list)
    for folder in folders:
        found[0].append(0.5)
        for look in history(folder):
            found[look["step"]].append(look[f"guard/win_rate/{reward}"])
    return dict(sorted(found.items()))
