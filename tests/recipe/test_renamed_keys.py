"""Keys under the names that they had once: read, with a warning where a person wrote them, and hashed as before."""

import json

import pytest

import runs
from mlcm_rl.pipeline.fingerprint import settings
from mlcm_rl.recipe import Distill, Evaluate, Policy, Recipe, Trajectories
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.renamed import FIRST_DEFAULTS, OF_SAMPLES, OF_STAGES, renewed, under_first_names
from mlcm_rl.recipe.tree import RecipeError

OLD = """
name: old
teacher: {path: teacher, family: sdxl}
samples:
  num_steps: [4]
stages:
  - kind: trajectories
    prompts: data/prompts.txt
    num_trajectories: 64
    num_steps: 24
  - kind: distill
    segments: [4, 1]
    num_steps: 10
    batch_size: 16
  - kind: policy
    prompts: data/prompts.txt
    epsilon: 0.5
    num_steps: 3
    batch_size: 8
    gamma: 0.3
    rewards: [brightness]
    guard: {rewards: [colourfulness]}
  - kind: evaluate
    prompts: data/prompts.txt
    num_steps: [2]
"""


@pytest.fixture
def old(root):
    path = root / "old.yaml"
    path.write_text(OLD, "utf-8")
    return path


def test_old_keys_are_read_with_a_warning_that_names_the_line_and_the_new_one(old, root):
    warnings: list[str] = []
    recipe = load(old, root=root, tell=warnings.append)
    store, student, policy, table = recipe.stages
    assert isinstance(store, Trajectories)
    assert isinstance(student, Distill)
    assert isinstance(policy, Policy)
    assert isinstance(table, Evaluate)
    assert (store.solver_steps, student.num_segments, policy.clip_range) == (24, [4, 1], 0.5)
    assert (student.num_steps, policy.num_steps) == (10, 3)  # optimiser steps are called what they were
    assert (table.sampling_steps, recipe.samples.sampling_steps) == ([2], [4])
    assert warnings == [
        f"{old}:{line}: {key}: is called {new} now, and still read: write {new}"
        for line, key, new in [
            ("5:3", "samples.num_steps", "sampling_steps"),
            ("10:5", "stages[0].num_steps", "solver_steps"),
            ("12:5", "stages[1].segments", "num_segments"),
            ("17:5", "stages[2].epsilon", "clip_range"),
            ("25:5", "stages[3].num_steps", "sampling_steps"),
        ]
    ]


def test_an_error_under_an_old_name_points_at_its_line(old, root):
    old.write_text(OLD.replace("[4, 1]", "[3]"), "utf-8")
    with pytest.raises(RecipeError, match=r"old\.yaml:12:16: stages\[1\]\.num_segments\[0\]"):
        load(old, root=root, tell=print)


@pytest.mark.parametrize(
    "overrides",
    [
        ("stages.1.segments=[8]",),
        ("stages.1.num_segments=[8]",),
        ("stages.1.num_segments=[2]", "stages.1.segments=[8]"),
    ],
)
def test_the_command_line_counts_under_either_name(old, root, overrides):
    assert load(old, overrides, root, tell=lambda _: None).stages[1].num_segments == [8]


def test_a_key_under_both_names_is_refused(old, root):
    old.write_text(OLD.replace("segments: [4, 1]", "segments: [4, 1]\n    num_segments: [1]"), "utf-8")
    with pytest.raises(RecipeError, match=r"13:5: stages\[1\]\.num_segments: the key is given twice, as segments too"):
        load(old, root=root, tell=print)


def test_a_recorded_recipe_is_read_under_either_name():
    stages = [runs.trajectories("p.txt"), runs.distill(num_segments=[2]), Evaluate(prompts="p.txt", sampling_steps=[2])]
    recipe = Recipe.model_validate({"name": "x", "teacher": {"path": "t", "family": "sd"}, "stages": stages})
    today = json.loads(recipe.model_dump_json())
    assert renewed(today) == today
    before = json.loads(json.dumps(today))
    before["samples"] = under_names(before["samples"], OF_SAMPLES)
    before["stages"] = [under_first_names(stage["kind"], stage) for stage in today["stages"]]
    assert before["stages"][1]["segments"] == [2]
    assert Recipe.model_validate(renewed(before)) == recipe


def under_names(settings, names):
    first = {new: old for old, new in names.items()}
    return {first.get(name, name): value for name, value in settings.items()}


def test_fingerprints_hash_the_first_name():
    stage = runs.distill(num_segments=[2])
    assert under_first_names("distill", settings(stage))["segments"] == [2]
    assert "num_segments" not in under_first_names("distill", settings(stage))


def test_a_changed_default_orphans_no_finished_stage():
    """What stands at the first default is hashed as if nothing were said, whatever today's is."""
    for (kind, name), first in FIRST_DEFAULTS.items():
        model = {"trajectories": Trajectories}[kind]
        today = model(prompts="p.txt", num_trajectories=1)
        assert getattr(today, name) != first
        assert settings(today)[name] == getattr(today, name)
        assert name not in settings(today.model_copy(update={name: first}))


def test_every_new_name_is_a_key_and_no_old_one_is():
    for stage in (Trajectories, Distill, Policy, Evaluate):
        names = OF_STAGES[stage.model_fields["kind"].default]
        assert set(names.values()) <= set(stage.model_fields)
        assert not set(names) & set(stage.model_fields)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stages.1.segments.0=8", lambda recipe: recipe.stages[1].num_segments == [8, 1]),
        ("stages[distill].segments[0]=8", lambda recipe: recipe.stages[1].num_segments == [8, 1]),
        ("samples.num_steps.0=3", lambda recipe: recipe.samples.sampling_steps == [3]),
        ("stages.evaluate.num_steps.0=4", lambda recipe: recipe.stages[3].sampling_steps == [4]),
        ("stages.distill.num_steps=7", lambda recipe: recipe.stages[1].num_steps == 7),
    ],
    ids=["number", "kind", "samples", "evaluate", "not renamed"],
)
def test_an_override_below_an_old_name_reaches_it(old, root, override, value):
    warnings: list[str] = []
    assert value(load(old, [override], root, tell=warnings.append))
    assert sum(override in warning for warning in warnings) == ("distill.num_steps" not in override)


def test_warnings_are_told_before_errors(old, root):
    """An error speaks of the new name, which is not in the file."""
    old.write_text(OLD.replace("num_steps: 24", "num_steps: 25"), "utf-8")
    warnings: list[str] = []
    with pytest.raises(RecipeError, match="solver_steps 25 must be a multiple of 8"):
        load(old, root=root, tell=warnings.append)
    assert any("stages[0].num_steps: is called solver_steps now" in warning for warning in warnings)


def test_a_key_that_came_later_is_hashed_only_where_it_changes_something():
    """The adversary of a stage before `jumps` and others has the identity that it had."""
    before = {"weight": 0.1, "real": "milestones"}
    later = {"jumps": "clean", "sees_start": False, "warmup_steps": 0}
    assert under_first_names("distill", {"adversarial": before | later}) == {"adversarial": before}
    changed = {"adversarial": before | {"jumps": "all"}}
    assert under_first_names("distill", changed) == changed
    assert under_first_names("distill", {"adversarial": None}) == {"adversarial": None}
