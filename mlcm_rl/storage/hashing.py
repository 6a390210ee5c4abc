"""Identities of files and folders: what is hashed is what would be loaded, through links too."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from .untrusted import regular

LOADED = (".safetensors", ".json", ".txt")  # of a folder of weights and configuration


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raise ValueError for a pipe, a socket or a device."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return the same, cached by size and time of change: gigabytes are read once a process."""
    found = regular(path).stat()
    return _sha256_at(path.resolve(), found.st_size, found.st_mtime_ns)


@cache
def _sha256_at(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def folder_hash(folder: Path) -> str:
    """Return one sha256 over the weights and configuration in a folder.

    A stage's manifest is left out: it says when and where the same files were made.
    """
    return _hash_of_files(folder, lambda name, path: name.suffix in LOADED and str(name) != "manifest.json")


def contents_hash(folder: Path) -> str:
    """Return one sha256 over the names and bytes of every file in a folder."""
    return _hash_of_files(folder, lambda name, path: path.is_file())


def _hash_of_files(folder: Path, counts: Callable[[PurePosixPath, Path], bool]) -> str:
    found = {}
    for name, path in sorted(_walk(folder)):
        if isinstance(path, str):
            found[str(name)] = path
        elif counts(name, path):
            found[str(name)] = sha256_once(path)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _walk(folder: Path) -> Iterator[tuple[PurePosixPath, Path | str]]:
    """Yield name and path of every file under `folder`, through links to folders too.

    Of a folder that is met again, by another link or inside itself, yield its name and in words what it is.
    """
    waiting, met = [PurePosixPath()], dict[Path, PurePosixPath]()
    while waiting:
        name = waiting.pop()
        real = (folder / name).resolve()
        if real in met:
            yield name, f"the folder {met[real]}"
            continue
        met[real] = name
        entries = sorted(os.scandir(real), key=lambda entry: entry.name, reverse=True)
        waiting += [name / entry.name for entry in entries if entry.is_dir()]
        yield from ((name / entry.name, real / entry.name) for entry in entries if not entry.is_dir())


def seal_of(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
