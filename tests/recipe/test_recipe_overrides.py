"""`key.path=value` on the command line, put over the file."""

import pytest

from mlcm_rl.recipe import Distill, Lora, Trajectories
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import key_text


def distill(root, *overrides: str) -> Distill:
    stage = load(root / "good.yaml", overrides, root).stages[1]
    assert isinstance(stage, Distill)
    return stage


@pytest.mark.parametrize("path", ["stages.1.learning_rate", "stages[1].learning_rate", "stages[distill].learning_rate"])
def test_a_stage_is_named_by_number_or_by_kind(root, path):
    assert distill(root, f"{path}=1e-4").learning_rate == 0.0001


def test_a_value_is_read_as_yaml_like_the_file(root):
    stage = distill(root, "stages[distill].num_steps=[4, 3, 2, 1]", "stages.1.precision=no", "stages.1.space=x0")
    assert (stage.num_steps, stage.precision, stage.space) == ([4, 3, 2, 1], "no", "x0")


def test_a_setting_that_the_file_does_not_have_is_added_with_what_stands_around_it(root):
    (root / "good.yaml").write_text((root / "good.yaml").read_text("utf-8").split("samples:")[0], "utf-8")
    recipe = load(root / "good.yaml", ["samples.prompts=[a cat]", "device=cpu"], root)
    assert (recipe.samples.prompts, recipe.device) == (["a cat"], "cpu")


def test_an_override_leaves_everything_else_as_it_was(root):
    before, after = load(root / "good.yaml"), load(root / "good.yaml", ["stages.1.adapter.rank=4"])
    assert after.stages[1].adapter == Lora(rank=4)
    assert after.stages[1].model_copy(update={"adapter": before.stages[1].adapter}) == before.stages[1]
    assert after.model_copy(update={"stages": before.stages}) == before


def test_of_two_overrides_of_one_key_the_last_holds(root):
    assert distill(root, "stages.1.batch_size=2", "stages[distill].batch_size=4").batch_size == 4


def test_an_override_changes_one_use_of_an_anchor_only(root):
    text = (root / "good.yaml").read_text("utf-8").replace("stages:\n", "stages:\n  - &first\n", 1)
    text = text.replace("  - kind: trajectories", "    kind: trajectories").replace(
        "  - kind: distill", "  - *first\n  - kind: distill"
    )
    (root / "good.yaml").write_text(text, "utf-8")
    stages = load(root / "good.yaml", ["stages.0.num_trajectories=8"]).stages
    assert [stage.num_trajectories for stage in stages if isinstance(stage, Trajectories)] == [8, 64]


@pytest.mark.parametrize(
    ("override", "key", "text"),
    [
        ("seed", "", "an override is written key.path=value"),
        ("=1", "", "an override is written key.path=value"),
        ("stages[.x=1", "", "an override is written key.path=value"),
        ("seed=x", "seed", "expected a whole number of at least 0, found the text 'x'"),
        ("seed=", "seed", "found nothing"),
        ("seed='7'", "seed", "remove the quotes"),
        ("sed=7", "sed", "unknown key; did you mean seed?"),
        ("teacher.pth=x", "teacher.pth", "unknown key; did you mean path?"),
        ("teacher.path=techer", "teacher.path", "no such folder: techer; did you mean teacher?"),
        ("seed.more=7", "seed", "holds the single value 7, which has no key more"),
        ("stages.3.kind=distill", "stages", "no entry 3; there are 0 trajectories, 1 distill, 2 evaluate"),
        ("stages[distil].num_steps=1", "stages", "2 evaluate; did you mean distill?"),
        ("stages.1.num_steps=[1, x", "", "the file ends inside a bracket or quotes"),
        ("stages.1={kind: distill, kind: distill}", "kind", "the key is given twice"),
        ("samples={prompts: [1]}", "samples.prompts[0]", "expected text, found the number 1"),
        (
            "samples={sampling_steps: [9]}",
            "samples.sampling_steps[0]",
            "expected a whole number from 1 to 8, found the number 9",
        ),
    ],
)
def test_an_error_of_an_override_names_the_override_instead_of_a_line(broken, root, override, key, text):
    (problem,) = broken(overrides=(override,))
    assert problem.where == f"{root / 'recipe.yaml'} with {override}"
    assert key_text(problem.key) == key
    assert text in problem.text


def test_a_kind_that_several_stages_have_does_not_name_one(broken):
    copy = "  - kind: trajectories\n    prompts: data/prompts.txt\n    num_trajectories: 8\n  - kind: evaluate"
    (problem,) = broken(("  - kind: evaluate", copy), overrides=("stages[trajectories].num_trajectories=4",))
    assert problem.text == "2 entries are of kind trajectories: name one by its number, 0 or 2"


def test_errors_of_overrides_come_after_those_of_the_file(broken):
    problems = broken(("seed: 7", "seed: x"), overrides=("nonsense", "teacher.family=x"))
    assert [problem.place.override for problem in problems] == ["", "nonsense", "teacher.family=x"]


def test_an_override_mends_what_was_wrong_in_the_file(root):
    (root / "good.yaml").write_text((root / "good.yaml").read_text("utf-8").replace("seed: 7", "seed: x"), "utf-8")
    assert load(root / "good.yaml", ["seed=3"], root).seed == 3
