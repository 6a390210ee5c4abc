"""What several commands on finished runs take: a run's folder, and the page on which a person chooses."""

import difflib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import typer
from rich.text import Text

from ..recipe import RESERVED
from ..storage.files import CheckpointError, read_json
from .console import error_console


def existing_run(path: Path) -> Path:
    """Return the folder `path`. Raises BadParameter for a file, and with the nearest folders where there is none."""
    if path.is_dir():
        return path
    if path.is_file():
        raise typer.BadParameter(
            f"{path} is a file: `mlcm sample` draws with it; a recipe of one stage `start`, with its path and its "
            "teacher, makes a run of it (docs/start_from.md)"
        )
    beside = [folder for parent in (path.parent, Path("runs")) if parent.is_dir() for folder in parent.iterdir()]
    names = {folder.name: str(folder) for folder in beside if folder.is_dir() and folder.name not in RESERVED}
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or sorted(names)[:3]
    suggestion = f"the nearest are {', '.join(names[name] for name in near)}" if near else "there are no runs yet"
    raise typer.BadParameter(f"no folder {path}: {suggestion}")


def existing_pictures(path: Path) -> Path:
    """Return the folder `path` of a run or of pictures. Raise BadParameter as `existing_run`, and for a run or a stage
    whose recipe has no evaluate stage.
    """
    existing_run(path)
    manifests = [one / "manifest.json" for one in (path, *sorted(path.glob("[0-9]*-*")))]
    try:
        recipes = [read_json(file).get("recipe", {}) for file in manifests if file.is_file()]
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from error
    if any(recipes) and not any(stage["kind"] == "evaluate" for stage in recipes[-1]["stages"]):
        raise typer.BadParameter(
            f"{path}: its recipe has no evaluate stage, whose pictures a gallery shows: add one and run it again, name "
            f"the folder that `mlcm evaluate {path} --prompts FILE` makes, or one of `mlcm sample`"
        )
    return path


def existing_student(path: Path) -> Path:
    """Return the file of a student, or the folder `path`. Raise BadParameter as `existing_run`."""
    return path if path.is_file() else existing_run(path)


def existing_runs(path: Path) -> Path:
    """Return the folder of runs `path`. Raise BadParameter where there is none, as before the first run."""
    if path.is_dir():
        return path
    if path.exists():
        raise typer.BadParameter(f"{path} is a file; name the folder that recipes call `runs`")
    raise typer.BadParameter(
        f"there are no runs yet in {path.absolute()}: `mlcm run emoji_demo` makes the first; "
        "or name the folder that your recipe calls `runs`"
    )


def label_page(command: str) -> ModuleType:
    """Return the module of the labelling page, for `command`. Exit 1 where a package that it needs is not installed."""
    try:
        return import_module("mlcm_rl.cli.label_page")
    except ModuleNotFoundError as error:
        message = f"{command}: the page needs {error.name}, which is not installed: pip install 'mlcm-rl[label]'"
        error_console.print(Text.assemble(("failed", "bold red"), f"  {message}"), soft_wrap=True)
        raise typer.Exit(1) from None
