"""The study of terms: every row is a recipe of as many steps, and its table is the mean over seeds by hand."""

from pathlib import Path

import pytest
import torch

import protocol
import terms
from mlcm_rl.recipe import Distill
from mlcm_rl.recipe.file import check, load
from mlcm_rl.recipe.paths import Folders


@pytest.mark.parametrize("subject", terms.BASES)
def test_every_row_is_a_valid_recipe_of_as_many_steps(subject):
    base = load(protocol.RECIPES / terms.BASES[subject], [])
    for row in terms.ROWS:
        recipe = terms.recipe_of(base, subject, row, 1, 400, 128)
        assert check(recipe, Folders(Path(), Path())) == []
        assert sum(stage.num_steps for stage in recipe.stages if isinstance(stage, Distill)) == 400


def test_a_cell_is_the_mean_over_seeds_prompt_by_prompt():
    """Two seeds, three prompts: their means are 2, 3 and 4, of which the deviation is 1."""
    seeds = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 4.0, 5.0])]
    assert protocol.cell(seeds) == "3.0000 +- 0.5774"
    assert protocol.cell([]) == protocol.cell([torch.tensor([torch.nan])]) == ""


def test_a_table_by_steps_has_the_best_sampler_of_each_student():
    head = ["student", "sampler", "evaluations", "seeds", "distance", "r@5"]
    lines = [
        ["a", "gamma 0", "4", "2", "0.5000 +- 0.1000", "0.7000 +- 0.1000"],
        ["a", "gamma 1", "4", "2", "0.6000 +- 0.1000", "0.8000 +- 0.1000"],
        ["a", "gamma 1", "16", "2", "0.7000 +- 0.1000", ""],
        ["b", "gamma 0", "4", "1", "-0.1000 +- 0.1000", "0.1000 +- 0.1000"],
    ]
    assert protocol.by_steps([head, *lines], "distance") == [
        ["student", "seeds", "4", "16"],
        ["a", "2", "0.500 +- 0.100", "0.700 +- 0.100"],
        ["b", "1", "-0.100 +- 0.100", "-"],
    ]
    by_recall = protocol.by_steps([head, *lines], "r@5")
    assert [row[2] for row in by_recall[1:]] == ["0.800 +- 0.100", "0.100 +- 0.100"]
    assert protocol.markdown(by_recall).splitlines() == [
        "| student | seeds | 4 | 16 |",
        "| --- | --: | --: | --: |",
        "| a | 2 | 0.800 +- 0.100 | - |",
        "| b | 1 | 0.100 +- 0.100 | - |",
    ]


def test_kid_is_said_in_thousandths():
    assert protocol.shortened("0.0076 +- 0.0014", "teacher_kid") == "7.6 +- 1.4"
    assert protocol.title_of("teacher_patch_kid").startswith("1,000 KID of patches to the teacher, by network")
    assert protocol.title_of("distance").startswith("Distance, by network evaluations")
