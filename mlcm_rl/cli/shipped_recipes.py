"""`mlcm recipes`: the recipes and launch files that come with this package, listed, shown and copied."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from ruamel.yaml import YAML

from ..recipe import shipped
from ..recipe.tree import nearest
from ..storage.files import replacing
from ..training.console import wrapped
from .console import console, error_console, line

app = typer.Typer(
    help="Recipes and launch files that come with mlcm_rl: list them, show one, copy one to change it.",
    invoke_without_command=True,
)
INDENT = "    "


def _files(name: str) -> list[Path]:
    """Return the shipped recipe `name`, or the launch file of that name with what lies beside it under the same name.

    Raise BadParameter with the nearest names where there is neither.
    """
    files = {file.stem: [file] for file in shipped.recipes()}
    files |= {file.stem: [file, *_scripts(file)] for file in shipped.launch_files()}
    stem = name.removesuffix(".yaml")
    if stem not in files:
        near = nearest(stem, list(files))
        suggestion = f"did you mean {near}? " if near else ""
        raise typer.BadParameter(f"no recipe or launch file is called {name}; {suggestion}`mlcm recipes` lists them")
    return files[stem]


def _scripts(launch_file: Path) -> list[Path]:
    """Return the other files of a launch file's name, such as its Slurm script."""
    return [path for path in sorted(launch_file.parent.glob(f"{launch_file.stem}.*")) if path != launch_file]


Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="a name of `mlcm recipes`")]


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes that come with mlcm_rl: their base, what they need, what they are; then the launch files."""
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="print a list of recipes as JSON")] = False,
) -> None:
    """List the recipes with their base, what they need and what they are, then the launch files."""
    rows = [summary(file) for file in shipped.recipes()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    header = {"name": "recipe", "family": "base", "needs": "needs", "what": "what it is"}
    widths = {key: max(len(row[key]) for row in [header, *rows]) for key in ("name", "family", "needs")}
    for row in [header, *rows]:
        columns = " ".join(row[key].ljust(width) for key, width in widths.items())
        line(Text(columns.rstrip(), "bold" if row is header else ""))
        _print_below(row["what"])
    line(Text("\nlaunch file, for --launch", "bold"))
    for file in shipped.launch_files():
        line(Text(file.stem))
        _print_below(_first_clause(file, "."))
    line(Text("\nneeds: made data is what the recipe's first lines say how to make, in a clone"))
    line(Text("of the repository, which `a clone` needs too; hours are for all its stages."))
    line(Text("\nmlcm recipes copy NAME makes a copy to change; mlcm plan NAME says what it"))
    line(Text("costs; mlcm run NAME runs it, with --launch NAME in several processes."))


def _print_below(text: str) -> None:
    """Print `text` indented under its name, broken where the terminal ends."""
    for row in wrapped(text, console.width - len(INDENT)):
        line(Text(INDENT + row, "dim"))


def summary(file: Path) -> dict[str, Any]:
    """Return what the list says of a recipe: it is read as plain YAML, since its files need not be here."""
    plain = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    needs = json.loads((file.parent / "needs.json").read_text(encoding="utf-8")).get(file.stem)
    return {
        "name": file.stem,
        "family": plain["teacher"]["family"],
        "stages": [stage["kind"] for stage in plain["stages"]],
        "needs": needs or "",
        "what": _first_clause(file, ":.;"),
    }


def _first_clause(file: Path, marks: str) -> str:
    """Return the comment at the top of `file` up to the first of the punctuation `marks` that ends a word."""
    return re.split(rf"(?<=[a-zA-Z0-9)])[{marks}](?:\s|$)", shipped.header(file))[0].strip()


@app.command()
def show(name: Name) -> None:
    """Print a recipe's file, or a launch file."""
    typer.echo(_files(name)[0].read_text(encoding="utf-8"), nl=False)


@app.command()
def copy(
    name: Name,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", file_okay=False, help="folder for the copy [the working one]")
    ] = Path("."),
) -> None:
    """Copy a recipe or a launch file to change it; of what ours it names, a recipe's copy has mlcm:..., for any folder.

    A launch file is then taken by its path: --launch DIR/ddp.yaml.
    """
    sources = _files(name)
    targets = [folder / source.name for source in sources]
    for target in targets:
        if target.exists() or target.is_symlink():
            raise typer.BadParameter(f"{target} is there already: name another folder, or move it", param_hint="DIR")
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, targets, strict=True):
        with replacing(target) as temporary:
            temporary.write_text(_copied(source, target), encoding="utf-8")
        line(Text(str(target)))
    if sources[0] in shipped.recipes():  # on standard error: standard output has the paths alone
        text = f"change it; then `mlcm plan {targets[0]}` says what it costs, and `mlcm run {targets[0]}` runs it"
        error_console.print(Text(text, "dim"), soft_wrap=True)


def _copied(source: Path, target: Path) -> str:
    """Return the text of a copy of a shipped file at `target`, in which the paths of a launch file are its own."""
    if source in shipped.recipes():
        return _with_prefix(source)
    text = source.read_text(encoding="utf-8")
    return text.replace(f"recipes/launch/{source.stem}", target.with_suffix("").as_posix())


def _with_prefix(source: Path) -> str:
    """Return the text of a shipped recipe in which every value that names a file beside it begins with PREFIX."""
    text = source.read_text(encoding="utf-8")
    names = {value for value in _texts(YAML(typ="safe").load(text)) if _is_beside(source.parent, value)}
    for value in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?m)(?<=[:,\[\-] ){re.escape(value)}(?=$|[ ,\]}}])", f"{shipped.PREFIX}{value}", text)
    return text.replace("$schema=recipe.schema.json", f"$schema={source.parent / 'recipe.schema.json'}")


def _texts(value: Any) -> list[str]:
    """Return all texts among the values of a YAML document."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in _texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def _is_beside(folder: Path, value: str) -> bool:
    return ("/" in value or "." in value) and not value.startswith((".", "/")) and (folder / value).exists()
