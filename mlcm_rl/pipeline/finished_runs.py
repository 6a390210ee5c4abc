"""Commands on a finished run: pictures, pair tables, a report, a folder to publish."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from rich.progress import track
from torch import Tensor

from ..cost.units import counted
from ..data.prompts import first_prompts, read_prompts
from ..equations.axis import NUM_SEGMENTS
from ..models import hub, labelled_sheet, pictures, students, teachers
from ..models.base import Base
from ..models.client_export import export_as
from ..models.composition import Composition
from ..models.export import Form, refuse_existing
from ..models.gammas import origin_of, own_gamma
from ..models.student_description import tuned_steps
from ..models.teachers import teacher_hash, tell_truncated
from ..preference import labels, ranking
from ..recipe import Evaluate, Recipe, Reward, paths
from ..recipe.experiment import STUDENTS
from ..report import assembly, tables, tuned_students
from ..rewards import build
from ..rewards.prompts import refuse_prompts
from ..storage.files import PARTIAL, CheckpointError, read_json
from ..storage.hashing import sha256
from ..storage.lock import folder_lock
from ..storage.manifest import is_finished, verify
from ..storage.untrusted import is_unicode, path_inside
from ..training.console import plain_console
from ..training.devices import device_of
from ..training.progress import tell
from ..training.seeding import generator
from . import lone_student, sample_inputs
from .errors import BadArgument, RunError, prefix_errors
from .fingerprint import Located, locate
from .running import run_stage, sweep_locked

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as other tools call them


def find_stage(run_folder: Path, kinds: tuple[str, ...]) -> Path:
    """Return the latest finished stage of one of `kinds` in `run_folder`: a recipe's folder of links, or a stage's own.

    Raises RunError where there is none, or where the latest is gone: an earlier one would be another student.
    Raises CheckpointError where its files have changed.
    """
    if (run_folder / "model_index.json").is_file():
        raise RunError(
            f"{run_folder} is a model for diffusers, as `mlcm export` writes them, and no run: its README.md has the "
            "code that draws with it; `mlcm sample`, `evaluate`, `export` and `pairs` take the run that made it, "
            "or one whose recipe starts from it (docs/start_from.md)"
        )
    for folder in [run_folder, *sorted(run_folder.glob("[0-9]*-*"), reverse=True)]:
        if is_finished(folder) and read_json(folder / "manifest.json", kind=str)["kind"] in kinds:
            verify(folder)
            return folder.resolve()
        if folder != run_folder and folder.name.endswith(tuple(f"-{kind}" for kind in kinds)):
            raise RunError(f"{folder} leads to a stage that is gone or unfinished; `mlcm run` the recipe again")
    raise RunError(f"{run_folder} holds no finished {' or '.join(kinds)} stage; `mlcm run` the recipe first")


@prefix_errors("--prompts", BadArgument)
def prompts_of(file: Path) -> list[str]:
    """Return the texts of a prompt file. Raise BadArgument where it is no such file."""
    return [prompt.prompt for prompt in read_prompts(file)]


@prefix_errors("sample")
def sample(
    run_folder: Path,
    prompts: list[str],
    num_steps: Sequence[int],
    seed: int,
    gamma: float | None,
    out: Path,
    batch_size: int = 16,
    images_per_prompt: int = 1,
    text_adapter: Path | None = None,
    inputs: sample_inputs.Inputs = sample_inputs.Inputs(),
    device: str | None = None,
    over: lone_student.Over | None = None,
) -> list[Path]:
    """Write pictures of `prompts` by a run's last student as PNG files in `out`, `batch_size` at a time; return paths.

    Every prompt has `images_per_prompt` pictures at each number of steps; the noise of the i-th of a number of steps
    depends on (seed, i) alone. More than one picture are on a sheet too, whose path is the last: a row for each noise,
    a column for each number of steps. Files are numbered after those in `out`, whoever writes there at the same time.
    The default `gamma` is the one that the student was tuned under, or its own. Prompts in the languages of a
    `text_adapter` go through it. With `inputs` the steps are over what their strength leaves of the time axis, as many
    as without. `device` takes the place of the recipe's. With `over` the student is a file or a folder of no run.
    """
    if not all(map(is_unicode, prompts)):
        raise BadArgument("--prompt: holds bytes that are not UTF-8; set the terminal to UTF-8 or take them out")
    with _student_of(run_folder, device, text_adapter, inputs, over) as (base, folder, name, shown):
        tell_truncated(base, prompts, "the prompts")
        student = students.load_student(base, folder / "student", base.dtype)
        gamma = own_gamma(folder / "student") if gamma is None else gamma
        times_by_steps = {steps: student.grid.times(steps, inputs.strength) for steps in dict.fromkeys(num_steps)}
        composition = sample_inputs.compose(base, student, inputs, shown)
        for steps in times_by_steps:
            tell_unlike(student, folder, steps)
    drawn = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    common = {"seed": seed, "gamma": gamma, "student": name, **inputs.record()}
    common |= {"text_adapter": str(text_adapter)} if text_adapter else {}
    files, columns = [], []
    terminal = plain_console(stderr=True)  # standard output has the paths alone
    with _numbers(out, len(drawn)) as first:
        for steps, times in times_by_steps.items():
            column = []
            for start in track(range(0, len(drawn), batch_size), f"{steps} steps", console=terminal, transient=True):
                indices = range(start, min(start + batch_size, len(drawn)))
                texts = [drawn[i] for i in indices]
                images = _sample(composition, student.conditioned, texts, seed, indices, times, gamma)
                for i, image in zip(indices, map(pictures.to_pil, images), strict=True):
                    file = out / f"{first + i:03d}-seed{seed}-steps{steps}.png"
                    metadata = {"prompt": drawn[i], "number": i, "steps": steps, **common}
                    files.append(pictures.save_png(image, file, metadata))
                    column.append(image)
            columns.append(column)
        if len(files) > 1:
            labels = [f"{first + i:03d}: {prompt}" for i, prompt in enumerate(drawn)]
            whole = labelled_sheet.labelled(
                [image for row in zip(*columns, strict=True) for image in row],
                labels,
                [f"seed {seed}, {counted(steps, 'step')}" for steps in times_by_steps],
            )
            if unwritten := [prompt for prompt in prompts if not labelled_sheet.can_write(prompt)]:
                tell("sheet:", f"no font here has the letters of {unwritten[0]}; its pictures have the prompt in them")
            metadata = {"prompts": "\n".join(drawn), "steps": " ".join(map(str, num_steps)), **common}
            files.append(pictures.save_png(whole, out / f"sheet-{first:03d}-seed{seed}.png", metadata))
    return files


@contextmanager
def _student_of(
    run_folder: Path,
    device: str | None,
    text_adapter: Path | None,
    inputs: sample_inputs.Inputs,
    over: lone_student.Over | None,
) -> Iterator[tuple[Base, Path, str, dict[Path, Image.Image]]]:
    """Yield the teacher, loaded, the folder that has its student in `student`, its name, and the pictures of `inputs`.

    Whatever the arguments lack is reported before anything is loaded.
    """
    if over is None:
        folder = find_stage(run_folder, STUDENTS)
        shown = sample_inputs.read(inputs, recipe_of(folder).teacher.family)
        yield teacher_of(folder, text_adapter=text_adapter, device=device), folder, folder.name, shown
        return
    source, teacher = lone_student.source_of(run_folder, over), lone_student.teacher_in(over, text_adapter)
    shown = sample_inputs.read(inputs, teacher.family)
    with lone_student.taken_in(source, teacher, _here(device or "auto")) as (base, folder):
        yield base, folder, run_folder.name, shown


def _sample(
    composition: Composition,
    conditioned: bool,
    prompts: list[str],
    seed: int,
    indices: range,
    times: list[int],
    gamma: float,
) -> Tensor:
    """Return pictures (B, 3, H, W) in [0, 1] of B `prompts`, the noise of each a function of `seed` and its index."""
    base, generators = composition.base, [generator(seed, "sample", i) for i in indices]
    noise, conditioning = base.noise(generators, len(prompts)), base.encode_prompts(prompts)
    x0 = composition.sample(conditioning, noise, times, gamma, generators, conditioned)
    return composition.decode(x0)


def tell_unlike(student: students.Student, folder: Path, num_steps: int) -> None:
    """Print a warning where the student in a stage's `folder` was not tuned after all, or is not for `num_steps`."""
    if tuned_steps(folder / "student") == 0:
        tell(f"{folder.name}:", "its guard kept step 0: this is the student as it was distilled")
    if student.budgets and num_steps not in student.budgets:
        budgets = ", ".join(map(str, student.budgets))
        tell(f"--steps {num_steps}:", f"this student learned to draw in {budgets} steps alone")


