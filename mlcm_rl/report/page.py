"""report.html: one page that holds everything it shows."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..storage.files import replacing
from . import comparisons, figures, plots, tables, tuned_students
from .definitions import GAIN, LATENCY, TRAINING, WIN_RATE, metric

THUMBNAIL = 256  # pixels a side at most; smaller pictures stay lossless
LANGUAGES = {"en": "English", "zh": "Chinese"}


def picture_path(folder: Path, row: str, prompt: int) -> Path:
    """Where the evaluation in `folder` keeps the picture that row drew for a prompt."""
    return folder / "pictures" / row / f"{prompt:04d}.png"


def write(result: dict[str, Any], folder: Path) -> None:
    """Write report.html into `folder` from report.json's contents and the pictures beside it."""
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(render(result, folder), encoding="utf-8")


def render(result: dict[str, Any], folder: Path) -> str:
    """The page as text. Nothing in it points outside: pictures and plots are part of it, and there is no script."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = next((one for one in result.get("tuned", []) if one["name"] == result.get("product")), None)
    return environment.get_template("report.html").render(
        report=result,
        headline=headline(result),
        made=f"the student tuned by {made['name']}" if made else "the student",
        standing=standing(result["headline"]["checks"]),
        outcome=tuned_students.outcome(made) if made else "",
        gallery=gallery(result, folder),
        legend=plots.lines(result),
        quality=[plots.quality(result, key) for key in tables.main_metrics(result)],
        tuned=tuned(result, folder) if result.get("tuned") else None,
        curves=losses(result["curves"]),
        learned=[plots.learned(one, name) for one in result.get("tuned", []) for name in one["rewards"]],
        heads=tables.heads(result),
        groups=groups(result),
        comparisons=[compared(result, one) for one in result["comparisons"]],
        latency=LATENCY,
        definitions=definitions(result),
        settings={**{f"teacher.{key}": value for key, value in result["teacher"].items()}, **result["settings"]},
    )


def losses(curves: list[dict[str, Any]]) -> list[str]:
    """The plots of a report's loss curves, told apart by stage where there is more than one."""
    several = any(curve.get("stage", 1) > 1 for curve in curves)
    return [plots.loss(curve, several) for curve in curves]


