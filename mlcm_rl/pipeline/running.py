"""Run a recipe: a for-loop over its stages, whose folders are named by fingerprints."""

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
from ..models.student_description import tuned_steps
from ..preference import guard
from ..recipe import Evaluate, Recipe, Reward, Stage, Tuning, paths
from ..storage import checkpoints, files, lock
from ..storage.commit import commit
from ..storage.files import CheckpointError
from ..storage.manifest import BEGUN, finish, is_finished, sweep, unswept, verify
from ..storage.untrusted import in_a_line
from ..training import allocator, machine, processes
from ..training.devices import device_of
from ..training.loop import NonFiniteLoss, StoppedBeforeUpdate
from ..training.progress import say_once, tell
from ..training.replay import prepare, read, write
from . import preflight
from .errors import EXPECTED_ERRORS, ProcessLost, RunError, message_of, prefix_errors, way_out
from .fingerprint import Located, locate, parents_of, seed_of_stage
from .planning import PlannedStage, Sizes, planned_stages


def run(recipe: Recipe, skip_damaged: bool = False) -> list[Located]:
    """Run every stage of `recipe` that is not done yet, and link them under `runs/<name>`. Raises RunError.

    With `skip_damaged` a stage continues from its newest whole checkpoint; without, a damaged newer one is an error.
    Whatever a later stage lacks is reported before the first one runs.
    """
    try:
        device = device_of(recipe.device)
        if device.type == "cpu":
            allocator.keep_freed_memory()
        processes.start(device)
        if processes.world_size() > 1:
            say_once(f"in {processes.world_size()} processes")
        if (note := machine.unlike_linux()) is not None:
            say_once(f"system {note}")
    except ValueError as error:
        raise RunError(str(error)) from error
    processes.on_rank_zero(refuse_unready, recipe)  # reported once, not by every process
    try:
        processes.refuse_unshared(Path(recipe.runs))
    except EXPECTED_ERRORS as error:
        raise RunError(message_of(error)) from error
    finished: list[Located] = []
    links = Path(recipe.runs) / recipe.name
    for number, stage in enumerate(recipe.stages):
        try:
            place = locate(stage, recipe, finished)
            if processes.broadcast(is_finished(place.folder)):
                refuse_another(place, verify(place.folder))
                processes.on_rank_zero(sweep_locked, place.folder)
                tell(stage.kind, f"{place.folder} is done")
            else:
                processes.on_rank_zero(_unlink, links, range(number, sys.maxsize))  # they may belong to an older recipe
                run_stage(stage, recipe, finished, place, skip_damaged)
            processes.on_rank_zero(_link, links, number, place)
        except EXPECTED_ERRORS as error:
            raise RunError(f"{recipe.place(number)} ({stage.kind}): {message_of(error)}") from error
        except torch.OutOfMemoryError as error:
            ways = way_out(has_gradients(stage, recipe))
            where = f"{recipe.place(number)} ({stage.kind})"
            raise RunError(
                f"{where}: memory of the device does not suffice: {ways}; "
                "`mlcm plan` says what a stage needs. Finished stages and checkpoints are as they were"
            ) from error
        except RuntimeError as error:
            if processes.is_lost_rank(error):
                where = f"{recipe.place(number)} ({stage.kind})"
                raise ProcessLost(f"{where}: {_without_others(place.folder)}") from error
            raise
        finished.append(place)
    processes.on_rank_zero(_unlink, links, range(len(finished), sys.maxsize))
    processes.finish()
    return finished


def _without_others(folder: Path) -> str:
    """Return the message for a stage in `folder` that has lost another process: what it will continue from."""
    newest = checkpoints.checkpoints(folder)[-1:]
    saved = f"{newest[0]} is whole" if newest else "what was finished is as it was"
    return (
        f"another process of this run has ended, and this one stops: {saved}, and the same command goes on from there"
    )


