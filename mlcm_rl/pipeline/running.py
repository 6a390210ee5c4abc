"""Run a recipe: a for-loop over its stages, each found again by its fingerprint."""

import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch

from .. import __version__
from ..cost import launches
from ..cost.evaluations import has_gradients, network_evaluations
from ..cost.flops import this_device
from ..cost.gpus import Device, kind_for
from ..cost.launches import Launch
from ..cost.peak import Meter, begin
from ..models.students import tuned_steps
from ..preference import guard
from ..recipe import Evaluate, Recipe, Reward, Stage, Tuning, paths
from ..storage import checkpoints, files, lock
from ..storage import manifest as checkpoint
from ..storage.commit import commit
from ..storage.files import CheckpointError
from ..storage.manifest import finish, is_finished, unswept, verify
from ..training import processes
from ..training.devices import device_of
from ..training.loop import NonFiniteLoss, StoppedBeforeUpdate
from ..training.progress import tell
from ..training.replay import prepare, read, write
from . import preflight
from .errors import PEOPLES_ERRORS, BadArgument, ProcessLost, RunError, said, way_out, worded
from .fingerprint import Located, locate, parents_of, seed_of_stage
from .planning import PlannedStage, Sizes, in_a_line, planned_stages

__all__ = [
    "BadArgument",
    "Located",
    "PlannedStage",
    "ProcessLost",
    "RunError",
    "device_here",
    "plan",
    "replay",
    "run",
]


def run(recipe: Recipe, skip_damaged: bool = False) -> list[Located]:
    """Run every stage of `recipe` that is not done yet, and link them under `runs/<name>`. Raises RunError.

    With `skip_damaged` a stage goes on from its newest whole checkpoint; without, a damaged one above it is an error.
    What later stages need and have not is told before the first one runs.
    """
    try:
        device = device_of(recipe.device)
        processes.start(device)
    except ValueError as error:
        raise RunError(str(error)) from error
    processes.on_rank_zero(refuse_unready, recipe)  # told once, not by every process
    try:
        processes.refuse_unshared(Path(recipe.runs))
    except PEOPLES_ERRORS as error:
        raise RunError(said(error)) from error
    done: list[Located] = []
    links = Path(recipe.runs) / recipe.name
    for number, stage in enumerate(recipe.stages):
        try:
            found = locate(stage, recipe, done)
            if processes.broadcast(is_finished(found.folder)):
                refuse_another(found, verify(found.folder))
                processes.on_rank_zero(sweep, found.folder)
                tell(stage.kind, f"{found.folder} is done")
            else:
                processes.on_rank_zero(_unlink, links, range(number, sys.maxsize))  # until they are of this recipe
                run_stage(stage, recipe, done, found, skip_damaged)
            processes.on_rank_zero(_link, links, number, found)
        except PEOPLES_ERRORS as error:
            raise RunError(f"stages[{number}] ({stage.kind}): {said(error)}") from error
        except torch.OutOfMemoryError as error:
            ways = way_out(has_gradients(stage, recipe))
            raise RunError(
                f"stages[{number}] ({stage.kind}): memory of the device does not suffice: {ways}; "
                "`mlcm plan` says what a stage needs. Finished stages and checkpoints are as they were"
            ) from error
        except RuntimeError as error:
            if processes.is_lost_rank(error):
                raise ProcessLost(f"stages[{number}] ({stage.kind}): {_without_others(found.folder)}") from error
            raise
        done.append(found)
    processes.on_rank_zero(_unlink, links, range(len(done), sys.maxsize))
    processes.finish()
    return done


def _without_others(folder: Path) -> str:
    """Say that another process of a stage in `folder` is gone, and what it goes on from."""
    newest = checkpoints.checkpoints(folder)[-1:]
    saved = f"{newest[0]} is whole" if newest else "what was finished is as it was"
    return (
        f"another process of this run has ended, and this one stops: {saved}, and the same command goes on from there"
    )


