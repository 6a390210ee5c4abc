"""The command on a teacher's files: convert."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .console import imported, line


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", exists=True, dir_okay=False, show_default=False, help="a .safetensors checkpoint"
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="folder to write")],
    like: Annotated[
        Path,
        typer.Option(
            exists=True,
            file_okay=False,
            show_default=False,
            help="folder of the checkpoint's base in diffusers format; its JSON and TXT files are enough",
        ),
    ],
) -> None:
    """Write a checkpoint of one file (SD 1 and 2, SDXL, SD3) as a folder that teacher.path can name.

    Nothing is fetched: configurations and tokenizers are copied from the folder of its base. The weights keep their
    precision.
    """
    with imported("pipeline.conversion") as conversion:
        folder = conversion.convert(file, like, out)
    line(Text(str(folder)))
