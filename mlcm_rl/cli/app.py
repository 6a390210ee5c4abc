"""The `mlcm` command: parses the arguments, calls the function that does the work, prints its result.

Exit codes: 0; 1 for a run that failed; 2 for a bad recipe or argument; 3 where one of several processes was lost; 130
after Ctrl-C, 143 after SIGTERM. torch is imported only by the commands that need it: `--help`, `validate` and `schema`
answer at once.
"""

import sys
from typing import Annotated

import typer

from .. import __version__
from . import doctor, gallery, prompts, recipes, results, reward_commands, shipped_recipes, students, teachers
from .console import error_console, output_may_refuse, unbreak_help, write_anything

app = typer.Typer(
    name="mlcm",
    help="Distil a latent text-to-image diffusion model into a 2-8-step student.",
    epilog="Begin with `mlcm doctor`, `mlcm recipes` and `mlcm run emoji_demo`; every command has a `--help`. "
    "Exit codes: 0 done, 1 failed, 2 bad recipe or argument, 3 one of several processes lost, 130 after Ctrl-C, 143 "
    "after SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(version: bool) -> None:
    """Print the version and exit where `version` is set."""
    if version:
        typer.echo(f"mlcm_rl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before a command."""


for command in (
    recipes.run,
    recipes.validate,
    recipes.plan,
    prompts.prompts,
    students.sample,
    students.pairs,
    students.evaluate,
    students.export,
    gallery.gallery,
    teachers.convert,
    doctor.doctor,
    results.runs,
    results.clean,
    recipes.replay,
    recipes.schema,
    reward_commands.score,
):
    app.command()(command)
app.add_typer(reward_commands.app, name="rewards")
app.add_typer(shipped_recipes.app, name="recipes")
unbreak_help(app)
unbreak_help(reward_commands.app)
unbreak_help(shipped_recipes.app)


def main() -> None:
    """Run the `mlcm` command."""
    write_anything()
    try:
        with output_may_refuse(error_console):
            app(prog_name="mlcm")
    finally:
        if "mlcm_rl.training.processes" in sys.modules:  # else it is the only process
            sys.modules["mlcm_rl.training.processes"].leave(sys.exception())
