"""Galleries of finished evaluations, and a person's blind choices between two of their columns."""

import difflib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..cost.units import counted
from ..data.prompts import Prompt
from ..equations.statistics import sign_test
from ..preference import labels, ranking
from ..report import assembly, drawn_pictures, gallery
from ..report.drawn_pictures import Drawn
from ..report.gallery import Column, Evaluation, Gallery
from ..storage.files import replacing
from ..storage.hashing import seal_of, sha256
from .errors import BadArgument, RunError, prefix_errors
from .finished_runs import find_stage

__all__ = ["RunError", "choose_blindly", "gather", "verdict", "write"]


@prefix_errors("gallery")
def gather(runs: Sequence[Path], steps: Sequence[int], with_all: bool) -> Gallery:
    """Return the gallery of `runs`: folders of recipes (their last evaluation), of stages, or of `mlcm sample`."""
    names = names_of(runs)
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise BadArgument(f"{repeated} is named twice: name each run once")
    found = gallery.joined(
        drawn_pictures.columns_of(Drawn(name, run), set(steps))
        if drawn_pictures.has_pictures(run)
        else gallery.columns_of(evaluation_of(name, run), steps, with_all)
        for name, run in zip(names, runs, strict=True)
    )
    if steps and not any(column.row.role == "student" for column in found.columns):
        raise BadArgument(f"--steps: no student of these evaluations is at {' or '.join(map(str, steps))} steps")
    return found


def evaluation_of(name: str, run: Path) -> Evaluation:
    """Return the latest evaluation of a run, called `name`."""
    place = find_stage(run, ("evaluate",))
    return Evaluation(name, place, assembly.read(place / "report.json"))


def names_of(runs: Sequence[Path]) -> list[str]:
    """Return a name for each of `runs`: its folder's, with the run's before that of a stage in it; whole paths where
    two would be one.
    """
    names = []
    for run in runs:
        path = run.absolute()
        names.append(f"{path.parent.name}/{path.name}" if re.match(r"\d+-", path.name) else path.name)
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


@prefix_errors("gallery")
def write(found: Gallery, title: str, out: Path, size: int) -> tuple[Path, int]:
    """Write `found` to `out`, a file by its ending .html, else a folder; return the page and the bytes of it all."""
    if out.suffix.lower() in (".html", ".htm"):
        if out.is_dir():
            raise BadArgument(f"--out: {out} is a folder; name a new file, or a folder without that ending")
        gallery.write_page(found, title, out, size)
        return out, out.stat().st_size
    if out.exists() and not is_gallery(out):
        raise BadArgument(f"--out: {out} holds other things than a gallery; name a new folder, or a file FILE.html")
    gallery.write_folder(found, title, out, size)
    return out / gallery.PAGE, sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def is_gallery(folder: Path) -> bool:
    """Return whether `folder` is empty or holds what a gallery has, which another one may replace."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    return names in (set(), {gallery.PAGE, gallery.PICTURES})


@prefix_errors("gallery")
def choose_blindly(
    found: Gallery, columns: tuple[str, str], out: Path, seed: int, serve: Callable[[labels.Choices], None]
) -> labels.Choices:
    """Write a pair table into `out` from a person's choices between two columns of `found`, without their names.

    `serve` shows the page until all prompts are judged; return the choices. Raise BadArgument for a column that there
    is not, or two that share no prompt.
    """
    first, second = (column_named(found, name) for name in columns)
    places = [place for place in found.places if place in first.cells and place in second.cells]
    if first is second or not places:
        raise BadArgument(f"--blind: {first.name} and {second.name} are not two columns with pictures of one prompt")
    files = {place: (first.cells[place].path, second.cells[place].path) for place in places}
    checksums = {place: [sha256(path) for path in pair] for place, pair in files.items()}
    places = [place for place in places if len(set(checksums[place])) > 1]  # equal pictures carry no preference
    if not places:
        raise BadArgument(f"--blind: the pictures of {first.name} and {second.name} are equal")
    seal = seal_of({"pictures": [checksums[place] for place in places]})
    settings = ranking.BlindSettings(first.name, second.name, seal, seed)
    prompts = [Prompt(place.prompt, place.language) for place in places]
    choices = labels.Choices(settings, prompts, out)
    ranking.sweep(out)
    for number, place in enumerate(places):
        for path, name in zip(files[place], labels.sample_names(number), strict=True):
            with replacing(out / name) as temporary:
                shutil.copyfile(path, temporary)
    if len(choices.judgements()) < len(choices):
        serve(choices)
    return choices


def column_named(found: Gallery, name: str) -> Column:
    """Return the column `name`. Raise BadArgument with the nearest names where there is none."""
    column = found.column(name)
    if column is None:
        names = [one.name for one in found.columns]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        raise BadArgument(f"--blind: there is no column {name!r}; the nearest are {', '.join(map(repr, near))}")
    return column


def verdict(choices: labels.Choices, names: tuple[str, str]) -> str:
    """Return in words how often each column was preferred, and the p of a sign test."""
    first, second, neither = choices.counts()
    return (
        f"{names[0]} was preferred {counted(first, 'time')}, {names[1]} {counted(second, 'time')}, neither "
        f"{counted(neither, 'time')}; two-sided sign test: p = {sign_test(first, second):.3g}."
    )
