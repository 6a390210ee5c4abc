"""Folders that a recipe's own command makes: where one is not there yet, that is one problem, not one a file."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .tree import Problem


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
