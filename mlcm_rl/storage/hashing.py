"""Identities of files and folders: hashes of the files that would be loaded, links followed.

A file is hashed once while it stays as it is. Checksums of large files are remembered by size, time of change and inode
in `$MLCM_RL_CHECKSUMS` (~/.cache/mlcm_rl/checksums), on the machine that computed them; the folder may be deleted at
any time, and set to nothing to remember nothing. The time is that of the inode (ctime), which no program sets back: a
file that is written to, or replaced, is hashed again. (Not one that a process goes on changing through a memory map
that it opened before: the system may change its time later.)
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from .caches import cache_folder
from .untrusted import regular

LARGE = 2**20  # bytes from which reading a file takes longer than looking it up
SETTLED_NS = 2 * 10**9  # a file that changed less than so long ago may change again within one tick of its clock
LOADED = (".safetensors", ".json", ".txt")  # the files that are loaded from a folder of weights and configuration
LOADED_OF_TEXTS = (*LOADED, ".model", ".spm")  # with the words of a tokenizer, which may be sentencepiece's


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raise ValueError for a pipe, a socket or a device."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return `sha256(path)`, without reading a file that was read before and has stayed as it was.

    Raise FileNotFoundError if it is not there, ValueError for a pipe, a socket or a device.
    """
    path = regular(path).resolve()
    memory, before = _memory(path.parent), identity_of(path)
    if (entry := memory.get(path.name)) is not None and entry[:-1] == before:
        return entry[-1]
    checksum = sha256(path)
    if identity_of(path) == before:
        memory[path.name] = [*before, checksum]
        if before[0] >= LARGE and time.time_ns() - before[1] > SETTLED_NS:
            _remember(path, memory[path.name])
    return checksum


def is_unchanged(path: Path, checksum: str) -> bool:
    """Return whether the sha256 of the file `path` is `checksum`; what is remembered calls no file damaged.

    Raise FileNotFoundError if it is not there.
    """
    return sha256_once(path) == checksum or sha256(path) == checksum


@cache
def _memory(folder: Path) -> dict[str, list[Any]]:
    """Return size, time of change, inode and sha256 of the files of `folder` that were hashed before, by name.

    A line of the memory that is not whole counts for nothing.
    """
    known: dict[str, list[Any]] = {}
    file = _memory_file(folder)
    with suppress(OSError):
        for line in file.read_text("utf-8", errors="replace").splitlines() if file else ():
            seal, _, text = line.partition(" ")
            if seal == _seal(text):
                name, *entry = json.loads(text)
                known[name] = entry
    return known


def _remember(path: Path, entry: list[Any]) -> None:
    """Append one line: several processes write here at once, each line in one piece."""
    text = json.dumps([path.name, *entry])
    file = _memory_file(path.parent)
    if file is None:
        return
    with suppress(OSError):  # without it the file is hashed again, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{_seal(text)} {text}\n")


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _memory_file(folder: Path) -> Path | None:
    """Return where the checksums of the files in `folder` are remembered; None where MLCM_RL_CHECKSUMS is empty."""
    if os.environ.get("MLCM_RL_CHECKSUMS") == "":
        return None
    memory = cache_folder("checksums", "MLCM_RL_CHECKSUMS")
    return memory / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.jsonl"


def identity_of(path: Path) -> list[int]:
    """Return size, time of change and inode of the file `path`."""
    status = path.stat()
    return [status.st_size, status.st_ctime_ns, status.st_ino]


def folder_hash(folder: Path) -> str:
    """Return one sha256 over the weights and configuration in a folder.

    A stage's manifest is left out: it records when and where the same files were made.
    """
    return _hash_of_files(folder, lambda name, path: name.suffix in LOADED and str(name) != "manifest.json")


def network_hash(folder: Path) -> str:
    """Return `folder_hash`, with the words of tokenizers in the folder that are sentencepiece's."""
    return _hash_of_files(folder, lambda name, path: name.suffix in LOADED_OF_TEXTS and str(name) != "manifest.json")


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
