"""Every command of every page is one that the command line takes: its options, its recipe, the recipe's keys."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
import typer

from mlcm_rl.cli.app import app
from mlcm_rl.recipe import reward_package, shipped
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import RecipeError

ROOT = pages.ROOT
TAKE_RECIPE = {"run", "plan", "validate"}
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.|<\w+>")
READERS = {
    "mine.yaml",
    "my_recipe.yaml",
    "rehearsal.yaml",
    "rivals-pcm-0.yaml",
    "rivals-ours-0.yaml",
}  # recipes/my_finetune.yaml stands for the reader's recipes
UsageError: Any = typer.BadParameter.__base__  # of the click that typer has
root = typer.main.get_command(app)


def faults(words: list[str]) -> list[str]:
    """Return what is wrong with the command `mlcm ...`."""
    command, path, rest = root, ["mlcm"], words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return [f"{' '.join(path)}: no command {rest[0]}"]
        path, command, rest = [*path, rest[0]], command.commands[rest[0]], rest[1:]
    if hasattr(command, "commands") and not rest:
        return [] if command.invoke_without_command else [f"{' '.join(path)}: which of its commands?"]
    parser = command.make_parser(command.make_context(path[-1], [], resilient_parsing=True))
    try:
        values, left, _ = parser.parse_args(list(rest))
    except UsageError as error:
        return [f"{' '.join(words)}: {error.format_message()}"]
    wrong, arguments = [f"{' '.join(left)} is left over"] if left else [], []
    for parameter in command.params:
        value = values.get(parameter.name)
        given = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            arguments += given
        else:
            wrong += [fault for one in given for fault in _option_faults(parameter, one)]
    wrong += _recipe_faults(" ".join(path[1:]), arguments)
    return [f"{' '.join(words)}: {fault}" for fault in wrong]


def _option_faults(option: Any, value: Any) -> list[str]:
    """Return what is wrong with the value of an option: a number out of range, a reward that is none."""
    if option.min is not None and not option.min <= float(value) <= (option.max or math.inf):
        return [f"{value} is not in the range of {option.name}"]
    if option.name == "reward" and value not in {*reward_package.names(), "order", "warmth"}:
        return [f"no reward {value}"]
    if option.name == "launch" and not (shipped.launch_file(value) or (ROOT / value).is_file() or is_readers(value)):
        return [f"no launch file {value}"]
    return []


def _recipe_faults(name: str, arguments: list[str]) -> list[str]:
    if name in ("recipes show", "recipes copy"):
        names = {file.stem for file in [*shipped.recipes(), *shipped.launch_files()]}
        return (
            [] if not arguments or arguments[0] in names or is_readers(arguments[0]) else [f"no recipe {arguments[0]}"]
        )
    if name not in TAKE_RECIPE or not arguments:
        return []
    file = recipe_file(arguments[0])
    if file is None:
        return [f"no recipe {arguments[0]}"]
    try:
        load(file, [text for text in arguments[1:] if "=" in text and "..." not in text])
    except RecipeError as error:
        return [str(error)]
    return []


def is_readers(name: str) -> bool:
    """Return whether a page names a file of the reader's: by a placeholder, or one that it makes."""
    return Path(name).name in READERS or bool(PLACEHOLDER.fullmatch(Path(name).stem))


def recipe_file(name: str) -> Path | None:
    """Return the file of the recipe that a page names; None where there is none."""
    if is_readers(name):
        return ROOT / "recipes" / "my_finetune.yaml"
    places = [ROOT / name, ROOT / "recipes" / Path(name).name, ROOT / "recipes" / f"{name}.yaml"]
    return next((place for place in places if place.is_file()), None)


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_is_taken(page):
    text = pages.text_of(page)
    assert [fault for words in pages.commands(text, "mlcm") for fault in faults(words)] == []


def test_the_pages_have_commands():
    found = [words for page in pages.pages() for words in pages.commands(pages.text_of(page), "mlcm")]
    assert len(found) > 100
    assert {words[1] for words in found} >= {"run", "plan", "sample", "export", "rewards", "pairs", "recipes", "doctor"}


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("mlcm score --images a --reward emoji_stile", "no reward"),
        ("mlcm run emoji_demo --launch zero5", "no launch"),
        ("mlcm rum emoji_demo", "no command rum"),
        ("mlcm run emoji_dem", "no recipe emoji_dem"),
        ("mlcm run emoji_demo --lunch cpu2", "--lunch"),
        ("mlcm run emoji_demo stages.distill.num_step=4", "num_step"),
        ("mlcm recipes copy emoji_dem", "no recipe"),
        ("mlcm sample runs/a --out b --steps 9", "9"),
        ("mlcm export runs/a b c", "left over"),
    ],
)
def test_a_wrong_command_is_told(command, fault):
    assert faults(command.split()) != []
    assert fault in " ".join(faults(command.split()))
    assert faults(["mlcm", "run", "emoji_demo", "--launch", "cpu2", "stages.distill.num_steps=4"]) == []


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    """Recipes, launch files, programs of ours, and targets of make."""
    text = pages.text_of(page)
    code = [*pages.SPAN.findall(text), *(block.text for block in pages.blocks(text) if block.language in ("", "sh"))]
    names = {name for part in code for name in re.findall(r"(?<![\w./-])[\w/]+\.yaml\b", part)}
    places = [ROOT, ROOT / "recipes", ROOT / "recipes" / "launch", page.parent]
    missing = [
        name
        for name in names
        if not any((place / one).is_file() for place in places for one in (name, Path(name).name))
    ]
    assert [name for name in missing if not is_readers(name)] == []
    programs = [words for part in ("python", "docs/") for words in pages.commands(text, part)]
    files = [word for words in programs for word in words[1:2] if word.endswith(".py")]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in pages.commands(text, "make") if len(words) > 1 and words[1].isalpha()]
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


OF_FILES = {
    "path",
    "revision",
    "prompts",
    "start",
    "pairs",
}  # keys that name what a reader has and these tests have not


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_whole_recipe_of_a_page_lacks_nothing_but_the_readers_own_files(page, tmp_path):
    for block in pages.blocks(page.read_text(encoding="utf-8")):
        if block.language == "yaml" and all(f"\n{key}:" in f"\n{block.text}" for key in ("name", "teacher", "stages")):
            (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
            problems = []
            try:
                load(tmp_path / "recipe.yaml", root=tmp_path)
            except RecipeError as error:
                problems = error.problems
            assert [str(problem) for problem in problems if problem.key[-1] not in OF_FILES] == []


RUN = [
    (page, block)
    for page in pages.pages()
    for block in pages.blocks(page.read_text(encoding="utf-8"))
    if block.mark.startswith("test: runs")
]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, _ in RUN}), ids=lambda page: page.stem)
def test_the_commands_that_are_cheap_run(page, tmp_path, monkeypatch):
    """In one folder a page: "runs in recipes" means that folder, "runs after a run" a folder that has one."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shim = tmp_path / "bin" / "mlcm"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlcm_rl "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:/usr/bin:/bin")
    folder = tmp_path / "here"
    folder.mkdir()
    for _, block in [one for one in RUN if one[0] == page]:
        if "in recipes" in block.mark and not (folder / "prompts").exists():
            (folder / "prompts").symlink_to(ROOT / "recipes" / "prompts")
        if "after a run" in block.mark:
            (folder / "runs" / "stages" / "distill-0").mkdir(parents=True)
        done = subprocess.run(
            ["sh", "-e", "-c", block.text], cwd=folder, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
