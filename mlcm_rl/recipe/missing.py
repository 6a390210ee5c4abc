"""Whether the files that a recipe names are there, and what lies nearest to one that is not."""

import os
from collections.abc import Iterator
from pathlib import Path

from .paths import Folders
from .tree import Key, Problem, nearest_file


def absent(key: Key, name: str, folders: Folders, holding: str | None = None) -> Iterator[Problem]:
    """Yield a problem if `name` is not a file or, with `holding`, not a folder that has that file in it."""
    path, looked_in = folders.place(key, name), folders.looked_in(key, name)
    if not name:
        yield Problem(key, "expected a path, found empty text")
    elif holding is None:
        if os.path.isdir(path):  # unlike Path.is_dir, False for a name too long for the file system
            yield Problem(key, f"expected a file, found the folder {name}")
        elif not os.path.isfile(path):
            yield Problem(key, f"no such file: {name}", nearest_beside(key, name, folders, "*"), looked_in=looked_in)
    elif os.path.isfile(path):
        yield Problem(key, f"expected a folder, found the file {name}")
    elif not os.path.isdir(path):
        yield Problem(key, f"no such folder: {name}", nearest_beside(key, name, folders, "*/"), looked_in=looked_in)
    elif not os.path.exists(path / holding):
        yield Problem(key, f"the folder {name} holds no {holding}")


def nearest_beside(key: Key, name: str, folders: Folders, pattern: str) -> str:
    """Return the nearest existing name to a missing one, relative to the folder of a recipe's paths; empty if none."""
    for folder in folders.of(key):
        if nearest_path := nearest_file(folder / name, pattern):
            return nearest_path if Path(name).is_absolute() else os.path.relpath(nearest_path, folder)
    return ""
