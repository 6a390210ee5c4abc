"""Files and folders that are whole or absent: they appear, and folders go, by one rename."""

import errno
import json
import os
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .hashing import sha256
from .untrusted import parse_json, read_bytes

PARTIAL = ".part"  # ends the names of what is not whole yet
SPARE_BYTES = 2**20  # of a disk, left free for logs and for the next small file
UMASK = os.umask(0)  # which can only be read by setting it
os.umask(UMASK)
REFUSALS = (  # of a disk, or of what is there, to be written
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR),
)


class CheckpointError(Exception):
    """A file that a run needs is missing, damaged, or of another format; the message names it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder to; it becomes `path` by rename when the block ends.

    It has reached the disk by then. Raises CheckpointError where the disk refuses; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        share(temporary)
        sync(temporary)
        if path.is_dir() and temporary.is_dir():  # a file takes no folder's place: the rename is refused then
            remove(path)
        temporary.replace(path)
        sync(path.parent, inside=False)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in REFUSALS:
            raise
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path} could not be written ({reason}); what was there before is as it was") from error
    finally:
        remove(temporary)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Raise CheckpointError that names `path` where the open file there is refused a write: the system names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise CheckpointError(f"{path} could not be written ({error.strerror.lower()})") from error


def share(path: Path) -> None:
    """Give tensor files, `path` or under it, the mode of any new file: safetensors lets none but their owner read."""
    for one in [path, *path.rglob("*.safetensors")]:
        if one.is_file():
            one.chmod(0o666 & ~UMASK)


def sync(path: Path, inside: bool = True) -> None:
    """Wait until a file, or a folder and, with `inside`, all that it holds, has reached the disk."""
    for one in [path, *(path.rglob("*") if inside else ())]:
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Delete what a process that was killed had not finished writing, or removing, under `folder`."""
    for path in list(folder.rglob(f".*{PARTIAL}")):
        remove(path)


def remove_partial_of(path: Path) -> None:
    """Delete what a process that was killed left beside `path` of writing or removing it."""
    for part in list(path.parent.glob(f".{path.name}.*{PARTIAL}")):
        remove(part)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder goes at once: no part of it is ever seen under its name."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(PARTIAL):
        aside = path.with_name(f".{path.name}.{os.getpid()}.old{PARTIAL}")
        remove(aside)
        path = path.rename(aside)
    shutil.rmtree(path)


def require_space(path: Path, size: int) -> None:
    """Raise CheckpointError where the disk of `path` has no room for `size` bytes more."""
    free = shutil.disk_usage(path.parent).free
    if size + SPARE_BYTES > free:
        needed, left = (f"{count / 1e6:,.1f} MB" for count in (size, free))
        raise CheckpointError(
            f"{path} needs {needed} and its disk has {left} left: make room, and the same command goes on from what "
            "was saved before"
        )


# ---- JSON and checksums ----


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        try:
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise CheckpointError(f"{path} was not written: it would hold NaN or infinity") from error
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """The object in `path`; `kinds` are keys that it must have, and what their values must be.

    Raises CheckpointError where it is missing, not such an object, or longer than any that is written here.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        found = parse_json(read_bytes(path).decode("utf-8"))
    except ValueError as error:  # not UTF-8 too
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    for name, kind in kinds.items():
        if type(found.get(name)) is not kind:  # True is no number here
            raise CheckpointError(
                f"{path} is damaged: {name} must be of type {kind.__name__}, is {reprlib.repr(found.get(name))}"
            )
    return found


def checksums(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of every file under `folder`, by relative path, but for those that match a pattern of `skip`."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256(path) for name, path in names.items() if not any(fnmatch(name, pattern) for pattern in skip)}


# ---- what others may read ----


def public(value: Any) -> Any:
    """`value` for others to read: of paths that only this machine has, and that may name its user, the last part."""
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    path = Path(value) if isinstance(value, str) else Path()
    return path.name if path.is_absolute() or ".." in path.parts else value


def forget_origin(folder: Path) -> None:
    """Take the place that diffusers loaded each part from out of the configurations under `folder`."""
    for path in [*folder.rglob("model_index.json"), *folder.rglob("*config.json")]:
        content = read_json(path)
        if content.pop("_name_or_path", None) is not None:
            write_json(path, content)
