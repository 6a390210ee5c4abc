"""Where a stage's folder is: found by a hash of everything that can change its result, and of nothing else.

Hashed: the stage's settings but for those marked `presentation`, the content of the files and folders it reads, the
source and weights of the rewards it asks (rewards/source.py), the teacher's weights, the seed, the stages it starts
from, and a maths number per stage that is raised by hand. Not hashed: the commit, names, where runs live, and settings
at their defaults, so that a new setting does not orphan finished stages (whoever changes a default raises the maths
number). By hand it is raised, too, for our own code outside `reward_models`. Never seen: other people's packages that a
reward imports, and pictures that a Parquet table of pairs only names.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.teachers import teacher_hash
from ..recipe import Recipe, Stage, Strict
from ..recipe.reads import Reads, paths_of
from ..recipe.renamed import under_first_names
from ..rewards.source import source_hashes
from ..storage.files import read_json
from ..storage.hashing import contents_hash, folder_hash, sha256
from ..storage.manifest import FORMAT


@dataclass(frozen=True)
class Located:
    """A stage, done or not, and where its results are or will be."""

    kind: str
    fingerprint: str
    folder: Path


def parents_of(stage: Stage, earlier: list[Located]) -> dict[str, Located]:
    """The stages that `stage` starts from, by kind: the latest of each among the `earlier` ones of its recipe."""
    return {one.kind: one for one in earlier if one.kind in stage.parents}


def locate(stage: Stage, recipe: Recipe, earlier: list[Located]) -> Located:
    """The folder of `stage`. Raises FileNotFoundError naming a file that it reads and that is not there."""
    parents = {kind: parent.fingerprint for kind, parent in parents_of(stage, earlier).items()}
    fingerprint = hashed(identity(stage, recipe, parents))
    return Located(stage.kind, fingerprint, Path(recipe.runs) / "stages" / f"{stage.kind}-{fingerprint}")


def identity(stage: Stage, recipe: Recipe, parents: dict[str, str]) -> dict:
    """All that can change the result of `stage`; `parents` are the names of the results that it starts from, by kind.

    Raises FileNotFoundError naming a file that it reads and that is not there.
    """
    read: dict[str, Any] = {name: content_of(path, mark) for name, (path, mark) in paths_of(stage).items()}
    if students := getattr(stage, "also", None):
        read["also"] = list(map(student_hash, students))
    return {
        "format": FORMAT,
        "kind": stage.kind,
        "maths": maths_number(stage),
        "stage": as_written(under_first_names(stage.kind, settings(stage)), recipe) | read,  # by content, not by name
        **as_written(reward_files(stage), recipe),
        **reward_sources(stage),
        "teacher": settings(recipe.teacher) | {"path": teacher_hash(recipe.teacher)},
        "parents": parents,
        "seed": seed_of_stage(stage, recipe),
    }


def maths_number(stage: Stage) -> int:
    """The maths number of `stage`: of its kind, of what was wrong for settings like its own, and of reading pictures.

    That of a stage that reads them is one higher since they are all read alike: 16-bit greys were white, and some
    readers left out the turn that EXIF asks for, or what transparency is laid on.
    """
    reads_pictures = any(mark.of_pictures for _, mark in paths_of(stage).values())
    return stage.maths + stage.corrections + reads_pictures


def content_of(path: str, mark: Reads) -> str:
    """One hash of the file or folder `path`, marked as `mark` says. Raises FileNotFoundError naming what is missing."""
    return network_hash(path) if mark.is_network else content_hash(path, mark.holding or None)


def hashed(described: dict) -> str:
    """A short name for a thing so described, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def seed_of_stage(stage: Stage, recipe: Recipe) -> int:
    """The stage's own seed, or the recipe's."""
    return recipe.seed if stage.seed is None else stage.seed


def settings(model: Strict) -> dict:
    """The settings of `model` that can change a result and are not at their defaults; a stage's seed stands apart."""
    dumped = model.model_dump(mode="json", exclude={"kind", "seed"})
    return {
        name: dumped[name]
        for name, field in type(model).model_fields.items()
        if name in dumped
        and not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("presentation"))
        and getattr(model, name) != field.get_default(call_default_factory=True)
    }


def as_written(value: Any, recipe: Recipe) -> Any:
    """`value` with the paths of rewards' settings as the recipe's file says them: they differ by where it is read."""
    if isinstance(value, dict):
        return {as_written(key, recipe): as_written(one, recipe) for key, one in value.items()}
    if isinstance(value, list):
        return [as_written(one, recipe) for one in value]
    return recipe._file_texts.get(value, value) if isinstance(value, str) else value


def reward_files(stage: Stage) -> dict[str, dict[str, str]]:
    """Hashes of the files and folders that the settings of the stage's rewards name, under one key; none for none.

    Whether a reward's setting is a path only the reward knows, so any text is one that names what is there.
    """
    texts = {text for reward in stage.reward_models for text in reward.settings.values() if isinstance(text, str)}
    paths = {text: Path(text) for text in sorted(texts) if text and os.path.exists(text)}
    hashes = {text: folder_hash(path) if path.is_dir() else sha256(path) for text, path in paths.items()}
    return {"reward_files": hashes} if hashes else {}


def reward_sources(stage: Stage) -> dict[str, dict[str, dict[str, str]]]:
    """Hashes of what each of the stage's rewards is made of, under one key; none for none."""
    hashes = {reward.name: source_hashes(reward.name) for reward in stage.reward_models}
    return {"reward_sources": hashes} if hashes else {}


def network_hash(folder: str) -> str:
    """One hash of what is in the folder of a network. Raises FileNotFoundError where it holds no config.json."""
    sha256(Path(folder) / "config.json")
    return folder_hash(Path(folder))


def content_hash(path: str, holding: str | None) -> str:
    """sha256 of a file, or one of all that a folder holds.

    Raises FileNotFoundError naming what is missing: the file or folder, or the file `holding` in it.
    """
    place = Path(path)
    if not place.is_dir():
        return sha256(place)
    if holding is not None and not (place / holding).is_file():
        raise FileNotFoundError(f"{path} holds no {holding}")
    return contents_hash(place)


def student_hash(folder: str) -> str:
    """The fingerprint of the finished stage that `folder` is now, often by a link; its student's hash without one.

    Raises FileNotFoundError where it holds neither.
    """
    place = Path(folder)
    manifest = read_json(place / "manifest.json") if (place / "manifest.json").is_file() else {}
    if isinstance(said := manifest.get("fingerprint"), str):
        return said
    if not (place / "student").is_dir():
        raise FileNotFoundError(f"also: {folder} holds no student; name the folder of a finished distill stage")
    return folder_hash(place / "student")
