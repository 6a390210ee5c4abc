"""Plots of a report as inline SVG: transparent, with text in the page's own colour, for light and dark pages."""

import math
import re
import warnings
from collections.abc import Sequence
from html import escape
from io import BytesIO, StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from PIL import Image

from .definitions import metric
from .types import Line, LossCurve, Point, Report, Row, TunedStudent

INK = "#010203"  # replaced by the page's text colour when the SVG is written
COLOURS = (
    "#2f7ed8",
    "#d9702b",
    "#1f9e77",
    "#a05fd0",
    "#d0447c",
    "#8a8a1f",
    "#16a3b8",
    "#b5513c",
    "#6b74e0",
    "#5c9e2e",
)  # legible on white and on near black
GREYS = ("#7d8590", "#a38a6a", "#6a8fa3")  # for the undistilled teacher
MANY = 4  # students
SIZE = (4.4, 3.1)  # inches; a plot is scaled to its column, so that its text stays readable on a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 11,
}


def lines(report: Report) -> list[Line]:
    """Return a line for each (student, sampler), then one for each solver of the undistilled teacher.

    More than MANY students have lines at their default samplers only: the table has the rest.
    """
    groups: dict[tuple[bool, str, str], list[Row]] = {}
    many = len({row.name for row in report.rows if row.role == "student"}) > MANY
    for row in report.rows:
        if row.role == "undistilled" or (row.role == "student" and (row.default or not many)):
            groups.setdefault((row.role == "undistilled", row.name, row.sampler), []).append(row)
    names = list(dict.fromkeys(name for undistilled, name, _ in groups if not undistilled))
    solvers = list(dict.fromkeys(row.solver for row in report.rows if row.role == "undistilled"))
    result = []
    for (undistilled, name, sampler), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        if undistilled:
            colour = GREYS[solvers.index(rows[0].solver) % len(GREYS)]
            dash = "" if rows[0].guidance_scale != 1.0 else "2 2"
        else:
            colour, dash = COLOURS[names.index(name) % len(COLOURS)], "" if rows[0].default else "5 2"
            dash = "1 2" if rows[0].grid == "paper" else dash
        result.append(Line(f"{name}, {sampler}", colour, dash, sorted(rows, key=lambda row: row.num_evaluations)))
    return result


def quality(report: Report, key: str) -> str:
    """Return the SVG of metric `key` against network evaluations, with standard errors; references are horizontal."""
    figure, axes = _figure(f"quality {key}")
    for line in lines(report):
        x = [row.num_evaluations for row in line.rows]
        means = [row.metrics[key].mean for row in line.rows]
        y = [math.nan if mean is None else mean for mean in means]
        errors = [row.metrics[key].se or 0.0 for row in line.rows]
        axes.plot(x, y, color=line.colour, ls=_dashes(line.dash), marker="o", ms=3.5, lw=1.6)
        axes.errorbar(x, y, errors, color=line.colour, ls="none", lw=1.0, alpha=0.45)
    references = [row for row in report.rows if row.role == "reference"]
    for place, row in enumerate(references):
        if key == "distance" and row.id == report.reference:
            continue  # zero, which a logarithmic axis does not have
        if (mean := row.metrics[key].mean) is not None:
            _horizontal(axes, mean, f"teacher, {row.num_steps} steps", below=place % 2 == 1)
    if key == "distance":
        _log(axes)
    ticks = sorted({row.num_evaluations for row in report.rows if row.role != "reference"})
    axes.set_xticks(ticks)
    axes.set_xlabel("network evaluations")
    better = "lower" if metric(key).lower_is_better else "higher"
    axes.set_title(f"{metric(key).label} ({better} is better)", loc="left")
    return _svg(figure, f"{metric(key).label} against network evaluations; the table below holds the same numbers")


def loss(curve: LossCurve, several: bool) -> str:
    """Return the SVG of one phase's training and held-out loss against optimiser steps.

    The title names the stage where there are `several`.
    """
    phase = f"phase {curve.phase + 1}"
    name = f"distill stage {curve.stage}, {phase}" if several else phase
    figure, axes = _figure(f"loss {name}")
    for points, colour, label in ((curve.loss, COLOURS[0], "training"), (curve.held_out_loss, COLOURS[1], "held out")):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, label=label)
    _log(axes)
    axes.set_xlabel("optimiser step")
    axes.set_title(f"{name.capitalize()}: K = {curve.num_segments}", loc="left")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return _svg(figure, f"Loss of {name}, K = {curve.num_segments}, against optimiser steps")


def gains(student: TunedStudent) -> str:
    """Return the SVG of a tuned student's gains against optimiser steps, with the kept step as a vertical line."""
    curves = [student.curves[f"guard/{which}_gain"] for which in ("trained", "held_out")]
    figure = _gains(f"gains {student.name}", curves, student.guard.kept_step)
    return _svg(figure, f"The guard's trained and held-out gain of {student.name} against optimiser steps")


def guard_picture(looks: Sequence[dict[str, Any]], kept_step: int) -> Image.Image:
    """Return the same of a guard that is still watching, as a picture, from its looks as records of a log."""
    curves = [[(look["step"], look[f"guard/{which}_gain"]) for look in looks] for which in ("trained", "held_out")]
    content = BytesIO()
    with rc_context(STYLE):
        _gains("gains", curves, kept_step).savefig(content, format="png", dpi=150, facecolor="white")
    return Image.open(content)


def _gains(salt: str, curves: Sequence[list[Point]], kept_step: int) -> Figure:
    """Return the figure of a guard's trained and held-out gains (step, gain)."""
    figure, axes = _figure(salt)
    axes.axhline(0.0, color=INK, lw=0.9, alpha=0.5)
    _plot_curves(axes, kept_step, curves, ("trained on", "held out"))
    axes.set_title("Gain, in deviations of the reference", loc="left")
    return figure


