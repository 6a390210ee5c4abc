"""Loading a YAML file into a `Recipe`, or reporting everything that is wrong with it.

`load` is the entry. `tree.py` reads the file and keeps the line of every value; the types of `recipe` validate it;
`errors.py` turns their errors into messages; `check` looks at what the types cannot know. Nothing imports torch.
"""

import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from ..storage.files import CheckpointError
from . import (
    errors,
    lpips_problems,
    missing,
    prompt_counts,
    prompt_languages,
    renamed,
    reward_package,
    reward_settings,
    student_sources,
    teacher_problems,
)
from .distill import Distill
from .evaluation import Evaluate
from .experiment import Recipe, Stage, gamma_of, missing_library, missing_trackers, origin_of, student_before
from .families import layout_of
from .feedback import Feedback
from .languages import code_meant, says_language
from .paths import Folders, resolved, rewards_in
from .preference import Tuning
from .reads import reads_of
from .schema import json_schema
from .start import Start, written_key
from .teacher_stages import TrainTeacher, Trajectories
from .tree import Key, Node, Problem, RecipeError, key_text, nearest, override, read
from .types import TRAINED, Full, Lora

STUDENT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # whose names no model of the hub has
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/model


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    root: Path | None = None,
    tell: Callable[[str], object] = partial(print, file=sys.stderr),
) -> Recipe:
    """Return the recipe in a YAML file, with `overrides` of the command line (`stages.1.learning_rate=1e-4`).

    Its paths are as this process sees them (`paths.py`). A path that may mean another file, a key under an old name,
    and prompts in a language that is not read or fewer than a guard has to watch, are reported by `tell`, a line each.
    With `root`, the working directory, a recipe of the right types goes through `check` too. Raise RecipeError, which
    has all errors at once.
    """
    tree, problems = read(Path(path))
    tree, warnings, twice = renamed.renew_tree(tree, str(path))
    problems += twice
    for text in overrides:
        try:
            renewed = partial(renamed.renew_parts, text=text, file=str(path), warnings=warnings)
            tree, more, _ = renamed.renew_tree(override(tree, text, str(path), renewed), str(path))
            warnings += more
        except RecipeError as error:
            problems += error.problems
    for text in warnings:
        tell(text)
    try:
        # JSON, because a list in a file may be meant for a tuple; strict, because "100" in quotes is not a number.
        recipe = Recipe.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        keys = {problem.key for problem in problems}
        of_types = errors.problems(error.errors(), json_schema(), tree, str(path))
        raise RecipeError(problems + [problem for problem in of_types if problem.key not in keys]) from error
    written = partial(written_key, tree)
    folders = Folders(
        Path(path).parent, root or Path.cwd(), lambda key: bool(tree.nearest_place(written(key)).override)
    )
    if root is not None:
        found = (replace(problem, key=written(problem.key)) for problem in check(recipe, folders))
        problems += missing.merged([_with_place(problem, tree, str(path)) for problem in found], Path(path))
    if problems:
        raise RecipeError(problems)
    if root is not None:
        warned = (prompt_languages.warnings(recipe, folders), prompt_counts.warnings(recipe, folders), unheld(recipe))
        for warning in itertools.chain(*warned):
            tell(str(_with_place(replace(warning, key=written(warning.key)), tree, str(path))))
    recipe, notes = resolved(recipe, folders)
    for note in notes:
        tell(f"{path}: {note}")
    places = {i: key_text(written(("stages", i))) for i in range(len(recipe.stages))}
    recipe._places = {i: place for i, place in places.items() if place != f"stages[{i}]"}
    return recipe


def unheld(recipe: Recipe) -> Iterator[Problem]:
    """Yield the learned rewards whose student nothing keeps where they have learned."""
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Feedback) and stage.surrogate and not stage.is_held:
            text = "a learned reward is right near the samples that it has learned from, and nothing keeps the student "
            yield Problem(("stages", i, "surrogate"), f"{text}there: set anchor, 0.3 with form: bounded, else 3.0")


def check(recipe: Recipe, folders: Folders) -> list[Problem]:
    """Return what is wrong with a recipe beyond its types, without opening weights.

    Its files and folders must exist (relative ones in `folders`; a teacher only if its path looks local), rewards must
    exist, each stage must have the stages that it needs before it, a source that fits its target, and a precision in
    which small gradients survive.
    """
    return [
        *teacher_problems.problems(recipe, folders),
        *_file_problems(recipe, folders),
        *lpips_problems.problems(recipe, folders),
        *_runs_problems(recipe, folders),
        *(Problem(("trackers", i), message) for i, message in missing_trackers(recipe)),
        *_order_problems(recipe),
        *_store_problems(recipe),
        *_tuning_problems(recipe, folders),
        *_evaluation_problems(recipe),
        *prompt_languages.problems(recipe, folders),
        *prompt_counts.problems(recipe, folders),
        *_precision_problems(recipe, folders),
        *_quantised_problems(recipe),
        *_resume_problems(recipe),
        *_prediction_problems(recipe),
    ]


