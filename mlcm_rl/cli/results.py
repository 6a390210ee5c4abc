"""`mlcm runs` and `mlcm clean`: what is under a folder of runs, and removing what no run needs."""

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..cost.units import counted, in_words, time_in_words
from ..training.console import wrapped
from .console import console, error_console, imported, line
from .folders import existing_runs

if TYPE_CHECKING:
    from ..pipeline.results import StageFolder

INDENT = "  "
COLOURS = {"done": "green", "running": "cyan", "unfinished": "yellow", "damaged": "bold red"}

Runs = Annotated[
    Path, typer.Argument(metavar="RUNS", callback=existing_runs, help="the folder that recipes call `runs`")
]


def runs(
    folder: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print a list of stages as JSON")] = False,
) -> None:
    """List the stages under a folder of runs: state, when, disk, of which run, network evaluations and time.

    Of a stage that was stopped it is the recipe that began it, and the evaluations so far.
    """
    with imported("pipeline.results") as results:
        stages = results.stages(folder)
        rows = [_row(stage) for stage in stages]
        shared = in_words(results.size_of(folder / "rows"))
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    width = max([len("stage"), *(len(row["stage"]) for row in rows)])
    line(Text(f"{'stage':{width}}  {'state':18}  {'changed':16}  {'disk':>7}", "bold"))
    for row in rows:
        state = row["state"] + (f" at {row['steps']}" if row["steps"] is not None else "")
        changed = f"{datetime.fromisoformat(row['changed']):%Y-%m-%d %H:%M}"
        colour = COLOURS[row["state"]]
        line(
            Text.assemble(
                f"{row['stage']:{width}}  ", (f"{state:18}", colour), f"  {changed}  {in_words(row['bytes']):>7}"
            )
        )
        for part in wrapped("; ".join([_of_whom(row), *_cost(row)]), console.width - len(INDENT)):
            line(Text(INDENT + part, "dim"))
    total = in_words(sum(row["bytes"] for row in rows))
    line(Text(f"\n{counted(len(rows), 'stage')}, {total}; measurements that evaluations share, {shared}."))
    if unneeded := sum(not row["is_needed"] for row in rows):
        line(
            Text(
                f"No run needs {unneeded} of them: `mlcm clean {folder}` lists these, and asks before it deletes them."
            )
        )


def _of_whom(row: dict) -> str:
    """Return which runs have the stage of a `row`, or which recipe began it."""
    of_runs = ", ".join(row["runs"]) or ("none needs it" if not row["is_needed"] else "")
    if row["state"] in ("unfinished", "running"):
        return of_runs or (f"begun by {row['recipe']}" if row["recipe"] else "no record says which recipe began it")
    return of_runs or "another stage needs it"


def _cost(row: dict) -> list[str]:
    """Return in words what the stage of a `row` has taken so far."""
    evaluations, seconds = row["network_evaluations"], row["seconds"]
    so_far = " so far" if row["state"] in ("unfinished", "running") else ""
    parts = [f"{evaluations:,} evaluations{so_far}"] if evaluations is not None else []
    return parts + ([time_in_words(seconds)] if seconds is not None else [])


def _row(stage: "StageFolder") -> dict:
    """Return what is known of a stage."""
    return {
        "stage": stage.folder.name,
        "kind": stage.kind,
        "state": stage.state,
        "steps": stage.steps if stage.state in ("unfinished", "running") else None,
        "runs": list(stage.runs),
        "recipe": stage.begun_by,
        "is_needed": stage.is_needed,
        "changed": datetime.fromtimestamp(stage.changed).isoformat(timespec="seconds"),
        "network_evaluations": _number(stage.network_evaluations),
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
            line(Text(f"{in_words(stage.num_bytes):>9}  {stage.state:10}  {stage.folder}{_origin(stage)}"))
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


def _origin(stage: "StageFolder") -> str:
    """Return where a stage's folder leads if it is a link, and which recipe began one that is not finished."""
    place = f" -> {stage.folder.resolve()}" if stage.folder.is_symlink() else ""
    return f"{place}  begun by {stage.begun_by}" if stage.begun_by else place


def _unneeded(stages: "list[StageFolder]", unfinished: bool) -> "list[StageFolder]":
    """Return those of `stages` that no run needs; with `unfinished`, also those that were stopped."""
    return [
        stage
        for stage in stages
        if not stage.is_needed or (unfinished and stage.state == "unfinished" and not stage.runs)
    ]
