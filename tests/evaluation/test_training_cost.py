"""The cost of a student's training, by hand, from the manifest of the stage that made it."""

import json

import pytest

import runs
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.evaluation import training_cost
from mlcm_rl.evaluation.training_cost import TrainingCost, of_stage
from mlcm_rl.recipe import Feedback, Policy

STORE = {"num_trajectories": 100, "num_held_out": 10, "solver_steps": 48}


def recipe(folder, *stages, guidance_scale=8.0):
    parsed = runs.recipe(folder / "teacher", folder, list(stages))
    return parsed.model_copy(update={"teacher": parsed.teacher.model_copy(update={"guidance_scale": guidance_scale})})


def store():
    return runs.trajectories("prompts.txt", **STORE)


def write(folder, config, position, **parents):
    """The manifest and the students' folders of `config.stages[position]`, as far as a cost asks for them."""
    fields = config.model_dump(mode="json")
    manifest = {"recipe": fields, "stage": fields["stages"][position], "parents": parents}
    (folder / "student").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "student"


@pytest.mark.parametrize(
    ("settings", "teacher_a_sample", "student_a_sample"),
    [
        ({"target": "trajectory"}, 96 * 110 / 160, 1),  # 96 x prompts / samples drawn
        ({"target": "consistency"}, 96 * 110 / 160, 2),
        ({"source": "online", "prompts": "p.txt", "target": "consistency"}, 11, 2),  # Algorithm 1
        ({"source": "data", "images": "pictures", "target": "consistency"}, 2, 2),  # LCM
        ({"method": "inter_segment", "num_segments": [1]}, 96 * 110 / 160 + 6, 2),
        ({"method": "inter_segment", "num_segments": [1], "renoise": "student", "prompts": "p.txt"}, 6, 2 + 4),
    ],
)
def test_a_sample_costs_what_its_source_says(tmp_path, settings, teacher_a_sample, student_a_sample):
    stage = runs.distill(**({"num_segments": [1], "num_steps": 40, "batch_size": 4} | settings))
    cost = of_stage(recipe(tmp_path, store(), stage), 1).record()
    assert cost.samples == 160
    assert cost.teacher_per_sample == pytest.approx(teacher_a_sample)
    assert cost.student_per_sample == student_a_sample
    assert cost.total == pytest.approx(160 * (teacher_a_sample + student_a_sample))


def test_an_unguided_teacher_costs_half(tmp_path):
    stages = [store(), runs.distill(num_segments=[1], num_steps=40, batch_size=4)]
    assert of_stage(recipe(tmp_path, *stages, guidance_scale=1.0), 1).store == 48 * 110


def test_a_chain_of_stages_is_summed_and_its_store_counted_once(tmp_path):
    first = runs.distill(num_segments=[8, 1], num_steps=[30, 10], batch_size=4, target=["trajectory", "consistency"])
    second = runs.distill(method="inter_segment", num_segments=[1], num_steps=5, batch_size=8)
    config = recipe(tmp_path, store(), first, second)
    cost = of_stage(config, 2)
    assert cost == TrainingCost(samples=160 + 40, store=96 * 110, online=40 * 6, student=120 + 2 * 40 + 2 * 40)
    assert cost.record().total == sum(network_evaluations(stage, config) for stage in config.stages)
    assert of_stage(config, 1) == TrainingCost(160, 96 * 110, 0, 120 + 80)


def test_a_tuned_student_has_cost_its_distillation_and_its_own_steps_and_no_other_tuning(tmp_path):
    rewards = {"rewards": [{"name": "a"}], "guard": {"rewards": [{"name": "b"}]}}
    tuning = {"prompts": "p.txt", "num_steps": 5, "batch_size": 8, **rewards}
    distill = runs.distill(num_segments=[1], num_steps=10, batch_size=4)
    config = recipe(tmp_path, store(), distill, Feedback(**tuning), Policy(**tuning))
    for position in (2, 3):
        own = network_evaluations(config.stages[position], config)
        assert of_stage(config, position) == TrainingCost(40 + 40, 96 * 110, 0, 40 + own)


def test_a_second_store_is_counted_beside_the_first(tmp_path):
    distill = runs.distill(num_segments=[1], num_steps=10, batch_size=4)
    other = runs.trajectories("others.txt", num_trajectories=1, num_held_out=0, solver_steps=48)
    assert of_stage(recipe(tmp_path, store(), distill, other, distill), 3).store == 96 * 110 + 96


def test_a_snapshot_has_cost_the_steps_up_to_its_own(tmp_path):
    first = runs.distill(num_segments=[8], num_steps=7, batch_size=4)
    stage = runs.distill(num_segments=[8, 4, 1], num_steps=[10, 20, 30], batch_size=4, target="consistency")
    student = write(tmp_path / "stage", recipe(tmp_path, store(), first, stage), 2, distill="before")
    snapshots = [tmp_path / "stage" / "snapshots" / name for name in ("phase-0-K8", "phase-1-K4", "phase-2-K1")]
    samples = [28 + 40, 28 + 120, 28 + 240]
    costs = [training_cost.of_student(folder) for folder in snapshots]
    assert [one.samples for one in costs] == samples
    assert [one.student for one in costs] == [28 + 2 * (count - 28) for count in samples]
    assert all(one.store == 96 * 110 for one in costs)
    assert training_cost.of_student(student) == costs[-1]


def test_a_stage_that_is_repeated_word_for_word_is_the_one_that_its_parents_say(tmp_path):
    stage = runs.distill(num_segments=[1], num_steps=10, batch_size=4)
    config = recipe(tmp_path, store(), stage, stage)
    assert training_cost.of_student(write(tmp_path / "one", config, 1, trajectories="x")).samples == 40
    assert training_cost.of_student(write(tmp_path / "two", config, 2, trajectories="x", distill="one")).samples == 80
