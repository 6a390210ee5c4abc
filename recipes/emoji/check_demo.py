"""Closes `make demo`: fails unless the 4-step student is ahead of the teacher at 4 evaluations, and names the page."""

import json
import sys
from pathlib import Path

from rich.console import Console

from mlcm_rl import report


def main(run: Path) -> int:
    """Exit code: 0 where the student is ahead by two standard errors in every metric of the headline, else 1."""
    console = Console(highlight=False)
    folder = sorted(run.glob("[0-9]*-evaluate"))[-1]
    result = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    headline = report.headline(result)
    console.print(report.table(result))
    console.print(headline["text"], soft_wrap=True)
    console.print(f"The page: {(folder / 'report.html').absolute()}", soft_wrap=True)
    if not headline["passed"]:
        console.print("[red]The 4-step student is not ahead of the teacher by two standard errors.[/]")
    return 0 if headline["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