def definitions(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's columns, and the networks that measured, in words."""
    found = [(metric(key).label, metric(key).definition) for key in tables.columns(result)]
    if tables.has_training(result):
        found.insert(0, ("Training evals", TRAINING))
    if result.get("tuned"):
        found += [("Win rate", WIN_RATE), ("Gain", GAIN)]
    return found + [(f"Network: {name}", text) for name, text in tables.network_texts(result)]


def headline(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The headline's checks as the page's tiles: what the student reaches, beside the teacher's two figures."""
    rows = comparisons.by_id(result)
    reference = rows[result["reference"]]
    tiles = []
    for check in result["headline"]["checks"]:
        student, teacher, key = rows[check["student"]], rows[check["teacher"]], check["metric"]
        tiles.append(
            {
                "label": metric(key).label,
                "better": "lower is better" if metric(key).lower_is_better else "higher is better",
                "student": figures.number(student["metrics"][key]),
                "teacher": figures.number(teacher["metrics"][key]),
                "solver": teacher["sampler"],
                "reference": figures.number(reference["metrics"][key]) if key != "distance" else None,
                "difference": figures.plus_minus(check["difference"], check["se"]),
                "verdict": check["verdict"],
            }
        )
    return tiles


def standing(checks: list[dict[str, Any]]) -> str:
    """Return in which metrics of the headline the student is ahead, level or behind, in words."""
    labels: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for check in checks:
        labels[check["verdict"]].append(metric(check["metric"]).label)
    return ", ".join(f"{verdict} in {' and '.join(found)}" for verdict, found in labels.items() if found)


def groups(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The table's rows under their headings."""
    return [
        (
            heading,
            [
                {"label": tables.label(row), "cells": tables.cells(result, row), "default": row["default"]}
                for row in rows
            ],
        )
        for heading, rows in tables.groups(result).items()
    ]


def compared(result: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    rows, key = comparisons.by_id(result), comparison["metric"]
    student, teacher = rows[comparison["student"]], rows[comparison["teacher"]]
    return {
        "num_evaluations": comparison["num_evaluations"],
        "metric": metric(key).label,
        "student": f"{student['name']}, {student['sampler']}",
        "teacher": teacher["sampler"],
        "values": (figures.number(student["metrics"][key]), figures.number(teacher["metrics"][key])),
        "difference": figures.plus_minus(comparison["difference"], comparison["se"]),
        "verdict": comparison["verdict"],
    }


def gallery(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The shown prompts down, evaluations across: what the run made at its default beside the undistilled teacher.

    The teacher's row at each number of evaluations is the one nearest to the reference.
    """
    rows = result["rows"]
    students = [row for row in rows if row["role"] == "student" and row["default"]]
    students.sort(key=lambda row: row["name"] != result.get("product"))  # what the run made comes first
    of_student = {row["num_evaluations"]: row for row in students if row["name"] == students[0]["name"]}
    budgets = sorted({row["num_evaluations"] for row in rows if row["role"] != "reference"})
    of_teacher = {n: comparisons.best(comparisons.rows_at(result, "undistilled", n), "distance") for n in budgets}
    reference = comparisons.by_id(result)[result["reference"]]
    prompts = [
        {
            "text": prompt["prompt"],
            "language": prompt["language"],
            "language_name": LANGUAGES.get(prompt["language"], prompt["language"]),
            "student": {n: picture(folder, of_student.get(n), i) for n in budgets},
            "teacher": {n: picture(folder, of_teacher[n], i) for n in budgets},
            "reference": picture(folder, reference, i),
        }
        for i, prompt in enumerate(result["prompts"])
        if prompt["shown"]
    ]
    return {
        "prompts": prompts,
        "budgets": budgets,
        "reference": reference,
        "student": students[0] if students else None,
        "solvers": {n: row["sampler"] for n, row in of_teacher.items() if row},
    }


def tuned(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The section on preference learning: a card a student, two tables, and galleries of before and after."""
    students = result["tuned"]
    others = [metric(key).label for key in tuned_students.others(result)]
    return {
        "cards": [
            {
                "name": one["name"],
                "sentence": tuned_students.sentence(one),
                "verdict": tuned_students.verdict(one),
                "warnings": one["guard"]["warnings"],
                "plot": plots.gains(one),
            }
            for one in students
        ],
        "tables": [
            {
                "title": title,
                "heads": heads,
                "num_words": num_words,
                "groups": [(f"{one['name']}, tuned from {one['reference']}", lines(result, one)) for one in students],
            }
            for title, heads, num_words, lines in (
                ("Rewards before and after", tuned_students.heads(result), 2, tuned_students.table),
                ("What else changed: paired differences", others, 0, tuned_students.costs),
            )
        ],
        "galleries": before_and_after(result, folder),
    }


def before_and_after(result: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A gallery for each distilled student and each sampler of those tuned from it: its pictures, then theirs."""
    rows = comparisons.by_id(result)
    tuned: dict[tuple[str, str], dict[str, Any]] = {}
    for one in result["tuned"]:
        found = tuned_students.nearest(one)
        if found is not None:
            tuned.setdefault((one["reference"], found["reference"]), {})[one["name"]] = rows[found["row"]]
    galleries = []
    for (reference, before), after in tuned.items():
        columns = {f"before: {reference}": rows[before]} | {f"after: {name}": row for name, row in after.items()}
        prompts = [
            {
                "text": prompt["prompt"],
                "language": prompt["language"],
                "language_name": LANGUAGES.get(prompt["language"], prompt["language"]),
                "pictures": {name: picture(folder, row, i) for name, row in columns.items()},
            }
            for i, prompt in enumerate(result["prompts"])
            if prompt["shown"]
        ]
        galleries.append({"num_steps": rows[before]["num_steps"], "columns": list(columns), "prompts": prompts})
    return galleries


def picture(folder: Path, row: dict[str, Any] | None, prompt: int) -> str | None:
    """A picture as a data: URI, at most THUMBNAIL pixels a side; None where there is no row."""
    if row is None:
        return None
    with Image.open(picture_path(folder, row["id"], prompt)) as image:
        lossless = max(image.size) <= THUMBNAIL
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        data = BytesIO()
        image.save(data, "WEBP", lossless=lossless, quality=85)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")
