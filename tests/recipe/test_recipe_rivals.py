"""The keys of other methods of distillation: what each refuses, by the setting that is wrong, and what it takes."""

import pytest
from pydantic import ValidationError

import runs
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.pipeline import fingerprint
from mlcm_rl.recipe import Distill, Evaluate
from mlcm_rl.recipe.file import check
from mlcm_rl.recipe.paths import Folders

SIMULATION = {"method": "simulation", "num_segments": [1], "prompts": "p.txt"}
WHOLE = {"starts": "milestones"}
RANDOM = {"ends": "random", "target": "consistency"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_segments": [16, 8]}, "more than 8 are for starts: milestones"),
        (WHOLE | {"condition_on_target": True}, "starts: milestones are whole segments.*without condition_on_target"),
        (WHOLE | {"keep_segments": True}, "starts: milestones are whole segments.*keep_segments"),
        (WHOLE | {"source": "online", "prompts": "p", "target": "consistency"}, "source: trajectories"),
        (RANDOM | {"condition_on_target": True}, "ends: random draws the ends of jumps"),
        (RANDOM | WHOLE, "ends: random .* starts: any"),
        (RANDOM | {"method": "inter_segment", "num_segments": [1]}, "ends: random .* method: segments"),
        (RANDOM | {"num_segments": [1], "adversarial": {}}, "adversarial: terms are of clean samples.*random ends"),
        ({"matching": {}, "adversarial": {"jumps": "all"}}, "^1 validation.*\n.*matching: terms are of clean samples"),
        ({"adversarial": {"jumps": "all", "real": "images"}, "images": "i"}, "images are clean"),
        (
            {"num_segments": [1], "adversarial": {"sees_start": True, "real": "images"}, "images": "i"},
            "ends of no jump",
        ),
        ({"distance_weight": 0.0}, "distance_weight has no effect"),
        (SIMULATION, "it needs matching, or adversarial on images"),
        (SIMULATION | {"matching": {}, "adversarial": {}}, "method: simulation has none: take real: images"),
        (SIMULATION | {"matching": {}, "num_segments": [8]}, "simulation is of the whole time axis"),
        (SIMULATION | {"matching": {}, "distance_weight": 0.5}, "distance_weight has no effect"),
        (SIMULATION | {"matching": {}, "distance": "huber"}, "simulation has no distance: leave it out"),
        (SIMULATION | {"matching": {}, "prompts": None}, "simulation needs prompts"),
        (SIMULATION | {"matching": {}, "target_ema": 0.9}, "target_ema has no effect without target: consistency"),
        (SIMULATION | {"matching": {}, "target": ["consistency"]}, "target has no effect without method: segments"),
        (SIMULATION | {"matching": {}, "source": "online"}, "source has no effect without method: segments"),
        (
            {"method": "inter_segment", "num_segments": [1], "adversarial": {"jumps": "all"}},
            "jumps: all has no effect with method: inter_segment",
        ),
    ],
)
def test_a_key_without_what_it_needs_is_refused(changes, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        runs.distill(**changes)


@pytest.mark.parametrize("changes", [WHOLE, {"ends": "random"}, {"keep_segments": True}])
def test_phases_of_another_method_are_not_the_open_form(changes):
    stage = Distill(num_steps=1, batch_size=4, **changes)
    assert (stage.num_segments, stage.condition_on_target, stage.budgets) == ([8, 4, 2, 1], False, [])


def test_they_take_their_passes_by_hand(tiny_sdxl, tmp_path):
    """Of each sample, guided by two passes: Lightning 1, and 3 of its heads; simulated states of 4 steps 1.5 more."""
    expected = [
        (WHOLE | {"num_segments": [8, 4], "adversarial": {"jumps": "all"}, "distance_weight": 0.0}, 1 + 1 + 2),
        (WHOLE | {"num_segments": [4], "adversarial": {"jumps": "all", "sees_start": True}}, 1 + 1 + 2 + 2),
        (WHOLE | {"num_segments": [4], "adversarial": {"jumps": "all", "loss": "relativistic"}}, 1 + 1 + 1 + 2),
        (RANDOM | {"num_segments": [8, 4]}, 1 + 1),
        (SIMULATION | {"matching": {}}, 1 + 1.5 + 2 + 1 + 5),
        (SIMULATION | {"adversarial": {"real": "images"}, "images": "unused"}, 1 + 1.5 + 1 + 2),
    ]
    for settings, evaluations in expected:
        stage = runs.distill(**settings)
        samples = sum(stage.steps_per_phase) * stage.batch_size
        assert network_evaluations(stage, runs.recipe(tiny_sdxl, tmp_path, [stage])) == evaluations * samples


def test_simulation_reads_no_store_and_needs_the_teacher():
    stage = runs.distill(**SIMULATION, matching={})
    assert not stage.reads_trajectories
    assert stage.uses_teacher
    assert "trajectories" not in stage.parents
    assert stage.texts == "p.txt"


def test_a_store_without_the_ends_of_segments_is_refused(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    for solver_steps, count in ((24, 1), (32, 0)):
        stages = [runs.trajectories(prompts, solver_steps=solver_steps), runs.distill(**WHOLE, num_segments=[32, 8])]
        problems = check(runs.recipe(tiny_sdxl, tmp_path, stages), Folders(tmp_path, tmp_path))
        assert [problem.key for problem in problems] == [("stages", 1, "num_segments")] * count
        assert all("multiple of 32, found 24" in problem.text for problem in problems)


def problems_of(teacher, folder, stages, family="sdxl"):
    recipe = runs.recipe(teacher, folder, [runs.trajectories(runs.write_prompts(folder), solver_steps=16), *stages])
    named = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"family": family})})
    found = check(named, Folders(folder, folder))
    return [(problem.key, problem.text) for problem in found if problem.key[-1] in ("prediction", "distance_weight")]


