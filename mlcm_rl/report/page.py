"""report.html: one page that holds everything it shows."""

import base64
import math
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..data.picture_files import read_picture
from ..storage.files import replacing
from . import comparisons, disagreements, figures, plots, tables, tuned_students
from .definitions import GAIN, LATENCY, RIGHT, TRAINING, WIN_RATE, metric
from .types import (
    Card,
    Comparison,
    ComparisonRow,
    Gallery,
    GalleryPrompt,
    LossCurve,
    NumberTable,
    PairGallery,
    PairPrompt,
    Picture,
    Report,
    Row,
    TableRow,
    Tile,
    TunedSection,
)

THUMBNAIL = 256  # pixels a side at most; smaller pictures stay lossless
LANGUAGES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean"}


def picture_path(folder: Path, row: str, prompt: int) -> Path:
    """Return where the evaluation in `folder` keeps the picture of a row for a prompt."""
    return folder / "pictures" / row / f"{prompt:04d}.png"


def sample_path(folder: Path, row: str, index: int) -> Path:
    """Return where `keep_pictures` puts a row's picture of sample `index`: in a folder that holds nothing else."""
    return folder / "samples" / row / f"{index:05d}.png"


def write(report: Report, folder: Path) -> None:
    """Write report.html into `folder` from a report and the pictures beside it."""
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(render(report, folder), encoding="utf-8")


def render(report: Report, folder: Path) -> str:
    """Return the page as text. Pictures and plots are part of it, nothing points outside, and there is no script."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    product = next((student for student in report.tuned if student.name == report.product), None)
    return environment.get_template("report.html").render(
        report=report,
        headline=headline(report),
        product=f"the student tuned by {product.name}" if product else "the student",
        standing=standing(report.headline.checks),
        outcome=tuned_students.outcome(product) if product else "",
        gallery=gallery(report, folder),
        legend=plots.lines(report),
        quality=[plots.quality(report, key) for key in tables.main_metrics(report)],
        tuned=tuned_section(report, folder) if report.tuned else None,
        curves=losses(report.curves),
        reward_curves=[plots.reward_curve(student, name) for student in report.tuned for name in student.rewards],
        heads=tables.heads(report),
        groups=groups(report),
        details=tables.details(report),
        disagreements=disagreements.sentences(report),
        paired=tables.paired(report),
        comparisons=[comparison_row(report, comparison) for comparison in report.comparisons],
        latency=LATENCY,
        definitions=definitions(report),
        settings={**{f"teacher.{key}": value for key, value in report.teacher.items()}, **report.settings},
    )


def losses(curves: list[LossCurve]) -> list[str]:
    """Return the plots of a report's loss curves, named for their stages where there is more than one."""
    several = any(curve.stage > 1 for curve in curves)
    return [plots.loss(curve, several) for curve in curves]


def definitions(report: Report) -> list[tuple[str, str]]:
    """Return (label, definition) of the table's columns, then of the networks that measured."""
    entries = [(metric(key).label, metric(key).definition) for key in tables.defined(report)]
    if tables.has_training(report):
        entries.insert(0, ("Training evals", TRAINING))
    if report.tuned:
        entries += [("Win rate", WIN_RATE), ("Gain", GAIN)]
    return entries + [(f"Network: {name}", text) for name, text in tables.network_texts(report)]


def headline(report: Report) -> list[Tile]:
    """Return the headline's checks as tiles: what the student reaches, beside the teacher's two figures."""
    rows = comparisons.by_id(report.rows)
    reference = rows[report.reference]
    tiles = []
    for check in report.headline.checks:
        student, teacher, key = rows[check.student], rows[check.teacher], check.metric
        tiles.append(
            Tile(
                label=metric(key).label,
                better="lower is better" if metric(key).lower_is_better else "higher is better",
                student=figures.number(student.metrics[key]),
                teacher=figures.number(teacher.metrics[key]),
                solver=teacher.sampler,
                reference=figures.number(reference.metrics[key]) if key != "distance" else None,
                difference=figures.plus_minus(check.difference, check.se),
                verdict=check.verdict,
            )
        )
    return tiles


def standing(checks: list[Comparison]) -> str:
    """Return in which metrics of the headline the student is ahead, level or behind, in words."""
    labels: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for check in checks:
        labels[check.verdict].append(metric(check.metric).label)
    return ", ".join(f"{verdict} in {' and '.join(metrics)}" for verdict, metrics in labels.items() if metrics)


def groups(report: Report) -> list[tuple[str, list[TableRow]]]:
    """Return the table's rows under their headings."""
    return [
        (heading, [TableRow(tables.label(row), tables.cells(report, row), row.default) for row in rows])
        for heading, rows in tables.groups(report).items()
    ]


