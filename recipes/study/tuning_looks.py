"""The looks of the guards of the tuning study, each student's in a small file: how it drifts while it is tuned.

A student that has such a file is not tuned again for its curve.
"""

import json
from pathlib import Path

from rich.console import Console

import kept_values
from mlcm_rl import pipeline
from mlcm_rl.recipe import Recipe, Tuning
from mlcm_rl.report.guard_history import history
from mlcm_rl.storage.files import read_json, write_json

FIGURES = ("step", "guard/distance", "guard/trained_gain", "guard/held_out_gain")


def keep(recipe: Recipe, path: Path) -> None:
    """Write the looks of the guard of the last stage of `recipe` to `path`, unless they are there.

    Raise ValueError if the file there is of another stage.
    """
    fingerprint = kept_values.fingerprint_of(recipe)
    if path.is_file():
        found = read_json(path, fingerprint=str)["fingerprint"]
        kept_values.refuse_other(path, found, fingerprint, f"the looks of stage {found}", "tune")
        return
    tuning = recipe.stages[-1]
    assert isinstance(tuning, Tuning)
    write(path, pipeline.run(recipe)[-1].folder, tuning.batch_size, fingerprint)
    Console().print(str(path), soft_wrap=True)


def write(path: Path, folder: Path, batch_size: int, fingerprint: str) -> None:
    """Write the looks of the finished stage in `folder`, whose steps score `batch_size` pictures, to `path`."""
    looks = [{name: look[name] for name in FIGURES} for look in history(folder)]
    kept_step = read_json(folder / "guard.json", kept_step=int)["kept_step"]
    found = {"fingerprint": fingerprint, "batch_size": batch_size, "kept_step": kept_step, "looks": looks}
    write_json(path, found)


def read(folder: Path, order: list[str]) -> dict[str, list[dict]]:
    """Return what `write` wrote to the files of `folder`, by row in this `order`, others last, its seeds in order."""
    return {
        row: [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for row, paths in kept_values.files_of(folder, order, "json").items()
    }
