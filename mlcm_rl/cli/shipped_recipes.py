"""`mlcm recipes`: the recipes that come with this package, listed, shown and copied."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML

from ..recipe import shipped
from ..recipe.tree import nearest
from ..storage.files import replacing
from .console import console, line

app = typer.Typer(
    help="Recipes that come with mlcm_rl: list them, show one, copy one to change it.", invoke_without_command=True
)


def _file(name: str) -> Path:
    """Return the file of the shipped recipe `name`. Raise BadParameter with the nearest names where there is none."""
    files = {file.stem: file for file in shipped.recipes()}
    stem = name.removesuffix(".yaml")
    if stem not in files:
        near = nearest(stem, list(files))
        suggestion = f"did you mean {near}? " if near else ""
        raise typer.BadParameter(f"no recipe is called {name}; {suggestion}`mlcm recipes` lists them")
    return files[stem]


Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="a name of `mlcm recipes`")]


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes that come with mlcm_rl: their base, their stages, what they need, what they are."""
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="print a list of recipes as JSON")] = False,
) -> None:
    """List the recipes with their base, their stages, what they need, what they are."""
    rows = [summary(file) for file in shipped.recipes()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = Table("recipe", "base", "needs", "what it is", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(Text(row["name"], no_wrap=True), row["family"], row["needs"], row["what"])
    console.print(table, crop=False)
    line(
        Text(
            "\nmlcm recipes copy NAME makes a copy to change; mlcm plan NAME says what it costs; mlcm run NAME runs it."
        )
    )


def summary(file: Path) -> dict[str, Any]:
    """Return what the list says of a recipe: it is read as plain YAML, since its files need not be here."""
    plain = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    sentence = re.split(r"(?<=[a-z0-9)])[:.;](?:\s|$)", shipped.header(file))[0]
    needs = json.loads((file.parent / "needs.json").read_text(encoding="utf-8")).get(file.stem)
    return {
        "name": file.stem,
        "family": plain["teacher"]["family"],
        "stages": [stage["kind"] for stage in plain["stages"]],
        "needs": needs or "",
        "what": sentence.strip(),
    }


@app.command()
def show(name: Name) -> None:
    """Print a recipe's file."""
    typer.echo(_file(name).read_text(encoding="utf-8"), nl=False)


@app.command()
def copy(
    name: Name,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", file_okay=False, help="folder for the copy [the working one]")
    ] = Path("."),
) -> None:
    """Copy a recipe to change it; what it names of ours is written as mlcm:..., which holds from any folder."""
    source = _file(name)
    target = folder / source.name
    if target.exists() or target.is_symlink():
        raise typer.BadParameter(f"{target} is there already: name another folder, or move it", param_hint="DIR")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_text(_with_prefix(source), encoding="utf-8")
    line(Text(str(target)))


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
