"""Identities of files and folders: hashes of the files that would be loaded, links followed."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from .untrusted import regular

LOADED = (".safetensors", ".json", ".txt")  # the files that are loaded from a folder of weights and configuration


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raise ValueError for a pipe, a socket or a device."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return `sha256(path)`, cached by size and time of change, so that a process reads gigabytes once."""
    status = regular(path).stat()
    return _sha256_at(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _sha256_at(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def folder_hash(folder: Path) -> str:
    """Return one sha256 over the weights and configuration in a folder.

    A stage's manifest is left out: it records when and where the same files were made.
    """
    return _hash_of_files(folder, lambda name, path: name.suffix in LOADED and str(name) != "manifest.json")


def contents_hash(folder: Path) -> str:
    """Return one sha256 over the names and bytes of every file in a folder."""
    return _hash_of_files(folder, lambda name, path: path.is_file())


def _hash_of_files(folder: Path, counts: Callable[[PurePosixPath, Path], bool]) -> str:
    hashes = {}
    for name, path in sorted(_walk(folder)):
        if isinstance(path, str):
            hashes[str(name)] = path
        elif counts(name, path):
            hashes[str(name)] = sha256_once(path)
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _walk(folder: Path) -> Iterator[tuple[PurePosixPath, Path | str]]:
    """Yield name and path of every file under `folder`, links to folders followed.

    A folder that was visited already, through another link or inside itself, yields its name and a text instead.
    """
    to_visit, visited = [PurePosixPath()], dict[Path, PurePosixPath]()
    while to_visit:
        name = to_visit.pop()
        real = (folder / name).resolve()
        if real in visited:
            yield name, f"the folder {visited[real]}"
            continue
        visited[real] = name
        entries = sorted(os.scandir(real), key=lambda entry: entry.name, reverse=True)
        to_visit += [name / entry.name for entry in entries if entry.is_dir()]
        yield from ((name / entry.name, real / entry.name) for entry in entries if not entry.is_dir())


def seal_of(state: dict) -> str:
    """Return the sha256 of `state` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