@contextmanager
def _numbers(out: Path, count: int) -> Iterator[int]:
    """Yield the first of `count` numbers that no picture in `out` has, nor one that another process is drawing."""
    with folder_lock(out, wait=True):
        first = max(map(_number, out.glob("*.png")), default=-1) + 1
        first = max([first, *(_number(path) + 1 for path in out.glob(f".*{PARTIAL}"))])
        claim = out / f".{first + count - 1:03d}-seed.{os.getpid()}{PARTIAL}"
        claim.touch()
    try:
        yield first
    finally:
        claim.unlink(missing_ok=True)


def _number(path: Path) -> int:
    """Return the number of a picture, or the last one that the file of another process claims; -1 of other files."""
    match = re.match(r"\.?(\d+)-seed", path.name)
    return int(match[1]) if match else -1


@prefix_errors("pairs")
def pairs(
    run_folder: Path,
    prompts: Path,
    reward: str,
    out: Path,
    num_prompts: int | None,
    num_generations: int,
    num_steps: int,
    min_margin: float,
    seed: int,
    batch_size: int,
) -> tuple[int, int]:
    """Write a pair table of a run's last student, ranked by a reward; return the numbers of pairs and prompts."""
    with prefix_errors("--prompts", BadArgument):
        prompt_list = read_prompts(prompts)[:num_prompts]
    folder = find_stage(run_folder, STUDENTS)
    student = read_json(folder / "manifest.json", fingerprint=str)["fingerprint"]
    gamma = own_gamma(folder / "student")
    settings = ranking.PairSettings(
        student, sha256(prompts), reward, num_generations, num_steps, gamma, min_margin, seed
    )
    model = build(Reward(name=reward), device_of(recipe_of(folder).device))
    refuse_prompts(model, reward, prompt_list, prompts)
    base = teacher_of(folder)
    tell_truncated(base, [prompt.prompt for prompt in prompt_list], str(prompts))
    loaded = students.load_student(base, folder / "student", base.dtype)
    return ranking.make_pairs(settings, base, loaded, model, prompt_list, out, batch_size), len(prompt_list)