def refuse_unready(recipe: Recipe) -> None:
    """Raise RunError for what stages still to do would stop at, a line each."""
    refused = {number: found for number, stage in enumerate(recipe.stages) if (found := list(preflight.refused(stage)))}
    earlier: list[Located] = []
    with suppress(*PEOPLES_ERRORS):  # a stage that cannot be found is still to do
        for number, stage in enumerate(recipe.stages[: max(refused, default=-1) + 1]):
            earlier.append(locate(stage, recipe, earlier))
            if is_finished(earlier[-1].folder):
                refused.pop(number, None)
    lines = [
        f"stages[{number}] ({recipe.stages[number].kind}): {key}: {said(error)}"
        for number, found in refused.items()
        for key, error in found
    ]
    if lines:
        raise RunError("\n".join(lines))


@worded("plan")
def plan(
    recipe: Recipe, memory: bool = False, launch: Launch | None = None, device: Device | None = None
) -> list[PlannedStage]:
    """What `run` would do now, stage by stage, with the `memory` of what is to do where that is asked for.

    Memory is that of each process of `launch`; on a `device` the time is told too. Raises RunError for files that are
    named and missing, and where the processes cannot share a batch.
    """
    return planned_stages(recipe, kind_for(recipe.device, device) if memory else None, launch, device)


@worded("plan")
def device_here(recipe: Recipe) -> Device:
    """The device that `recipe` would run on here, measured. Raises RunError where it is not here."""
    return this_device(device_of(recipe.device))


def refuse_another(found: Located, manifest: dict) -> None:
    """Raise CheckpointError where a finished folder is of another stage than the one that it is named for."""
    if manifest.get("fingerprint") != found.fingerprint:
        other = f"{manifest.get('kind')}-{manifest.get('fingerprint')}"
        raise CheckpointError(
            f"{found.folder} holds stage {other}, which another teacher, recipe "
            "or seed made: delete the folder to run the stage again"
        )


def run_stage(stage: Stage, recipe: Recipe, done: list[Located], found: Located, skip_damaged: bool = False) -> None:
    """What is left of a stage, while no other run writes to its folder."""
    found.folder.mkdir(parents=True, exist_ok=True)  # in every process: on a shared folder too
    with ExitStack() as locked:
        processes.on_rank_zero(locked.enter_context, lock.folder_lock(found.folder))  # for all processes of this run
        if processes.broadcast(is_finished(found.folder)):  # by the run that held it until now
            return
        processes.on_rank_zero(_clear, found.folder, skip_damaged)
        _run_locked(stage, recipe, done, found)


def _clear(folder: Path, skip_damaged: bool) -> None:
    """Put aside what an earlier run left unfinished or, where that is asked for, damaged."""
    files.remove_partial(folder)
    for skipped in checkpoints.skip_damaged(folder) if skip_damaged else []:
        tell("skipped", skipped, "yellow")


def sweep(folder: Path) -> None:
    """Remove what a finished stage would have gone on from, where its process was killed before it could."""
    if unswept(folder):
        with lock.folder_lock(folder):
            checkpoint.sweep(folder)


