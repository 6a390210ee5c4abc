"""What one student of a study measured, in a file of its own: values prompt by prompt, in half precision.

A student that has such a file is not trained or measured again, so that a study may be cut off, go on elsewhere, or be
shared among machines, and its table is of all files in a folder.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from mlcm_rl import pipeline
from mlcm_rl.pipeline.fingerprint import Located, locate
from mlcm_rl.recipe import Evaluate, Recipe
from mlcm_rl.storage.tensors import write_tensors

METRICS = ("distance", "r@1", "r@5", "teacher_kid", "teacher_patch_kid", "diversity")  # diversity of several pictures
SEPARATOR = " | "
TEACHER = "teacher"  # name of the file of the rows without a student
SEEDED = re.compile(r"(?P<row>.+)-(?P<seed>\d+)")  # name of a student's file

Key = tuple[str, str, int, str]  # name, sampler, evaluations, metric


def keep(recipe: Recipe, path: Path, metrics: tuple[str, ...] = METRICS) -> None:
    """Write what the evaluations in `recipe` measured to `path`, unless it is there: its students' rows.

    The other rows go to the file of the teacher beside it, unless that is there. A recipe without students is that.
    Raise ValueError if the file there is of another recipe, or the teacher's of other prompts or another teacher.
    """
    teacher = path.with_name(f"{TEACHER}.safetensors")
    fingerprint, of_teacher = fingerprint_of(recipe), teacher_fingerprint_of(recipe)
    has_teacher, is_done = is_kept(teacher, of_teacher), path == teacher or is_kept(path, fingerprint)
    if not (has_teacher and is_done):
        reports = [done.folder / "report.json" for done in pipeline.run(recipe) if done.kind == "evaluate"]
        if not has_teacher:
            write(teacher, reports, True, of_teacher, metrics)
        if not is_done:
            write(path, reports, False, fingerprint, metrics)
    Console().print(str(path), soft_wrap=True)


def write(
    path: Path, reports: Sequence[Path], of_teacher: bool, fingerprint: str, metrics: tuple[str, ...] = METRICS
) -> None:
    """Write the `metrics` of the rows of `reports`, each a report.json, to `path`: the students', or the others."""
    rows = [row for report in reports for row in json.loads(report.read_text(encoding="utf-8"))["rows"]]
    rows = [row for row in rows if (row["role"] != "student") == of_teacher]
    found = {
        SEPARATOR.join((row["name"], row["sampler"], str(row["num_evaluations"]), metric)): _values(row, metric)
        for row in rows
        for metric in metrics
        if metric in row["metrics"]
    }
    write_tensors(path, found, {"fingerprint": fingerprint}, may_lack=True)  # NaN: no such value


def is_kept(path: Path, fingerprint: str) -> bool:
    """Return whether `path` has the results of the evaluation with `fingerprint`. Raise ValueError if of another."""
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        found = file.metadata()["fingerprint"]
    refuse_other(path, found, fingerprint, f"what evaluation {found} measured", "measure")
    return True


def fingerprint_of(recipe: Recipe) -> str:
    """Return the fingerprint of the last stage of `recipe`, behind those of the evaluations before it."""
    done: list[Located] = []
    for stage in recipe.stages:
        done.append(locate(stage, recipe, done))
    return " ".join([*(one.fingerprint for one in done[:-1] if one.kind == "evaluate"), done[-1].fingerprint])


def teacher_fingerprint_of(recipe: Recipe) -> str:
    """Return a fingerprint of what the rows without a student are pictures of: the teacher, the prompts, the noises."""
    shared = {"prompts", "num_prompts", "images_per_prompt", "seed"}
    given = next(stage for stage in recipe.stages if isinstance(stage, Evaluate))
    return locate(Evaluate(**given.model_dump(include=shared)), recipe, []).fingerprint


def refuse_other(path: Path, found: str, fingerprint: str, content: str, again: str) -> None:
    """Raise ValueError if the file `path`, whose `content` is said, was `found` to be of another fingerprint."""
    if found != fingerprint:
        raise ValueError(
            f"{path} holds {content}, and this is {fingerprint}: of other settings or code. "
            f"Delete the file to {again} again, or name another folder with --results"
        )


def files_of(folder: Path, order: Sequence[str] = (), ending: str = "safetensors") -> dict[str, list[Path]]:
    """Return the students' files of `folder` with this `ending`, by row in this `order`, others last."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob(f"*.{ending}")):
        if match := SEEDED.fullmatch(path.stem):
            found[match["row"]].append(path)
    return {row: found[row] for row in [*order, *(row for row in found if row not in order)] if row in found}


def read(path: Path) -> dict[Key, Tensor]:
    """Return the values (P,) in double precision, nan where a prompt has none, of everything in a file."""
    found = {}
    with safe_open(path, "pt") as file:
        for joined in sorted(file.keys()):
            name, sampler, evaluations, metric = joined.split(SEPARATOR)
            found[name, sampler, int(evaluations), metric] = file.get_tensor(joined).double()
    return found


def _values(row: dict, metric: str) -> Tensor:
    values = [math.nan if value is None else value for value in row["metrics"][metric]["values"]]
    return torch.tensor(values, dtype=torch.float16)