@prefix_errors("pairs")
def pairs_by_hand(
    run_folder: Path,
    prompts: Path,
    out: Path,
    num_prompts: int | None,
    num_steps: int,
    seed: int,
    batch_size: int,
    serve: Callable[[labels.Choices], None],
) -> tuple[int, int]:
    """Write a pair table of a person's choices between two samples; return the numbers of pairs and prompts.

    Missing samples are drawn, then `serve` shows the page until all are judged.
    """
    with prefix_errors("--prompts", BadArgument):
        prompt_list = read_prompts(prompts)[:num_prompts]
    folder = find_stage(run_folder, STUDENTS)
    student = read_json(folder / "manifest.json", fingerprint=str)["fingerprint"]
    settings = ranking.PairSettings(
        student, sha256(prompts), ranking.BY_HAND, 2, num_steps, own_gamma(folder / "student"), 0.0, seed
    )
    choices = labels.Choices(settings, prompt_list, out)
    if labels.num_sampled(prompt_list, out) < len(prompt_list):
        base = teacher_of(folder)
        tell_truncated(base, [prompt.prompt for prompt in prompt_list], str(prompts))
        labels.draw(
            settings, base, students.load_student(base, folder / "student", base.dtype), prompt_list, out, batch_size
        )
    if len(choices.judgements()) < len(choices):
        serve(choices)
    return len(choices.rows()), len(prompt_list)


@prefix_errors("evaluate")
def evaluate(
    run_folder: Path,
    num_prompts: int | None = None,
    num_steps: list[int] | None = None,
    device: str | None = None,
    prompts: Path | None = None,
) -> Path:
    """Evaluate the student of a run as its recipe's own evaluate stage would, or with other prompts, steps or device.

    A recipe without such a stage needs `prompts`: the stage has its defaults then. Return the folder of the new report.
    """
    folder = find_stage(run_folder, STUDENTS)
    recipe = recipe_of(folder)
    if device is not None:
        recipe = recipe.model_copy(update={"device": _here(device)})
    stages = [stage for stage in recipe.stages if isinstance(stage, Evaluate)]
    if not stages and prompts is None:
        raise RunError(f"the recipe of {run_folder} has no evaluate stage to take prompts from: name --prompts FILE")
    stage = stages[-1] if stages else Evaluate(prompts=str(prompts))
    if prompts is not None:
        num_prompts = num_prompts or min(stage.num_prompts, len(prompts_of(prompts)))
    changes = {"num_prompts": num_prompts, "sampling_steps": num_steps, "students": "last"}
    changes["prompts"] = str(prompts) if prompts is not None else None
    stage = stage.model_copy(update={name: value for name, value in changes.items() if value is not None})
    refuse_missing(folder, recipe, stage.prompts)
    if num_prompts is not None:
        with prefix_errors("--num-prompts", BadArgument):
            first_prompts(stage.prompts, num_prompts)
    file = folder / "manifest.json"
    origin = origin_of(read_json(file, parents=dict))  # to compare a tuned student with
    folders = [path_inside(folder.parent, origin, file), folder] if origin else [folder]
    if any(reward.is_of_this_recipe for reward in stage.reward_models):
        folders.append(find_stage(run_folder, ("train_reward",)))
    manifests = [read_json(one / "manifest.json", kind=str, fingerprint=str) for one in folders]
    earlier = [Located(one["kind"], one["fingerprint"], path) for one, path in zip(manifests, folders, strict=True)]
    place = locate(stage, recipe, earlier)
    if not is_finished(place.folder):
        run_stage(stage, recipe, earlier, place)
    sweep_locked(place.folder)
    return place.folder