def refuse_unready(recipe: Recipe) -> None:
    """Raise RunError with a line for every problem that would stop a stage which is not done yet."""
    problems = {number: errors for number, stage in enumerate(recipe.stages) if (errors := preflight.problems(stage))}
    earlier: list[Located] = []
    with suppress(*EXPECTED_ERRORS):  # a stage whose folder is unknown is not done
        for number, stage in enumerate(recipe.stages[: max(problems, default=-1) + 1]):
            earlier.append(locate(stage, recipe, earlier))
            if is_finished(earlier[-1].folder):
                problems.pop(number, None)
    places: dict[str, list[str]] = {}  # several stages may lack one reward's weights
    for number, errors in problems.items():
        for key, error in errors:
            place = f"{recipe.place(number)} ({recipe.stages[number].kind}): {key}"
            places.setdefault(message_of(error), []).append(place)
    if places:
        raise RunError("\n".join(f"{', '.join(where)}: {message}" for message, where in places.items()))


@prefix_errors("plan")
def plan(
    recipe: Recipe, memory: bool = False, launch: Launch | None = None, device: Device | None = None
) -> list[PlannedStage]:
    """Return what `run` would do now, stage by stage; with `memory` that of the stages which are not done.

    Memory is that of each process of `launch`; with a `device` there is the time too. Raises RunError for missing
    files, and where the processes cannot share a batch.
    """
    return planned_stages(recipe, kind_for(recipe.device, device) if memory else None, launch, device)


@prefix_errors("plan")
def device_here(recipe: Recipe) -> Device:
    """Return the device that `recipe` would run on here, with measured rates. Raises RunError where it is not here."""
    return this_device(device_of(recipe.device))


def refuse_another(place: Located, manifest: dict) -> None:
    """Raise CheckpointError where a finished folder holds another stage than its name says."""
    if manifest.get("fingerprint") != place.fingerprint:
        other = f"{manifest.get('kind')}-{manifest.get('fingerprint')}"
        raise CheckpointError(
            f"{place.folder} holds stage {other}, which another teacher, recipe "
            "or seed made: delete the folder to run the stage again"
        )


def run_stage(stage: Stage, recipe: Recipe, earlier: list[Located], place: Located, skip_damaged: bool = False) -> None:
    """Run a stage, or the rest of it, while no other run writes to its folder."""
    place.folder.mkdir(parents=True, exist_ok=True)  # in every process, on a shared folder too
    with ExitStack() as locked:
        processes.on_rank_zero(locked.enter_context, lock.folder_lock(place.folder))  # for all processes of this run
        if processes.broadcast(is_finished(place.folder)):  # by the run that had the lock before
            return
        processes.on_rank_zero(_clear, place.folder, skip_damaged)
        _run_locked(stage, recipe, earlier, place)


def _clear(folder: Path, skip_damaged: bool) -> None:
    """Remove the unfinished files of an earlier run and, with `skip_damaged`, put its damaged checkpoints aside."""
    files.remove_partial(folder)
    for skipped in checkpoints.skip_damaged(folder) if skip_damaged else []:
        tell("skipped", skipped, "yellow")


def sweep_locked(folder: Path) -> None:
    """Remove the checkpoints of a finished stage whose process was killed before it removed them."""
    if unswept(folder):
        with lock.folder_lock(folder):
            sweep(folder)


def _run_locked(stage: Stage, recipe: Recipe, earlier: list[Located], place: Located) -> None:
    """Run a stage and write its manifest."""
    parents = parents_of(stage, earlier)
    if "train_teacher" in parents:
        recipe = with_teacher(recipe, parents["train_teacher"].folder)
    if "adapt_text" in parents:
        recipe = with_text_adapter(recipe, parents["adapt_text"].folder)
    tell(stage.kind, f"-> {place.folder}", "bold")
    meter = _memory_meter(stage, recipe)
    origin = {
        "stage": stage.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "parents": {kind: str(parent.folder.name) for kind, parent in parents.items()},
    }
    evaluations = network_evaluations(stage, recipe)
    processes.on_rank_zero(_begin, place.folder, origin | {"network_evaluations": evaluations})
    started = time.monotonic()
    folders = {kind: parent.folder for kind, parent in parents.items()}
    seeded = recipe.model_copy(update={"seed": seed_of_stage(stage, recipe)})
    resolved = with_trained_reward(stage, parents["train_reward"].folder) if "train_reward" in parents else stage
    try:
        _stage_module(resolved).run(resolved, seeded, folders, place.folder)
    except NonFiniteLoss as error:
        bundle = processes.on_rank_zero(write, place.folder, resolved, seeded, folders, error.figures)
        raise NonFiniteLoss(f"{error}; `mlcm replay {bundle}` repeats it", error.figures) from error
    manifest = {
        "kind": stage.kind,
        "fingerprint": place.fingerprint,
        **origin,
        **paths.record(recipe, place.folder),
        "network_evaluations": evaluations,
        "seconds": round(time.monotonic() - started, 1),
        "memory": meter.record() if meter else None,
        **({"tuned_steps": tuned_steps(place.folder / "student")} if isinstance(stage, Tuning) else {}),
        "version": __version__,
        "commit": commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
    }
    processes.on_rank_zero(finish, place.folder, manifest)
    if meter:
        tell("memory", str(meter))
    if isinstance(stage, Tuning):
        tell("guard", guard.ending(place.folder), "bold")


