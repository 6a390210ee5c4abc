"""What a path in a recipe means: the one place that decides it.

What a recipe reads is relative to the folder of its file. `runs`, and the finished stages in `also`, are relative to
the working directory, where `mlcm run` leaves them, and so is all that an override of the command line names. A path
that is only found in the working directory is read there, as it was before this rule, and the new form is told.

A loaded recipe holds its paths as this process sees them: short where they lie under the working directory, else
absolute. What a reward's setting said stays known, since its text is part of a fingerprint. No torch here.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from .evaluation import Evaluate
from .experiment import Recipe, Stage
from .preference import Tuning
from .reads import read_by
from .renamed import renewed
from .tree import Key, key_text
from .types import Reward

PATH_SETTINGS = ("folder", "file", "path")  # of a reward, by name; others where their text looks like a path


@dataclass(frozen=True)
class Folders:
    """The folders that relative paths are looked for in: of the recipe's file, and the working directory."""

    recipe: Path
    working: Path
    is_overridden: Callable[[Key], bool] = field(default=lambda key: False)

    def of(self, key: Key) -> list[Path]:
        """Those that count for the path at `key`, in order."""
        is_one = os.path.realpath(self.recipe) == os.path.realpath(self.working)
        is_of_working = "also" in key or self.is_overridden(key)
        return [self.working] if is_one or is_of_working else [self.recipe, self.working]

    def place(self, key: Key, text: str) -> Path:
        """Where `text` at `key` is; where it is in none of the folders, what it would be in the first."""
        places = [folder / text for folder in self.of(key)]
        return next(filter(os.path.exists, places), places[0])

    def looked_in(self, key: Key, text: str) -> str:
        """A sentence on where `text` at `key` was looked for; none for an absolute path."""
        if os.path.isabs(text):
            return ""
        if self.is_overridden(key):
            return f"paths on the command line are relative to the working directory, here {self.working}"
        if "also" in key:
            return f"finished stages are looked for from the working directory, here {self.working}"
        also = f" (and looked for from the working directory too, {self.working})" if len(self.of(key)) > 1 else ""
        return f"paths in a recipe are relative to its file, here to {os.path.abspath(self.recipe)}{also}"


def resolved(recipe: Recipe, folders: Folders) -> tuple[Recipe, list[str]]:
    """`recipe` with its paths as this process sees them, and a line on each that could have meant something else."""
    notes: dict[str, str] = {}
    read = {("stages", i, name) for i, stage in enumerate(recipe.stages) for name in read_by(stage)}

    def seen(key: Key, text: str) -> str:
        if not text or os.path.isabs(text):
            return text
        if note := _note(key, text, folders):
            notes.setdefault(text, f"{key_text(key)}: {note}")
        place = folders.place(key, text)
        if os.path.exists(place):
            return _shown(place, folders.working)
        return str(place) if key in read else text  # of a hub's name, or a word for a reward, nothing is there

    return _changed(recipe, named(recipe), seen, {}), list(notes.values())


def record(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What else a manifest in `folder` says of `recipe`, so that its paths are found from any working directory.

    That it is relative where `folder` lies under it: both may then be moved together.
    """
    here, place = Path.cwd(), folder.resolve()
    working = os.path.relpath(here, place) if place.is_relative_to(here.resolve()) else str(here)
    return {"working_directory": working} | ({"written": recipe._written} if recipe._written else {})


def recorded(described: dict[str, Any], folder: Path) -> Recipe:
    """The recipe that a manifest in `folder` holds, its paths as this process sees them.

    What is not there any more is left as it stands. Raises pydantic's ValidationError for another version's recipe.
    """
    recipe = Recipe.model_validate(renewed(described["recipe"]))
    working = _working_directory(recipe, described, folder.resolve())

    def seen(key: Key, text: str) -> str:
        place = working / text
        is_known = key == ("runs",) or (text and os.path.exists(place))
        return os.path.abspath(place) if is_known and not is_here else text

    is_here = os.path.realpath(working) == os.path.realpath(Path.cwd())
    written = described.get("written")
    return _changed(recipe, [*named(recipe), *_of_runs(recipe)], seen, written if isinstance(written, dict) else {})


def _working_directory(recipe: Recipe, described: dict[str, Any], folder: Path) -> Path:
    """Where the process worked that left the stage in `folder`. Older manifests do not say: it held `runs`."""
    if isinstance(said := described.get("working_directory"), str):
        return folder / said
    runs = Path(recipe.runs).parts
    is_below = not os.path.isabs(recipe.runs) and folder.parts[-2 - len(runs) : -2] == runs
    return folder.parents[1 + len(runs)] if is_below else Path.cwd()


def named(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """(key, text) of every path that `recipe` names, those of finished runs left out."""
    yield ("teacher", "path"), recipe.teacher.path
    for i, stage in enumerate(recipe.stages):
        for name in read_by(stage):
            if (text := getattr(stage, name)) is not None:
                yield ("stages", i, name), text
        for key, reward in rewards_named(("stages", i), stage):
            for name, text in reward.settings.items():
                if isinstance(text, str) and _is_path_like(name, text):
                    yield (*key[:-1], "settings", name), text


def rewards_named(key: Key, stage: Stage) -> Iterator[tuple[Key, Reward]]:
    """(key of its name, reward) of every reward model that a stage at `key` names: by a name alone, or by an entry."""
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


def _changed(
    recipe: Recipe, paths: Iterable[tuple[Key, str]], seen: Callable[[Key, str], str], written: dict[str, str]
) -> Recipe:
    """`recipe` with its `paths` made what `seen` says of them; `written` is what the file said for some of them."""
    plain: Any = recipe.model_dump()
    of_settings = {}
    for key, text in paths:
        *parts, last = key
        holder = reduce(getitem, parts, plain)
        holder[last] = seen(key, text)
        if "settings" in key and (text in written or holder[last] != text):
            of_settings[holder[last]] = written.get(text, text)
    changed = Recipe.model_validate(plain)
    changed._written = of_settings
    return changed


def _note(key: Key, text: str, folders: Folders) -> str:
    """What there is to say of a path that one of two folders could have been meant for; nothing where it is plain."""
    places = [folder / text for folder in folders.of(key) if os.path.exists(folder / text)]
    if len(places) > 1 and not os.path.samefile(*places):
        return f"{text} is beside the recipe and in the working directory; {places[0]} is read"
    if places and len(folders.of(key)) > 1 and places[0] == folders.working / text:
        form = os.path.relpath(places[0], folders.recipe)
        return f"{text} is read in the working directory; paths are relative to the recipe's file now: write {form}"
    return ""


def _shown(place: Path, working: Path) -> str:
    """`place` relative to the folder `working` where it lies under it, which all does under /, else absolute."""
    plain = Path(os.path.normpath(place))
    if os.path.realpath(plain) != os.path.realpath(place):  # `..` behind a link
        return os.path.abspath(place.parent.resolve() / place.name)
    whole, under = Path(os.path.abspath(plain)), Path(os.path.abspath(working))
    is_short = whole.is_relative_to(under) and under != Path(under.anchor)
    return str(whole.relative_to(under) if is_short else whole)


def _is_path_like(name: str, text: str) -> bool:
    """Whether a reward's setting may be a path: by its name, or by a slash or an ending in its text."""
    return name in PATH_SETTINGS or "/" in text or bool(Path(text).suffix)
