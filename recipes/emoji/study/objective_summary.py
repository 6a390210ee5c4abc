"""What the study of preference learning says: a row an objective, its seeds averaged, and whether the targets are met.

P prompts. A student of several seeds is the mean of their values prompt by prompt, so that errors are over prompts;
differences to the distilled student are paired: the same prompts, the same noise, the same sampler.
"""

import math
import re
from collections import defaultdict

import torch
from torch import Tensor

from mlcm_rl.equations.statistics import mean_and_error, paired_difference, wins

NAME = re.compile(r"(?P<row>.+)-(?P<seed>\d+)")
STYLE, STYLE_JUDGE, ALIGNMENT = (f"reward/{name}" for name in ("emoji_style", "emoji_style_judge", "emoji_alignment"))
TRAINED_ON = defaultdict(lambda: STYLE, {"feedback-alignment": ALIGNMENT})
HELD_OUT = defaultdict(lambda: STYLE_JUDGE, {"feedback-alignment": "r@1"})
PREFERRED_ABOVE = 0.0  # of emoji_style_judge's log-odds
TRAINED_WINS, HELD_OUT_WINS, RECALL_KEPT, DIVERSITY_KEPT = 0.75, 0.65, 0.97, 0.90  # the targets at four steps

Values = dict[str, Tensor]  # metric -> (P,)


class Student:
    """One row of the study: its seeds' values (P,) and the distilled student's under the same sampler."""

    def __init__(self, name: str, reference: Values, languages: list[str]):
        self.name, self.reference, self.languages = name, reference, languages
        self.seeds: list[Values] = []

    def mean(self, metric: str) -> Tensor:
        """Values (P,) of `metric`, its seeds averaged."""
        return torch.stack([values[metric] for values in self.seeds]).mean(0)

    def wins(self, metric: str, language: str | None = None) -> Tensor:
        """Share (P,) of the seeds that score higher than the distilled student; a tie counts half."""
        won = [wins(values[metric], self.reference[metric]) for values in self.seeds]
        chosen = torch.tensor([language in (None, one) for one in self.languages])
        return torch.stack(won).mean(0)[chosen]

    def kept(self, metric: str) -> float:
        """The mean of `metric` over the distilled student's."""
        return (self.mean(metric).nanmean() / self.reference[metric].nanmean()).item()

    def style_share(self) -> Tensor:
        """Share (P,) of the seeds whose picture is in the preferred style."""
        return torch.stack([(values[STYLE_JUDGE] > PREFERRED_ABOVE).double() for values in self.seeds]).mean(0)


def students(report: dict) -> dict[str, Student]:
    """The tuned students of a report, by row."""
    languages = [prompt["language"] for prompt in report["prompts"]]
    rows = [row for row in report["rows"] if row["role"] == "student"]
    reference = next(values(row) for row in rows if row["name"] == "student")
    found: dict[str, Student] = {}
    for row in rows:
        if match := NAME.fullmatch(row["name"]):
            found.setdefault(match["row"], Student(match["row"], reference, languages)).seeds.append(values(row))
    return found


def values(row: dict) -> Values:
    """Metric -> (P,) of a report's row."""
    return {
        key: torch.tensor([math.nan if one is None else one for one in metric["values"]], dtype=torch.float64)
        for key, metric in row["metrics"].items()
        if "values" in metric
    }


def text(reports: list[dict], diversity_reports: list[dict]) -> str:
    """The table and the targets in words, as Markdown."""
    found = {name: one for report in reports for name, one in students(report).items()}
    spread = {name: one for report in diversity_reports for name, one in students(report).items()}
    guards = {name: steps for report in reports for name, steps in kept_steps(report).items()}
    heads = [
        "student",
        "seeds, steps kept",
        "win rate, trained on",
        "held out",
        "`emoji_alignment`",
        "English",
        "Chinese",
    ]
    heads += ["preferred style, before", "after", "R@5 kept", "distance", "diversity kept"]
    heads += ["KID to the teacher x 1000, after less before", "the same, patches"]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|{'--:|' * (len(heads) - 2)}"]
    lines += [f"| {' | '.join(cells(one, spread.get(name), guards[name]))} |" for name, one in found.items()]
    return "\n".join([*lines, "", *(line for name, one in found.items() for line in targets(one, spread.get(name)))])


def kept_steps(report: dict) -> dict[str, list[int]]:
    """Row -> the step that the guard kept, seed by seed."""
    found: dict[str, list[int]] = defaultdict(list)
    for student in report["tuned"]:
        if match := NAME.fullmatch(student["name"]):
            found[match["row"]].append(student["guard"]["kept_step"])
    return found


def cells(student: Student, spread: Student | None, steps: list[int]) -> list[str]:
    trained = TRAINED_ON[student.name]
    before = (student.reference[STYLE_JUDGE] > PREFERRED_ABOVE).double()
    return [
        student.name,
        f"{len(student.seeds)}, {'/'.join(map(str, steps))}",
        said(student.wins(trained)),
        said(student.wins(HELD_OUT[student.name])),
        said(student.wins(ALIGNMENT)),
        *(said(student.wins(trained, language)) for language in ("en", "zh")),
        said(before),
        said(student.style_share()),
        f"{student.kept('r@5'):.3f}",
        said(student.mean("distance")),
        f"{spread.kept('diversity'):.2f}" if spread else "-",
        *(changed(student, metric) for metric in ("teacher_kid", "teacher_patch_kid")),
    ]


def changed(student: Student, metric: str) -> str:
    """Return the paired difference in a KID to the distilled student, a thousandfold; a dash if it was not measured."""
    if metric not in student.reference:
        return "-"
    change, error = paired_difference(student.mean(metric), student.reference[metric])
    return f"{1000 * change:+.3f} +- {1000 * error:.3f}"


def targets(student: Student, spread: Student | None) -> list[str]:
    """A line for every target of `student`."""
    trained, held_out = TRAINED_ON[student.name], HELD_OUT[student.name]
    checks = [
        ("win rate on what it was trained on", student.wins(trained).nanmean().item(), TRAINED_WINS),
        ("judge's R@5 over the distilled student's", student.kept("r@5"), RECALL_KEPT),
    ]
    if held_out != "r@1":
        checks.insert(1, ("win rate on what was held out", student.wins(held_out).nanmean().item(), HELD_OUT_WINS))
    if spread:
        checks.append(("diversity over the distilled student's", spread.kept("diversity"), DIVERSITY_KEPT))
    lines = [
        f"- {student.name}, {what}: {value:.3f}, target {goal:.2f} {verdict(value, goal)}"
        for what, value, goal in checks
    ]
    if held_out == "r@1":
        change, error = paired_difference(student.mean("r@1"), student.reference["r@1"])
        lines.append(f"- {student.name}, judge's R@1, held out: {change:+.4f} +- {error:.4f} (paired)")
    return lines


def verdict(value: float, goal: float) -> str:
    return "met" if value >= goal else "missed"


def said(column: Tensor) -> str:
    mean, error = mean_and_error(column)
    return f"{mean:.3f} +- {error:.3f}"
