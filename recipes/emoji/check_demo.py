"""Closes `make demo`: fails unless the 4-step student is ahead of the teacher at 4 evaluations.

Draws the README's picture, `demo.png` in the run's folder: a prompt a row, the teacher at its most steps, the student
at 8, 4 and 2, and last the tuned student at 4.
"""

import sys
from pathlib import Path

from PIL import Image
from rich.console import Console

from mlcm_rl.report import assembly, comparisons, page
from mlcm_rl.report.types import Report
from mlcm_rl.storage.files import replacing

SIZE, GAP, COLUMNS = 96, 6, 2  # pixels a picture, pixels between, prompts side by side


def contact_sheet(folder: Path, report: Report) -> Image.Image:
    """Return the reference and the finished student's pictures, all from the same noise, for every shown prompt."""
    students = [row for row in report.rows if row.role == "student" and row.default]
    finished = [row for row in students if row.name == students[0].name]
    tuned = [row for row in students if row not in finished and row.num_steps == comparisons.HEADLINE_BUDGET]
    drawn = [*sorted(finished, key=lambda row: -row.num_steps), *tuned]
    rows = [report.reference, *(row.id for row in drawn)]
    shown = [i for i, prompt in enumerate(report.prompts) if prompt.shown]
    cell = SIZE + GAP
    width = COLUMNS * (len(rows) * cell + 2 * GAP)
    sheet = Image.new("RGB", (width, -(-len(shown) // COLUMNS) * cell + GAP), "white")
    for place, prompt in enumerate(shown):
        left, top = place % COLUMNS * (width // COLUMNS), place // COLUMNS * cell
        for column, row in enumerate(rows):
            with Image.open(page.picture_path(folder, row, prompt)) as picture:
                resized = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            sheet.paste(resized, (left + GAP + column * cell, top + GAP))
    return sheet


def main(run: Path) -> int:
    """Return the exit code: 0 where the headline holds of the distilled student, else 1."""
    console = Console(highlight=False)
    folder = sorted(run.glob("[0-9]*-evaluate"))[-1]
    report = assembly.read(folder / "report.json")
    with replacing(run / "demo.png") as temporary:
        contact_sheet(folder, report).quantize(128).save(temporary, format="PNG")
    headline = comparisons.headline_of(report, "student")
    console.print(
        f"{headline.text}\n{report.headline.text}\nThe page: {(folder / 'report.html').absolute()}",
        soft_wrap=True,
    )
    if not headline.passed:
        console.print("[red]The 4-step student is not ahead of the teacher by two standard errors.[/]")
    return 0 if headline.passed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
