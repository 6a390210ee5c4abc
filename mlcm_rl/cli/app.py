"""The `mlcm` command: reads the arguments, calls the function that does the work, prints what came of it.

Exit codes: 0; 1 for a run that failed; 2 for a bad recipe or argument; 3 where one of several processes was lost; 130
after Ctrl-C, 143 after SIGTERM. torch is
imported only by the commands that need it, by `_imported`: `--help`, `validate` and `schema` answer at once.
"""

import difflib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..cost.gpus import DEVICES, THIS, kind_for
from ..recipe import RESERVED, Recipe
from ..recipe.file import load
from ..recipe.schema import json_schema
from ..recipe.tree import RecipeError
from ..training import signals
from ..training.console import plain_console
from . import plan_table, reward_commands
from .console import output_may_refuse, print_problems, unbreak_help, write_anything

if TYPE_CHECKING:
    from ..cost.launches import Launch

app = typer.Typer(
    name="mlcm",
    help="Distil a latent text-to-image diffusion model into a 2-8-step student.",
    epilog="Begin with `mlcm plan recipes/emoji_demo.yaml`; every command has a `--help` of its own. "
    "Exit codes: 0 done, 1 failed, 2 bad recipe or argument, 3 one of several processes lost, 130 after Ctrl-C, 143 "
    "after SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# of several processes the first speaks
console = plain_console(quiet=os.environ.get("RANK", "") not in ("", "0"))
error_console = plain_console(stderr=True)


def _existing(path: Path) -> Path:
    """A run or stage folder that is there; else the nearest ones that are."""
    if path.is_dir():
        return path
    beside = [folder for parent in (path.parent, Path("runs")) if parent.is_dir() for folder in parent.iterdir()]
    names = {folder.name: str(folder) for folder in beside if folder.is_dir() and folder.name not in RESERVED}
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or sorted(names)[:3]
    known = f"the nearest are {', '.join(names[name] for name in near)}" if near else "there are no runs yet"
    raise typer.BadParameter(f"no folder {path}: {known}")


def _print_version(asked: bool) -> None:
    """Print the version and exit, where that is asked for."""
    if asked:
        typer.echo(f"mlcm_rl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What may stand before a command."""


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", show_default=False, help="a recipe's YAML file")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        show_default=False,
        help=r"settings put over the recipe's: stages.1.learning_rate=1e-4, stages\[distill].num_steps=100",
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", callback=_existing, show_default=False, help="runs/<recipe>, or a stage's folder"),
]


def _known_device(name: str | None) -> str | None:
    """A name that is known, in lower case without spaces; else the names that are."""
    if name is None or (short := name.lower().replace(" ", "")) in (*DEVICES, THIS):
        return None if name is None else short
    raise typer.BadParameter(f"no device {name!r}: {', '.join(DEVICES)}, or {THIS} for the one here")


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default=False,
            help="run in several processes: a file of recipes/launch, or any configuration of accelerate's",
        ),
    ] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="go on from the newest whole checkpoint where a newer one is damaged")
    ] = False,
) -> None:
    """Run a recipe, or what is not yet done of it. The same command takes up an interrupted run.

    Ctrl-C and SIGTERM end it within 30 seconds, in training after a whole step that is saved; a second one ends it at
    once. The exit code is 130 after Ctrl-C and 143 after SIGTERM, 1 for a run that failed, 2 for a bad recipe, 3 where
    one of several processes was killed: the same command goes on from what was saved.

    In several processes it runs under --launch, or under torchrun: `torchrun --nproc_per_node 8 -m mlcm_rl run RECIPE`.
    """
    loaded = _load(recipe, overrides, quiet=launch is not None)  # the first of the processes tells
    if launch is not None:
        flags = ["--skip-damaged"] if skip_damaged else []
        raise typer.Exit(_launched(launch, [str(recipe), *(overrides or []), *flags]))
    with _imported(
        "pipeline", interrupted="Interrupted. The same command takes the run up where it was saved."
    ) as pipeline:
        finished = pipeline.run(loaded, skip_damaged)
    _line(Text.assemble(("done", "green"), f"  {len(finished)} stages in {Path(loaded.runs) / loaded.name}"))