def test_a_student_that_predicts_x0_goes_on_so(tiny_sdxl, tmp_path):
    noise, x0 = (runs.distill(num_segments=[1], prediction=one) for one in ("teacher", "x0"))
    assert problems_of(tiny_sdxl, tmp_path, [noise, x0, x0]) == []
    ((key, text),) = problems_of(tiny_sdxl, tmp_path, [x0, noise])
    assert key == ("stages", 2, "prediction")
    assert "prediction must be x0: it is what the student of stages[1] predicts" in text


def test_x0_is_first_learned_by_a_distance(tiny_sdxl, tmp_path):
    sharp = WHOLE | {"num_segments": [1], "distance_weight": 0.0, "adversarial": {}}
    changes: list[dict] = [{}, {"prediction": "x0", "distance_weight": 1.0}, {"prediction": "x0"}]
    noise, x0, alone = (runs.distill(**sharp | one) for one in changes)
    assert problems_of(tiny_sdxl, tmp_path, [noise, x0, alone]) == []
    simulated = runs.distill(**SIMULATION, matching={}, prediction="x0")
    for stages in ([alone], [noise, alone], [simulated]):
        ((key, text),) = problems_of(tiny_sdxl, tmp_path, stages)
        assert key == ("stages", len(stages), "prediction")
        assert "put a stage with prediction: x0 and a distance before this one" in text


def test_a_one_step_student_is_for_one_step_and_tuned_at_no_other(tiny_sdxl, tmp_path):
    one_step = runs.distill(**WHOLE, num_segments=[1], prediction="x0")
    assert [one_step.steps_learned(k) for k in (32, 8, 1)] == [[], [8], [1]]
    assert runs.distill(**WHOLE, num_segments=[1]).steps_learned(1) == []
    prompts = runs.write_prompts(tmp_path)
    for steps, count in ((1, 0), (2, 1)):
        stages = [runs.trajectories(prompts, solver_steps=16), one_step]
        stages.append(runs.tuning("dpo", prompts, sampling_steps=steps))
        problems = check(runs.recipe(tiny_sdxl, tmp_path, stages), Folders(tmp_path, tmp_path))
        assert [one.key for one in problems] == [("stages", 2, "sampling_steps")] * count
        assert all("expected 1, since its student predicts x0" in one.text for one in problems)


@pytest.mark.parametrize(
    ("steps", "students", "known"), [([1, 2], "last", ""), ([2, 4], "last", "1"), ([2], "snapshots", "")]
)
def test_an_evaluation_at_no_step_that_the_student_knows_is_refused(tiny_sdxl, tmp_path, steps, students, known):
    """A table without the student of the recipe; its snapshot of two steps would be in it."""
    prompts = runs.write_prompts(tmp_path)
    distilled = runs.distill(**WHOLE, num_segments=[2, 1], prediction="x0")
    evaluate = Evaluate(prompts=prompts, num_prompts=4, sampling_steps=steps, students=students)
    stages = [runs.trajectories(prompts, solver_steps=16), distilled, evaluate]
    problems = check(runs.recipe(tiny_sdxl, tmp_path, stages), Folders(tmp_path, tmp_path))
    assert [one.key for one in problems] == [("stages", 2, "sampling_steps")] * bool(known)
    assert all(f"expected {known} among them, since the student predicts x0" in one.text for one in problems)


def test_families_of_flows_predict_a_velocity(tiny_sdxl, tmp_path):
    ((key, text),) = problems_of(tiny_sdxl, tmp_path, [runs.distill(num_segments=[1], prediction="x0")], "flux")
    assert key == ("stages", 1, "prediction")
    assert "students of family flux predict a velocity" in text


def test_the_prediction_of_the_teacher_is_the_stage_of_before(tiny_sdxl, tmp_path):
    """Named or not, it is not in the fingerprint; x0 is."""
    stages = [runs.distill(**one) for one in ({}, {"prediction": "teacher"}, {"prediction": "x0"})]
    plain, named, x0 = (fingerprint.settings(stage) for stage in stages)
    assert plain == named
    assert x0 == plain | {"prediction": "x0"}
