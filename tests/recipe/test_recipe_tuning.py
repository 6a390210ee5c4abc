"""What a recipe's stages of preference learning refuse, each by the setting that is wrong."""

from pathlib import Path

import pytest
from pydantic import ValidationError

import runs
from mlcm_rl.recipe import Distill, Feedback, shipped
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import RecipeError, key_text

MPS = {"shape": "mps_hinge", "rewards": [{"name": "mps"}]}

RECIPES = shipped.folder("recipes")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("feedback", {"num_grad_steps": 3}, "num_grad_steps 3 is more than sampling_steps 2"),
        ("feedback", {"kl": 0.1, "gamma": 0.0}, "kl needs gamma above 0"),
        ("feedback", {"rewards": [{"name": "colourfulness"}]}, "guard.rewards: colourfulness is trained on"),
        ("feedback", {"rewards": []}, "at least 1 item"),
        ("feedback", {"guard": {"rewards": []}}, "at least 1 item"),
        ("feedback", {"kl": 0.1, "sampling_steps": 1}, "kl needs sampling_steps 2 or more"),
        ("feedback", {"shape": "mps_hinge", "batch_size": 1}, "shape: mps_hinge needs batch_size 2 or more"),
        ("feedback", {"shape": "mps_hinge"}, "threshold: set it for mps_hinge, here in the summed reward's own scale"),
        ("feedback", MPS | {"normalise": True}, "threshold: set it for mps_hinge, here in running deviations"),
        ("feedback", MPS | {"rewards": [{"name": "mps", "weight": 0.5}]}, "threshold: set it for mps_hinge"),
        ("feedback", {"threshold": 2.0}, "threshold has no meaning for shape negative"),
        (
            "feedback",
            {"guard": {"rewards": [{"name": "colourfulness"}], "num_prompts": 1}},
            "greater than or equal to 2",
        ),
        ("dpo", {"form": "pso", "sampling_steps": 1}, "form pso needs sampling_steps 2 or more"),
        ("dpo", {"form": "pso", "gamma": 0.0}, "form pso needs gamma above 0"),
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing has no meaning for sigmoid"),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ("dpo", {"num_generations": 1}, "greater than or equal to 2"),
        ("dpo", {"form": "pso", "gamma": 1.0, "kappa": 0.1}, "kappa has no meaning for form pso"),
        ("dpo", {"form": "pso", "gamma": 1.0, "pairs": "pairs"}, "form pso learns the steps of the student's own"),
        ("dpo", {"pairs": "pairs", "num_generations": 8}, "num_generations is of the student's own samples"),
        ("dpo", {"pairs": "pairs", "min_margin": 0.1}, "min_margin is of the student's own samples"),
        ("feedback", {"rewards": [{"name": "sharpness", "max_drop": 0.1}]}, "rewards: all have max_drop"),
        ("feedback", {"rewards": [{"name": "brightness", "weight": 0}]}, "rewards: all weights are 0"),
        (
            "feedback",
            {"rewards": ["brightness", {"name": "sharpness", "max_drop": 0.1, "weight": 2.0}]},
            "weight has no meaning beside max_drop",
        ),
        ("feedback", {"form": "bounded", "num_grad_steps": 2}, "num_grad_steps: form bounded has the target of one"),
        ("feedback", {"surrogate": {}, "shape": "hinge"}, "shape hinge is of rewards with a gradient"),
        ("feedback", {"surrogate": {}, "gradient": "low_variance"}, "low_variance scores copies of a sample"),
        ("feedback", {"num_copies": 3}, "num_copies is of gradient: low_variance"),
        (
            "feedback",
            {"gradient": "low_variance", "num_grad_steps": 2},
            "num_grad_steps is of gradient: last and random",
        ),
        ("feedback", {"surrogate": {"num_generations": 3}}, "whole groups of surrogate.num_generations 3"),
        ("feedback", {"surrogate": {"width": 6}}, "multiple of 4"),
        ("feedback", {"surrogate": {"head_start": 9}, "num_steps": 9}, "head_start 9 of num_steps 9 leaves no step in"),
        ("feedback", {"matching": {"fake": {"warmup_steps": 2}}}, "warmup_steps 2 of 2 steps leave none in which the"),
        ("feedback", {"matching": {"times": [0.9, 0.1]}}, "times \\[0.9, 0.1\\] must ascend"),
        ("feedback", {"matching": {"weight": 0.0}}, "greater than 0"),
        ("dpo", {"matching": {}}, "matching"),
        ("feedback", {"target_bound": 0.2}, "target_bound is of form bounded"),
        ("feedback", {"multiplier_rate": 0.2}, "multiplier_rate is of rewards with max_drop"),
        (
            "dpo",
            {"rewards": ["brightness", {"name": "sharpness", "max_drop": 0.1}], "pairs": "pairs"},
            "max_drop of sharpness is measured on samples",
        ),
        ("policy", {"batch_size": 3}, "whole groups of num_generations 2"),
        ("policy", {"batch_size": 4, "gradient_accumulation": 4}, "whole groups of num_generations 2"),
        ("policy", {"gamma": 0.0}, "gamma must be above 0"),
        ("policy", {"sampling_steps": 1}, "sampling_steps 2 or more"),
    ],
)
def test_a_stage_that_cannot_work_is_refused(kind, changes, message):
    with pytest.raises(ValidationError, match=message):
        runs.tuning(kind, "prompts.txt", **changes)


