"""What the terms of distillation and tuning refuse in a recipe, each by the setting that is wrong, and their cost."""

import pytest
from pydantic import ValidationError

import runs
from mlcm_rl.cost.evaluations import evaluations_of, network_evaluations
from mlcm_rl.recipe import Full, Lora
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
        (GLOBAL | {"adversarial": {"warmup_steps": 3}}, "adversarial.warmup_steps 3 of 2 steps leave none in which"),
        (GLOBAL | {"adversarial": {"real": "images"}}, "adversarial.real: images needs images"),
        (GLOBAL | {"adversarial": {"width": 6}}, "multiple of 4"),
        (GLOBAL | {"adversarial": {"loss": "wasserstein"}}, "hinge"),
        ({"num_segments": [1], "keep_segments": True}, "keep_segments draws K of earlier phases"),
    ],
)
def test_a_term_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        runs.distill(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_ema": 0.9}, "target_ema has no effect without target: consistency or method: inter_segment"),
        ({"pair": "random"}, "pair has no effect without target: consistency or ends: random"),
        ({"skip": 10}, "skip has no effect without source: online or data"),
        ({"renoise": "student"}, "renoise has no effect without method: inter_segment"),
        ({"num_teacher_steps": 2}, "num_teacher_steps has no effect without method: inter_segment"),
        ({"num_student_steps": 2}, "num_student_steps has no effect without renoise: student"),
        (GLOBAL | {"target": "consistency"}, "target has no effect without method: segments"),
        (GLOBAL | {"source": "online", "prompts": "p.txt"}, "source has no effect without method: segments"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused_with_what_would(changes, message):
    with pytest.raises(ValidationError, match=message):
        runs.distill(**changes)
    assert runs.distill(target=["trajectory", "consistency"], num_segments=[2, 1], pair="random", target_ema=0.9)


def test_terms_keep_the_teacher_in_memory_and_cost_their_passes(tiny_sdxl, tmp_path):
    """By hand, guided by two passes: a store's student costs 1; matching 2 and 1, q = 4 and 5; an adversary 1 and 2.

    Of jumps of 2 steps every other ends at time 0, where a term is.
    """
    settings = {"num_segments": [1], "budgets": [2], "condition_on_target": True}
    expected = {"": 1, "matching": 1 + (2 + 1) / 2 + 4 + 5, "adversarial": 1 + (1 + 2) / 2}
    for term, evaluations in expected.items():
        stage = runs.distill(**settings, **({term: {}} if term else {}))
        assert stage.uses_teacher == bool(term)
        samples = stage.num_steps * stage.batch_size
        assert network_evaluations(stage, runs.recipe(tiny_sdxl, tmp_path, [stage])) == evaluations * samples
    stage = runs.distill(**settings, matching={"fake": {"warmup_steps": 1}})  # of 2
    expected = 1 + (2 + 1) / 2 / 2 + 4 + 5
    assert network_evaluations(stage, runs.recipe(tiny_sdxl, tmp_path, [stage])) == expected * samples
    stage = runs.distill(**settings, adversarial={"warmup_steps": 1, "sees_start": True})  # of 2
    expected = 1 + ((1 + 1) / 2 + 2 + 1) / 2
    assert network_evaluations(stage, runs.recipe(tiny_sdxl, tmp_path, [stage])) == expected * samples
    unguided = runs.distill(**settings, matching={"guidance_scale": 1.0})
    assert network_evaluations(unguided, runs.recipe(tiny_sdxl, tmp_path, [unguided])) == 11 * samples


def test_of_feedback_it_is_on_every_scored_copy_and_its_fake_learns_from_these(tiny_sdxl, tmp_path):
    """By hand, at 2 sampling steps: 1 + 1 of the student; matching 2 guided and 1, and 5 updates; n copies of these."""

    def of_steps(**changes) -> float:
        stage = runs.tuning("feedback", "prompts.txt", **changes)
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
        steps = [one for one in stage.passes(recipe) if one.in_step]
        return evaluations_of(steps) / (stage.num_steps * stage.batch_size)

    assert of_steps() == 2
    assert of_steps(matching={}) == 2 + (2 + 1) + 5
    assert of_steps(matching={"fake": {"num_updates": 2}, "guidance_scale": 1.0}) == 2 + (1 + 1) + 2
    assert of_steps(matching={"fake": {"warmup_steps": 1}}) == 2 + (2 + 1) / 2 + 5  # of 2 steps
    copies = {"gradient": "low_variance", "num_copies": 3}
    assert of_steps(**copies, matching={}) == of_steps(**copies) + 3 * (2 + 1 + 5)
    stage = runs.tuning("feedback", "prompts.txt", matching={}, gradient_accumulation=2, **copies)
    beside = [one.batch for one in stage.passes(runs.recipe(tiny_sdxl, tmp_path, [stage])) if one.role == "fake"]
    assert beside == [2 * 3, 2 * 3]


@pytest.mark.parametrize(("student", "where"), [(Full(), "precision"), (Lora(rank=2), "precision"), (None, None)])
def test_a_fake_score_in_the_teachers_float16_is_refused_whatever_student_is_tuned(tiny_sdxl, tmp_path, student, where):
    """A student of its own float32 weights does not need bf16, and its fake score does."""
    prompts = runs.write_prompts(tmp_path)
    distill = runs.distill(num_segments=[2], adapter=student or Full(), precision="bf16")
    tuned = runs.tuning("feedback", prompts, **({"matching": {}} if student else {}))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), distill, tuned])
    half = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": "float16"})})
    problems = [problem for problem in check(half, Folders(tmp_path, tmp_path)) if "float16" in problem.text]
    assert {problem.key for problem in problems} == ({("stages", 2, where)} if where else set())


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
