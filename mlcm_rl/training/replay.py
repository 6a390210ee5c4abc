"""What a step that stopped before its update leaves behind, and what repeats that step from it.

All randomness is a function of (seed, purpose, step), so that a checkpoint from before the step is all that its figures
need: the bundle beside it says which step of which stage it was, and what came out.
"""

import math
from pathlib import Path

from pydantic import ValidationError

from ..recipe import Recipe, Stage, paths
from ..storage.checkpoints import checkpoints
from ..storage.files import CheckpointError, read_json, write_json
from ..storage.untrusted import path_inside

FORMAT = 1  # of a bundle
REQUEST = "replay.json"  # in a folder made for a replay: the step to stop before


def write(folder: Path, stage: Stage, recipe: Recipe, parents: dict[str, Path], figures: dict) -> Path:
    """Leave the bundle of a step of `stage` in its folder: the `figures` that it stopped with, and what made them."""
    path = folder / f"nonfinite-{figures['step'] + 1}.json"
    bundle = {
        "format": FORMAT,
        "figures": figures,
        "stage": stage.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "parents": {kind: parent.name for kind, parent in parents.items()},
    }
    write_json(path, bundle)
    return path


def read(path: Path) -> tuple[dict, Stage, Recipe, dict[str, Path]]:
    """The figures of a bundle, its stage, its recipe without trackers, and the folders that the stage starts from.

    Raises CheckpointError where it is no bundle or a folder is gone.
    """
    bundle = read_json(path)
    if bundle.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no bundle of format {FORMAT}: a step that stops leaves a nonfinite-<step>.json"
        )
    bundle = read_json(path, figures=dict, stage=dict, recipe=dict, parents=dict)
    try:
        recipe = paths.recorded(bundle | {"recipe": bundle["recipe"] | {"trackers": []}}, path.parent)
        alone = bundle["recipe"] | {"stages": [bundle["stage"]]}
        (stage,) = paths.recorded(bundle | {"recipe": alone}, path.parent).stages
    except ValidationError as error:
        raise CheckpointError(f"{path} is of another version: {error.error_count()} settings are not known") from error
    parents = {kind: path_inside(path.parent.parent, name, path) for kind, name in bundle["parents"].items()}
    for kind, folder in parents.items():
        if not folder.is_dir():
            raise CheckpointError(f"{path} starts from the {kind} stage in {folder}, which is not there")
    figures = bundle["figures"]
    if any(type(figures.get(name)) is not int for name in ("step", "update")):
        raise CheckpointError(f"{path} is damaged: its figures are of no step")
    return figures, stage, recipe, parents


def prepare(figures: dict, bundle: Path, folder: Path) -> None:
    """Make `folder` one in which the stage goes on from the bundle's checkpoint and stops before the step's update."""
    (folder / "checkpoints").mkdir()
    for kept in checkpoints(bundle.parent.resolve()):
        if int(kept.name.removeprefix("step-")) <= figures["step"]:
            (folder / "checkpoints" / kept.name).symlink_to(kept)
    write_json(folder / REQUEST, {"step": figures["step"], "update": figures["update"]})


def stop_point(folder: Path) -> tuple[int, int] | None:
    """The step, and the update within it, that a replay in `folder` stops before; None where `folder` is a stage's."""
    if not (folder / REQUEST).is_file():
        return None
    found = read_json(folder / REQUEST)
    return found["step"], found["update"]


def plain(values: list[float]) -> list[float | str]:
    """`values` for JSON, which has no word for those that are not numbers."""
    return [value if math.isfinite(value) else str(value) for value in values]
