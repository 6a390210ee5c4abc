"""Where the distance and the distribution name different students or samplers as the best, in words."""

from itertools import groupby

from .comparisons import best, compare, measured, rows_at
from .definitions import DISTRIBUTION, GENEVAL, RIGHT, metric
from .figures import number
from .types import Report, Row

OTHERS = (*DISTRIBUTION, RIGHT, "r@5", "clip", GENEVAL)  # what may disagree with the distance
WHY = (
    "The distance asks for the teacher's very picture of the same noise and so favours staying, and blur; the "
    "distribution asks whether pictures could be the teacher's. Where any good picture will do, go by the distribution."
)


def sentences(report: Report) -> list[str]:
    """Return a sentence for each number of evaluations at which they disagree, and one on the others.

    Both rows must be ahead by two standard errors of the paired difference, each in its own metric. Empty without
    distances of distributions, and where no number of evaluations has two rows of students.
    """
    if not measured(report.rows, DISTRIBUTION):
        return []
    budgets = sorted({row.num_evaluations for row in report.rows if row.role == "student"})
    students = {n: rows_at(report.rows, "student", n) for n in budgets}
    rivals = {n: _rivals(rows) for n, rows in students.items() if len(rows) > 1}
    texts = [_sentence(n, students[n], by_key) for n, by_key in rivals.items() if by_key]
    texts += [WHY] if texts else []
    agreed = {n: _best_of_all(students[n]) for n, by_key in rivals.items() if not by_key}
    texts += [
        f"At {n} evaluations {_name(row)} is the best by distance and distribution." for n, row in agreed.items() if row
    ]
    if level := ", ".join(str(n) for n, row in agreed.items() if row is None):
        texts.append(
            f"At {level} evaluations distance and distribution name different students or samplers as the best, none "
            "of them ahead in one and behind in the other by two standard errors."
        )
    return texts


def _best_of_all(rows: list[Row]) -> Row | None:
    """Return the row that is best in the distance and in every distance of distributions; None where none is."""
    winners = [best(rows, key) for key in ("distance", *measured(rows, DISTRIBUTION))]
    return winners[0] if len({row.id for row in winners if row is not None}) == 1 else None


def _rivals(rows: list[Row]) -> dict[str, Row]:
    """Return the row that is best in each metric which disagrees with the distance about the best of `rows`."""
    nearest = best(rows, "distance")
    assert nearest is not None, "there are rows"
    found = {}
    for key in measured(rows, OTHERS):
        other = best(rows, key)
        if other is None or other.id == nearest.id:
            continue
        if compare(nearest, other, "distance").verdict == "ahead" and compare(other, nearest, key).verdict == "ahead":
            found[key] = other
    return found


def _sentence(num_evaluations: int, rows: list[Row], by_key: dict[str, Row]) -> str:
    """Return the disagreement at one number of evaluations in words."""
    nearest = best(rows, "distance")
    assert nearest is not None, "there are rows"
    texts = []
    for other, keys in groupby(sorted(by_key, key=lambda key: by_key[key].id), key=lambda key: by_key[key]):
        better = [f"{metric(key).label} ({_figures(other, nearest, key)})" for key in keys]
        texts.append(f"{_name(other)} in {' and '.join(better)}")
    return (
        f"At {num_evaluations} evaluations they disagree: {_name(nearest)} is best in Distance "
        f"({number(nearest.metrics['distance'])}), {'; '.join(texts)}."
    )


def _figures(row: Row, other: Row, key: str) -> str:
    return f"{number(row.metrics[key])} against {number(other.metrics[key])}"


def _name(row: Row) -> str:
    return f"{row.name}, {row.sampler}"