def _with_place(problem: Problem, tree: Node, file: str) -> Problem:
    return replace(problem, file=file, place=tree.nearest_place(problem.key))


def _file_problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    known_rewards = reward_package.names()
    for i, stage in enumerate(recipe.stages):
        settings = stage.model_dump(include={*reads_of(stage), "also"})
        for name, mark in reads_of(stage).items():
            if mark.of_student:
                yield from _source_problems(("stages", i), stage, recipe, folders)
            elif (path := settings[name]) is not None:
                is_table = name == "pairs" and Path(path).suffix == ".parquet"
                yield from missing.absent(
                    ("stages", i, name), path, folders, holding=None if is_table else mark.held_by(path)
                )
        for name in ("prompts", "guard_prompts"):
            path, entry = settings.get(name), ("stages", i, name)
            if path and Path(path).suffix not in (".txt", ".jsonl") and not os.path.isdir(folders.place(entry, path)):
                yield Problem(entry, f"expected a .txt or .jsonl file, found {path}")
            elif path and _is_blank(folders.place(entry, path)):
                yield Problem(entry, f"{path} holds no prompt: write one a line")
        for j, other in enumerate(settings.get("also", [])):
            place = student_sources.finished_in(folders.place(("stages", i, "also", j), other))
            if other and os.path.isdir(place) and not (place / "manifest.json").is_file():
                yield Problem(("stages", i, "also", j), f"the folder {other} is no finished stage and no run of one")
            else:
                yield from missing.absent(("stages", i, "also", j), other, folders, holding="")
        for key, reward in rewards_in(("stages", i), stage):
            if reward.name not in known_rewards:
                message = f"no reward is called {reward.name}; known are {', '.join(known_rewards) or 'none'}"
                yield Problem(key, message, nearest(reward.name, known_rewards))
            else:
                yield from reward_settings.problems(key[:-1], reward)
            yield from missing.endless((*key[:-1], "settings"), reward, folders)
            folder = reward.settings.get("folder") if reward.name == TRAINED else None
            if isinstance(folder, str):
                yield from missing.absent((*key[:-1], "settings", "folder"), folder, folders, holding="reward.json")


