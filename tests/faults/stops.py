"""A process that ends before one of its changes to the disk, and what it would have changed.

A change is the opening of a file to write it, a write of tensors, an fsync, a rename, and whatever else makes, removes
or alters a name: Python tells audit hooks of all of them before they happen but of fsync and of safetensors,
which writes files in Rust; those two are replaced. What a write has put into a file when the process ends is any first
part of it: a stop may cut the file in half that was opened last. Times of files and extended attributes are left out.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

KILLED = 137  # as a shell says it of SIGKILL
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NAMES = {f"os.{name}": name for name in ("rename", "remove", "rmdir", "mkdir", "chmod", "symlink", "link", "truncate")}
WRITES = ("open", "save")  # after which a file may be cut short
PACKAGE = f"{os.sep}mlcm_rl{os.sep}"


@dataclass(frozen=True)
class Change:
    """What was about to be done, and by which of the package's lines, innermost first."""

    kind: str
    site: str


class Watch:
    """The changes that this process makes under `root`, as `changes`; it ends before number `stop`.

    With `torn` the file that the change before it opened is then cut in half.
    """

    def __init__(self, root: Path, stop: int | None = None, torn: bool = False):
        self.root, self.stop, self.torn = f"{root}{os.sep}", stop, torn
        self.changes: list[Change] = []
        self.opened: tuple[str, int] | None = None  # by the last change: the file, and its size before

    def start(self) -> None:
        """Watch from here to the end of the process."""
        sys.addaudithook(self._told)
        os.fsync = self._before("fsync", os.fsync, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
        save = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._before("save", save, lambda _, path, *__, **___: os.fspath(path))

    def _before(self, kind: str, function: Callable, path_of: Callable[..., str]) -> Callable:
        def watched(*arguments: Any, **named: Any) -> Any:
            self._change(kind, path_of(*arguments, **named))
            return function(*arguments, **named)

        return watched

    def _told(self, event: str, arguments: tuple) -> None:
        """Audit hooks are called before anything is done, with whatever is done without effect too."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and flags & WRITING:
                self._change("open", os.fsdecode(path))
        elif event in NAMES:
            path = os.fsdecode(arguments[1] if event == "os.symlink" else arguments[0])
            if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # within an open folder
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
            if os.path.lexists(path) == (event in ("os.mkdir", "os.symlink")):
                return  # it will be refused, and nothing changes
            self._change(NAMES[event], path)

    def _change(self, kind: str, path: str) -> None:
        if not os.path.abspath(path).startswith(self.root):
            return
        if len(self.changes) == self.stop:
            self.stop = None  # cutting a file is a change too
            if self.torn and self.opened:
                place, before = self.opened
                os.truncate(place, (before + os.path.getsize(place)) // 2)
            os._exit(KILLED)
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        self.opened = (os.path.abspath(path), size) if kind in WRITES else None
        self.changes.append(Change(kind, _site()))


def _site() -> str:
    """The package's lines that this call came through."""
    lines, frame = [], sys._getframe(2)
    while frame is not None:
        folder, _, name = frame.f_code.co_filename.rpartition(PACKAGE)
        if folder:
            lines.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)
