"""What the terms of distillation refuse in a recipe, each by the setting that is wrong, and what they cost."""

import pytest
from pydantic import ValidationError

import runs
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.recipe import Full
from mlcm_rl.recipe.file import check
from mlcm_rl.recipe.paths import Folders

GLOBAL = {"method": "inter_segment", "num_segments": [1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matching": {}}, "matching: terms are of clean samples.*num_segments: \\[1\\]"),
        ({"matching": {}, "adversarial": {}}, "matching and adversarial: terms are of clean samples"),
        (GLOBAL | {"matching": {"times": [0.9, 0.1]}}, "times \\[0.9, 0.1\\] must ascend"),
        (GLOBAL | {"matching": {"times": [0.1, 1.1]}}, "less than or equal to 1"),
        (GLOBAL | {"matching": {"weight": 0.0}}, "greater than 0"),
        (GLOBAL | {"matching": {"fake": {"num_updates": 0}}}, "greater than or equal to 1"),
        (GLOBAL | {"matching": {"fake": {"warmup_steps": 2}}}, "warmup_steps 2 of 2 steps leave none in which"),
        (GLOBAL | {"adversarial": {"real": "images"}}, "adversarial.real: images needs images"),
        (GLOBAL | {"adversarial": {"width": 6}}, "width 6 is not a multiple of 4"),
        (GLOBAL | {"adversarial": {"loss": "wasserstein"}}, "hinge"),
        ({"num_segments": [1], "keep_segments": True}, "keep_segments draws K of earlier phases"),
    ],
)
def test_a_term_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        runs.distill(**changes)


def test_terms_keep_the_teacher_in_memory_and_cost_their_passes(tiny_sdxl, tmp_path):
    """By hand, guided by two passes: a store's student costs 1; matching 2 and 1, q = 3 and 5; an adversary 1 and 2.

    Of jumps of 2 steps every other ends at time 0, where a term is.
    """
    settings = {"num_segments": [1], "budgets": [2], "condition_on_target": True, "num_student_steps": 3}
    expected = {"": 1, "matching": 1 + (2 + 1) / 2 + 3 + 5, "adversarial": 1 + (1 + 2) / 2}
    for term, evaluations in expected.items():
        stage = runs.distill(**settings, **({term: {}} if term else {}))
        assert stage.uses_teacher == bool(term)
        samples = stage.num_steps * stage.batch_size
        assert network_evaluations(stage, runs.recipe(tiny_sdxl, tmp_path, [stage])) == evaluations * samples
    stage = runs.distill(**settings, matching={"fake": {"warmup_steps": 1}})  # of 2
    expected = 1 + (2 + 1) / 2 / 2 + 3 + 5
    assert network_evaluations(stage, runs.recipe(tiny_sdxl, tmp_path, [stage])) == expected * samples
    unguided = runs.distill(**settings, matching={"guidance_scale": 1.0})
    assert network_evaluations(unguided, runs.recipe(tiny_sdxl, tmp_path, [unguided])) == 10 * samples


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"adversarial": {}, "precision": "bf16"}, "adversarial"),
        ({"matching": {}, "adapter": Full()}, "precision"),
        ({"matching": {}, "adapter": Full(), "precision": "bf16"}, None),
        ({"matching": {}, "precision": "bf16"}, None),
    ],
)
def test_gradients_in_the_teachers_float16_are_refused(tiny_sdxl, tmp_path, changes, where):
    prompts = runs.write_prompts(tmp_path)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), runs.distill(**GLOBAL | changes)])
    half = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": "float16"})})
    problems = [problem for problem in check(half, Folders(tmp_path, tmp_path)) if "float16" in problem.text]
    assert [problem.key for problem in problems] == ([("stages", 1, where)] if where else [])
