"""Paths of a recipe that lead to nothing.

Where a folder is missing that the recipe's own command makes, that is one problem, not one a file.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..storage.untrusted import regular
from .paths import Folders
from .tree import Key, Problem, nearest_file
from .types import Reward


def absent(key: Key, name: str, folders: Folders, holding: str | None = None) -> Iterator[Problem]:
    """Yield a problem if `name` is not a file or, with `holding`, not a folder that has that file in it."""
    path, looked_in = folders.place(key, name), folders.looked_in(key, name)
    if not name:
        yield Problem(key, "expected a path, found empty text")
    elif holding is None:
        if os.path.isdir(path):  # unlike Path.is_dir, False for a name too long for the file system
            yield Problem(key, f"expected a file, found the folder {name}")
        elif not os.path.isfile(path):
            yield Problem(
                key, f"no such file: {name}", beside(key, name, folders, "*"), looked_in=looked_in, absent=path
            )
    elif os.path.isfile(path):
        yield Problem(key, f"expected a folder, found the file {name}")
    elif not os.path.isdir(path):
        yield Problem(
            key, f"no such folder: {name}", beside(key, name, folders, "*/"), looked_in=looked_in, absent=path
        )
    elif not os.path.exists(path / holding):
        yield Problem(key, f"the folder {name} holds no {holding}")


def beside(key: Key, name: str, folders: Folders, pattern: str) -> str:
    """Return the nearest existing name to a missing one, relative to the folder of a recipe's paths; empty if none."""
    for folder in folders.of(key):
        if nearest_path := nearest_file(folder / name, pattern):
            return nearest_path if Path(name).is_absolute() else os.path.relpath(nearest_path, folder)
    return ""


def endless(key: Key, reward: Reward, folders: Folders) -> Iterator[Problem]:
    """Yield a problem for each setting of a reward that is the path of a pipe, a socket or a device."""
    for name, text in reward.settings.items():
        place = folders.place((*key, name), text) if isinstance(text, str) else None
        if place is not None and os.path.exists(place):
            try:
                regular(place)
            except ValueError as error:
                yield Problem((*key, name), str(error))


def merged(problems: Sequence[Problem], recipe: Path) -> list[Problem]:
    """Return `problems`, of which those of missing paths in one folder that is missing itself are one.

    It has the command with which the first lines of the file `recipe` say that the folder is made.
    """
    groups: dict[Path, list[Problem]] = {}
    for problem in problems:
        if problem.absent is not None:
            groups.setdefault(_topmost_missing(problem.absent), []).append(problem)
    merged_into: dict[int, Problem | None] = {}
    for group in groups.values():
        folder = Path(os.path.commonpath([problem.absent for problem in group if problem.absent]))
        if len(group) > 1 and not folder.exists() and all(problem.absent != folder for problem in group):
            message = f"no such folder: {os.path.relpath(folder, recipe.parent)}, with what {len(group)} settings name"
            command = _command_for(folder.name, recipe)
            message += f"; the recipe's first lines say what makes it: {command}" if command else ""
            merged_into |= {id(problem): None for problem in group}
            merged_into[id(group[0])] = replace(group[0], message=message, nearest="")
    replaced = (merged_into.get(id(problem), problem) for problem in problems)
    return [problem for problem in replaced if problem is not None]


def _topmost_missing(path: Path) -> Path:
    """Return the highest folder above the missing `path`, or that itself, that is not there."""
    while not path.parent.exists():
        path = path.parent
    return path


def _command_for(name: str, recipe: Path) -> str:
    """Return the command beside which the comment at the top of the file `recipe` has `name`; empty without one."""
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        command, _, remark = line.lstrip("# ").partition("  ")
        if name in remark:
            return command
    return ""
