"""The study of terms: every row is a recipe of as many steps, and its table is the mean over seeds by hand."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import protocol
import tables
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


def test_a_mean_is_over_seeds_prompt_by_prompt():
    """Two seeds, three prompts: their means are 2, 3 and 4, of which the deviation is 1."""
    seeds = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 4.0, 5.0])]
    means = tables.means_of({"distance": seeds, "r@5": [torch.tensor([torch.nan])]}, ("distance", "r@5", "r@1"))
    assert means == {"distance": pytest.approx((3.0, 3**-0.5))}
    (_, written) = tables.in_words([tables.Line("a", "gamma 0", 4, 2, means)], ("distance", "r@5"))
    assert written == ["a", "gamma 0", "4", "2", "3.0000 +- 0.5774", ""]


def test_a_table_by_steps_has_the_best_sampler_of_each_student():
    lines = [
        tables.Line("a", "gamma 0", 4, 2, {"distance": (0.5, 0.1), "r@5": (0.7, 0.1)}),
        tables.Line("a", "gamma 1", 4, 2, {"distance": (0.6, 0.1), "r@5": (0.8, 0.1)}),
        tables.Line("a", "gamma 1", 16, 2, {"distance": (0.7, 0.1)}),
        tables.Line("b", "gamma 0", 4, 1, {"distance": (-0.1, 0.1), "r@5": (0.1, 0.1)}),
    ]
    assert tables.by_steps(lines, "distance") == [
        ["student", "seeds", "4", "16"],
        ["a", "2", "0.500 +- 0.100", "0.700 +- 0.100"],
        ["b", "1", "-0.100 +- 0.100", "-"],
    ]
    by_recall = tables.by_steps(lines, "r@5")
    assert [row[2] for row in by_recall[1:]] == ["0.800 +- 0.100", "0.100 +- 0.100"]
    assert tables.markdown(by_recall).splitlines() == [
        "| student | seeds | 4 | 16 |",
        "| --- | --: | --: | --: |",
        "| a | 2 | 0.800 +- 0.100 | - |",
        "| b | 1 | 0.100 +- 0.100 | - |",
    ]


def test_kid_is_said_in_thousandths():
    assert tables.shortened((0.0076, 0.0014), "teacher_kid") == "7.6 +- 1.4"
    assert tables.title_of("teacher_patch_kid").startswith("1,000 KID of patches to the teacher, by network")
    assert tables.title_of("distance").startswith("Distance, by network evaluations")


def test_a_row_that_there_is_not_is_refused_by_name(capsys):
    parser = protocol.options("", ["emoji"], ["forms"])
    arguments = parser.parse_intermixed_args(["emoji", "forms", "--rows", "local,globl", "runs=x"])
    assert (arguments.group, arguments.overrides) == ("forms", ["runs=x"])
    with pytest.raises(SystemExit):
        protocol.rows_of(parser, arguments, ["local", "global"])
    assert "--rows: there is no globl, only local, global" in capsys.readouterr().err
    asked = parser.parse_intermixed_args(["emoji", "forms", "--rows", "local"])
    assert protocol.rows_of(parser, asked, ["local", "global"]) == ["local"]
    assert protocol.rows_of(parser, parser.parse_intermixed_args(["emoji", "forms", "--tables"]), ["local"]) == []


@pytest.mark.parametrize(
    ("steps", "prompts", "message"),
    [
        (400, 2, "global: distribution needs num_prompts of 3 or more, is 2"),
        (400, 10**6, r"global: stages\[3\].num_prompts: .* num_prompts is 1000000"),
        (4, 128, "global: num_steps.*greater than 0"),
    ],
)
def test_options_that_make_no_recipe_end_the_study_before_anything_runs(capsys, steps, prompts, message):
    base = load(protocol.RECIPES / terms.BASES["emoji"], [])
    made, parser = partial(terms.recipe_of, base, "emoji", "global", 0, steps, prompts), protocol.options("", ["emoji"])
    with pytest.raises(SystemExit):
        protocol.checked(parser, "global", made)
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_without_students_says_so(tmp_path, capsys):
    tables.write(tmp_path, ("distance",), ["local"])
    assert "is measured yet" in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []
