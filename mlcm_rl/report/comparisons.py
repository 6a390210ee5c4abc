"""Which student is ahead, level or behind, of the teacher and of the others."""

import math
from collections.abc import Iterable

from ..equations.statistics import paired_difference
from . import tuned_students
from .definitions import DISTRIBUTION, GENEVAL, RIGHT, metric
from .figures import number, plus_minus, rounded, values_of
from .tuned_students import NUM_ERRORS
from .types import Comparison, Headline, Measurements, Report, Row, TunedStudent

BUDGETS = (2, 4, 8)  # network evaluations at which student and teacher are compared
HEADLINE_BUDGET = 4
OWN = "student"  # the name of the student that an evaluation's own recipe distilled
COMPARED = ("distance", "r@5", RIGHT, "clip", GENEVAL)


def comparisons(measurements: Measurements) -> list[Comparison]:
    """Return, at 2, 4 and 8 evaluations, the best student row against the best undistilled row, by each metric, paired.

    "Best" is picked on these very prompts, on both sides; an honest headline compares the student's default instead.
    """
    rows, compared = measurements.rows, []
    for key in measured(rows, (*COMPARED, *DISTRIBUTION)):
        for budget in BUDGETS:
            student = best(rows_at(rows, "student", budget), key)
            teacher = best(rows_at(rows, "undistilled", budget), key)
            if student and teacher:
                compared.append(compare(student, teacher, key).model_copy(update={"num_evaluations": budget}))
    return compared


def compare(student: Row, teacher: Row, key: str) -> Comparison:
    """Return student minus teacher in metric `key`, over the prompts that both have, with its standard error.

    The student is ahead or behind where the difference is more than NUM_ERRORS standard errors, else level.
    """
    difference, error = paired_difference(values_of(student, key), values_of(teacher, key))
    gain = -difference if metric(key).lower_is_better else difference
    return Comparison(
        metric=key,
        student=student.id,
        teacher=teacher.id,
        difference=rounded(difference),
        se=rounded(error),
        verdict="ahead" if gain > NUM_ERRORS * error else "behind" if gain < -NUM_ERRORS * error else "level",
    )


def headline_of(report: Report, name: str) -> Headline:
    """Return the headline of the student `name` of a finished report."""
    return headline(report, report.tuned, name)


def headline(measurements: Measurements, tuned: list[TunedStudent], product: str | None) -> Headline:
    """Return whether the student `product`, at its default sampler, beats the undistilled teacher at four evaluations.

    `product` is what the run made: the tuned student where there is one. In every metric of COMPARED that was
    measured, the student's row at 4 is compared with the best undistilled row at 4, paired. It passes where the
    distance is ahead, nothing is behind, and a tuned student is behind the student that it was tuned from in no reward,
    each by two standard errors: retrieval can be at its ceiling on both sides.
    """
    rows = measurements.rows
    students = [row for row in rows_at(rows, "student", HEADLINE_BUDGET) if row.default]
    name = product or (students[0].name if students else None)  # older reports have no product
    own = [row for row in students if row.name == name]
    teachers = rows_at(rows, "undistilled", HEADLINE_BUDGET)
    if not own or not teachers:
        text = (
            f"Nothing to compare at {HEADLINE_BUDGET} network evaluations: the student or the undistilled teacher was "
            "not measured there."
        )
        return Headline(num_evaluations=HEADLINE_BUDGET, passed=False, checks=[], text=text)
    checks = []
    for key in measured(rows, COMPARED):
        rival = best(teachers, key)
        assert rival is not None  # there are teachers
        checks.append(compare(own[0], rival, key))
    student = next((one for one in tuned if one.name == name), None)
    nearest = best(students, "distance")
    who, more = "the student", []
    if student:
        who, more = f"the student tuned by {name}", [tuned_students.outcome(student)]
    elif len({row.name for row in students}) > 1:
        who = "the recipe's own student" if name == OWN else f"the student {name}"
        if nearest is not None and nearest.name != name:
            figure = number(nearest.metrics["distance"])
            more = [f"Of the students of this table {nearest.name} is the nearest ({figure})."]
    sentences = [sentence(measurements, check, who) for check in checks] + more
    behind = tuned_students.rewards_behind(student) if student else []
    verdicts = [check.verdict for check in checks]
    return Headline(
        num_evaluations=HEADLINE_BUDGET,
        passed=verdicts[0] == "ahead" and "behind" not in verdicts and not behind,
        checks=checks,
        text=f"At {HEADLINE_BUDGET} network evaluations: {' '.join(sentences)}",
    )


def sentence(measurements: Measurements, check: Comparison, product: str) -> str:
    """Return a comparison of the student called `product` in words, beside what the reference itself reaches."""
    rows, key = by_id(measurements.rows), check.metric
    student, teacher, reference = (rows[name] for name in (check.student, check.teacher, measurements.reference))
    own = f", {reference.num_steps} guided steps {number(reference.metrics[key])}" if key != "distance" else ""
    return (
        f"{metric(key).label} {number(student.metrics[key])} for {product}, {number(teacher.metrics[key])} for "
        f"the undistilled teacher ({teacher.sampler}){own}; paired difference "
        f"{plus_minus(check.difference, check.se)}, {check.verdict}."
    )


def rows_at(rows: list[Row], role: str, num_evaluations: int) -> list[Row]:
    """Return those of `rows` of one role and number of evaluations."""
    return [row for row in rows if row.role == role and row.num_evaluations == num_evaluations]


def by_id(rows: list[Row]) -> dict[str, Row]:
    """Return `rows` by their ids."""
    return {row.id: row for row in rows}


def measured(rows: list[Row], keys: Iterable[str]) -> list[str]:
    """Return those of `keys` that the first of `rows` has a value of."""
    metrics = rows[0].metrics
    return [key for key in keys if key in metrics and metrics[key].mean is not None]


def best(rows: list[Row], key: str) -> Row | None:
    """Return the row whose mean of `key` is best; None of no rows."""
    sign = 1.0 if metric(key).lower_is_better else -1.0

    def rank(row: Row) -> float:
        mean = row.metrics[key].mean
        return math.inf if mean is None else sign * mean

    return min(rows, key=rank, default=None)
