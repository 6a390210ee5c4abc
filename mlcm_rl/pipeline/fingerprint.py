"""Fingerprints: a stage's folder is named by a hash of everything that can change its result, and of nothing else.

Hashed: the stage's settings but for those marked `presentation`, the content of the files and folders it reads, the
source and weights of its rewards (rewards/source.py), the teacher's weights, the seed, the stages it starts
from, and a maths number per stage that is raised by hand for changes of our own code outside `reward_models`. Not
hashed: the commit, names, where runs live, and settings at their defaults, so that a new setting does not orphan
finished stages (whoever changes a default enters the old one in recipe/renamed.py). Never hashed: packages of others
that a reward imports, and pictures that a Parquet table of pairs only names.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.gammas import own_gamma
from ..models.teachers import teacher_hash
from ..recipe import STUDENTS, Recipe, Stage, Strict, Teacher, Tuning, student_sources
from ..recipe.reads import Reads, paths_of
from ..recipe.renamed import FIRST_DEFAULTS, under_first_names
from ..rewards.source import source_hashes
from ..storage import hashing
from ..storage.files import read_json
from ..storage.hashing import contents_hash, folder_hash, sha256
from ..storage.manifest import FORMAT, is_finished


@dataclass(frozen=True)
class Located:
    """A stage, done or not, and the folder of its results."""

    kind: str
    fingerprint: str
    folder: Path


def parents_of(stage: Stage, earlier: list[Located]) -> dict[str, Located]:
    """Return the stages that `stage` starts from, by kind: the latest of each kind among `earlier`.

    The one before it whose student it tunes, of whatever kind, is "start".
    """
    parents = {one.kind: one for one in earlier if one.kind in stage.parents}
    if isinstance(stage, Tuning) and stage.start is not None:
        parents["start"] = [one for one in earlier if one.kind in STUDENTS][-1]
    return parents


def locate(stage: Stage, recipe: Recipe, earlier: list[Located]) -> Located:
    """Return the folder of `stage`. Raises FileNotFoundError naming a missing file that it reads."""
    parents = {kind: parent.fingerprint for kind, parent in parents_of(stage, earlier).items()}
    fingerprint = hashed(identity(stage, recipe, parents))
    folder = Path(recipe.runs) / "stages" / f"{stage.kind}-{fingerprint}"
    if (variant := stage.variant(recipe)) and not is_finished(folder):
        folder = folder.with_name(f"{folder.name}-{variant}")
    return Located(stage.kind, fingerprint, folder)


def identity(stage: Stage, recipe: Recipe, parents: dict[str, str]) -> dict:
    """Return all that can change the result of `stage`; `parents` are the fingerprints that it starts from, by kind.

    Raises FileNotFoundError naming a missing file that it reads.
    """
    contents: dict[str, Any] = {name: content_of(path, mark) for name, (path, mark) in paths_of(stage).items()}
    if students := getattr(stage, "also", None):
        contents["also"] = list(map(student_hash, students))
    return {
        "format": FORMAT,
        "kind": stage.kind,
        "maths": maths_number(stage),
        "stage": with_recipe_paths(under_first_names(stage.kind, settings(stage)), recipe) | contents,
        **with_recipe_paths(reward_files(stage), recipe),
        **reward_sources(stage),
        "teacher": teacher_identity(recipe.teacher),
        "parents": parents,
        "seed": seed_of_stage(stage, recipe),
    }


def teacher_identity(teacher: Teacher) -> dict[str, Any]:
    """Return the settings of a teacher that can change a result, with the content of its files for their paths."""
    described = settings(teacher) | {"path": teacher_hash(teacher)}
    if teacher.text_adapter is not None:
        described["text_adapter"] = hashing.network_hash(Path(teacher.text_adapter))
    return {name: value for name, value in described.items() if name != "lora"}


def maths_number(stage: Stage) -> int:
    """Return the maths number of `stage`: that of its kind, plus corrections for its settings and for reading pictures.

    The one for pictures counts since all are decoded alike: 16-bit greys were white, and some readers ignored EXIF's
    rotation, or the background under transparency.
    """
    reads_pictures = any(mark.of_pictures for _, mark in paths_of(stage).values())
    return stage.maths + stage.corrections + reads_pictures


def content_of(path: str, mark: Reads) -> str:
    """Return one hash of the file or folder `path`, as `mark` says. Raises FileNotFoundError naming what is missing."""
    if mark.of_student:
        return student_content(path)
    if mark.or_file and mark.held_by(path) is not None:
        return sha256(Path(path) / (mark.holding or ""))
    return network_hash(path) if mark.is_network else content_hash(path, mark.holding or None)


def student_content(path: str) -> str:
    """Return one hash of a student from elsewhere: its file's, or that of the weights and configuration in its folder.

    With the gamma that a run's student was tuned under, and with PEFT's configuration beside a LoRA.
    Raises as `student_sources.find`.
    """
    found = student_sources.find(Path(path))
    if not found.place.is_dir():
        beside = found.place.with_name(student_sources.PEFT_CONFIG)
        has_alpha = found.kind == "lora" and beside.is_file()
        return hashing.sha256_once(found.place) + (f" under {hashing.sha256_once(beside)}" if has_alpha else "")
    gamma = f" at gamma {own_gamma(found.place)}" if found.kind == "student" else ""
    return folder_hash(found.place) + gamma


def hashed(description: dict) -> str:
    """Return a short hash of `description`, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def seed_of_stage(stage: Stage, recipe: Recipe) -> int:
    """Return the stage's own seed, or the recipe's."""
    return recipe.seed if stage.seed is None else stage.seed