def _source_problems(key: Key, stage: Stage, recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield what is wrong with a student from elsewhere: not there, none, or not stating how it is sampled.

    A recipe does not start from its own run, whose folder the first of its stages to begin would take away.
    """
    assert isinstance(stage, Start), "no other stage names one"
    path = folders.place((*key, "path"), stage.path)
    if not stage.path or not os.path.exists(path):
        beside = missing.beside((*key, "path"), stage.path, folders, "*") if stage.path else ""
        if not beside and stage.path and Path(stage.path).parts[0] == Path(recipe.runs).name:
            message = f"there is no run {stage.path}: `mlcm run` its recipe first; `mlcm runs` lists those that are"
            yield Problem((*key, "path"), message, looked_in=folders.looked_in((*key, "path"), stage.path))
            return
        is_of_hub = HUB_NAME.fullmatch(stage.path) and path.suffix not in STUDENT_FILES
        if not beside and is_of_hub and not os.path.isdir(path.parent):
            message = (
                f"{stage.path} is not a folder here, and students are not fetched: `hf download {stage.path} "
                "--local-dir FOLDER` does, from the hub; then name FOLDER, or the .safetensors file in it"
            )
            yield Problem((*key, "path"), message, looked_in=folders.looked_in((*key, "path"), stage.path))
            return
        message = f"no such file or folder: {stage.path}" if stage.path else "expected a path, found empty text"
        yield Problem((*key, "path"), message, beside, looked_in=folders.looked_in((*key, "path"), stage.path))
        return
    own = Path(os.path.abspath(folders.working / recipe.runs / recipe.name))
    if Path(os.path.abspath(path)).is_relative_to(own):
        stages = f"{Path(recipe.runs) / 'stages'}/<kind>-<number>, where its link leads"
        message = f"{stage.path} is in the folder of this recipe's own run, which its stages will fill anew"
        yield Problem((*key, "path"), f"{message}: take another name than {recipe.name}, or name the stage by {stages}")
        return
    try:
        student_sources.refuse_unstated(student_sources.find(path), stage)
    except (OSError, ValueError, CheckpointError) as error:
        yield Problem((*key, "path"), str(error))


def _runs_problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    if not recipe.runs or os.path.isfile(folders.working / recipe.runs):
        actual = f"the file {recipe.runs}" if recipe.runs else "empty text"
        yield Problem(("runs",), f"expected a folder, which need not be there yet, found {actual}")


def _is_blank(path: Path) -> bool:
    """Return whether the file `path` has only white space. False without such a file, which `missing` reports."""
    if not os.path.isfile(path):
        return False
    with suppress(OSError), path.open("rb") as file:
        return not any(map(bytes.strip, file))
    return False


def _order_problems(recipe: Recipe) -> Iterator[Problem]:
    for i, stage in enumerate(recipe.stages):
        before = {earlier.kind for earlier in recipe.stages[:i]}
        for one in stage.requirements:
            if not before & set(one.kinds):
                key: Key = ("stages", i, one.setting) if one.setting else ("stages", i)
                yield Problem(key, f"{one.reason or f'{stage.kind} needs'} an earlier {one.kinds[0]} stage")
        if "train_reward" not in before:
            for key, reward in rewards_in(("stages", i), stage):
                if reward.is_of_this_recipe:
                    message = f"{TRAINED} needs settings: {{folder: ...}}, or an earlier train_reward stage to read"
                    yield Problem(key, message)


def _store_problems(recipe: Recipe) -> Iterator[Problem]:
    """A store that would leave out states that a later stage reads, or has none where a jump ends."""
    for i, stage in enumerate(recipe.stages):
        if not isinstance(stage, Trajectories):
            continue
        for j, reader in enumerate(recipe.stages):
            if isinstance(reader, Distill) and reader.method == "segments" and reader.reads_trajectories:
                for k in (k for k in reader.num_segments if stage.solver_steps % k):
                    message = f"{k} segments end where stages[{i}] stores no states: its solver_steps must be a "
                    yield Problem(
                        ("stages", j, "num_segments"), f"{message}multiple of {k}, found {stage.solver_steps}"
                    )
            if stage.keep != "milestones":
                continue
            if reader.states_read(recipe.stages[:j]) == "all":
                message = f"milestones leaves out states that stages[{j}] ({reader.kind}) begins its jumps at, since "
                yield Problem(("stages", i, "keep"), message + "it has no budgets: write all, or auto")


def _tuning_problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield what would stop a tuning stage, hours later, when the student is finished."""
    for i, stage in enumerate(recipe.stages):
        if not isinstance(stage, Tuning):
            continue
        before = student_before(recipe.stages, i)
        gamma = None if before is None else gamma_of(recipe.stages, before)
        if stage.needs_random_steps and stage.gamma is None and gamma == 0.0:
            message = f"{stage.kind} needs random steps here, and the student that it tunes samples without noise"
            yield Problem(("stages", i, "gamma"), f"{message} (gamma 0) by default: set gamma, such as 0.3")
        begun = origin_of(recipe.stages, i)
        if isinstance(begun, Start) and isinstance(begun.grid, list) and len(begun.grid) != stage.sampling_steps:
            message = f"expected {len(begun.grid)}, as many as the times of its start's grid {begun.grid}, found "
            yield Problem(("stages", i, "sampling_steps"), f"{message}{stage.sampling_steps}")
        whole = begun.steps_learned(begun.num_segments[-1]) if isinstance(begun, Distill) and not begun.budgets else []
        if whole and stage.sampling_steps not in whole:
            message = f"expected {whole[0]}, since its student predicts x0 and knows the starts of those jumps alone, "
            yield Problem(("stages", i, "sampling_steps"), f"{message}found {stage.sampling_steps}")
        if stage.languages and not sum(stage.languages.values()):
            yield Problem(("stages", i, "languages"), "all weights are 0, so that no prompt can be drawn")
        for name in stage.languages:
            if (code := code_meant(name)) and not says_language(
                folders.place(("stages", i, "prompts"), stage.prompts), name
            ):
                message = f"no prompt of {stage.prompts} is in {name!r}: did you mean {code}?"
                yield Problem(("stages", i, "languages", name), message)
        reward_keys = set()
        for key, reward in rewards_in(("stages", i), stage):
            is_followed = isinstance(stage, Feedback) and not stage.surrogate and "guard" not in key
            if is_followed and reward_settings.attributes_of(reward).get("differentiable") is False:
                yield Problem(key, reward_settings.without_gradient([reward.name]))
            reward_key = (*key[:-2], reward.name)
            if reward_key in reward_keys:
                yield Problem(key, f"{reward.name} is named twice; a sum has one weight for each reward")
            reward_keys.add(reward_key)


def _evaluation_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each evaluation whose numbers of steps are none that the student learned to draw in."""
    for i, stage in enumerate(recipe.stages):
        distilled = [one for one in recipe.stages[:i] if isinstance(one, Distill)]
        if not isinstance(stage, Evaluate) or stage.also or not distilled or distilled[-1].condition_on_target:
            continue
        last = distilled[-1]
        phases = last.num_segments if stage.students == "snapshots" else last.num_segments[-1:]
        learned = [last.steps_learned(num_segments) for num_segments in phases]
        if all(learned) and not {n for steps in learned for n in steps} & set(stage.sampling_steps):
            known = " or ".join(str(n) for n in sorted({n for steps in learned for n in steps}))
            message = f"expected {known} among them, since the student predicts x0 and knows the starts of those jumps "
            yield Problem(("stages", i, "sampling_steps"), f"{message}alone, found {stage.sampling_steps}")


def _precision_problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield a problem for each adapter or term whose gradients would be in float16, where small ones become zero.

    An adapter has the dtype of the teacher's weights if there is no autocast, whoever distilled the student under it.
    """
    if recipe.teacher.dtype != "float16":
        return
    over_teacher = False  # whether the student is an adapter, and not weights of its own in float32
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Start):
            with suppress(OSError, ValueError, CheckpointError):  # reported with its path
                over_teacher = student_sources.find(folders.place(("stages", i, "path"), stage.path)).is_lora
        if isinstance(stage, Distill):
            over_teacher = isinstance(stage.adapter, Lora)
            if stage.adversarial is not None:
                message = "takes gradients through the teacher, where those of float16 are lost: write teacher.dtype: "
                yield Problem(("stages", i, "adversarial"), message + "bfloat16 or float32")
        if isinstance(stage, Distill | Feedback) and stage.matching and not over_teacher and stage.precision == "no":
            message = "no would train the fake score in the float16 of teacher.dtype, where small gradients are lost: "
            yield Problem(("stages", i, "precision"), message + "write bf16, or teacher.dtype: float32")
        if isinstance(stage, Distill | Tuning) and over_teacher and stage.precision == "no":
            message = "no would train in the float16 of teacher.dtype, where small gradients are lost: write bf16, or "
            yield Problem(("stages", i, "precision"), message + "teacher.dtype: float32")


