"""The gamma that a student is sampled with: that of its tuning, or the default for its kind."""

from pathlib import Path
from typing import Any

from ..recipe.experiment import TUNING
from ..storage.files import read_json
from .student_description import default_gamma_in, describe


def tuned_from(folder: Path) -> tuple[str, float] | None:
    """Return the stage whose student the one in `folder` was tuned from, by name, and the gamma of its tuning.

    None for a student that is not tuned.
    """
    path = folder.parent / "manifest.json"
    manifest: dict[str, Any] = read_json(path) if path.is_file() else {}
    if manifest.get("kind") not in TUNING:
        return None
    gamma = manifest["stage"]["gamma"]
    return str(origin_of(manifest)), default_gamma_of(folder) if gamma is None else gamma


def origin_of(manifest: dict[str, Any]) -> str | None:
    """Return the stage whose student the stage of a `manifest` went on from, by its folder's name; None without one."""
    parents = manifest["parents"]
    return parents.get("start", parents.get("distill"))


def own_gamma(folder: Path) -> float:
    """Return the gamma that the student in `folder` was tuned under, or the default for its kind."""
    origin = tuned_from(folder)
    return default_gamma_of(folder) if origin is None else origin[1]


def default_gamma_of(folder: Path) -> float:
    """Return the default gamma for the student in `folder`, by its student.json."""
    return default_gamma_in(describe(folder))
