"""A console that prints text as it is. Imports no torch."""

from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console


def plain_console(**settings: Any) -> Console:
    """Return a console without markup: brackets and colons, as in file names, are printed as they are."""
    return Console(highlight=False, markup=False, emoji=False, **settings)


def wrapped(text: str, columns: int) -> list[str]:
    """Return the lines of `text` in `columns` of a terminal, of which an East Asian character takes two.

    They are broken at spaces; a longer word stays whole, a path say, unless it is East Asian.
    """
    lines = [""]
    for word in text.split():
        for part in chop_cells(word, columns) if cell_len(word) > len(word) else [word]:
            longer = f"{lines[-1]} {part}".lstrip()
            if lines[-1] and cell_len(longer) > columns:
                lines.append(part)
            else:
                lines[-1] = longer
    return lines
