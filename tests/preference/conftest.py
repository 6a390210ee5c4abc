"""Pictures to judge by hand with the page that asks, and a distilled student to tune."""

import pytest

import runs
from labelling import choices, opened, served
from mlcm_rl import pipeline
from mlcm_rl.recipe import Lora

__all__ = ["choices", "opened", "served"]


@pytest.fixture(scope="module")
def distilled(tiny_sdxl, tmp_path_factory):
    """A recipe and the folder of its distilled student."""
    folder = tmp_path_factory.mktemp("distilled")
    prompts = runs.write_prompts(folder)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[1], adapter=Lora(rank=2, alpha=2.0))]
    recipe = runs.recipe(tiny_sdxl, folder, stages)
    return recipe, pipeline.run(recipe)[-1].folder
