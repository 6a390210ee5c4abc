"""What a study of variants says: its distances and KID as Markdown, whether the targets are met, from its table.

    python recipes/emoji/study/variant_summary.py recipes/emoji/study/variants-400.tsv

How far the seeds of a student lie apart is said where they lie farthest. What else the figures are: variant_table.py.
"""

import math
import sys
from itertools import groupby
from pathlib import Path

from rich.console import Console

import variant_table
from variant_table import LCM, Row

BUDGETS = (2, 4, 8)  # evaluations at which students are set against the undistilled teacher and LCM
SINGLE_BUDGETS = (2, 3, 4, 6, 8)  # at which one student is set against the dedicated ones
RECALL_AT, RECALL_KEPT = 4, 0.95  # evaluations, and of the reference's R@5
REFERENCE = ("teacher", "DDIM, guided", 100)
DEDICATED = ("fixed_8", "fixed_8_trajectory", "fixed_4_trajectory", "fixed_2_trajectory")
DEARER = ("budgets_long", "progressive_second_stage", "online")  # trained on more samples, or evaluations, than LCM
TABLES = {  # of a row -> title, factor
    "kid": ("KID to the teacher x 1000", 1000),
    "patch_kid": ("the same on patches", 1000),
    "diversity": ("diversity", 1),
}
SINGLE = ("budgets", "budgets_long", "budgets_lora", "conditioned")


def main(table: Path) -> None:
    Console().print(text(variant_table.read(table)), soft_wrap=True)


def text(rows: list[Row]) -> str:
    """Return the table of distances and the targets in words, as Markdown."""
    students = [row for row in rows if row.seeds]
    teachers = [row for row in rows if not row.seeds]
    budgets = sorted({row.evaluations for row in students})
    lines = [
        f"| student, sampler | seeds | apart | {' | '.join(map(str, budgets))} |",
        f"|---|--:|--:{'|--:' * len(budgets)}|",
        *(line(list(group), budgets) for _, group in groupby(rows, key=lambda row: row.pair)),
    ]
    verdicts = [*against(students, teachers), *one_for_all(students), *recall(students, teachers)]
    return "\n".join([*lines, "", *verdicts, *distributions(rows), *disagreements(students)])


def line(rows: list[Row], budgets: list[int]) -> str:
    """Return the line of one student under one sampler, `rows` of its numbers of evaluations."""
    distances = {row.evaluations: said(row.distance, row.distance_error) for row in rows}
    farthest = max((row.apart for row in rows if not math.isnan(row.apart)), default=None)
    cells = [
        ", ".join(rows[0].pair),
        str(rows[0].seeds or "-"),
        "-" if farthest is None else f"{farthest:.0%}",
        *(distances.get(budget, "-") for budget in budgets),
    ]
    return f"| {' | '.join(cells)} |"


def against(students: list[Row], teachers: list[Row]) -> list[str]:
    """Return a line for each budget: the best student against the teacher, and against LCM at equal training cost."""
    lines = []
    at_equal_cost = [row for row in students if row.student not in DEARER]
    lcm = [row for row in students if row.student in LCM]
    for evaluations in BUDGETS:
        best, other = picked(students, evaluations), picked(teachers, evaluations)
        if best and other:
            lines.append(duel(best, "the undistilled teacher", other, best.over_teacher, best.over_teacher_error))
        best, other = picked(at_equal_cost, evaluations), picked(lcm, evaluations)
        if best and other:
            lines.append(duel(best, "LCM", other, best.over_lcm, best.over_lcm_error))
    return lines


def duel(best: Row, name: str, other: Row, difference: float, error: float) -> str:
    return (
        f"- {best.evaluations} evaluations, {', '.join(best.pair)} against {name} ({', '.join(other.pair)}): "
        f"{said(difference, error)}, {verdict(difference < -2.0 * error)}"
    )


