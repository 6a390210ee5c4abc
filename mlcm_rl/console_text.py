"""What is printed reaches any terminal, pipe or log: characters that its encoding lacks are escaped, never an error."""

import codecs
import io
import sys
from typing import TextIO


def write_anything() -> None:
    """Have standard output and error escape what they cannot encode: \\u732b for a cat on a Latin-1 terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a terminal, another class under a notebook
            stream.reconfigure(errors="backslashreplace")


def is_utf8(stream: TextIO) -> bool:
    """Whether `stream` takes any character as it is."""
    return codecs.lookup(stream.encoding or "ascii").name == "utf-8"
