"""Files and folders that are whole or absent: they appear, and folders go, by one rename."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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
        reason = error.strerror.lower() if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} could not be written ({reason}); what was there before is as it was") from error
    finally:
        remove(temporary)


@contextmanager
def told_of(path: Path) -> Iterator[None]:
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
