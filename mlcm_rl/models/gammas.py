"""The gamma that a student is sampled with: what it was tuned under, or what suits it."""

from pathlib import Path
from typing import Any

from ..recipe.experiment import TUNING
from ..recipe.types import default_gamma
from ..storage.files import read_json
from .students import describe


def tuned_from(folder: Path) -> tuple[str, float] | None:
    """Name of the distill stage that a tuned student in `folder` started from, and the gamma that it was tuned under.

    None for a student that is not tuned.
    """
    manifest = folder.parent / "manifest.json"
    kept: dict[str, Any] = read_json(manifest) if manifest.is_file() else {"kind": None}
    if kept["kind"] not in TUNING:
        return None
    gamma = kept["stage"]["gamma"]
    return kept["parents"]["distill"], suited_gamma(folder) if gamma is None else gamma


def own_gamma(folder: Path) -> float:
    """The gamma that the student in `folder` was tuned under, or what suits it."""
    tuned = tuned_from(folder)
    return suited_gamma(folder) if tuned is None else tuned[1]


def suited_gamma(folder: Path) -> float:
    """The gamma that suits the student in `folder`, by what it says of itself."""
    described = describe(folder)
    return default_gamma(described["num_segments"], described["conditioned"])
