"""A gallery: the pictures of any number of evaluations on one page, prompts down, runs and steps across.

The page is a file, or a folder of a page and its pictures; it needs neither a server nor a network.
"""

import base64
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..storage.files import CheckpointError, replacing
from ..training.progress import Bar, progress
from . import comparisons, page
from .definitions import RIGHT, is_detail, metric
from .figures import significant
from .types import Report, Row, SampledRow

SIZE = 512  # pixels a side at most of a picture on the page
PICTURES = "pictures"  # the folder of a gallery that is a folder
PAGE = "index.html"
MAIN = ("reward/", "clip")  # beginnings of the metrics under a picture; all of them are beside a large one


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation in `folder`, and its name on the page."""

    name: str
    folder: Path
    report: Report


@dataclass(frozen=True)
class Place:
    """A row of the gallery: picture `picture` of a prompt, from 0, counted on where the prompt is repeated."""

    prompt: str
    language: str
    picture: int


@dataclass(frozen=True)
class Cell:
    """A picture in the file `path`; `noise` is what its noise depends on, and `scores` are by metric."""

    path: Path
    noise: tuple[int | str, ...]  # of an evaluation seed, number of the prompt, number of its picture
    scores: dict[str, float]


@dataclass(frozen=True)
class Column:
    """A row of an evaluation's table as a column of the gallery, or drawn pictures: a network under one sampler.

    `means` are the metrics that are a prompt's mean over several pictures, under each of them.
    """

    name: str  # unique: what `--blind` takes
    evaluation: str
    row: SampledRow
    is_shown: bool  # at first
    cells: dict[Place, Cell]
    means: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Gallery:
    """Columns with their pictures, and the places that one of them has a picture of, in order."""

    columns: list[Column]
    places: list[Place]

    @property
    def num_pictures(self) -> int:
        """Return the number of pictures."""
        return sum(len(column.cells) for column in self.columns)

    def column(self, name: str) -> Column | None:
        """Return the column of a name, if there is one."""
        return next((column for column in self.columns if column.name == name), None)


# ---- what is on the page ----


def gather(evaluations: Sequence[Evaluation], steps: Iterable[int] = (), with_all: bool = False) -> Gallery:
    """Return the gallery of `evaluations`, as `joined` makes it of their columns."""
    return joined(columns_of(evaluation, steps, with_all) for evaluation in evaluations)


def columns_of(evaluation: Evaluation, steps: Iterable[int] = (), with_all: bool = False) -> list[Column]:
    """Return the columns of an evaluation.

    Columns are the students at their default samplers, the undistilled teacher's nearest row at each number of
    evaluations, and the reference; `with_all`, every row. Rows of other than `steps` are left out, where any are named;
    the reference is not.
    """
    return [column_of(evaluation, row) for row in chosen_rows(evaluation.report, set(steps), with_all)]


def joined(parts: Iterable[list[Column]]) -> Gallery:
    """Return the gallery of all columns of `parts`; a teacher whose pictures an earlier part has is shown once."""
    columns: list[Column] = []
    places: dict[Place, None] = {}
    for column in itertools.chain.from_iterable(parts):
        if column.row.role == "student" or not any(is_same(column, other) for other in columns):
            columns.append(column)
            places |= dict.fromkeys(column.cells)
    return Gallery(columns, list(places))


def chosen_rows(report: Report, steps: set[int], with_all: bool) -> list[Row]:
    """Return the rows of `report` to show: students, the undistilled teacher, the reference, in that order."""
    wanted = [row for row in report.rows if not steps or row.num_steps in steps or row.id == report.reference]
    students = [row for row in wanted if row.role == "student" and (with_all or row.default)]
    others = [row for row in wanted if row.role != "student"]
    if not with_all:
        budgets = sorted({row.num_evaluations for row in others if row.role == "undistilled"})
        best = [comparisons.best(comparisons.rows_at(others, "undistilled", n), "distance") for n in budgets]
        others = [row for row in best if row] + [row for row in others if row.id == report.reference]
    others.sort(key=lambda row: row.id == report.reference)
    return students + others


def column_of(evaluation: Evaluation, row: Row) -> Column:
    """Return the column of `row`: its name is run:student@steps, with the sampler where that is not the default."""
    report = evaluation.report
    is_main = row.id == report.reference or (row.role == "student" and row.default)
    sampler = "" if is_main else f", {row.sampler}"
    return Column(
        name=f"{evaluation.name}:{row.name}@{row.num_steps}{sampler}",
        evaluation=evaluation.name,
        row=row,
        is_shown=is_main,
        cells=cells_of(evaluation, row),
        means=frozenset(
            key for key, one in row.metrics.items() if report.settings["images_per_prompt"] > 1 and not one.samples
        ),
    )


def cells_of(evaluation: Evaluation, row: Row) -> dict[Place, Cell]:
    """Return the pictures of `row` that the evaluation kept: of all prompts, or of those that its page shows.

    Raise CheckpointError for one that is gone.
    """
    report, settings = evaluation.report, evaluation.report.settings
    images, keeps = settings["images_per_prompt"], settings["keep_pictures"]
    cells, repeats = {}, Counter[tuple[str, str]]()
    for i, prompt in enumerate(report.prompts):
        text = prompt.prompt, prompt.language
        earlier = repeats[text] * images  # pictures of the same prompt
        repeats[text] += 1
        for j in range(images if keeps else int(prompt.shown)):
            if keeps:
                path = page.sample_path(evaluation.folder, row.id, i * images + j)
            else:
                path = page.picture_path(evaluation.folder, row.id, i)
            noise = (settings["seed"], i, j)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: delete {evaluation.folder} to evaluate again")
            cells[Place(*text, earlier + j)] = Cell(path, noise, scores(row, i, j))
    return cells


def scores(row: Row, prompt: int, picture: int) -> dict[str, float]:
    """Return the metrics of a picture that has them; a prompt's mean over its pictures, where that is all there is."""
    values = {}
    for key, summary in row.metrics.items():
        of_prompt = summary.samples[prompt] if summary.samples else summary.values[prompt : prompt + 1]
        value = of_prompt[picture if summary.samples else 0] if of_prompt else None
        if value is not None and not is_detail(key):
            values[key] = significant(value)
    return values