def settings(model: Strict) -> dict:
    """Return the settings of `model` that can change a result and are not at their first defaults, without the seed."""
    kind = getattr(model, "kind", "")
    dumped = model.model_dump(mode="json", exclude={"kind", "seed"})
    return {
        name: dumped[name]
        for name, field in type(model).model_fields.items()
        if name in dumped
        and not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("presentation"))
        and getattr(model, name) != FIRST_DEFAULTS.get((kind, name), field.get_default(call_default_factory=True))
    }


def with_recipe_paths(value: Any, recipe: Recipe) -> Any:
    """Return `value` with the paths of rewards' settings as they stand in the recipe's file.

    Resolved paths differ with the folder that the file is read from.
    """
    if isinstance(value, dict):
        return {with_recipe_paths(key, recipe): with_recipe_paths(one, recipe) for key, one in value.items()}
    if isinstance(value, list):
        return [with_recipe_paths(one, recipe) for one in value]
    return recipe._file_texts.get(value, value) if isinstance(value, str) else value


def reward_files(stage: Stage) -> dict[str, dict[str, str]]:
    """Return hashes of the files and folders that the settings of the stage's rewards name, under one key; {} of none.

    Only the reward knows whether a setting is a path, so any text counts as one where such a file exists.
    """
    texts = {text for reward in stage.reward_models for text in reward.settings.values() if isinstance(text, str)}
    paths = {text: Path(text) for text in sorted(texts) if text and os.path.exists(text)}
    hashes = {text: folder_hash(path) if path.is_dir() else sha256(path) for text, path in paths.items()}
    return {"reward_files": hashes} if hashes else {}


def reward_sources(stage: Stage) -> dict[str, dict[str, dict[str, str]]]:
    """Return hashes of the source and weights of each of the stage's rewards, under one key; {} of none."""
    hashes = {reward.name: source_hashes(reward.name) for reward in stage.reward_models}
    return {"reward_sources": hashes} if hashes else {}


def network_hash(folder: str) -> str:
    """Return one hash of a network's folder. Raises FileNotFoundError where it holds no config.json."""
    sha256(Path(folder) / "config.json")
    return hashing.network_hash(Path(folder))


def content_hash(path: str, holding: str | None) -> str:
    """Return the sha256 of a file, or one hash of all that a folder holds.

    Raises FileNotFoundError naming what is missing: the file or folder, or the file `holding` in it.
    """
    place = Path(path)
    if not place.is_dir():
        return sha256(place)
    if holding is not None and not (place / holding).is_file():
        raise FileNotFoundError(f"{path} holds no {holding}")
    return contents_hash(place)


def student_hash(folder: str) -> str:
    """Return the fingerprint of the finished stage in `folder`, often a link, or of a run's last with a student.

    Without a manifest it is the student's hash. Raises FileNotFoundError where it holds neither.
    """
    place = student_sources.finished_in(Path(folder))
    manifest = read_json(place / "manifest.json") if (place / "manifest.json").is_file() else {}
    if isinstance(fingerprint := manifest.get("fingerprint"), str):
        return fingerprint
    if not (place / "student").is_dir():
        raise FileNotFoundError(f"also: {folder} holds no student; name a run, or a finished stage that leaves one")
    return folder_hash(place / "student")