def _begin(folder: Path, record: dict) -> None:
    """Write the `record` of a stage that begins or goes on: `mlcm runs` reads whose it is and what it takes.

    `mlcm clean` leaves what it is made from.
    """
    (folder / BEGUN).parent.mkdir(exist_ok=True)
    files.write_json(folder / BEGUN, record)


def _memory_meter(stage: Stage, recipe: Recipe) -> Meter | None:
    """Return a meter of a training stage's memory beside its prediction; a prediction that fails is reported."""
    if not has_gradients(stage, recipe):
        return None
    device = device_of(recipe.device)
    try:
        predicted = Sizes(recipe).memory(stage, device.type, launches.of_this_process())
    except Exception as error:  # an estimate must not stop a run; the stage reports real problems
        tell("memory could not be predicted:", in_a_line(error), "yellow")
        predicted = None
    return begin(device, predicted)


def _stage_module(stage: Stage) -> ModuleType:
    return import_module(f"mlcm_rl.stages.{stage.kind}")


@prefix_errors("replay")
def replay(bundle: Path) -> tuple[dict, dict]:
    """Repeat the step that wrote `bundle`, from the checkpoint beside it; return its figures then and now.

    Nothing is written to the stage's folder. Raises RunError.
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
    """Return `recipe` with the teacher that the `train_teacher` stage in `folder` has trained."""
    teacher = recipe.teacher.model_copy(update={"path": str(folder / "teacher"), "revision": None})
    return recipe.model_copy(update={"teacher": teacher})


def with_text_adapter(recipe: Recipe, folder: Path) -> Recipe:
    """Return `recipe` with the text adapter that the `adapt_text` stage in `folder` has trained."""
    teacher = recipe.teacher.model_copy(update={"text_adapter": str(folder / "text_adapter")})
    return recipe.model_copy(update={"teacher": teacher})


def with_trained_reward(stage: Stage, folder: Path) -> Stage:
    """Return `stage` with the rewards of its own recipe read from `folder`, that of the `train_reward` stage."""
    assert isinstance(stage, Tuning | Evaluate), "no other stage uses a reward of its recipe"
    changes: dict[str, object] = {"rewards": _from_folder(stage.rewards, folder)}
    if isinstance(stage, Tuning):
        held_out = _from_folder(stage.guard.rewards, folder)
        changes["guard"] = stage.guard.model_copy(update={"rewards": held_out})
    return stage.model_copy(update=changes)


def _from_folder(rewards: Sequence[str | Reward], folder: Path) -> list[Reward]:
    settings = [Reward(name=one) if isinstance(one, str) else one for one in rewards]
    return [one.from_folder(str(folder)) for one in settings]


def _link(links: Path, number: int, place: Located) -> None:
    """Point link `number` in the folder `links` to a finished stage."""
    link, target = links / f"{number:02d}-{place.kind}", Path("..") / "stages" / place.folder.name
    if link.is_symlink() and link.readlink() == target:  # nothing to write: the disk may be read-only by now
        return
    links.mkdir(parents=True, exist_ok=True)
    _unlink(links, range(number, number + 1))
    link.symlink_to(target)


def _unlink(links: Path, numbers: range) -> None:
    """Remove the links of these `numbers`, which lead to stages of another version of the recipe."""
    for link in links.glob("[0-9]*-*"):
        if link.is_symlink() and int(link.name.split("-")[0]) in numbers:
            link.unlink()
