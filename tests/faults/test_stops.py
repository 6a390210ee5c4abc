"""A process killed before each of its changes to the disk, one after the other: the next start makes it good.

Every prefix of what a stage writes is a state that the next start must end from with the same bits as a run that was
left alone, and with nothing left over.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import forked
import pytest
import stops
from forked import FORKS

import runs
from mlcm_rl.recipe import Evaluate, Recipe, TrainReward
from mlcm_rl.storage import checkpoints, hashing

TUNED = ("feedback", "dpo", "policy")
NUM_KILLS = 60  # of each kind, or as many as there are call sites
TIMED = ("runs/rows/*/record.json",)  # with what a row took


@dataclass(frozen=True)
class Stop:
    """A place to end a process at: before change number `number`, the file opened by the one before it cut or not."""

    number: int
    torn: bool
    change: stops.Change


class Trial:
    """A command, and a folder `place` in which it runs again and again from the same `start`."""

    def __init__(self, folder: Path, command: Callable, *arguments: object, recipe: Recipe | None = None):
        self.place, self.start, self.changes_file = folder / "place", folder / "start", folder / "changes.json"
        self.command, self.arguments, self.recipe = command, arguments, recipe

    def begin(self) -> None:
        """Put `place` back to what it was before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.start, self.place, symlinks=True)

    def call(self, stop: Stop | None = None) -> int:
        """The exit code of a process that runs the command."""
        number, torn = (stop.number, stop.torn) if stop else (None, False)
        arguments = (self.command, self.arguments, self.place, number, torn, self.changes_file)
        process = FORKS.Process(target=watched, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    def stops(self) -> list[Stop]:
        """Run the command and leave it alone; every place to stop it at."""
        self.begin()
        assert self.call() == 0
        changes = [stops.Change(**change) for change in json.loads(self.changes_file.read_text())]
        found = []
        for number, change in enumerate(changes):
            found.append(Stop(number, False, change))
            if number and changes[number - 1].kind in stops.WRITES:
                found.append(Stop(number, True, change))
        return found

    def left(self) -> dict[str, object]:
        """All that is in `place`: names of folders, targets of links, checksums of files that hold no times."""
        found: dict[str, object] = runs.results(self.recipe) if self.recipe else {}
        for path in self.place.rglob("*"):
            name = path.relative_to(self.place).as_posix()
            if path.is_symlink():
                found[name] = str(path.readlink())
            elif path.is_dir() or any(fnmatch(name, pattern) for pattern in (*runs.NOT_COMPARED, *TIMED)):
                found[name] = "is there"
            else:
                found[name] = hashing.sha256(path)
        return found

    def faults(self, *chosen: Stop, again: Callable[[Stop], Stop | None] = lambda _: None) -> list[str]:
        """What is not as it should be after each of the `chosen` stops and one more start.

        Where `again` gives a second stop to a first, the start after it is stopped too, if it comes so far.
        """
        self.begin()
        assert self.call() == 0
        expected, found = self.left(), []
        for stop in chosen:
            self.begin()
            assert self.call(stop) == stops.KILLED
            if second := again(stop):
                assert self.call(second) in (stops.KILLED, 0)
            code = self.call()
            left = self.left()
            differing = sorted(name for name in left | expected if left.get(name) != expected.get(name))
            if code or differing:
                cut = "half a file, " if stop.torn else ""
                found.append(f"{cut}{stop.change.kind} {stop.change.site}: exit code {code}, {differing[:3]}")
        return found


def watched(command: Callable, arguments: tuple, place: Path, stop: int | None, torn: bool, changes_file: Path) -> None:
    """Run `command` in this process under a watch; more checkpoints than are to be kept are an error."""
    save_state = checkpoints.save_state

    def counted(folder: Path, step: int, tensors: dict, record: dict | None = None, keep: int = 2) -> Path:
        path = save_state(folder, step, tensors, record, keep)
        assert len(checkpoints.checkpoints(folder)) <= keep
        return path

    checkpoints.save_state = counted
    watch = stops.Watch(place, stop, torn)
    watch.start()
    command(*arguments)
    changes_file.write_text(json.dumps([vars(change) for change in watch.changes]))


def spread(found: list[Stop], limit: int) -> list[Stop]:
    """At least the first stop of each kind at each call site, and of the rest evenly as many as make `limit`."""
    first = {(one.torn, one.change): one for one in reversed(found)}
    rest = [one for one in found if first[one.torn, one.change] is not one]
    wanted = max(0, limit - len(first))
    more = rest[:: max(1, -(-len(rest) // wanted))] if wanted else []
    return sorted([*first.values(), *more], key=lambda one: (one.number, one.torn))


def trial_of(kind: str, teacher: Path, folder: Path) -> Trial:
    """The last stage of a recipe, or what is made of a finished one, as a trial."""
    place = folder / "place"
    place.mkdir()
    settings = {"runs": str(place / "runs")}
    prompts = runs.write_prompts(folder)
    stages = {stage.kind: stage for stage in runs.of_kinds(teacher, folder, runs.KINDS).stages}
    report = Evaluate(prompts=prompts, num_prompts=2, sampling_steps=[1], gammas=[0.0], teacher_steps=[2], batch_size=1)
    changes = {"evaluate": {}, "evaluate_rows": {"teacher_solvers": []}, "evaluate_pictures": {"keep_pictures": True}}
    distilled = [stages["trajectories"], stages["distill"]]
    if kind == "train_reward":
        table = runs.write_pairs(folder / "pairs")
        chosen = [TrainReward(pairs=table, num_steps=2, batch_size=2, save_every=1, held_out=0.4)]
    elif kind in changes:
        chosen = [*distilled, report.model_copy(update=changes[kind])]
    elif kind in TUNED:
        chosen = [*distilled, stages[kind]]
    else:
        chosen = [stages[kind]] if kind in ("train_teacher", "trajectories") else distilled
    recipe = runs.recipe(teacher, folder, chosen, **settings)
    made = kind in ("export", "pairs")
    before = [*distilled, report] if kind == "evaluate_rows" else chosen if made else chosen[:-1]
    if before:
        forked_run(runs.recipe(teacher, folder, before, **settings))
    place.rename(folder / "start")
    if kind == "export":
        return Trial(folder, forked.export, place / "runs" / recipe.name, place / "exported")
    if kind == "pairs":
        return Trial(folder, forked.pairs, place / "runs" / recipe.name, Path(prompts), place / "pairs")
    return Trial(folder, forked.run, recipe.model_dump_json(), recipe=recipe)


def forked_run(recipe: Recipe) -> None:
    process = FORKS.Process(target=forked.run, args=(recipe.model_dump_json(),))
    process.start()
    process.join()
    assert process.exitcode == 0


EVERY = (
    *("train_teacher", "trajectories", "train_reward", "distill", *TUNED),
    *("evaluate", "evaluate_rows", "evaluate_pictures", "pairs", "export"),
)


@pytest.mark.slow
def test_a_stage_killed_before_the_last_change_of_each_kind_is_made_good_by_the_next_start(tiny_sdxl, tmp_path):
    """What a stage does last is to remove what it would have gone on from."""
    trial = trial_of("distill", tiny_sdxl, tmp_path)
    last = {(one.torn, one.change.kind): one for one in trial.stops()}
    assert {kind for _, kind in last} == {
        "open",
        "save",
        "fsync",
        "rename",
        "remove",
        "rmdir",
        "mkdir",
        "chmod",
        "symlink",
    }
    chosen = [last[False, kind] for kind in ("rename", "remove", "rmdir", "symlink")]
    assert not trial.faults(*chosen)


@pytest.mark.slow
def test_an_evaluation_killed_while_it_removes_what_it_drew_is_made_good_by_the_next_start(tiny_sdxl, tmp_path):
    """With its pictures, for which no row can be brought from the store: what is lost must be drawn again."""
    trial = trial_of("evaluate_pictures", tiny_sdxl, tmp_path)
    removals = [one for one in trial.stops() if one.change.kind == "remove" and not one.torn]
    assert not trial.faults(*removals[-12::2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_every_prefix_of_what_is_written_is_made_good_by_the_next_start(kind, tiny_sdxl, tmp_path, capfd):
    """At every call site that changes the disk at least once, and evenly over the rest."""
    trial = trial_of(kind, tiny_sdxl, tmp_path)
    found = trial.stops()
    chosen = spread(found, NUM_KILLS)
    faults = trial.faults(*chosen)
    with capfd.disabled():
        print(f"{kind}: {len(chosen)} kills of {len(found)} possible, {len(faults)} not made good by the next start")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "evaluate"])
def test_a_start_that_is_killed_too_is_made_good_by_the_one_after_it(kind, tiny_sdxl, tmp_path):
    trial, draws = trial_of(kind, tiny_sdxl, tmp_path), random.Random(4)
    found = trial.stops()
    faults = trial.faults(*draws.choices(found, k=NUM_KILLS // 3), again=lambda _: draws.choice(found))
    assert not faults, "\n".join(faults)
