"""Commands on recipes: run, validate, plan, schema; and replay, which repeats a step of a run."""

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..cost.gpus import DEVICES, THIS, kind_for
from ..cost.units import counted
from ..recipe import Recipe, shipped
from ..recipe.file import load
from ..recipe.schema import json_schema
from ..recipe.tree import RecipeError
from .console import console, error_console, imported, line, print_problems

if TYPE_CHECKING:
    from ..cost.launches import Launch


def _shipped(path: Path) -> Path:
    """Return `path`, or the recipe of that name that comes with this package where no file is called so.

    A folder of its name, such as one with what it reads, is no recipe.
    """
    names = {file.stem: file for file in shipped.recipes()}
    return names.get(str(path), path) if path.is_dir() or not path.exists() else path


def _launch_file(name: Path | None) -> Path | None:
    """Return the launch file of this path, or the shipped one of this name. Raise BadParameter where there is none."""
    if name is None or name.is_file():
        return name
    if (file := shipped.launch_file(str(name))) is None:
        names = ", ".join(file.stem for file in shipped.launch_files())
        raise typer.BadParameter(f"no file {name}; launch files that come with mlcm_rl are {names}")
    return file


RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", callback=_shipped, show_default=False, help="a YAML file, or a name of `mlcm recipes`"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        show_default=False,
        help=r"settings put over the recipe's: stages.1.learning_rate=1e-4, stages\[distill].num_steps=100",
    ),
]


def _device_name(name: str | None) -> str | None:
    """Return `name` in lower case without spaces. Raises BadParameter with the known names for an unknown one."""
    if name is None or (short := name.lower().replace(" ", "")) in (*DEVICES, THIS):
        return None if name is None else short
    raise typer.BadParameter(f"no device {name!r}: {', '.join(DEVICES)}, or {THIS} for the one here")


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(
            callback=_launch_file,
            show_default=False,
            help="run in several processes: ddp, zero2, fsdp2, ..., or any configuration of accelerate's",
        ),
    ] = None,
    machine_rank: Annotated[
        int | None,
        typer.Option(min=0, show_default=False, help="with --launch on several machines: which one this is, from 0"),
    ] = None,
    main_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            show_default=False,
            help="with --launch on several machines: where they meet, an address of machine 0 and a free port there",
        ),
    ] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="go on from the newest whole checkpoint where a newer one is damaged")
    ] = False,
) -> None:
    """Run a recipe, or the rest of it. The same command continues an interrupted run.

    Ctrl-C and SIGTERM end it within 30 seconds, in training after a save (of the step, or of the state before one of
    several micro-batches); a second one ends it at once. The exit code is 130 after Ctrl-C and 143 after SIGTERM, 1 for
    a run that failed, 2 for a bad recipe, 3 where one of several processes was killed: the same command continues from
    the newest checkpoint.

    In several processes it runs under --launch, or under torchrun: `torchrun --nproc_per_node 8 -m mlcm_rl run RECIPE`.
    Each of several machines runs the same command, with its own --machine-rank; all must see the folder of runs.
    """
    if launch is None and (machine_rank, main_address) != (None, None):
        raise typer.BadParameter("--machine-rank and --main-address go with --launch", param_hint="--launch")
    loaded = _load(recipe, overrides, quiet=launch is not None)  # the first process prints
    if launch is not None:
        flags = ["--skip-damaged"] if skip_damaged else []
        arguments = [str(recipe), *(overrides or []), *flags]
        raise typer.Exit(_run_under(launch, arguments, machine_rank, main_address))
    with imported(
        "pipeline", interrupted="Interrupted. The same command takes the run up where it was saved."
    ) as pipeline:
        finished = pipeline.run(loaded, skip_damaged)
    folder = Path(loaded.runs) / loaded.name
    line(Text.assemble(("done", "green"), f"  {counted(len(finished), 'stage')} in {folder}"))
    for i, stage in enumerate(loaded.stages):
        if stage.kind == "evaluate":
            line(Text(f"report  {folder / f'{i:02d}-evaluate' / 'report.html'}"))