def comparison_row(report: Report, comparison: Comparison) -> ComparisonRow:
    """Return `comparison` as a row of the page's table."""
    rows, key = comparisons.by_id(report.rows), comparison.metric
    student, teacher = rows[comparison.student], rows[comparison.teacher]
    return ComparisonRow(
        num_evaluations=comparison.num_evaluations,
        metric=metric(key).label,
        student=f"{student.name}, {student.sampler}",
        teacher=teacher.sampler,
        values=(figures.number(student.metrics[key]), figures.number(teacher.metrics[key])),
        difference=figures.plus_minus(comparison.difference, comparison.se),
        verdict=comparison.verdict,
    )


def gallery(report: Report, folder: Path) -> Gallery:
    """Return the gallery: prompts down, evaluations across; what the run made beside the undistilled teacher.

    The student is at its default sampler; the teacher's row at each number of evaluations is the one nearest to the
    reference.
    """
    rows = report.rows
    students = [row for row in rows if row.role == "student" and row.default]
    students.sort(key=lambda row: row.name != report.product)  # what the run made comes first
    of_student = {row.num_evaluations: row for row in students if row.name == students[0].name}
    budgets = sorted({row.num_evaluations for row in rows if row.role != "reference"})
    of_teacher = {n: comparisons.best(comparisons.rows_at(rows, "undistilled", n), "distance") for n in budgets}
    reference = comparisons.by_id(rows)[report.reference]
    prompts = [
        GalleryPrompt(
            text=prompt.prompt,
            language=prompt.language,
            language_name=LANGUAGES.get(prompt.language, prompt.language),
            student={n: picture(folder, of_student.get(n), i) for n in budgets},
            teacher={n: picture(folder, of_teacher[n], i) for n in budgets},
            reference=picture(folder, reference, i),
        )
        for i, prompt in enumerate(report.prompts)
        if prompt.shown
    ]
    return Gallery(
        prompts=prompts,
        budgets=budgets,
        reference=reference,
        student=students[0] if students else None,
        solvers={n: row.sampler for n, row in of_teacher.items() if row},
    )


def tuned_section(report: Report, folder: Path) -> TunedSection:
    """Return the section on preference learning: a card a student, two tables, and galleries of before and after."""
    students = report.tuned
    others = [metric(key).label for key in tuned_students.others(report)]
    return TunedSection(
        cards=[
            Card(
                name=student.name,
                sentence=tuned_students.sentence(student),
                verdict=tuned_students.verdict(student),
                constraints=tuned_students.constraints(student),
                warnings=student.guard.warnings,
                plots=[plots.gains(student), *(plots.constraint(student, name) for name in student.max_drops)],
            )
            for student in students
        ],
        tables=[
            NumberTable(
                title=title,
                first="Steps",
                heads=heads,
                num_words=num_words,
                groups=[(f"{one.name}, tuned from {one.reference}", lines(report, one)) for one in students],
            )
            for title, heads, num_words, lines in (
                ("Rewards before and after", tuned_students.heads(report), 2, tuned_students.table),
                ("What else changed: paired differences", others, 0, tuned_students.costs),
            )
        ],
        galleries=before_and_after(report, folder),
    )


def before_and_after(report: Report, folder: Path) -> list[PairGallery]:
    """Return a gallery for each distilled student and each sampler of those tuned from it, its pictures first."""
    rows = comparisons.by_id(report.rows)
    after_by_reference: dict[tuple[str, str], dict[str, Row]] = {}
    for student in report.tuned:
        comparison = tuned_students.nearest(student)
        if comparison is not None:
            key = (student.reference, comparison.reference)
            after_by_reference.setdefault(key, {})[student.name] = rows[comparison.row]
    galleries = []
    for (reference, before), after in after_by_reference.items():
        columns = {f"before: {reference}": rows[before]} | {f"after: {name}": row for name, row in after.items()}
        prompts = [
            PairPrompt(
                text=prompt.prompt,
                language=prompt.language,
                language_name=LANGUAGES.get(prompt.language, prompt.language),
                pictures={name: picture(folder, row, i) for name, row in columns.items()},
            )
            for i, prompt in enumerate(report.prompts)
            if prompt.shown
        ]
        galleries.append(PairGallery(rows[before].num_steps, list(columns), prompts))
    return galleries


def picture(folder: Path, row: Row | None, prompt: int) -> Picture | None:
    """Return the first picture of a prompt, at most THUMBNAIL pixels a side; None where there is no row."""
    if row is None:
        return None
    content = webp(picture_path(folder, row.id, prompt), THUMBNAIL)
    uri = "data:image/webp;base64," + base64.b64encode(content).decode("ascii")
    right = figures.samples_of(row, RIGHT)[prompt, 0].item() if RIGHT in row.metrics else math.nan
    return Picture(uri, None if math.isnan(right) else right == 1.0)


def webp(path: Path, size: int) -> bytes:
    """Return a picture as WebP, at most `size` pixels a side. One of THUMBNAIL pixels or fewer loses nothing.

    Raise ValueError for a file that is no picture.
    """
    image, data = read_picture(path, str(path)), BytesIO()
    lossless = max(image.size) <= min(size, THUMBNAIL)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    image.save(data, "WEBP", lossless=lossless, quality=85)
    return data.getvalue()
