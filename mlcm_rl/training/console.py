"""A console that takes text as it is. Imports no torch."""

from typing import Any

from rich.console import Console


def plain_console(**settings: Any) -> Console:
    """Return a console to which brackets and colons, as the names of people's files have them, are no markup."""
    return Console(highlight=False, markup=False, emoji=False, **settings)
