"""A console that prints text as it is. Imports no torch."""

from typing import Any

from rich.console import Console


def plain_console(**settings: Any) -> Console:
    """Return a console without markup: brackets and colons, as in file names, are printed as they are."""
    return Console(highlight=False, markup=False, emoji=False, **settings)
