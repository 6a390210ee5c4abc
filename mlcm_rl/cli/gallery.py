"""`mlcm gallery`: the pictures of any number of runs on one page, and blind choices between two of its columns."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..cost.units import counted, in_words
from .console import imported, line
from .folders import existing_pictures, label_page


def gallery(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            callback=lambda paths: [existing_pictures(path) for path in paths],
            show_default=False,
            help="runs/<recipe>, whose last evaluation is taken, the folder of an evaluation, or one of `mlcm sample`",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            show_default=False,
            help="FILE.html, which holds its pictures, or a folder for a page and its pictures; with --blind, the "
            "folder for the table",
        ),
    ],
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="only these numbers of steps; may be repeated", show_default=False)
    ] = None,
    with_all: Annotated[
        bool, typer.Option("--all", help="every row of the evaluations: other samplers, solvers, schedules")
    ] = False,
    size: Annotated[int, typer.Option(min=16, max=4096, help="pixels a side at most of a picture on the page")] = 512,
    blind: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            show_default=False,
            help="you choose between two columns in a browser, without their names; the page says what they are called",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the sides in --blind")] = 0,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="the page's; default: a free one", show_default=False)
    ] = None,
) -> None:
    """Put the pictures of several runs on one page: prompts down, runs and steps across, scores under each picture.

    The pictures are those of the runs' evaluate stages: of a few prompts a language, of all with keep_pictures:
    true. The page needs no server: filter by language, order by disagreement or by what is worst, enlarge.

    --blind A B shows two columns side by side in a browser, and writes a table of pairs, which dpo and train_reward
    read, and how often each was preferred.
    """
    if port is not None and blind is None:
        raise typer.BadParameter("--port means nothing without --blind; leave it out")
    interrupted = "Interrupted. The same command goes on where it was stopped." if blind else "Interrupted."
    with imported("pipeline.galleries", interrupted) as galleries:
        found = galleries.gather(runs, steps or [], with_all)
        if blind:
            serve = partial(label_page("gallery").serve, port=port or 0)
            choices = galleries.choose_blindly(found, blind, out, seed, serve)
            line(Text(galleries.verdict(choices, blind)))
            line(Text(f"{out}  {len(choices.rows())} pairs of {len(choices)} prompts"))
            return
        title = ", ".join(dict.fromkeys(column.evaluation for column in found.columns))
        page, num_bytes = galleries.write(found, title, out, size)
    counts = ", ".join(
        counted(count, noun)
        for count, noun in ((len(found.places), "row"), (len(found.columns), "column"), (found.num_pictures, "picture"))
    )
    line(Text(f"{page}  {counts}, {in_words(num_bytes)}"))
