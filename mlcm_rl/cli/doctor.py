"""`mlcm doctor`: parsing and printing."""

import json
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..cost.units import counted
from .console import console, line

COLOURS = {"ok": "green", "note": "yellow", "bad": "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print a list of findings as JSON, for a bug report")] = False,
) -> None:
    """Say what is installed and what this machine has, what is missing or slow here, and what to do about it.

    Exit 1 if something is missing that every run needs.
    """
    from ..pipeline import doctor as machine

    findings = list(machine.findings())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        for topic, group in groupby(findings, key=lambda finding: finding.topic):
            line(Text(topic, style="bold"))
            table = Table.grid(padding=(0, 2))
            for finding in group:
                value = Text(finding.value)
                if finding.advice:
                    value.append(f"\n{finding.advice}", style="italic")
                table.add_row(Text(finding.state, style=COLOURS[finding.state]), Text(finding.name), value)
            console.print(Padding(table, (0, 0, 1, 2)))
        counts = {state: sum(finding.state == state for finding in findings) for state in COLOURS}
        verdict = (
            "Something that every run needs is missing." if counts["bad"] else "Everything that a run needs is here."
        )
        line(Text(f"{verdict} {counted(counts['note'], 'note')}, each with what to do."))
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)