@app.command()
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
    paths = [Path(text) for text in recipes if text not in overrides]
    if not paths:
        raise typer.BadParameter("name a recipe's YAML file before the settings that are put over it")
    bad = 0
    for path in paths:
        try:
            load(path, overrides, Path.cwd(), tell=_tell_path)
        except RecipeError as error:
            bad += 1
            print_problems(console, path, error)
        else:
            _line(Text.assemble(("ok", "green"), f"  {path}"))
    if bad:
        raise typer.Exit(2)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default=False,
            help="memory of each process under a file of recipes/launch",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            callback=_known_device,
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
    with _imported("pipeline") as pipeline:
        asked = _read_launch(launch)
        found = pipeline.device_here(loaded) if device == THIS else DEVICES[device] if device else None
        stages = pipeline.plan(loaded, True, asked, found)
    if as_json:
        described = [asdict(stage) | {"folder": str(stage.folder)} for stage in stages]
        on = asdict(found) | {"share": found.share} if found else None
        typer.echo(json.dumps({"launch": asdict(asked), "device": on, "stages": described}, indent=2))
    else:
        plan_table.show(console, loaded, stages, asked, found, kind_for(loaded.device, found))


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[list[str], typer.Option(help="what to draw; may be repeated", show_default=False)],
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the pictures", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, max=8, help="network evaluations a picture")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    gamma: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="noise put back between steps: 0 none, 1 all; default: what suits the student"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 16,
) -> None:
    """Draw pictures with a run's student."""
    with _imported("pipeline.finished_runs") as finished_runs:
        pictures = finished_runs.sample(run, prompt, steps, seed, gamma, out, batch_size)
    for picture in pictures:
        _line(Text(str(picture)))


@app.command()
def pairs(
    run: RunFolder,
    prompts: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, show_default=False, help="prompts (.txt, .jsonl) to draw")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the table", show_default=False)],
    reward: Annotated[
        str | None,
        typer.Option(
            callback=reward_commands.known_reward, show_default=False, help="a reward model's name: it chooses"
        ),
    ] = None,
    by_hand: Annotated[bool, typer.Option("--by-hand", help="you choose, on a page in your browser")] = False,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="the first so many of the prompts; default: all", show_default=False)
    ] = None,
    num_generations: Annotated[
        int | None, typer.Option(min=2, help="samples a prompt for the reward; default: 4", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=8, help="network evaluations a sample")] = 4,
    min_margin: Annotated[
        float | None,
        typer.Option(min=0, help="pairs no further apart in reward are left out; default: 0", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="samples drawn at once, in whole prompts")] = 16,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="the page's; default: a free one", show_default=False)
    ] = None,
) -> None:
    """Make a table of preference pairs of a run's samples, chosen by a reward or by hand.

    Of each prompt's samples a reward takes the best and the worst; you choose between two.

    The student is the run's last; a stage's folder, runs/<recipe>/01-distill, gives its own.
    """
    if by_hand:
        _refuse("--by-hand", **{"--reward": reward, "--num-generations": num_generations, "--min-margin": min_margin})
    elif reward is None:
        raise typer.BadParameter("say who chooses: --reward NAME, or --by-hand for yourself")
    else:
        _refuse("--reward", **{"--port": port})
    with _imported(
        "pipeline.finished_runs", interrupted="Interrupted. The same command goes on where it was stopped."
    ) as finished_runs:
        if by_hand:
            serve = partial(_label_page().serve, port=port or 0)
            kept, asked = finished_runs.pairs_by_hand(run, prompts, out, num_prompts, steps, seed, batch_size, serve)
        else:
            samples, margin = num_generations or 4, min_margin or 0.0
            kept, asked = finished_runs.pairs(
                run, prompts, reward, out, num_prompts, samples, steps, margin, seed, batch_size
            )
    _line(Text(f"{out}  {kept} pairs of {asked} prompts"))


@app.command()
def evaluate(
    run: RunFolder,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, max=8, help="sampling steps; may be repeated", show_default=False)
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="prompts to draw", show_default=False)] = None,
) -> None:
    """Measure a run's student beside its teacher and write the report."""
    with _imported("pipeline.finished_runs") as finished_runs:
        report = finished_runs.evaluate(run, num_prompts, steps or None)
    _line(Text(str(report)))


