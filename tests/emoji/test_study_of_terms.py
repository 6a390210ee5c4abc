"""The study of terms: every row is a recipe of as many steps, and its table is the mean over seeds by hand."""

from pathlib import Path

import pytest

import protocol
import terms
from mlcm_rl.recipe import Distill
from mlcm_rl.recipe.file import check, load
from mlcm_rl.recipe.paths import Folders


@pytest.mark.parametrize("subject", terms.BASES)
def test_every_row_is_a_valid_recipe_of_as_many_steps(subject):
    base = load(protocol.RECIPES / terms.BASES[subject], [])
    for row in terms.ROWS:
        recipe = terms.recipe_of(base, row, 1, 400, 128)
        assert check(recipe, Folders(Path(), Path())) == []
        assert sum(stage.num_steps for stage in recipe.stages if isinstance(stage, Distill)) == 400


def test_a_cell_is_the_mean_over_seeds_prompt_by_prompt():
    """Two seeds, three prompts: their means are 2, 3 and 4, of which the deviation is 1."""
    seeds = [{"mean": 2.0, "se": 0.5, "values": [1.0, 2.0, 3.0]}, {"mean": 4.0, "se": 0.5, "values": [3.0, 4.0, 5.0]}]
    assert protocol.cell(seeds) == "3.0000 +- 0.5774"
    assert protocol.cell([{"mean": 2.0, "se": 0.5, "values": []}, None]) == "2.0000 +- 0.5000"
    assert protocol.cell([None]) == ""