def constraint(student: TunedStudent, name: str) -> str:
    """Return the SVG of a constrained reward against optimiser steps: its drop at the guard's looks, its multiplier."""
    figure, axes = _figure(f"constraint {student.name} {name}")
    labels = {"guard/drop/": "drop, in deviations", "multiplier/": "multiplier"}
    curves = [(student.curves.get(prefix + name, []), label) for prefix, label in labels.items()]
    _horizontal(axes, student.max_drops[name], "allowed", below=False)
    _plot_curves(axes, student.guard.kept_step, *zip(*curves, strict=True))
    axes.set_title(f"Constraint on {name}", loc="left")
    return _svg(figure, f"Drop of {name} and its multiplier in the tuning of {student.name} against optimiser steps")


def reward_curve(student: TunedStudent, name: str) -> str:
    """Return the SVG of one reward of a tuned student against optimiser steps: of batches, and of the guard's looks."""
    figure, axes = _figure(f"reward {student.name} {name}")
    labels = {"reward/": "batches", "guard/reward/": "the guard's prompts"}
    curves = [(student.curves.get(prefix + name, []), label) for prefix, label in labels.items()]
    _plot_curves(axes, student.guard.kept_step, *zip(*curves, strict=True))
    axes.set_title(f"{student.name}: {name}, {student.rewards[name]}", loc="left")
    return _svg(figure, f"Reward {name} of {student.name} against optimiser steps")


def reward_training(log: list[dict[str, Any]]) -> Figure:
    """Return the figure of a reward's training from its log: losses, and the share of held-out pairs decided right."""
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
        losses, accuracy = figure.subplots(1, 2)
    for axes, keys, title in (
        (losses, {"loss": "training", "held_out_loss": "held out"}, "Bradley-Terry loss"),
        (accuracy, {"held_out_accuracy": "held out"}, "Pairs decided right"),
    ):
        for (key, label), colour in zip(keys.items(), COLOURS if axes is losses else COLOURS[1:], strict=False):
            points = [(record["step"], record[key]) for record in log if key in record]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, label=label)
        axes.grid(color=INK, alpha=0.12, lw=0.7)
        axes.set_xlabel("optimiser step")
        axes.set_title(title, loc="left")
        axes.legend(frameon=False, fontsize=9)
    accuracy.axhline(0.5, color=INK, lw=0.9, ls=(0, (6, 3)), alpha=0.7)
    accuracy.set_ylim(None, 1.02)
    return figure


def _plot_curves(axes: Axes, kept_step: int, curves: Sequence[list[Point]], labels: Sequence[str]) -> None:
    """Plot those of `curves` (step, value) that have points, and the step that the guard kept."""
    for colour, curve, label in zip(COLOURS, curves, labels, strict=False):
        if curve:
            few: dict[str, Any] = {"marker": "o", "ms": 3.0} if len(curve) <= 30 else {}
            axes.plot(*zip(*curve, strict=True), color=colour, lw=1.6, label=label, **few)
    axes.axvline(kept_step, color=INK, lw=1.0, ls=(0, (2, 2)), label=f"kept: step {kept_step}")
    axes.set_xlabel("optimiser step")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _horizontal(axes: Axes, value: float, text: str, below: bool) -> None:
    """Plot a dashed line at `value`, labelled at its right end above it, or at its left end below it."""
    axes.axhline(value, color=INK, lw=0.9, ls=(0, (6, 3)), alpha=0.7)
    place: dict[str, Any] = {"ha": "left", "va": "top"} if below else {"ha": "right", "va": "bottom"}
    xy, offset = (0.0 if below else 1.0, value), (2, -3) if below else (0, 2)
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": offset, "textcoords": "offset points"}
    axes.annotate(text, xy, **where, **place, fontsize=8, color=INK)


def _figure(salt: str) -> tuple[Figure, Axes]:
    """Return an empty plot; `salt` makes its ids unique on the page, and the same from run to run."""
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        figure.set_gid(re.sub(r"\W", "-", salt))
        axes = figure.add_axes((0.13, 0.17, 0.85, 0.71))
    axes.grid(color=INK, alpha=0.12, lw=0.7)
    return figure, axes


def _dashes(dash: str) -> str | tuple:
    return (0, tuple(map(float, dash.split()))) if dash else "-"


def _log(axes: Axes) -> None:
    """Make the y axis logarithmic with plain numbers, where every value is positive."""
    curves: Sequence[Any] = axes.lines
    low = min((value for line in curves for value in line.get_ydata()), default=0.0)
    if low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _svg(figure: Figure, description: str) -> str:
    """Return `figure` as an <svg> element that fills its column; screen readers read `description`."""
    text = StringIO()
    with rc_context(STYLE | {"svg.hashsalt": figure.get_gid()}), warnings.catch_warnings():
        # Text stays text, which the browser draws in its own fonts: what matplotlib's lacks is no fault.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    body = text.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>", "", body[body.index("<svg") :], flags=re.DOTALL)
    head, _, rest = body.replace(INK, "currentColor").partition(">")
    head = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(description)}">{_own_ids(rest, figure.get_gid())}'


def _own_ids(body: str, prefix: str | None) -> str:
    """Return `body` with `prefix` before the ids that it refers to, without the others: a page holds several plots."""
    referenced = set(re.findall(r"""(?:url\(#|href="#)([^")]+)""", body))
    body = re.sub(r"""(url\(#|href="#)""", rf"\g<1>{prefix}-", body)
    return re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in referenced else "", body)