def one_for_all(students: list[Row]) -> list[str]:
    """Return a line for each student of every budget: its distance over that of the best dedicated one."""
    lines = []
    for single in SINGLE:
        ratios = {}
        for evaluations in SINGLE_BUDGETS:
            own = picked([row for row in students if row.student == single], evaluations)
            dedicated = picked([row for row in students if row.student in DEDICATED], evaluations)
            if own and dedicated:
                ratios[evaluations] = own.distance / dedicated.distance
        if ratios:
            shown = ", ".join(f"{value:.2f} at {evaluations}" for evaluations, value in ratios.items())
            met = verdict(all(value <= 1.1 for value in ratios.values()))
            lines.append(f"- {single} over the best dedicated student: {shown}: within 10 % {met}")
    return lines


def distributions(rows: list[Row]) -> list[str]:
    """Return the tables of KID to the teacher's own pictures and their patches, and of diversity, where measured."""
    lines: list[str] = []
    budgets = sorted({row.evaluations for row in rows if row.seeds})
    for name, (title, scale) in TABLES.items():
        known = [row for row in rows if not math.isnan(getattr(row, name))]
        if known:
            head = f"| {title}: student, sampler | {' | '.join(map(str, budgets))} |"
            lines += ["", head, f"|---|{'--:|' * len(budgets)}"]
        for pair, group in groupby(known, key=lambda row: row.pair):
            figures = {
                row.evaluations: f"{scale * getattr(row, name):.3f} +- {scale * getattr(row, f'{name}_error'):.3f}"
                for row in group
            }
            lines.append(f"| {', '.join(pair)} | {' | '.join(figures.get(budget, '-') for budget in budgets)} |")
    return lines


def disagreements(students: list[Row]) -> list[str]:
    """Return a line for each budget and kind of KID: whether it names another student than the distance as the best.

    Each is picked on the picking prompts; they disagree if each is ahead by two standard errors in what picked it.
    """
    lines: list[str] = []
    for name, what in (("kid", "KID"), ("patch_kid", "KID of patches")):
        known = [row for row in students if not math.isnan(getattr(row, name))]
        for evaluations in BUDGETS:
            nearest = picked(known, evaluations)
            if nearest is None:
                continue
            at_budget = [row for row in known if row.evaluations == evaluations]
            best = min(at_budget, key=lambda row: getattr(row, f"{name}_picking"))
            gain, error = (1000 * getattr(best, f"{name}_over_nearest{end}") for end in ("", "_error"))
            disagree = gain < -2 * error and best.over_nearest > 2 * best.over_nearest_error
            distance = said(best.over_nearest, best.over_nearest_error)
            lines.append(
                f"- {evaluations} evaluations, {what}: {', '.join(best.pair)} is best, {', '.join(nearest.pair)} "
                f"nearest (KID x 1000 {gain:.3f} +- {error:.3f}, distance {distance} apart): they "
                f"{'disagree' if disagree else 'agree, or errors do not part them'}"
            )
    return ["", *lines] if lines else []


def recall(students: list[Row], teachers: list[Row]) -> list[str]:
    """Return a line on the share of the reference's R@5 that the student has which is best by distance."""
    best = picked(students, RECALL_AT)
    if best is None:
        return []
    reference = next(row for row in teachers if (*row.pair, row.evaluations) == REFERENCE)
    kept = best.recall / reference.recall
    return [
        f"- {RECALL_AT} evaluations, {', '.join(best.pair)}: R@5 {said(best.recall, best.recall_error)}, {kept:.3f} of "
        f"the {said(reference.recall, reference.recall_error)} of the teacher's {REFERENCE[2] // 2} guided steps: "
        f"{verdict(kept >= RECALL_KEPT)}"
    ]


def picked(rows: list[Row], evaluations: int) -> Row | None:
    """Return the row with the lowest distance on the picking prompts, of so many evaluations; None of none."""
    return min((row for row in rows if row.evaluations == evaluations), key=lambda row: row.picking, default=None)


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def said(mean: float, error: float) -> str:
    return f"{mean:.4f} +- {error:.4f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