@pytest.mark.parametrize(
    ("changes", "normalise", "threshold"),
    [
        ({}, True, 0.0),
        ({"shape": "hinge"}, True, 0.0),
        (MPS, False, 16.0),
        (MPS | {"threshold": 12.0}, False, 12.0),
        (MPS | {"normalise": True, "threshold": 0.0}, True, 0.0),
        (MPS | {"normalise": False}, False, 16.0),
        ({"shape": "mps_hinge", "threshold": 0.3}, False, 0.3),
    ],
)
def test_the_hinge_of_mps_is_the_papers_by_default_and_what_is_set_is_kept(changes, normalise, threshold):
    stage = runs.tuning("feedback", "prompts.txt", **changes)
    assert (stage.normalise, stage.threshold) == (normalise, threshold)
    assert Feedback.model_validate(stage.model_dump()) == stage
    assert Feedback.model_validate_json(stage.model_dump_json(), strict=True) == stage  # as a file is read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition_on_target": False}, "they need condition_on_target: true"),
        ({"num_segments": [8, 1]}, "and num_segments: \\[1\\]"),
        ({"target": "consistency"}, "target: trajectory"),
        ({"budgets": [9]}, "less than or equal to 8"),
    ],
)
def test_budgets_are_refused_where_no_stored_jump_can_teach_them(changes, message):
    settings = {"num_steps": 1, "batch_size": 1, "num_segments": [1], "budgets": [2, 4], "condition_on_target": True}
    Distill(**settings)
    with pytest.raises(ValidationError, match=message):
        Distill(**(settings | changes))


FEEDBACK = """  - kind: feedback
    prompts: data/prompts.txt
    num_steps: 1
    batch_size: 1
    rewards: [{name: brightness}]
    guard: {rewards: [{name: colourfulness}]}
"""


def test_a_reward_is_named_alone_or_by_an_entry_in_every_stage(root):
    text = (root / "good.yaml").read_text("utf-8")
    names = FEEDBACK.replace("{name: brightness}", "brightness").replace("{name: colourfulness}", "colourfulness")
    recipes = []
    for stage in (FEEDBACK, names):
        (root / "tuned.yaml").write_text(text.replace("  - kind: evaluate\n", stage + "  - kind: evaluate\n"))
        recipes.append(load(root / "tuned.yaml", root=root))
    assert recipes[0] == recipes[1]  # the fingerprint too, which hashes what is loaded
    assert recipes[0].stages[2].model_dump() == recipes[1].stages[2].model_dump()