def is_same(column: Column, other: Column) -> bool:
    """Return whether two columns are one teacher under one sampler, with the same pictures."""
    keys = ("name", "sampler", "num_steps", "guidance_scale")
    if (
        any(getattr(column.row, key) != getattr(other.row, key) for key in keys)
        or column.cells.keys() != other.cells.keys()
    ):
        return False
    return all(cell.path.read_bytes() == other.cells[place].path.read_bytes() for place, cell in column.cells.items())


# ---- files ----


def write_page(gallery: Gallery, title: str, path: Path, size: int = SIZE) -> None:
    """Write the gallery as one file, with its pictures in it."""
    with replacing(path) as temporary:
        temporary.write_text(render(gallery, title, Inline(size)), encoding="utf-8")


def write_folder(gallery: Gallery, title: str, folder: Path, size: int = SIZE) -> None:
    """Write the gallery as a folder: index.html, and its pictures, which a browser loads as they come into view."""
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        text = render(gallery, title, Beside(size, temporary / PICTURES))
        (temporary / PAGE).write_text(text, encoding="utf-8")


class Inline:
    """Pictures as data: addresses; equal ones are one."""

    def __init__(self, size: int):
        self.size = size
        self.addresses: dict[str, int] = {}

    def add(self, path: Path) -> int:
        """Return the number of a picture's address."""
        return self.addresses.setdefault(self.address(page.webp(path, self.size)), len(self.addresses))

    def address(self, content: bytes) -> str:
        """Return where the page has a picture of that `content`."""
        return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")


class Beside(Inline):
    """Pictures as files of the folder `folder`, named by their content."""

    def __init__(self, size: int, folder: Path):
        super().__init__(size)
        self.folder = folder
        folder.mkdir()

    def address(self, content: bytes) -> str:
        """Write a picture, and return its address beside the page."""
        name = f"{hashlib.sha256(content).hexdigest()[:20]}.webp"
        (self.folder / name).write_bytes(content)
        return f"{PICTURES}/{name}"


def render(gallery: Gallery, title: str, pictures: Inline) -> str:
    """Return the page as text: what is on it as JSON, and the program that shows it. Its policy allows nothing else."""
    folder = Path(__file__).parent
    style = "".join((folder / name).read_text(encoding="utf-8") for name in ("fonts.css", "gallery.css"))
    script = (folder / "gallery.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment.get_template("gallery.html").render(
        title=title,
        style=style,
        script=script,
        style_hash=checksum(style),
        script_hash=checksum(script),
        data=content(gallery, pictures),
    )


def checksum(text: str) -> str:
    """Return the hash by which a page's policy allows the text of a style or a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def content(gallery: Gallery, pictures: Inline) -> dict[str, Any]:
    """Return what is on the page. A cell is [address, scores, noise], null where a column has no picture."""
    keys = list(
        dict.fromkeys(key for column in gallery.columns for cell in column.cells.values() for key in cell.scores)
    )
    noises: dict[tuple[int | str, ...], int] = {}

    def cell(column: Column, place: Place, bar: Bar) -> list | None:
        one = column.cells.get(place)
        if one is None:
            return None
        bar.advance()
        return [
            pictures.add(one.path),
            [one.scores.get(key) for key in keys],
            noises.setdefault(one.noise, len(noises)),
        ]

    with progress(gallery.num_pictures, "pictures") as bar:
        cells = [[cell(column, place, bar) for column in gallery.columns] for place in gallery.places]
    return {
        "columns": [described(column, keys) for column in gallery.columns],
        "metrics": [
            {
                "label": metric(key).label,
                "lower": metric(key).lower_is_better,
                "main": key.startswith(MAIN) or key == RIGHT,
            }
            for key in keys
        ],
        "prompts": [[place.prompt, place.language, place.picture] for place in gallery.places],
        "languages": page.LANGUAGES,
        "cells": cells,
        "pictures": list(pictures.addresses),
    }


def described(column: Column, keys: Sequence[str]) -> dict[str, Any]:
    """Return a column's heading: whose it is, at how many steps, under which sampler.

    `means` has the numbers, among `keys`, of the metrics that are a prompt's mean under each of its pictures.
    """
    row = column.row
    guided = row.num_evaluations // row.num_steps > 1
    cost = f"{row.num_evaluations} evaluations" if guided else ""
    return {
        "name": column.name,
        "run": column.evaluation,
        "label": f"{row.name}, {row.num_steps} step{'s' if row.num_steps > 1 else ''}",
        "detail": ", ".join(filter(None, [row.sampler, cost])),
        "shown": column.is_shown,
        "means": [i for i, key in enumerate(keys) if key in column.means],
    }
