"""A lock on a stage's folder: one process at a time writes to it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .files import CheckpointError, report_write_errors

FILE = ".lock"  # stays behind, empty: deleting it would let two processes lock two files of one name


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of `folder` while the block runs.

    The system releases the lock when the process ends, however it ends. Raise CheckpointError with the name of the
    process that has the lock; with `wait`, wait for its end instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            raise CheckpointError(
                f"{folder} is being written by {owner}: wait for it or end it, then run again"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder / FILE} cannot be locked ({(error.strerror or str(error)).lower()}): without locks two runs "
                "could write to one folder. Set runs: to a folder on a file system that has them (a local disk; NFS of "
                "version 4, or of version 3 with its lock service)"
            ) from error
        with report_write_errors(folder / FILE):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
            file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def is_locked(folder: Path) -> bool:
    """Return whether a process has the lock of `folder` now; nothing is written."""
    try:
        with (folder / FILE).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file, or no locks here
        return False
    return False
