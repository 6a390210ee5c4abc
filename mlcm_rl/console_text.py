"""What is printed reaches any terminal, pipe or log as it is: nothing in it is markup, and characters that its encoding
lacks are escaped, never an error.
"""

import codecs
import io
import sys
from typing import Any, TextIO

from rich.console import Console


def plain_console(**settings: Any) -> Console:
    """Return a console to which brackets and colons, as the names of people's files have them, are no markup."""
    return Console(highlight=False, markup=False, emoji=False, **settings)


def write_anything() -> None:
    """Have standard output and error escape what they cannot encode: \\u732b for a cat on a Latin-1 terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a terminal, another class under a notebook
            stream.reconfigure(errors="backslashreplace")


def is_utf8(stream: TextIO | None) -> bool:
    """Whether `stream` takes any character as it is; None, one that was closed, takes none."""
    return stream is not None and codecs.lookup(stream.encoding or "ascii").name == "utf-8"
