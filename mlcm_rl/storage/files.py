"""Files and folders that are whole or absent: they appear, and folders go, by one rename."""

import errno
import json
import os
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .hashing import sha256
from .untrusted import parse_json, read_bytes

PARTIAL = ".part"  # ending of files and folders that are not whole yet
SPARE_BYTES = 2**20  # of a disk, for logs and for the next small file
UMASK = os.umask(0)  # which can only be read by setting it
os.umask(UMASK)
REFUSALS = (  # a disk, a file or a folder cannot be written
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
)


class CheckpointError(Exception):
    """A file that a run needs is missing, damaged, or of another format; the message names it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file or folder to. It is renamed to `path` when the block ends.

    Its bytes have reached the disk before that. Raise CheckpointError if the disk refuses; `path` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        share(temporary)
        sync(temporary)
        if path.is_dir() and temporary.is_dir():  # a file never replaces a folder: the system refuses that rename
            remove(path)
        temporary.replace(path)
        sync(path.parent, inside=False)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in REFUSALS:
            raise
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "it is in a file, not in a folder"
        raise CheckpointError(f"{path} could not be written ({reason}); what was there before is unchanged") from error
    finally:
        remove(temporary)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Raise CheckpointError with `path` if a write to the open file fails: the system's error has no path then."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise CheckpointError(f"{path} could not be written ({error.strerror.lower()})") from error


def share(path: Path) -> None:
    """Give tensor files, `path` or under it, the mode of any new file: safetensors lets only their owner read them."""
    for file in [path, *path.rglob("*.safetensors")]:
        if file.is_file():
            file.chmod(0o666 & ~UMASK)


def sync(path: Path, inside: bool = True) -> None:
    """Wait until `path` has reached the disk; with `inside`, everything in the folder `path` too."""
    for member in [path, *(path.rglob("*") if inside else ())]:
        descriptor = os.open(member, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Delete the partial files under `folder` of a process that was killed while it wrote or removed something."""
    for path in list(folder.rglob(f".*{PARTIAL}")):
        remove(path)


def remove_partial_of(path: Path) -> None:
    """Delete the partial files beside `path` of a process that was killed while it wrote or removed `path`."""
    for part in list(path.parent.glob(f".{path.name}.*{PARTIAL}")):
        remove(part)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists. A folder is renamed first, so that it is never seen in part."""
    if not path.is_dir() or path.is_symlink():
        with suppress(FileNotFoundError, NotADirectoryError):  # the second where its folder is a file
            path.unlink()
        return
    if not path.name.endswith(PARTIAL):
        aside = path.with_name(f".{path.name}.{os.getpid()}.old{PARTIAL}")
        remove(aside)
        path = path.rename(aside)
    shutil.rmtree(path)


def require_space(path: Path, size: int, of: str = "") -> None:
    """Raise CheckpointError if the disk of `path` has no room for another `size` bytes, `of` what it names."""
    free = free_space(path.parent)
    if size + SPARE_BYTES > free:
        needed, available = (
            f"{count / 1e9:,.1f} GB" if count > 1e9 else f"{count / 1e6:,.1f} MB" for count in (size, free)
        )
        raise CheckpointError(
            f"{path} needs {needed}{of}, and its disk has {available} free, of which 1 MB stays free: make room, and "
            "the same command goes on from what was saved before"
        )


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk of `folder`, or of that which it would be made on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- JSON and checksums ----


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` as JSON. Raise CheckpointError if it holds NaN or infinity, or the disk refuses."""
    with replacing(path) as temporary:
        try:
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise CheckpointError(f"{path} was not written: it would hold NaN or infinity") from error
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """Return the JSON object in `path`; `kinds` are the keys that it must have, with the types of their values.

    Raise CheckpointError if the file is missing, holds another object, or is longer than any that is written here.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        content = parse_json(read_bytes(path).decode("utf-8"))
    except ValueError as error:  # not UTF-8 too
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it does not hold a JSON object")
    for name, kind in kinds.items():
        if type(content.get(name)) is not kind:  # not isinstance: True would be an int
            raise CheckpointError(
                f"{path} is damaged: {name} must be of type {kind.__name__}, is {reprlib.repr(content.get(name))}"
            )
    return content


def checksums(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the sha256 of every file under `folder`, by relative path, except those that match a pattern of `skip`."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256(path) for name, path in names.items() if not any(fnmatch(name, pattern) for pattern in skip)}


# ---- files that are published ----


def public(value: Any) -> Any:
    """Return `value` to publish: of paths of this machine, which may name its user, only the last part."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    path = Path(value) if isinstance(value, str) else Path()
    return path.name if path.is_absolute() or ".." in path.parts else value


def forget_origin(folder: Path) -> None:
    """Delete from the configurations under `folder` the path that diffusers loaded each component from."""
    for path in [*folder.rglob("model_index.json"), *folder.rglob("*config.json")]:
        content = read_json(path)
        if content.pop("_name_or_path", None) is not None:
            write_json(path, content)