@app.command()
def export(
    run: RunFolder, out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write", show_default=False)]
) -> None:
    """Write a run's student as a folder that diffusers opens without this package.

    A student told the time it jumps to has its pipeline's class in the folder: open it with trust_remote_code=True. For
    stock pipelines (image to image, ControlNet) it is in the folders steps-N. The card in README.md has the code.
    """
    with _imported("pipeline.finished_runs") as finished_runs:
        folder = finished_runs.export(run, out)
    _line(Text(str(folder)))


@app.command()
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
    """Repeat the step whose loss or gradient was no number: its figures then and now. Exit code 1 where they differ."""
    with _imported("pipeline") as pipeline:
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
    if then != now:
        _line(Text(f"step {then['step'] + 1}: the figures differ", style="bold red"))
        raise typer.Exit(1)
    _line(Text.assemble(f"step {then['step'] + 1}: ", ("the same figures", "green")))


@app.command()
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


app.command()(reward_commands.score)
app.add_typer(reward_commands.app, name="rewards")
unbreak_help(app)
unbreak_help(reward_commands.app)


def main() -> None:
    """The console command."""
    write_anything()
    try:
        with output_may_refuse(error_console):
            app(prog_name="mlcm")
    finally:
        if "mlcm_rl.training.processes" in sys.modules:  # else it is no process of several
            sys.modules["mlcm_rl.training.processes"].leave(sys.exception())


def _launched(launch: Path, arguments: list[str]) -> int:
    """`mlcm run` with `arguments` in the processes that `launch` describes; its exit code, 2 where none can start."""
    from ..training.launch import LOST, Killed, LaunchError, run_under

    try:
        return run_under(launch, arguments)
    except LaunchError as error:
        error_console.print(Text.assemble(("bad", "bold red"), f"  --launch: {error}"), soft_wrap=True)
        return 2
    except Killed as error:
        error_console.print(Text.assemble(("failed", "bold red"), f"  {error}"), soft_wrap=True)
        return LOST


def _read_launch(path: Path | None) -> "Launch":
    """The launch that the file at `path` describes, one process without one; exit 2 where it is not known."""
    from ..cost import launches
    from ..training.launch import LaunchError

    try:
        return launches.Launch() if path is None else launches.read_launch(path)
    except LaunchError as error:
        raise typer.BadParameter(str(error), param_hint="--launch") from None


def _load(path: Path, overrides: list[str] | None, quiet: bool = False) -> Recipe:
    """The recipe, checked against the files that it names; exit 2 with all its errors."""
    try:
        return load(path, overrides or [], Path.cwd(), tell=(lambda note: None) if quiet else _tell_path)
    except RecipeError as error:
        print_problems(error_console, path, error)
        raise typer.Exit(2) from None


def _tell_path(note: str) -> None:
    """One line on a path that could have been meant otherwise."""
    if not console.quiet:
        error_console.print(Text.assemble(("path", "yellow"), f"  {note}"), soft_wrap=True)


def _label_page() -> ModuleType:
    """The page that asks; exit 1 where what it needs is not installed."""
    try:
        return import_module("mlcm_rl.cli.label_page")
    except ModuleNotFoundError as error:
        needed = f"pairs: the page needs {error.name}, which is not installed: pip install 'mlcm-rl[label]'"
        error_console.print(Text.assemble(("failed", "bold red"), f"  {needed}"), soft_wrap=True)
        raise typer.Exit(1) from None


def _refuse(way: str, **options: object) -> None:
    """Exit 2 for any of `options` that was given and means nothing beside the option `way`."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"{name} means nothing beside {way}; leave one of them out")


@contextmanager
def _imported(name: str, interrupted: str = "Interrupted.") -> Iterator[ModuleType]:
    """The module mlcm_rl.`name`, imported only here. What fails ends with its message, a signal with one line."""
    try:
        with signals.raised():
            module = import_module(f"mlcm_rl.{name}")
            try:
                yield module
            except module.RunError as error:
                label = "bad" if error.exit_code == 2 else "failed"
                error_console.print(Text.assemble((label, "bold red"), f"  {error}"), soft_wrap=True)
                raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        error_console.print(Text(f"\n{interrupted}"), soft_wrap=True)
        raise typer.Exit(stop.code if isinstance(stop, signals.Stopped) else 130) from None


def _line(text: Text) -> None:
    """One line of output, never wrapped, so that a path in it can be copied and piped."""
    console.print(text, soft_wrap=True)


if __name__ == "__main__":
    main()