def _quantised_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what does not go with a quantised teacher: a missing library, and all weights trained."""
    kind = recipe.teacher.quantise
    if kind is None:
        return
    if message := missing_library(kind):
        yield Problem(("teacher", "quantise"), message)
    for i, stage in enumerate(recipe.stages):
        message = f"trains all weights, and teacher.quantise keeps them in {kind}: "
        if isinstance(stage, TrainTeacher):
            message += "leave it out, and quantise in a recipe of its own, over the trained teacher"
            yield Problem(("teacher", "quantise"), f"stages[{i}] {message}")
        if isinstance(stage, Distill) and isinstance(stage.adapter, Full):
            yield Problem(("stages", i, "adapter"), f"full {message}train a lora, or leave teacher.quantise out")


def _resume_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each distill stage that does not fit the student of the one before, which it goes on with."""
    stages = [(i, stage) for i, stage in enumerate(recipe.stages) if isinstance(stage, Distill)]
    for (j, before), (i, stage) in itertools.pairwise(stages):
        if stage.adapter != before.adapter:
            message = f"adapter must be that of stages[{j}], whose student this stage goes on with: "
            yield Problem(("stages", i, "adapter"), message + str(before.adapter.model_dump()))
        if before.condition_on_target and not stage.condition_on_target:
            message = f"condition_on_target must be true: the student of stages[{j}] takes its target time"
            yield Problem(("stages", i, "condition_on_target"), message)
        if before.prediction == "x0" and stage.prediction != "x0":
            message = f"prediction must be x0: it is what the student of stages[{j}] predicts, which this goes on with"
            yield Problem(("stages", i, "prediction"), message)


def _prediction_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each student that cannot predict x0, or that would not learn to."""
    family, turned = recipe.teacher.family, False  # whether an earlier stage has made the network predict x0
    for i, stage in enumerate(recipe.stages):
        if not isinstance(stage, Distill | Start) or stage.prediction != "x0":
            continue
        key: Key = ("stages", i, "prediction")
        if layout_of(family).is_flow:
            message = f"x0: students of family {family} predict a velocity, which gives x0 at the noisiest time too, "
            yield Problem(key, message + "and no stock scheduler of theirs takes x0: leave it out")
        if not isinstance(stage, Distill):
            continue
        if not turned and (stage.method == "simulation" or stage.distance_weight == 0.0):
            message = "x0: the network begins as one that predicts what its teacher does, and terms alone do not turn "
            yield Problem(key, message + "it: put a stage with prediction: x0 and a distance before this one")
        turned = True
