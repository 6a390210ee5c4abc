"""recipes/needs.json, which `mlcm recipes` prints, beside what `mlcm plan` says of each recipe.

With MLCM_RL_UPDATE_NEEDS=1 the file is written anew. Those of recipes for a CPU, and of recipes that read files of the
user's, are as in their headers.
"""

import json
import os
from pathlib import Path

import pytest

from mlcm_rl import pipeline
from mlcm_rl.cost.gpus import DEVICES
from mlcm_rl.cost.launches import Launch
from mlcm_rl.cost.units import in_words, time_in_words
from mlcm_rl.recipe.file import load

RECIPES = Path(__file__).parents[2] / "recipes"
NEEDS = RECIPES / "needs.json"
AS_IN_HEADERS = (
    *("emoji_", "hanzi_", "scenes_", "my_finetune", "sdxl_adapt_text", "sdxl_coco", "sdxl_dmd2", "sdxl_geneval"),
    "tune_published",
)
UPDATE = os.environ.get("MLCM_RL_UPDATE_NEEDS") == "1"


def planned(name: str, tmp_path: Path) -> str:
    """Return hours, memory and disk of a recipe on an H100 in words, before any of it is done."""
    recipe = load(RECIPES / f"{name}.yaml", [f"runs={tmp_path}"])
    stages = pipeline.plan(recipe, memory=True, launch=Launch(), device=DEVICES["h100"])
    memory = in_words(max(stage.memory.total for stage in stages if stage.memory))
    seconds = time_in_words(sum(stage.seconds or 0 for stage in stages))
    return f"{seconds}, {memory} of an H100, {in_words(sum(stage.disk_bytes for stage in stages))} of disk"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(file.stem for file in RECIPES.glob("*.yaml") if not file.stem.startswith(AS_IN_HEADERS))
)
def test_needs_are_what_plan_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPES)
    needs = json.loads(NEEDS.read_text(encoding="utf-8"))
    if UPDATE:
        needs = dict(sorted((needs | {name: planned(name, tmp_path)}).items()))
        NEEDS.write_text(json.dumps(needs, indent=1) + "\n", encoding="utf-8")
    assert needs[name] == planned(name, tmp_path)