@prefix_errors("export")
def export(
    run_folder: Path,
    out: Path,
    formats: Sequence[str] = ("diffusers",),
    precision: str | None = None,
    merge: bool = False,
    repository: str | None = None,
) -> Path:
    """Write the student of a run for diffusers or for other tools, with its phases' snapshots and a card.

    `precision` is that of the student's weights (a key of `PRECISIONS`), by default that of its training; `merge`
    leaves adapters out; `repository` is where it will be found, for the card.
    """
    with prefix_errors("OUT", BadArgument):
        refuse_existing(out)
    if repository is not None:
        with prefix_errors("--push", BadArgument):
            hub.refuse_name(repository)
    folder = find_stage(run_folder, STUDENTS)
    base = teacher_of(folder, in_floats=True)
    snapshots = {}
    for path in sorted((folder / "snapshots").glob("phase-*")):
        student = students.describe(path)
        if not student["conditioned"] and 1 < student["num_segments"] <= NUM_SEGMENTS:  # a sampler's
            snapshots[student["num_segments"]] = path
    table, languages = _latest_table(run_folder)
    form = Form(PRECISIONS[precision] if precision else None, merge, repository or "")
    own = own_gamma(folder / "student")
    return export_as(formats, folder / "student", base, out, table, snapshots, own, languages, form)


@prefix_errors("export --push")
def push(folder: Path, repository: str, public: bool) -> str:
    """Upload an exported folder to a repository of the hub, private unless `public`; return its address."""
    return hub.push(folder, repository, public)


def _latest_table(run_folder: Path) -> tuple[str | None, list[str]]:
    """Return the table of the run's latest report as Markdown, and its prompts' languages; None and [] without one."""
    reports = sorted(run_folder.glob("[0-9]*-evaluate/report.json"))
    if not reports:
        return None, []
    latest = assembly.read(reports[-1])
    return tables.markdown(latest), tuned_students.languages(latest.prompts)


def teacher_of(
    folder: Path, in_floats: bool = False, text_adapter: Path | None = None, device: str | None = None
) -> Base:
    """Return the teacher of the student in a finished stage, loaded from the path in its recipe.

    Where the recipe quantises it, `in_floats` leaves that out: an export has adapters merged into the weights. A
    `text_adapter` and a `device` take the place of the recipe's.
    Raises CheckpointError where its files have changed: the student, an adapter over them, would draw something else.
    Raises as `teachers.load` does.
    """
    recipe = recipe_of(folder)
    refuse_missing(folder, recipe)
    changes: dict[str, object] = {"quantise": None} if in_floats else {}
    changes |= {"text_adapter": str(text_adapter)} if text_adapter is not None else {}
    teacher = recipe.teacher.model_copy(update=changes)
    where = device_of(_here(device) if device else recipe.device)
    base = teachers.load(teacher, where, computes=not in_floats)  # an export adds and writes weights
    recorded = students.describe(folder / "student").get("teacher_hash")  # older folders have none
    if recorded not in (None, teacher_hash(recipe.teacher)):
        raise CheckpointError(
            f"teacher {recipe.teacher.path} has changed since {folder.name} was made with it: put its files back, or "
            "`mlcm run` the recipe again"
        )
    return base


@prefix_errors("--device", BadArgument)
def _here(device: str) -> str:
    """Return `device`. Raise BadArgument where this machine has none."""
    device_of(device)
    return device


def refuse_missing(folder: Path, recipe: Recipe, *files: str) -> None:
    """Raise RunError where the teacher of the stage in `folder`, or one of the other `files`, is not there any more."""
    teacher = [] if recipe.teacher.revision else [recipe.teacher.path]  # a hub's name is not a path
    teacher += filter(None, [recipe.teacher.lora, recipe.teacher.text_adapter])
    missing = [path for path in (*teacher, *files) if not Path(path).exists()]
    if missing:
        raise RunError(
            f"{' and '.join(missing)}, by which {folder.name} was made, is neither where that was run nor in the "
            f"working directory, here {Path.cwd()}: go to the folder that it is relative to, or put it back"
        )


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a finished stage from its manifest, with paths as they are for this process."""
    file = folder / "manifest.json"
    try:
        return paths.recorded(read_json(file, recipe=dict), folder)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, ("recipe", *wrong["loc"])))
        raise CheckpointError(
            f"{file} holds a recipe that this version does not read: {key}: {wrong['msg']}"
        ) from error