@pytest.mark.parametrize(
    ("entry", "key", "text"),
    [
        ("{name: brightness, weight: big}", "weight", "expected a number, found the text 'big'"),
        ("{name: brightness, settings: 3}", "settings", "expected a mapping, found the number 3"),
        ("{name: brightness, chunk_size: 0}", "chunk_size", "expected a whole number above 0"),
        ("{name: brightness, max_drop: true}", "max_drop", "expected a number of at least 0"),
    ],
)
def test_a_setting_of_a_rewards_entry_of_the_wrong_type_is_told(broken, entry, key, text):
    """The entry has a check of its own, by which pydantic names it other than by its model."""
    stage = FEEDBACK.replace("{name: brightness}", entry)
    (problem,) = broken(("  - kind: evaluate\n", stage + "  - kind: evaluate\n"))
    assert problem.key == ("stages", 2, "rewards", 0, key)
    assert text in problem.text


def test_a_reward_that_does_not_exist_is_refused_by_name_and_place(broken):
    stage = FEEDBACK.replace("brightness", "brightnes").replace("colourfulness", "taste")
    problem, other = broken(("  - kind: evaluate\n", stage + "  - kind: evaluate\n"))
    assert problem.key == ("stages", 2, "rewards", 0, "name")
    assert "did you mean brightness" in str(problem)
    assert other.key == ("stages", 2, "guard", "rewards", 0, "name")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pears", "no such folder: pears; did you mean pairs?"),
        ("data", "the folder data holds no metadata.jsonl"),
        ("pairs.parquet", "no such file: pairs.parquet"),
    ],
)
def test_a_pair_table_that_is_not_there_is_told(broken, root, path, message):
    (root / "pairs").mkdir()
    stage = FEEDBACK.replace("feedback", f"dpo\n    pairs: {path}")
    (problem,) = broken(("  - kind: evaluate\n", stage + "  - kind: evaluate\n"))
    assert problem.key == ("stages", 2, "pairs")
    assert message in problem.text


def test_a_small_decoder_that_is_not_there_is_told(broken, root):
    (root / "small").mkdir()
    stage = FEEDBACK.replace("feedback", "feedback\n    small_decoder: small")
    (problem,) = broken(("  - kind: evaluate\n", stage + "  - kind: evaluate\n"))
    assert problem.key == ("stages", 2, "small_decoder")
    assert problem.text == "the folder small holds no config.json"


def test_a_tuning_stage_needs_a_distilled_student(broken):
    problems = broken(("  - kind: trajectories\n", FEEDBACK + "  - kind: trajectories\n"))
    assert any("feedback tunes a distilled student" in str(problem) for problem in problems)


def test_an_underscore_file_is_no_reward(broken):
    stage = FEEDBACK.replace("brightness", "_clip")
    (problem,) = broken(("  - kind: evaluate\n", stage + "  - kind: evaluate\n"))
    assert problem.key == ("stages", 2, "rewards", 0, "name")


POLICY = FEEDBACK.replace("feedback", "policy").replace("batch_size: 1", "batch_size: 4")


def with_stage(stage: str) -> tuple[str, str]:
    return "  - kind: evaluate\n", stage + "  - kind: evaluate\n"


