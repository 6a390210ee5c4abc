"""What is under a folder of runs: its stages, which runs they belong to, and which none needs."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from ..data.store_writer import share_written
from ..recipe import RESERVED, Stage
from ..storage import checkpoints, files, lock
from ..storage.files import CheckpointError, read_json
from ..storage.manifest import BEGUN, is_finished
from .errors import RunError, prefix_errors

State = Literal["done", "unfinished", "running", "damaged"]


@dataclass(frozen=True)
class StageFolder:
    """A folder under `runs/stages`: `runs` are the names of the runs that link to it.

    `is_needed` holds for what a run links to, and for what such a stage is made from or reads; an unfinished stage
    counts as needed too, since its recipe goes on from it.
    """

    folder: Path
    state: State
    runs: tuple[str, ...]
    is_needed: bool

    @cached_property
    def manifest(self) -> dict:
        """Return the manifest; {} of a stage without a whole one."""
        return read_json(self.folder / "manifest.json") if self.state == "done" else {}

    @cached_property
    def begun(self) -> dict:
        """Return what a stage that is not finished has recorded of itself: its settings, its recipe, its cost in all.

        {} of a finished one, and where there is no whole record.
        """
        if self.state in ("unfinished", "running"):
            with suppress(CheckpointError):
                return read_json(self.folder / BEGUN, stage=dict, recipe=dict)
        return {}

    @property
    def begun_by(self) -> str | None:
        """Return the name of the recipe that began a stage which is not finished; None of another, or unrecorded."""
        name = self.begun["recipe"].get("name") if self.begun else None
        return name if isinstance(name, str) else None

    @property
    def network_evaluations(self) -> object:
        """Return the network evaluations of a stage, so far where it is not finished; None where they are unknown."""
        if not self.begun:
            return self.manifest.get("network_evaluations")
        total = self.begun.get("network_evaluations")
        try:
            stage: Stage = TypeAdapter(Stage).validate_python(self.begun["stage"])
        except ValidationError:  # of another version
            return None
        return round(total * share_done(stage, self.folder)) if isinstance(total, int) else None

    @property
    def kind(self) -> str:
        """Return the kind of the stage, as its folder's name begins."""
        return self.folder.name.split("-")[0]

    @property
    def steps(self) -> int | None:
        """Return after how many steps an unfinished stage goes on; None without a checkpoint."""
        newest = checkpoints.checkpoints(self.folder)[-1:]
        return checkpoints.step_of(newest[0]) if newest else None

    @property
    def changed(self) -> float:
        """Return when something in the folder changed last, in seconds since the epoch; 0.0 once it is deleted."""
        newest = 0.0
        with suppress(FileNotFoundError):  # of a stage that is running, whose files come and go
            for path in [self.folder, *self.folder.iterdir()]:
                newest = max(newest, path.lstat().st_mtime)
        return newest

    @cached_property
    def num_bytes(self) -> int:
        """Return what the folder takes on disk."""
        return size_of(self.folder)


def size_of(folder: Path) -> int:
    """Return the bytes of all files under `folder`; links count nothing, nor does what is deleted meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(place, name))
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def links(runs: Path) -> dict[str, list[Path]]:
    """Return the links under the folder `runs`, however deep and called, by what lies in `runs`: a run, or the link.

    Those inside stages are left out: they are a stage's own.
    """
    links_by_name: dict[str, list[Path]] = {}
    for path in sorted(runs.iterdir()):
        if path.name in RESERVED:
            continue
        links_of_run = [path] if path.is_symlink() else []
        for place, folders, names in os.walk(path):
            links_of_run += [Path(place, name) for name in sorted([*folders, *names]) if Path(place, name).is_symlink()]
        links_by_name[path.name] = links_of_run
    return links_by_name


def stages(runs: Path) -> list[StageFolder]:
    """Return every stage under the folder `runs`, oldest first. Raise RunError where that is no such folder."""
    if not (runs / "stages").is_dir():
        raise RunError(f"{runs} holds no stages: name the folder that recipes call `runs`")
    folders = {path.name: path for path in (runs / "stages").iterdir() if path.is_dir() and path.name[0] != "."}
    states = {name: _state(folder) for name, folder in folders.items()}
    by_place: dict[str, list[str]] = {}  # a stage may have two names, of which one is a link
    for name, folder in folders.items():
        by_place.setdefault(os.path.realpath(folder), []).append(name)
    users: dict[str, list[str]] = {name: [] for name in folders}
    for run, paths in links(runs).items():
        for link in paths:
            place = Path(os.path.realpath(link))
            for name in {name for inside in [place, *place.parents] for name in by_place.get(str(inside), [])}:
                users[name] += [run] if run not in users[name] else []
    needed = {name for name, state in states.items() if users[name] or state in ("unfinished", "running")}
    waiting = list(needed)
    while waiting:
        earlier = set(_names_in(folders[waiting.pop()], folders)) - needed
        needed |= earlier
        waiting += earlier
    result = [StageFolder(path, states[name], tuple(users[name]), name in needed) for name, path in folders.items()]
    return sorted(result, key=lambda stage: stage.changed)


def _state(folder: Path) -> State:
    if is_finished(folder):
        try:
            read_json(folder / "manifest.json", kind=str, fingerprint=str)
        except CheckpointError:
            return "damaged"
        return "done"
    return "running" if lock.is_locked(folder) else "unfinished"


def _names_in(folder: Path, names: dict[str, Path]) -> Iterator[str]:
    """Yield the other stages that the records of `folder` mention: its parents, students and teachers of others."""
    text = ""
    for record in (folder / "manifest.json", folder / BEGUN):
        with suppress(OSError):  # a stage has one of them, and gets the other while this runs
            text += record.read_text(encoding="utf-8", errors="replace")
    yield from (name for name in names if json.dumps(name)[1:-1] in text and name != folder.name)


def share_done(stage: Stage, folder: Path) -> float:
    """Return the share of `stage` that is saved in its folder, from 0 to 1; damaged files count as nothing."""
    if stage.num_stored:
        with suppress(CheckpointError):
            return share_written(folder, stage.num_stored)
    if stage.steps_per_phase and (saved := checkpoints.checkpoints(folder)):
        return min(1.0, checkpoints.step_of(saved[-1]) / sum(stage.steps_per_phase))
    return 0.0


@prefix_errors("clean")
def remove(stage: StageFolder) -> None:
    """Delete a stage's folder; of one that is a link, the folder that it leads to and the link.

    A link to something that is no stage is deleted alone. Raise RunError where a run writes to it, or the disk refuses.
    """
    place = stage.folder.resolve()
    if not stage.folder.is_symlink() or is_finished(place) or (place / BEGUN).parent.is_dir():
        with lock.folder_lock(place):
            files.remove(place)
    if stage.folder.is_symlink():
        stage.folder.unlink()
