"""The bundle that a step leaves behind when it stops before its update, and how that step is repeated from it.

All randomness is a function of (seed, purpose, step), so that a checkpoint from before the step is enough to repeat it.
The bundle beside it records which step of which stage it was, and its figures.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ..recipe import Recipe, Stage, paths
from ..storage.checkpoints import checkpoints
from ..storage.files import CheckpointError, read_json, write_json
from ..storage.untrusted import path_inside

FORMAT = 1  # of a bundle
UNKNOWN = "unknown"  # a figure: DeepSpeed tells no gradient norm without an update
REQUEST = "replay.json"  # in the folder of a replay: the step to stop in, before its update


def write(folder: Path, stage: Stage, recipe: Recipe, parents: dict[str, Path], figures: dict) -> Path:
    """Write the bundle of a step of `stage` into its folder, with the step's `figures`. Return its path."""
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
    """Return the figures of a bundle, its stage, its recipe without trackers, and the folders of the stage's parents.

    Raise CheckpointError if the file is not a bundle or a folder does not exist.
    """
    bundle = read_json(path)
    if bundle.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a bundle of format {FORMAT}: a step that stops leaves a nonfinite-<step>.json"
        )
    bundle = read_json(path, figures=dict, stage=dict, recipe=dict, parents=dict)
    try:
        recipe = paths.recorded(bundle | {"recipe": bundle["recipe"] | {"trackers": []}}, path.parent)
        alone = bundle["recipe"] | {"stages": [bundle["stage"]]}
        (stage,) = paths.recorded(bundle | {"recipe": alone}, path.parent).stages
    except ValidationError as error:
        raise CheckpointError(f"{path} is of another version: {error.error_count()} settings are unknown") from error
    parents = {kind: path_inside(path.parent.parent, name, path) for kind, name in bundle["parents"].items()}
    for kind, folder in parents.items():
        if not folder.is_dir():
            raise CheckpointError(f"{path} starts from the {kind} stage in {folder}, which is not there")
    figures = bundle["figures"]
    if any(type(figures.get(name)) is not int for name in ("step", "update")):
        raise CheckpointError(f"{path} is damaged: its figures do not say their step")
    return figures, stage, recipe, parents


def prepare(figures: dict, bundle: Path, folder: Path) -> None:
    """Fill `folder` so that the stage goes on in it from the bundle's checkpoint and stops before the step's update."""
    (folder / "checkpoints").mkdir()
    for checkpoint in checkpoints(bundle.parent.resolve()):
        if int(checkpoint.name.removeprefix("step-")) <= figures["step"]:
            (folder / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    write_json(folder / REQUEST, {"step": figures["step"], "update": figures["update"]})


def stop_point(folder: Path) -> tuple[int, int] | None:
    """Return the step, and the update within it, before which a replay in `folder` stops; None without a replay."""
    if not (folder / REQUEST).is_file():
        return None
    request = read_json(folder / REQUEST)
    return request["step"], request["update"]


def plain(values: Sequence[float | None]) -> list[float | str]:
    """Return `values` for JSON, which has no NaN or infinity: those as text, and None as what is not known."""
    return [UNKNOWN if value is None else value if math.isfinite(value) else str(value) for value in values]


def differ(then: dict, now: dict) -> bool:
    """Return whether figures of a step are others now than then, of those that both know."""
    return any(then[name] != now[name] for name in then if UNKNOWN not in (then[name], now[name]))
