"""Checksums of large files: compared when a file is first read, and not again while it stays as it was.

What was compared is remembered by size, time of change and inode in `$MLCM_RL_VERIFIED` (~/.cache/mlcm_rl/verified), on
the machine that compared it; the folder may be deleted at any time. The time is that of the inode (ctime), which no
program sets back: whoever writes to a file, or puts another in its place, has it compared again.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from .hashing import sha256

SETTLED_NS = 2 * 10**9  # a file that changed less than so long ago may change again within one tick of its clock


class Verified:
    """The checksums of the files in `folder` that this machine has compared before, and those of this process."""

    def __init__(self, folder: Path):
        self._place = cache_folder() / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.jsonl"
        self._known = _read(self._place)

    def matches(self, path: Path, expected: str) -> bool:
        """Return whether the sha256 of the file `path` is `expected`; the file is read where that is not remembered.

        Raise FileNotFoundError where it is not there.
        """
        before = _identity(path)
        if self._known.get(path.name) == [*before, expected]:
            return True
        if sha256(path) != expected or _identity(path) != before:
            return False
        self._known[path.name] = [*before, expected]
        if time.time_ns() - before[1] > SETTLED_NS:
            self._remember(path.name)
        return True

    def _remember(self, name: str) -> None:
        """Append one line: several processes write here at once, each line in one piece."""
        with suppress(OSError):  # without it the file is compared again, no more
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with self._place.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, *self._known[name]]) + "\n")


def cache_folder() -> Path:
    """Return where checksums are remembered."""
    return Path(os.environ.get("MLCM_RL_VERIFIED", "~/.cache/mlcm_rl/verified")).expanduser()


def _identity(path: Path) -> list[int]:
    """Return size, time of change and inode of the file `path`."""
    status = path.stat()
    return [status.st_size, status.st_ctime_ns, status.st_ino]


def _read(place: Path) -> dict[str, list]:
    """Return what is remembered in the file `place`, by name; a line that is not whole counts for nothing."""
    known = {}
    with suppress(OSError):
        for line in place.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):
                name, *state = json.loads(line)
                if isinstance(name, str) and len(state) == 4:
                    known[name] = state
    return known
