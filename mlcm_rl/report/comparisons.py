"""Which student is ahead, level or behind, of the teacher and of the others."""

from collections.abc import Iterable
from typing import Any

from ..equations.statistics import paired_difference
from . import tuned_students
from .definitions import metric
from .figures import kept, number, plus_minus, rounded
from .tuned_students import NUM_ERRORS

BUDGETS = (2, 4, 8)  # network evaluations at which student and teacher are compared
HEADLINE_BUDGET = 4
COMPARED = ("distance", "r@5", "clip")


def comparisons(report: dict[str, Any]) -> list[dict[str, Any]]:
    """At 2, 4 and 8 evaluations, the best student row against the best undistilled row, by each metric, paired.

    "Best" is picked on these very prompts, on both sides; an honest headline compares the student's default instead.
    """
    found = []
    for key in measured(report, COMPARED):
        for budget in BUDGETS:
            student = best(rows_at(report, "student", budget), key)
            teacher = best(rows_at(report, "undistilled", budget), key)
            if student and teacher:
                found.append({"num_evaluations": budget, **compare(student, teacher, key)})
    return found


def compare(student: dict, teacher: dict, key: str) -> dict[str, Any]:
    """Student minus teacher in metric `key`, over the prompts that both have, with its standard error.

    "verdict": ahead or behind where the difference is more than NUM_ERRORS standard errors, else level.
    """
    difference, error = paired_difference(kept(student, key), kept(teacher, key))
    gain = -difference if metric(key).lower_is_better else difference
    return {
        "metric": key,
        "student": student["id"],
        "teacher": teacher["id"],
        "difference": rounded(difference),
        "se": rounded(error),
        "verdict": "ahead" if gain > NUM_ERRORS * error else "behind" if gain < -NUM_ERRORS * error else "level",
    }


def headline(report: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """Whether the student `name`, at its default sampler, beats the undistilled teacher at four evaluations, in words.

    Without a name it is what the run made: the tuned student where there is one. In every metric of COMPARED that was
    measured, the student's row at 4 is set against the best undistilled row at 4, paired. "passed" needs the distance
    ahead, nothing behind, and of a tuned student no reward lost to the one that it was tuned from, each by two standard
    errors: retrieval can be at its ceiling on both sides.
    """
    students = [row for row in rows_at(report, "student", HEADLINE_BUDGET) if row["default"]]
    name = name or report.get("product") or (students[0]["name"] if students else None)  # older reports do not say
    own = [row for row in students if row["name"] == name]
    teachers = rows_at(report, "undistilled", HEADLINE_BUDGET)
    if not own or not teachers:
        text = (
            f"Nothing to compare at {HEADLINE_BUDGET} network evaluations: the student or the undistilled teacher was "
            "not measured there."
        )
        return {"num_evaluations": HEADLINE_BUDGET, "passed": False, "checks": [], "text": text}
    checks = []
    for key in measured(report, COMPARED):
        rival = best(teachers, key)
        assert rival is not None  # there are teachers
        checks.append(compare(own[0], rival, key))
    tuned = next((one for one in report.get("tuned", []) if one["name"] == name), None)
    lost = tuned_students.lost(tuned) if tuned else []
    said = [sentence(report, check) for check in checks] + ([tuned_students.outcome(tuned)] if tuned else [])
    verdicts = [check["verdict"] for check in checks]
    return {
        "num_evaluations": HEADLINE_BUDGET,
        "passed": verdicts[0] == "ahead" and "behind" not in verdicts and not lost,
        "checks": checks,
        "text": f"At {HEADLINE_BUDGET} network evaluations: {' '.join(said)}",
    }


def sentence(report: dict[str, Any], check: dict[str, Any]) -> str:
    """A comparison in words, beside what the reference itself reaches."""
    rows, key = by_id(report), check["metric"]
    student, teacher, reference = (rows[name] for name in (check["student"], check["teacher"], report["reference"]))
    own = f", {reference['num_steps']} guided steps {number(reference['metrics'][key])}" if key != "distance" else ""
    return (
        f"{metric(key).label} {number(student['metrics'][key])} for the student, {number(teacher['metrics'][key])} for "
        f"the undistilled teacher ({teacher['sampler']}){own}; paired difference "
        f"{plus_minus(check['difference'], check['se'])}, {check['verdict']}."
    )


def rows_at(report: dict[str, Any], role: str, num_evaluations: int) -> list[dict]:
    return [row for row in report["rows"] if row["role"] == role and row["num_evaluations"] == num_evaluations]


def by_id(report: dict[str, Any]) -> dict[str, dict]:
    return {row["id"]: row for row in report["rows"]}


def measured(report: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of `keys` that the rows have a value of."""
    return [key for key in keys if report["rows"][0]["metrics"].get(key, {}).get("mean") is not None]


def best(rows: list[dict], key: str) -> dict | None:
    """The row whose mean of `key` is best, None of no rows."""
    sign = 1.0 if metric(key).lower_is_better else -1.0
    return min(rows, key=lambda row: sign * row["metrics"][key]["mean"], default=None)
