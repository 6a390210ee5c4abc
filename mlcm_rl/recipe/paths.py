"""The meaning of paths in a recipe, decided here alone.

Files that a recipe reads are relative to the folder of its file, and a student from elsewhere to that or to the working
directory, where runs are. `runs`, and the finished stages in `also`, are relative to the working directory, where `mlcm
run` writes them, and so are all paths in overrides of the command line.
A path that exists only in the working directory is read there, as it was before this rule, with a note of the new form.
`mlcm:emoji/teacher` is in the folder of recipes that comes with this package, from anywhere.

A loaded recipe has its paths as this process sees them: relative if they lie under the working directory, else
absolute. The text of a reward's setting is kept as well, since a fingerprint has it. No torch here.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from . import shipped
from .evaluation import Evaluate
from .experiment import Recipe, Stage
from .preference import Tuning
from .reads import reads_of
from .renamed import renewed
from .start import Start
from .tree import Key, key_text
from .types import Reward

PATH_SETTINGS = ("folder", "file", "path")  # of a reward, by name; others if their text looks like a path


@dataclass(frozen=True)
class Folders:
    """The folders that relative paths may start from: the one of the recipe's file, and the working directory."""

    recipe: Path
    working: Path
    is_overridden: Callable[[Key], bool] = field(default=lambda key: False)

    def of(self, key: Key) -> list[Path]:
        """Return the folders for the path at `key`, in order."""
        is_one = os.path.realpath(self.recipe) == os.path.realpath(self.working)
        is_of_working = "also" in key or self.is_overridden(key)
        return [self.working] if is_one or is_of_working else [self.recipe, self.working]

    def place(self, key: Key, text: str) -> Path:
        """Return the path of `text` at `key`: in the first folder that has it, or in the first of all if none has."""
        if (of_package := shipped.place(text)) is not None:
            return of_package
        places = [folder / text for folder in self.of(key)]
        return next(filter(os.path.exists, places), places[0])

    def looked_in(self, key: Key, text: str) -> str:
        """Return a sentence on where `text` at `key` was looked for; empty for an absolute path."""
        if os.path.isabs(text):
            return ""
        if text.startswith(shipped.PREFIX):
            return (
                f"{shipped.PREFIX} is the folder of recipes that comes with mlcm_rl, here {shipped.folder('recipes')}"
            )
        if self.is_overridden(key):
            return f"paths on the command line are relative to the working directory, here {self.working}"
        if "also" in key:
            return f"finished stages are looked for from the working directory, here {self.working}"
        also = f" (and looked for from the working directory too, {self.working})" if len(self.of(key)) > 1 else ""
        return f"paths in a recipe are relative to its file, here to {os.path.abspath(self.recipe)}{also}"


def resolved(recipe: Recipe, folders: Folders) -> tuple[Recipe, list[str]]:
    """Return `recipe` with its paths as this process sees them, and a note on each ambiguous one."""
    notes: dict[str, str] = {}
    input_keys: set[Key] = {("stages", i, name) for i, stage in enumerate(recipe.stages) for name in reads_of(stage)}
    input_keys |= {("teacher", "lora"), ("teacher", "text_adapter")}
    of_students = {("stages", i, "path") for i, stage in enumerate(recipe.stages) if isinstance(stage, Start)}

    def local_path(key: Key, text: str) -> str:
        if not text or os.path.isabs(text):
            return text
        if key not in of_students and (note := _note(key, text, folders)):
            notes.setdefault(text, f"{key_text(key)}: {note}")
        place = folders.place(key, text)
        if os.path.exists(place):
            return _short(place, folders.working)
        return str(place) if key in input_keys else text  # a hub's name, or another text of a reward's settings

    return _with_paths(recipe, paths_in(recipe), local_path, {}), list(notes.values())