@pytest.mark.parametrize(
    "stage",
    [
        POLICY,
        FEEDBACK.replace("feedback", "dpo\n    form: pso"),
        FEEDBACK.replace("feedback", "feedback\n    kl: 0.1"),
    ],
)
@pytest.mark.parametrize("student", ["num_segments: [8, 4, 2, 2]", "condition_on_target: true"])
def test_random_steps_of_a_student_that_samples_without_noise_need_a_gamma(broken, root, stage, student):
    (problem,) = broken(with_stage(stage), ("precision: no", student))
    assert problem.key == ("stages", 2, "gamma")
    assert "samples without noise (gamma 0)" in problem.text
    text = (root / "recipe.yaml").read_text("utf-8")
    for old, new in ((stage, stage + "    gamma: 0.3\n"), (student, "precision: no")):
        (root / "good.yaml").write_text(text.replace(old, new), "utf-8")
        load(root / "good.yaml", root=root)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("[{name: brightness}]", "[{name: brightness}, {name: brightness}]", ("rewards", 1, "name")),
        ("[{name: colourfulness}]", "[{name: colourfulness}, {name: colourfulness}]", ("guard", "rewards", 1, "name")),
        ("num_steps: 1", "num_steps: 1\n    languages: {en: 0, zh: 0.0}", ("languages",)),
        ("num_steps: 1", "num_steps: 1\n    languages: {en: -1}", ("languages", "en")),
        ("num_steps: 1", "num_steps: 1\n    languages: {en: .nan}", ("languages", "en")),
        ("num_steps: 1", "num_steps: 1\n    languages: {en: x}", ("languages", "en")),
        ("num_steps: 1", "num_steps: 1\n    languages: {en: 1.0e+300}", ("languages", "en")),
        ("num_steps: 1", "num_steps: 1\n    languages: {en: 1.0e-300}", ("languages", "en")),
        ("num_steps: 1", "num_steps: 1\n    languages: [en]", ("languages",)),
    ],
)
def test_rewards_named_twice_and_languages_of_no_weight_are_refused(broken, old, new, key):
    (problem,) = broken(with_stage(FEEDBACK.replace(old, new)))
    assert problem.key == ("stages", 2, *key)


@pytest.mark.parametrize(
    ("name", "code"),
    [("cn", "zh"), ("zh-CN", "zh"), ("ZH", "zh"), ("jp", "ja"), ("kr", "ko"), ("Chinese", "zh"), ("english", "en")],
)
def test_other_names_of_languages_are_answered_with_the_code(broken, name, code):
    (problem,) = broken(
        with_stage(FEEDBACK.replace("num_steps: 1", f"num_steps: 1\n    languages: {{{name}: 1, ko: 1}}"))
    )
    assert problem.key == ("stages", 2, "languages", name)
    assert problem.text.endswith(f"is in {name!r}: did you mean {code}?")


def test_a_prompt_file_may_use_such_a_name(root):
    text = with_stage(FEEDBACK.replace("num_steps: 1", "num_steps: 1\n    languages: {cn: 1}"))
    (root / "named.yaml").write_text((root / "good.yaml").read_text("utf-8").replace(*text), "utf-8")
    recipe_file, prompts = root / "named.yaml", root / "named.jsonl"
    prompts.write_text('{"prompt": "猫", "language": "cn"}\n' * 2, "utf-8")
    load(recipe_file, [f"stages.feedback.prompts={prompts}"], root=root)


@pytest.mark.parametrize(
    "override",
    ["stages.2.teacher_steps=[]", "stages.2.sampling_steps=[]", "stages.2.grids=[]", "samples.sampling_steps=[]"],
)
def test_an_empty_list_is_refused_where_something_must_be_drawn(broken, override):
    (problem,) = broken(overrides=(override,))
    assert "found an empty list" in problem.text


def test_a_learned_reward_that_nothing_holds_a_student_to_is_a_note():
    recipe, free = RECIPES / "scenes_count.yaml", "stages.feedback.anchor=0"
    assert "stages[2].surrogate: a learned reward is right near the samples" in told(recipe, free)
    assert "surrogate" not in told(recipe) + told(recipe, free, "stages.feedback.consistency=1")


def told(path: Path, *overrides: str) -> str:
    lines: list[str] = []
    load(path, overrides, root=RECIPES, tell=lines.append)
    return "\n".join(lines)


def test_feedback_on_a_reward_without_gradient_is_refused_before_anything_runs():
    """scene_count has none: that is in its file, which is parsed. A surrogate learns it, and a guard may have it."""
    assert load(RECIPES / "scenes_count.yaml", root=RECIPES).stages[2].surrogate
    assert load(RECIPES / "scenes_demo.yaml", root=RECIPES).stages[2].guard.rewards[0].name == "scene_count"
    with pytest.raises(RecipeError) as caught:
        load(RECIPES / "scenes_count.yaml", ["stages.feedback.surrogate=null"], root=RECIPES)
    (problem,) = caught.value.problems
    assert key_text(problem.key) == "stages[2].rewards[0].name"
    assert "needs rewards with a gradient, which scene_count has not" in problem.text
