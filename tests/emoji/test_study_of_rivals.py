"""The study of rivals: every row is a recipe, its evaluations are those of ours, and the steps are found by hand."""

import itertools
import json
from pathlib import Path

import pytest

import kept_values
import rivals
import tables
import terms
from mlcm_rl.recipe import Distill, Evaluate
from mlcm_rl.recipe.file import check, load
from mlcm_rl.recipe.paths import Folders

HERE = Folders(Path(), Path())  # a loaded recipe has its paths as this process sees them


@pytest.fixture(scope="module", params=rivals.BASES)
def subject(request):
    return request.param, load(terms.protocol.RECIPES / rivals.BASES[request.param], [])


@pytest.mark.parametrize("row", [*rivals.ROWS, *rivals.TUNED])
def test_every_row_is_a_valid_recipe_of_equal_evaluations(subject, row):
    name, base = subject
    recipe = rivals.recipe_of(base, name, row, 1, 2000, 128)
    problems = [problem for problem in check(recipe, HERE) if problem.key[-1] != "images"]
    assert problems == []
    ours = rivals.recipe_of(base, name, "ours", 0, 2000, 128)
    assert [stage.num_steps for stage in ours.stages if isinstance(stage, Distill)] == [2000]
    counts = [rivals.evaluations(one, one.stages) for one in (recipe, ours)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
    measured = [stage.sampling_steps for stage in recipe.stages if isinstance(stage, Evaluate)]
    assert sorted(steps for one in measured for steps in one) == [1, 2, 3, 4, 6, 8]
    of_each = {"lightning": [[6, 8], [3, 4], [1, 2]], "hyper_sd": [[6, 8], [3, 4], [2], [1]]}
    assert measured == of_each.get(row, [[1, 2, 3, 4, 6, 8]])
    for before, stage in itertools.pairwise(recipe.stages):
        if isinstance(stage, Evaluate) and row in of_each:
            assert max(stage.sampling_steps) == before.num_segments[0]  # the student that is for that number


@pytest.mark.parametrize("row", ["pcm", "lightning", "lightning_one_step", "hyper_sd", "ours"])
def test_a_row_is_written_as_a_recipe_whose_stages_are_the_studys(subject, row, tmp_path):
    """All but evaluations: how a file names a folder of a reward's settings is part of theirs."""
    name, base = subject
    recipe = rivals.recipe_of(base, name, row, 1, 400, 16)
    rivals.protocol.write_recipes([recipe], tmp_path)
    written = load(tmp_path / f"{recipe.name}.yaml")
    trained = [
        one.model_copy(update={"stages": [stage for stage in one.stages if not isinstance(stage, Evaluate)]})
        for one in (recipe, written)
    ]
    assert [len(one.stages) > 1 for one in trained] == [True, True]
    assert len(set(map(kept_values.fingerprint_of, trained))) == 1
    assert written.stages[-1].sampling_steps == recipe.stages[-1].sampling_steps


def test_the_budget_is_counted_by_hand(subject):
    """A trajectory is 24 guided steps, a step of ours one pass a sample; LCM's are four, without a store."""
    name, base = subject
    store, batch = base.stages[0], rivals.protocol.first_of(base, Distill).batch_size
    budget = (store.num_trajectories + store.num_held_out) * 24 * 2 + 2000 * batch
    ours = rivals.recipe_of(base, name, "ours", 0, 2000, 128)
    assert rivals.evaluations(ours, ours.stages) == budget
    (lcm,) = rivals.recipe_of(base, name, "lcm", 0, 2000, 128).stages[:-1]
    assert lcm.num_steps == round(budget / batch / 4)


def test_the_one_step_student_turns_to_x0_before_the_adversary_is_there(subject):
    name, base = subject
    *_, first, second = [
        stage
        for stage in rivals.recipe_of(base, name, "lightning_one_step", 0, 2000, 128).stages
        if isinstance(stage, Distill)
    ]
    prediction = "x0" if name == "emoji" else "teacher"  # the scenes' teacher is a flow
    assert [(one.prediction, one.num_segments) for one in (first, second)] == [(prediction, [1])] * 2
    assert [one.terms for one in (first, second)] == [[], ["adversarial"]]


def test_steps_are_the_nearest_to_the_budget_and_a_store_beyond_it_is_refused():
    assert [rivals.steps_within(budget, lambda steps: 100 + 7 * steps) for budget in (107, 138, 139, 800)] == [
        1,
        5,
        6,
        100,
    ]
    with pytest.raises(ValueError, match="takes 107 evaluations of 106: raise --steps"):
        rivals.steps_within(106, lambda steps: 100 + 7 * steps)


def test_a_tuned_student_is_not_taken_for_the_one_before_it_and_the_teacher_is_last(tmp_path):
    def row(role: str, name: str, value: float) -> dict:
        metrics = {"distance": {"values": [value, value]}}
        return {"role": role, "name": name, "sampler": "gamma 0", "num_evaluations": 4, "metrics": metrics}

    report = tmp_path / "report.json"
    for seed in (0, 1):
        rows = [row("student", "student", 1.0), row("student", "feedback", 2.0 + seed), row("undistilled", "DDIM", 3.0)]
        report.write_text(json.dumps({"rows": rows}))
        kept_values.write(tmp_path / f"ours_feedback-{seed}.safetensors", [report], False, "0123")
    kept_values.write(tmp_path / "teacher.safetensors", [report], True, "0123")
    kept_values.write(tmp_path / "aside-0.safetensors", [report], False, "0123")
    columns = ("distance", "r@5")
    head, *lines = tables.in_words(tables.lines_of(tmp_path, columns, ["lcm", "ours_feedback"]), columns)
    assert head[-2:] == ["distance", "r@5"]
    assert [(one[0], *one[3:]) for one in lines] == [
        ("ours_feedback", "2", "1.0000 +- 0.0000", ""),
        ("ours_feedback (feedback)", "2", "2.5000 +- 0.0000", ""),
        ("aside", "1", "1.0000 +- 0.0000", ""),
        ("aside (feedback)", "1", "3.0000 +- 0.0000", ""),
        ("DDIM", "1", "3.0000 +- 0.0000", ""),
    ]