def _run_locked(stage: Stage, recipe: Recipe, done: list[Located], found: Located) -> None:
    parents = parents_of(stage, done)
    if "train_teacher" in parents:
        recipe = with_teacher(recipe, parents["train_teacher"].folder)
    tell(stage.kind, f"-> {found.folder}", "bold")
    meter = _memory_meter(stage, recipe)
    started = time.monotonic()
    folders = {kind: parent.folder for kind, parent in parents.items()}
    seeded = recipe.model_copy(update={"seed": seed_of_stage(stage, recipe)})
    asked = with_trained_reward(stage, parents["train_reward"].folder) if "train_reward" in parents else stage
    try:
        _stage_module(asked).run(asked, seeded, folders, found.folder)
    except NonFiniteLoss as error:
        bundle = processes.on_rank_zero(write, found.folder, asked, seeded, folders, error.figures)
        raise NonFiniteLoss(f"{error}; `mlcm replay {bundle}` repeats it", error.figures) from error
    manifest = {
        "kind": stage.kind,
        "fingerprint": found.fingerprint,
        "stage": stage.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        **paths.record(recipe, found.folder),
        "parents": {kind: str(parent.folder.name) for kind, parent in parents.items()},
        "network_evaluations": network_evaluations(stage, recipe),
        "seconds": round(time.monotonic() - started, 1),
        "memory": meter.record() if meter else None,
        **({"tuned_steps": tuned_steps(found.folder / "student")} if isinstance(stage, Tuning) else {}),
        "version": __version__,
        "commit": commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
    }
    processes.on_rank_zero(finish, found.folder, manifest)
    if meter:
        tell("memory", str(meter))
    if isinstance(stage, Tuning):
        tell("guard", guard.ending(found.folder), "bold")


def _memory_meter(stage: Stage, recipe: Recipe) -> Meter | None:
    """Return what compares a training stage's memory with its prediction, which is said where it fails."""
    if not has_gradients(stage, recipe):
        return None
    device = device_of(recipe.device)
    try:
        predicted = Sizes(recipe).memory(stage, device.type, launches.of_this_process())
    except Exception as error:  # an estimate stands in no run's way; what is really wrong, the stage says
        tell("memory could not be predicted:", in_a_line(error), "yellow")
        predicted = None
    return begin(device, predicted)


def _stage_module(stage: Stage) -> ModuleType:
    return import_module(f"mlcm_rl.stages.{stage.kind}")


@worded("replay")
def replay(bundle: Path) -> tuple[dict, dict]:
    """Repeat the step that left `bundle`, from the checkpoint beside it: its figures then and now. Raises RunError.

    Nothing is written to the stage's folder.
    """
    figures, stage, recipe, parents = read(bundle)
    with TemporaryDirectory() as place:
        folder = Path(place)
        prepare(figures, bundle, folder)
        try:
            _stage_module(stage).run(stage, recipe, parents, folder)
        except StoppedBeforeUpdate as stopped:
            return figures, stopped.figures
    raise CheckpointError(f"{bundle}: the stage ended before step {figures['step'] + 1}")


def with_teacher(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with the teacher that the `train_teacher` stage in `folder` has made."""
    teacher = recipe.teacher.model_copy(update={"path": str(folder / "teacher"), "revision": None})
    return recipe.model_copy(update={"teacher": teacher})


def with_trained_reward(stage: Stage, folder: Path) -> Stage:
    """`stage` with the rewards that are of its recipe read from `folder`, where the `train_reward` stage was."""
    assert isinstance(stage, Tuning | Evaluate), "no other stage asks a reward of its recipe"
    changes: dict[str, object] = {"rewards": _from_folder(stage.rewards, folder)}
    if isinstance(stage, Tuning):
        held_out = _from_folder(stage.guard.rewards, folder)
        changes["guard"] = stage.guard.model_copy(update={"rewards": held_out})
    return stage.model_copy(update=changes)


def _from_folder(rewards: Sequence[str | Reward], folder: Path) -> list[Reward]:
    named = [Reward(name=one) if isinstance(one, str) else one for one in rewards]
    return [one.from_folder(str(folder)) for one in named]


def _link(links: Path, number: int, found: Located) -> None:
    """Make link `number` in the folder `links` lead to a finished stage."""
    links.mkdir(parents=True, exist_ok=True)
    _unlink(links, range(number, number + 1))
    (links / f"{number:02d}-{found.kind}").symlink_to(Path("..") / "stages" / found.folder.name)


def _unlink(links: Path, numbers: range) -> None:
    """Remove the links of these numbers: what stands behind them is of another version of the recipe."""
    for link in links.glob("[0-9]*-*"):
        if link.is_symlink() and int(link.name.split("-")[0]) in numbers:
            link.unlink()