def record(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return what a manifest in `folder` needs beside `recipe`, so that its paths are found from anywhere.

    The working directory is relative if `folder` lies under it, so that both can be moved together.
    """
    here, place = Path.cwd(), folder.resolve()
    working = os.path.relpath(here, place) if place.is_relative_to(here.resolve()) else str(here)
    return {"working_directory": working} | ({"written": recipe._file_texts} if recipe._file_texts else {})


def recorded(described: dict[str, Any], folder: Path) -> Recipe:
    """Return the recipe of a manifest in `folder`, with its paths as this process sees them.

    Paths that no longer exist stay as they are. Raise pydantic's ValidationError for another version's recipe.
    """
    recipe = Recipe.model_validate(renewed(described["recipe"]))
    working = _working_directory(recipe, described, folder.resolve())

    def local_path(key: Key, text: str) -> str:
        place = working / text
        is_known = key == ("runs",) or (text and os.path.exists(place))
        return os.path.abspath(place) if is_known and not is_here else text

    is_here = os.path.realpath(working) == os.path.realpath(Path.cwd())
    file_texts = described.get("written")
    return _with_paths(
        recipe, [*paths_in(recipe), *_of_runs(recipe)], local_path, file_texts if isinstance(file_texts, dict) else {}
    )


def _working_directory(recipe: Recipe, described: dict[str, Any], folder: Path) -> Path:
    """Return the working directory of the run that wrote `folder`; without a record, the one that has `runs` in it."""
    if isinstance(directory := described.get("working_directory"), str):
        return folder / directory
    runs = Path(recipe.runs).parts
    is_below = not os.path.isabs(recipe.runs) and folder.parts[-2 - len(runs) : -2] == runs
    return folder.parents[1 + len(runs)] if is_below else Path.cwd()


def paths_in(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Yield (key, text) of every path in `recipe`, except those of finished runs."""
    yield ("teacher", "path"), recipe.teacher.path
    if recipe.teacher.lora is not None:
        yield ("teacher", "lora"), recipe.teacher.lora
    if recipe.teacher.text_adapter is not None:
        yield ("teacher", "text_adapter"), recipe.teacher.text_adapter
    for i, stage in enumerate(recipe.stages):
        for name in reads_of(stage):
            if (text := getattr(stage, name)) is not None:
                yield ("stages", i, name), text
        for key, reward in rewards_in(("stages", i), stage):
            for name, text in reward.settings.items():
                if isinstance(text, str) and _is_path_like(name, text):
                    yield (*key[:-1], "settings", name), text


def rewards_in(key: Key, stage: Stage) -> Iterator[tuple[Key, Reward]]:
    """Yield (key of its name, reward) of every reward model in a stage at `key`, given by name or as an entry."""
    places: list[tuple[Key, Sequence[str | Reward]]] = []
    if isinstance(stage, Tuning | Evaluate):
        places.append((("rewards",), stage.rewards))
    if isinstance(stage, Tuning):
        places.append((("guard", "rewards"), stage.guard.rewards))
    for place, rewards in places:
        for j, one in enumerate(rewards):
            entry = (*key, *place, j)
            yield (entry, Reward(name=one)) if isinstance(one, str) else ((*entry, "name"), one)


def _of_runs(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    yield ("runs",), recipe.runs
    for i, stage in enumerate(recipe.stages):
        for j, text in enumerate(stage.also if isinstance(stage, Evaluate) else []):
            yield ("stages", i, "also", j), text


def _with_paths(
    recipe: Recipe, paths: Iterable[tuple[Key, str]], local_path: Callable[[Key, str], str], file_texts: dict[str, str]
) -> Recipe:
    """Return `recipe` with `local_path` of each of `paths`; `file_texts` are the texts in the file of some of them."""
    plain: Any = recipe.model_dump()
    of_settings = {}
    for key, text in paths:
        *parts, last = key
        holder = reduce(getitem, parts, plain)
        holder[last] = local_path(key, text)
        if "settings" in key and (text in file_texts or holder[last] != text):
            of_settings[holder[last]] = file_texts.get(text, text)
    copy = Recipe.model_validate(plain)
    copy._file_texts = of_settings
    return copy


def _note(key: Key, text: str, folders: Folders) -> str:
    """Return a note on a path that two folders could have; empty if it is not ambiguous."""
    places = [folder / text for folder in folders.of(key) if os.path.exists(folder / text)]
    if len(places) > 1 and not os.path.samefile(*places):
        return f"{text} is beside the recipe and in the working directory; {places[0]} is read"
    if places and len(folders.of(key)) > 1 and places[0] == folders.working / text:
        form = os.path.relpath(places[0], folders.recipe)
        return f"{text} is read in the working directory; paths are relative to the recipe's file now: write {form}"
    return ""


def _short(place: Path, working: Path) -> str:
    """Return `place` relative to the folder `working` if it lies under it and that is not the root; else absolute."""
    plain = Path(os.path.normpath(place))
    if os.path.realpath(plain) != os.path.realpath(place):  # `..` behind a link
        return os.path.abspath(place.parent.resolve() / place.name)
    whole, under = Path(os.path.abspath(plain)), Path(os.path.abspath(working))
    is_short = whole.is_relative_to(under) and under != Path(under.anchor)
    return str(whole.relative_to(under) if is_short else whole)


def _is_path_like(name: str, text: str) -> bool:
    """Return whether a reward's setting may be a path: by its name, or by a slash or a suffix in its text."""
    return name in PATH_SETTINGS or "/" in text or bool(Path(text).suffix)