def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            show_default=False,
            help="recipes' YAML files, and settings put over those of each, as in run",
        ),
    ],
) -> None:
    """Check recipes, every error at once, without loading anything."""
    overrides = [text for text in recipes if "=" in text and not Path(text).exists()]
    paths = [_shipped(Path(text)) for text in recipes if text not in overrides]
    if not paths:
        raise typer.BadParameter("name a recipe's YAML file before the settings that are put over it")
    bad = 0
    for path in paths:
        try:
            load(path, overrides, Path.cwd(), tell=_tell_note)
        except RecipeError as error:
            bad += 1
            print_problems(console, path, error)
        else:
            line(Text.assemble(("ok", "green"), f"  {path}"))
    if bad:
        raise typer.Exit(2)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(
            callback=_launch_file,
            show_default=False,
            help="memory of each process under ddp, zero2, fsdp2, ..., or a configuration of accelerate's",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            callback=_device_name,
            show_default=False,
            help=f"hours, and whether memory suffices, on {', '.join(DEVICES)}, or {THIS} (measured here)",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON, sizes in bytes, times in seconds")] = False,
) -> None:
    """Show what a run would do: stages done and to do, network evaluations, disk, memory, hours.

    The teacher's JSON files in a folder are enough: no weights are loaded.
    """
    loaded = _load(recipe, overrides)
    with imported("pipeline") as pipeline:
        processes = _read_launch(launch)
        target = pipeline.device_here(loaded) if device == THIS else DEVICES[device] if device else None
        stages = pipeline.plan(loaded, True, processes, target)
    if as_json:
        entries = [asdict(stage) | {"folder": str(stage.folder)} for stage in stages]
        on = asdict(target) | {"share": target.share} if target else None
        typer.echo(json.dumps({"launch": asdict(processes), "device": on, "stages": entries}, indent=2))
    else:
        from . import plan_table

        plan_table.show(console, loaded, stages, processes, target, kind_for(loaded.device, target))


def replay(
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="the nonfinite-<step>.json of a stage",
        ),
    ],
) -> None:
    """Repeat a step whose loss or gradient was not finite: its figures then and now. Exit code 1 where they differ."""
    with imported("pipeline") as pipeline:
        then, now = pipeline.replay(bundle)
    table = Table("sample", box=None, pad_edge=False, header_style="bold")
    for name in ("loss then", "now"):
        table.add_column(name, justify="right")
    copies = max(1, len(then["losses"]) // max(1, len(then["samples"])))  # samples of one prompt stand in a row
    for i, (old, new) in enumerate(zip(then["losses"], now["losses"], strict=False)):
        table.add_row(str(then["samples"][i // copies]), str(old), str(new))
    for name in ("loss", "grad_norm"):
        table.add_row(name, str(then[name]), str(now[name]), style="bold")
    console.print(table, crop=False)
    if pipeline.differ(then, now):
        line(Text(f"step {then['step'] + 1}: the figures differ", style="bold red"))
        raise typer.Exit(1)
    line(Text.assemble(f"step {then['step'] + 1}: ", ("the same figures", "green")))


def schema(
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="file to write; default: print it", show_default=False)
    ] = None,
) -> None:
    """Print the JSON schema of recipes, from which editors complete and check them."""
    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    temporary = out.with_name(out.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):  # it may not be there, nor its folder
            temporary.unlink()
        reason = (error.strerror or str(error)).lower()
        raise typer.BadParameter(f"{out} could not be written: {reason}", param_hint="--out") from None


def _load(path: Path, overrides: list[str] | None, quiet: bool = False) -> Recipe:
    """Return the recipe in `path`, checked against the files that it names. Exit 2 with all its errors."""
    try:
        return load(path, overrides or [], Path.cwd(), tell=(lambda note: None) if quiet else _tell_note)
    except RecipeError as error:
        print_problems(error_console, path, error)
        raise typer.Exit(2) from None


def _tell_note(note: str) -> None:
    """Print a note on a recipe that can be run: a path that has another reading, say."""
    if not console.quiet:
        error_console.print(Text.assemble(("note", "yellow"), f"  {note}"), soft_wrap=True)


def _run_under(launch: Path, arguments: list[str], machine_rank: int | None, main_address: str | None) -> int:
    """Run `mlcm run` with `arguments` in the processes of `launch`; return its exit code, 2 where none can start."""
    from ..training.launch import LOST_PEER, Killed, LaunchError, Machine, run_under

    try:
        return run_under(launch, arguments, Machine(machine_rank, main_address))
    except LaunchError as error:
        message = str(error) if str(error).startswith("--") else f"--launch: {error}"
        error_console.print(Text.assemble(("bad", "bold red"), f"  {message}"), soft_wrap=True)
        return 2
    except Killed as error:
        error_console.print(Text.assemble(("failed", "bold red"), f"  {error}"), soft_wrap=True)
        return LOST_PEER


def _read_launch(path: Path | None) -> "Launch":
    """Return the launch of the file `path`, that of one process for None. Exit 2 for one that cannot be predicted."""
    from ..cost import launches
    from ..training.launch import LaunchError

    try:
        return launches.Launch() if path is None else launches.read_launch(path)
    except LaunchError as error:
        raise typer.BadParameter(str(error), param_hint="--launch") from None
