"""A cache of estimates of memory and operations.

It is the folder `$MLCM_RL_ESTIMATES` (~/.cache/mlcm_rl/estimates). An estimate's file is named by a hash of all that it
depends on, our code included; a damaged one is computed again.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..recipe import Recipe, Stage
from ..recipe.reads import reads_of
from ..rewards.weights import weights_folder
from ..storage.caches import cache_folder
from ..storage.files import CheckpointError, read_json, write_json
from ..storage.hashing import sha256_once
from .fingerprint import hashed, reward_files, reward_sources

MODEL_PACKAGES = ("torch", "diffusers", "transformers", "peft")  # whose models an estimate runs
# Settings of a stage that change nothing in an estimate; of settings that name files only their presence counts.
WITHOUT = ("seed", "learning_rate", "log_every", "save_every", "sample_every", "held_out_every", "keep_checkpoints")


def cached(description: dict[str, Any], estimate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `estimate`, from the cache where one of this `description` is there."""
    path = folder() / f"{hashed(description)}.json"
    with suppress(CheckpointError, OSError):
        entry = read_json(path, description=dict, estimate=dict, seal=str)
        if entry["description"] == _through_json(description) and entry["seal"] == hashed(entry["estimate"]):
            return entry["estimate"]
    result = _through_json(estimate())
    with suppress(CheckpointError, OSError):  # a full disk costs a repetition alone
        write_json(path, {"description": description, "estimate": result, "seal": hashed(result)})
    return result


def folder() -> Path:
    """Return the folder of the cache."""
    return cache_folder("estimates", "MLCM_RL_ESTIMATES")


def description(stage: Stage, recipe: Recipe, teacher: Path, **others: Any) -> dict[str, Any]:
    """Return all that an estimate of `stage` depends on; `teacher` is the folder of its shapes."""
    settings = stage.model_dump(mode="json", exclude=set(WITHOUT))
    settings |= {name: bool(settings[name]) for name in (*reads_of(stage), "also") if name in settings}
    small = getattr(stage, "small_decoder", None)
    return {
        "stage": settings,
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"path", "revision"}),
        "shapes": {path.relative_to(teacher).as_posix(): sha256_once(path) for path in _configurations(teacher)},
        "small_decoder": sha256_once(Path(small) / "config.json") if small else None,
        "grid": len(recipe.samples.prompts),
        "fetched": sorted(path.parent.name for path in weights_folder().glob("*/origin.json")),  # rewards' weights
        **reward_files(stage),
        **reward_sources(stage),
        "code": _code(),
        **others,
    }


def _configurations(teacher: Path) -> list[Path]:
    """Return the files that shapes are read from: the configurations of components and of tokenizers."""
    return sorted([*teacher.glob("model_index.json"), *teacher.glob("*/*config.json")])


@cache
def _code() -> dict[str, str]:
    """Return a hash of this package's files, and the versions of the packages that define the models."""
    package = Path(__file__).parents[1]
    files = {path.relative_to(package).as_posix(): sha256_once(path) for path in sorted(package.rglob("*.py"))}
    return {"mlcm_rl": hashed(files)} | {name: version(name) for name in MODEL_PACKAGES}


def _through_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` as it is after a round trip through JSON."""
    return json.loads(json.dumps(value))
