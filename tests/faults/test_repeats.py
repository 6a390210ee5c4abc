"""One recipe, run twice: the same bits in every result and in every checkpoint on the way."""

from pathlib import Path

import pytest

import runs
from mlcm_rl import pipeline
from mlcm_rl.storage import checkpoints, files


@pytest.mark.parametrize(
    "kinds", [("trajectories", "distill"), pytest.param(runs.KINDS, marks=pytest.mark.slow)], ids=["first", "every"]
)
def test_two_runs_of_one_recipe_leave_the_same_results_and_checkpoints(tiny_sdxl, tmp_path, monkeypatch, kinds):
    """Checkpoints go when a stage is done, so that they are taken down as they are written."""
    recipe, save_state, seen = runs.of_kinds(tiny_sdxl, tmp_path, kinds), checkpoints.save_state, []

    def noted(folder: Path, *arguments):
        path = save_state(folder, *arguments)
        seen[-1][f"{folder.name}/{path.name}"] = files.checksums(path)
        return path

    monkeypatch.setattr(checkpoints, "save_state", noted)
    left = []
    for name in ("once", "again"):
        seen.append({})
        copy = recipe.model_copy(update={"runs": str(tmp_path / name)})
        pipeline.run(copy)
        left.append(runs.results(copy))
    assert len(seen[0]) >= 4
    assert seen[0] == seen[1]
    assert left[0] == left[1]
