"""Output to any terminal, pipe or log: text is printed as it is and never as markup, characters that the encoding
lacks are escaped, and lines break where the terminal ends.
"""

import codecs
import inspect
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TextIO

import typer
from rich.console import Console
from rich.text import Text

from ..recipe.tree import RecipeError, key_text
from ..training import signals
from ..training.console import plain_console, wrapped

# of several processes only the first prints
console = plain_console(quiet=os.environ.get("RANK", "") not in ("", "0"))
error_console = plain_console(stderr=True)


def write_anything() -> None:
    """Let standard output and error escape what they cannot encode: \\u732b for a cat on a Latin-1 terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a terminal, another class under a notebook
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def output_may_refuse(errors: Console) -> Iterator[None]:
    """Exit with 1 and a line on `errors` where standard output cannot be written: its disk is full, say.

    Commands report the other errors of the system themselves.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # the buffer would be flushed once more when the process ends
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        reason = f"{error.filename or 'what it prints'} could not be written: {(error.strerror or str(error)).lower()}"
        errors.print(Text.assemble(("failed", "bold red"), f"  {reason}"), soft_wrap=True)
        sys.exit(1)


def is_utf8(stream: TextIO | None) -> bool:
    """Return whether `stream` can encode any character; None, a closed one, cannot."""
    return stream is not None and codecs.lookup(stream.encoding or "ascii").name == "utf-8"


def unbreak_help(app: typer.Typer) -> None:
    """Let `--help` of each command of `app` break lines where the terminal ends, not where its docstring does."""
    for command in app.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def print_problems(to: Console, path: Path, error: RecipeError) -> None:
    """Print all errors of a recipe: in a terminal laid out for reading, else one line each, never wrapped."""
    count = f"{len(error.problems)} error{'s' if len(error.problems) > 1 else ''}"
    to.print(Text.assemble(("bad", "bold red"), f" {path}: {count}"), soft_wrap=True)
    for problem in error.problems:
        if to.is_terminal:
            place = Text.assemble(f"  {problem.where}  ", (key_text(problem.key), "bold cyan"))
            to.print(place, soft_wrap=True)
            for row in wrapped(problem.text, to.width - 6):
                to.print(Text(" " * 6 + row), soft_wrap=True)
        else:
            to.print(Text(str(problem)), soft_wrap=True)
    if error.note:
        to.print(Text(error.note), soft_wrap=True)


@contextmanager
def imported(name: str, interrupted: str = "Interrupted.") -> Iterator[ModuleType]:
    """Yield the module mlcm_rl.`name`, imported only now.

    Exit with the message of an error inside, or with the line `interrupted` after a signal.
    """
    try:
        with signals.raise_on_sigterm():
            module = import_module(f"mlcm_rl.{name}")
            try:
                yield module
            except module.RunError as error:
                label = "bad" if error.exit_code == 2 else "failed"
                error_console.print(Text.assemble((label, "bold red"), f"  {error}"), soft_wrap=True)
                raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        error_console.print(Text(f"\n{interrupted}"), soft_wrap=True)
        raise typer.Exit(stop.code if isinstance(stop, signals.Stopped) else 130) from None


def line(text: Text) -> None:
    """Print one line, never wrapped, so that a path in it can be copied and piped."""
    console.print(text, soft_wrap=True)
