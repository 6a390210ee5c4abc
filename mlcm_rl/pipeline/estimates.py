"""Estimates of memory and operations that were made before, found by all that they depend on.

They are kept in `$MLCM_RL_ESTIMATES` (~/.cache/mlcm_rl/estimates), which may be deleted at any time. An estimate is
found by its description and the code that made it; one that is damaged, or of another description, is made again.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..recipe import Recipe, Stage
from ..recipe.reads import reads_of
from ..rewards.weights import cache_folder
from ..storage.files import CheckpointError, read_json, write_json
from ..storage.hashing import sha256_once
from .fingerprint import hashed, reward_files, reward_sources

READ_BY = ("torch", "diffusers", "transformers", "peft")  # packages whose models an estimate goes through
# Settings of a stage that change nothing of an estimate; of those that name what is read only whether they are given.
WITHOUT = ("seed", "learning_rate", "log_every", "save_every", "sample_every", "held_out_every", "keep_checkpoints")


def remembered(description: dict[str, Any], estimate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `estimate` gives for what is so described, without calling it where that was done before."""
    path = folder() / f"{hashed(description)}.json"
    with suppress(CheckpointError, OSError):
        kept = read_json(path, description=dict, estimate=dict, seal=str)
        if kept["description"] == _as_read(description) and kept["seal"] == hashed(kept["estimate"]):
            return kept["estimate"]
    made = _as_read(estimate())
    with suppress(CheckpointError, OSError):  # a disk that takes no more costs a repetition alone
        write_json(path, {"description": description, "estimate": made, "seal": hashed(made)})
    return made


def folder() -> Path:
    """Return where estimates are kept."""
    return Path(os.environ.get("MLCM_RL_ESTIMATES", "~/.cache/mlcm_rl/estimates")).expanduser()


def described(stage: Stage, recipe: Recipe, teacher: Path, **others: Any) -> dict[str, Any]:
    """Return all that an estimate of `stage` depends on, of the shapes of the `teacher` in a folder and of `others`."""
    settings = stage.model_dump(mode="json", exclude=set(WITHOUT))
    settings |= {name: bool(settings[name]) for name in (*reads_of(stage), "also") if name in settings}
    small = getattr(stage, "small_decoder", None)
    return {
        "stage": settings,
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"path", "revision"}),
        "shapes": {path.relative_to(teacher).as_posix(): sha256_once(path) for path in _configurations(teacher)},
        "small_decoder": sha256_once(Path(small) / "config.json") if small else None,
        "grid": len(recipe.samples.prompts),
        "fetched": sorted(path.parent.name for path in cache_folder().glob("*/origin.json")),  # rewards' weights
        **reward_files(stage),
        **reward_sources(stage),
        "code": _code(),
        **others,
    }


def _configurations(teacher: Path) -> list[Path]:
    """Return what shapes are read from: every component's configuration, and how many tokens a prompt has."""
    return sorted([*teacher.glob("model_index.json"), *teacher.glob("*/*config.json")])


@cache
def _code() -> dict[str, str]:
    """Return what makes an estimate: this package's own files, and the versions of those that define the models."""
    package = Path(__file__).parents[1]
    files = {path.relative_to(package).as_posix(): sha256_once(path) for path in sorted(package.rglob("*.py"))}
    return {"mlcm_rl": hashed(files)} | {name: version(name) for name in READ_BY}


def _as_read(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` as JSON gives it back."""
    return json.loads(json.dumps(value))
