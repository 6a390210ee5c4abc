"""`mlcm runs` and `mlcm clean`: what is under a folder of runs, and removing what no run needs."""

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..cost.units import counted, in_words, time_in_words
from .console import console, error_console, imported, line
from .folders import existing_runs

if TYPE_CHECKING:
    from ..pipeline.results import StageFolder

COLOURS = {"done": "green", "running": "cyan", "unfinished": "yellow", "damaged": "bold red"}

Runs = Annotated[
    Path, typer.Argument(metavar="RUNS", callback=existing_runs, help="the folder that recipes call `runs`")
]


def runs(
    folder: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print a list of stages as JSON")] = False,
) -> None:
    """List the stages under a folder of runs: of which run, their state, when, how long they took, their disk."""
    with imported("pipeline.results") as results:
        stages = results.stages(folder)
        rows = [_row(stage) for stage in stages]
        shared = in_words(results.size_of(folder / "rows"))
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = Table("runs", "stage", "state", "changed", box=None, pad_edge=False, header_style="bold")
    for name in ("evaluations", "time", "disk"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            Text(", ".join(row["runs"]) or ("" if row["is_needed"] else "none needs it"), overflow="fold"),
            Text(row["stage"], overflow="fold"),
            Text(row["state"] + (f" at {row['steps']}" if row["steps"] is not None else ""), COLOURS[row["state"]]),
            f"{datetime.fromisoformat(row['changed']):%Y-%m-%d %H:%M}",
            f"{row['network_evaluations']:,}" if row["network_evaluations"] is not None else "",
            time_in_words(row["seconds"]) if row["seconds"] is not None else "",
            in_words(row["bytes"]),
        )
    console.print(table, crop=False)
    total = in_words(sum(row["bytes"] for row in rows))
    line(Text(f"\n{counted(len(rows), 'stage')}, {total}; measurements that evaluations share, {shared}."))
    if unneeded := sum(not row["is_needed"] for row in rows):
        line(
            Text(
                f"No run needs {unneeded} of them: `mlcm clean {folder}` lists these, and asks before it deletes them."
            )
        )


def _row(stage: "StageFolder") -> dict:
    """Return what is known of a stage."""
    return {
        "stage": stage.folder.name,
        "kind": stage.kind,
        "state": stage.state,
        "steps": stage.steps if stage.state in ("unfinished", "running") else None,
        "runs": list(stage.runs),
        "is_needed": stage.is_needed,
        "changed": datetime.fromtimestamp(stage.changed).isoformat(timespec="seconds"),
        "network_evaluations": _number(stage.manifest.get("network_evaluations")),
        "seconds": _number(stage.manifest.get("seconds")),
        "bytes": stage.num_bytes,
    }


def _number(value: object) -> int | float | None:
    """Return `value` if it is a number, as of a manifest that was not edited; else None."""
    return value if isinstance(value, int | float) else None


def clean(
    folder: Runs = Path("runs"),
    unfinished: Annotated[bool, typer.Option("--unfinished", help="stages that were stopped, too")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Delete the stages that no run links to and no other stage was made from, after asking.

    A stage that was stopped stays, since the same recipe goes on from it; --unfinished deletes it too. A stage that
    is running always stays.
    """
    with imported("pipeline.results", "Interrupted: what was deleted is deleted, the rest is whole.") as results:
        chosen = _unneeded(results.stages(folder), unfinished)
        if not chosen:
            line(Text(f"Some run needs every stage in {folder}: nothing to delete."))
            return
        for stage in chosen:
            line(Text(f"{in_words(stage.num_bytes):>9}  {stage.state:10}  {stage.folder}{_target(stage)}"))
        total = in_words(sum(stage.num_bytes for stage in chosen))
        if dry_run:
            line(Text(f"{counted(len(chosen), 'stage')}, {total}, would be deleted."))
            return
        if not yes and not typer.confirm(f"Delete {counted(len(chosen), 'stage')}, {total}?"):
            error_console.print(Text("Nothing was deleted."))
            raise typer.Exit(1)
        listed = {stage.folder for stage in chosen}  # a run may have come to need one while this asked
        chosen = [stage for stage in _unneeded(results.stages(folder), unfinished) if stage.folder in listed]
        total = in_words(sum(stage.num_bytes for stage in chosen))
        for stage in chosen:
            results.remove(stage)
        line(Text(f"{counted(len(chosen), 'stage')} deleted, {total}."))


def _target(stage: "StageFolder") -> str:
    """Return where a stage's folder leads, if it is a link."""
    return f" -> {stage.folder.resolve()}" if stage.folder.is_symlink() else ""


def _unneeded(stages: "list[StageFolder]", unfinished: bool) -> "list[StageFolder]":
    """Return those of `stages` that no run needs; with `unfinished`, also those that were stopped."""
    return [
        stage
        for stage in stages
        if not stage.is_needed or (unfinished and stage.state == "unfinished" and not stage.runs)
    ]
