"""Paths that commands take: to files and folders that have to be there, of this machine or of those that come along."""

from pathlib import Path
from typing import Any

import typer

from ..recipe import shipped


def folder_option(about: str) -> Any:
    """Return the option of a folder, with what it is `about`."""
    return typer.Option(parser=_folder, metavar="DIRECTORY", show_default=False, help=about)


def prompts_option(about: str) -> Any:
    """Return the option of a file of prompts, with what they are `about`."""
    return typer.Option(parser=_file, metavar="FILE", show_default=False, help=f"prompts (.txt, .jsonl) {about}")


def _folder(text: str) -> Path:
    path = _there(text)
    if not path.is_dir():
        raise typer.BadParameter(f"{text} is a file, not a folder")
    return path


def _file(text: str) -> Path:
    path = _there(text)
    if path.is_dir():
        raise typer.BadParameter(f"{text} is a folder, not a file")
    return path


def _there(text: str) -> Path:
    """Return the path `text`; mlcm:emoji/teacher is one of what comes with this package, as in recipes."""
    path = shipped.place(text) or Path(text)
    if not path.exists():
        raise typer.BadParameter(f"{text} does not exist")
    return path
