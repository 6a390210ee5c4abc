"""Which rows an evaluation has, and what each costs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import runs
from mlcm_rl.evaluation.row_store import RowStore
from mlcm_rl.evaluation.rows import Entry, entries, student_folders, student_rows, teacher_rows
from mlcm_rl.evaluation.training_cost import TrainingCost
from mlcm_rl.models.gammas import own_gamma
from mlcm_rl.models.grids import SamplingGrid
from mlcm_rl.recipe import Evaluate, Teacher
from mlcm_rl.recipe.types import default_gamma

BASE = SimpleNamespace(family="sdxl", prediction_type="epsilon", student_predictions=("epsilon", "sample"))


def stage(**settings):
    return Evaluate(prompts="p.txt", **settings)


def student(num_segments, conditioned=False):
    own = default_gamma(num_segments, conditioned)
    cost = TrainingCost(10, 40, 0, 20)
    grid = SamplingGrid(num_segments=1 if conditioned else num_segments)
    return Entry("student", Path("student"), num_segments, conditioned, grid, cost, own, (own, 1.0 - own))


def teacher(guidance_scale, family="sdxl"):
    return Teacher(path="teacher", family=family, guidance_scale=guidance_scale)


def test_the_reference_comes_first_and_costs_two_evaluations_a_guided_step():
    rows = [row for row in teacher_rows(stage(teacher_steps=[25, 50]), teacher(8.0)) if row.role == "reference"]
    assert [(row.num_steps, row.num_evaluations) for row in rows] == [(50, 100), (25, 50)]
    assert teacher_rows(stage(), teacher(1.0))[0].num_evaluations == 50


def test_the_undistilled_teacher_has_a_row_at_every_students_cost():
    solvers = ["ddim", "dpmpp", "unipc"]
    rows = teacher_rows(stage(sampling_steps=[1, 2, 3, 4], teacher_solvers=solvers), teacher(8.0))[2:]
    for solver in solvers:
        costs = [(row.num_evaluations, row.num_steps, row.guidance_scale) for row in rows if row.solver == solver]
        assert costs == [(1, 1, 1.0), (2, 1, 8.0), (2, 2, 1.0), (3, 3, 1.0), (4, 2, 8.0), (4, 4, 1.0)]


def test_a_guided_step_costs_one_evaluation_where_the_scale_is_an_input():
    rows = teacher_rows(stage(teacher_steps=[25], sampling_steps=[1, 3]), teacher(3.5, "flux"))
    costs = [(row.num_evaluations, row.num_steps, row.guidance_scale) for row in rows]
    assert costs == [(25, 25, 3.5), (1, 1, 3.5), (1, 1, 1.0), (3, 3, 3.5), (3, 3, 1.0)]


def test_the_solver_of_a_flow_is_eulers():
    solvers = ["ddim", "unipc"]
    for family, names in (("sd3", ["Euler", "UniPC"]), ("sdxl", ["DDIM", "UniPC"])):
        rows = teacher_rows(
            stage(teacher_steps=[25], sampling_steps=[2], teacher_solvers=solvers), teacher(4.0, family)
        )
        expected = [f"{name}, {way}" for name in names for way in ("guided", "unguided")]
        assert [row.sampler for row in rows] == [f"{names[0]}, guided", *expected]


def test_an_unguided_teacher_has_no_guided_rows():
    assert {row.guidance_scale for row in teacher_rows(stage(), teacher(1.0))} == {1.0}


def test_a_student_is_measured_at_every_sampler_that_makes_other_pictures():
    rows = student_rows(stage(sampling_steps=[1, 2, 4], grids=["milestones", "paper"]), 0, student(1))
    keys = [(row.num_steps, row.gamma, row.grid) for row in rows]
    # One step has no gamma; at one and two steps the grids agree. A student of one segment re-noises by default.
    assert keys == [
        (1, 1.0, "milestones"),
        (2, 1.0, "milestones"),
        (4, 1.0, "milestones"),
        (4, 1.0, "paper"),
        (2, 0.0, "milestones"),
        (4, 0.0, "milestones"),
        (4, 0.0, "paper"),
    ]
    assert [row.default for row in rows] == [True, True, True, False, False, False, False]
    assert all(row.num_evaluations == row.num_steps == len(row.times) for row in rows)
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.training.total == 60 for row in rows)


def test_a_student_of_more_segments_lands_on_its_boundaries_and_goes_straight_by_default():
    rows = student_rows(stage(sampling_steps=[3, 6]), 0, student(2))
    assert all(499 in row.times for row in rows)
    assert [row.gamma for row in rows if row.default] == [0.0, 0.0]
    even = student_rows(stage(sampling_steps=[3]), 0, student(8, conditioned=True))
    assert even[0].times == student_rows(stage(sampling_steps=[3]), 0, student(1))[0].times
    assert even[0].default
    assert even[0].gamma == 0.0


def write_stage(folder, kind, gamma=None):
    """What `entries` reads of a finished stage: its manifest and what its student says of itself."""
    adapter = {"kind": "lora", "rank": 2, "alpha": 2.0}
    description = {
        "family": "sdxl",
        "prediction_type": "epsilon",
        "num_segments": 2,
        "conditioned": False,
        "adapter": adapter,
    }
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "student.json").write_text(json.dumps(description))
    settings = runs.tuning(kind, "p.txt", gamma=gamma) if kind in runs.TUNING else runs.distill(num_segments=[2])
    stages = [runs.trajectories("p.txt"), runs.distill(num_segments=[2])]
    recipe = runs.recipe(folder, folder, stages if kind == "distill" else [*stages, settings])
    parents = {"distill": "distill"} if kind in runs.TUNING else {}
    manifest = {"kind": kind, "stage": settings.model_dump(), "recipe": recipe.model_dump(), "parents": parents}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(("sampling_steps", "others"), [([2], None), ([1, 2, 4], "1, 4")])
def test_steps_that_a_student_of_whole_segments_has_not_learned_are_told(tmp_path, capsys, sampling_steps, others):
    parents = {"distill": write_stage(tmp_path / "distill", "distill")}
    place = tmp_path / "distill" / "student" / "student.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"starts": "milestones"}))
    entries(stage(sampling_steps=sampling_steps), parents, BASE)
    told = " ".join("".join(capsys.readouterr()).split())
    assert ("learned the jumps of 2 steps alone" in told) == bool(others)
    assert others is None or f"in {others} steps it begins at times that it has not seen" in told


@pytest.mark.parametrize(("gamma", "own"), [(0.3, 0.3), (None, 0.0), (1.0, 1.0)])
def test_a_tuned_student_is_measured_at_the_gamma_it_was_tuned_under_and_so_is_what_it_started_from(
    tmp_path, gamma, own
):
    kinds = {"distill": None, "feedback": gamma}
    parents = {kind: write_stage(tmp_path / kind, kind, value) for kind, value in kinds.items()}
    other = write_stage(tmp_path / "other", "distill")
    evaluation = stage(sampling_steps=[1, 2], gammas=[0.0], also=[str(other)])
    distilled, tuned, another = entries(evaluation, parents, BASE)
    assert (distilled.own_gamma, tuned.own_gamma, another.own_gamma) == (0.0, own, 0.0)
    assert [own_gamma(folder / "student") for folder in (*parents.values(), other)] == [0.0, own, 0.0]
    samplers = [
        {(row.num_steps, row.gamma) for row in student_rows(evaluation, 0, one)} for one in (distilled, tuned, another)
    ]
    assert samplers[0] == {(1, 0.0), (2, 0.0), (2, own)}
    assert samplers[1] == {(1, own), (2, 0.0), (2, own)}
    assert samplers[2] == {(1, 0.0), (2, 0.0)}
    assert {row.gamma for row in student_rows(evaluation, 0, tuned) if row.default} == {own}


def test_a_student_that_predicts_x0_is_measured_in_the_steps_that_it_knows_and_no_others(tmp_path):
    """One that is told its target is measured in all that are asked for, whatever its budgets."""
    for conditioned, measured in ((False, [2]), (True, [1, 2, 4])):
        place = write_stage(tmp_path / str(conditioned), "distill") / "student" / "student.json"
        described = {"prediction_type": "sample", "budgets": [2], "conditioned": conditioned}
        place.write_text(json.dumps(json.loads(place.read_text()) | described))
        evaluation = stage(sampling_steps=[1, 2, 4], gammas=[0.0])
        (entry,) = entries(evaluation, {"distill": place.parents[1]}, BASE)
        assert [row.num_steps for row in student_rows(evaluation, 0, entry)] == measured


def test_a_snapshot_is_measured_at_its_own_gamma_and_the_student_at_all_that_are_asked_for(tmp_path):
    distilled = write_stage(tmp_path / "distill", "distill")
    shutil.copytree(distilled / "student", distilled / "snapshots" / "phase-0-K2")
    shutil.copytree(distilled / "student", distilled / "snapshots" / "phase-1-K2")  # the last, which is the student
    evaluation = stage(sampling_steps=[2, 4], gammas=[0.3, 1.0], students="snapshots")
    finished, snapshot = entries(
        evaluation,
        {"distill": distilled},
        BASE,
    )
    assert [(row.num_steps, row.gamma) for row in student_rows(evaluation, 0, finished)] == [
        (2, 0.3),
        (4, 0.3),
        (2, 1.0),
        (4, 1.0),
    ]
    assert [(row.num_steps, row.gamma) for row in student_rows(evaluation, 1, snapshot)] == [(2, 0.0), (4, 0.0)]


def test_a_plan_counts_the_snapshots_of_the_recipes_phases():
    def planned(students):
        evaluation = stage(sampling_steps=[2, 4], teacher_steps=[2], gammas=[0.0, 1.0], students=students)
        stages = [runs.distill(num_segments=[8, 4, 1]), evaluation]
        return sum(evaluation.evaluations_per_row(runs.recipe(Path("teacher"), Path("runs"), stages)))

    assert planned("snapshots") == planned("last") + 2 * (2 + 4)


def test_a_plan_counts_the_rows_at_a_tuned_students_own_gamma():
    def planned(gamma):
        evaluation = stage(sampling_steps=[2, 4], teacher_steps=[2], gammas=[0.0])
        stages = [runs.distill(num_segments=[2]), runs.tuning("feedback", "p.txt", gamma=gamma), evaluation]
        return sum(evaluation.evaluations_per_row(runs.recipe(Path("teacher"), Path("runs"), stages)))

    assert planned(None) == planned(0.0)
    assert planned(0.3) == planned(0.0) + 2 * (2 + 4)  # the tuned student, and the distilled one beside it


def test_tuned_students_stand_beside_the_distilled_one_they_start_from(tmp_path):
    parents = {"policy": tmp_path / "policy", "distill": tmp_path / "distill", "train_teacher": tmp_path / "teacher"}
    folders = student_folders(stage(), parents)
    assert folders == {"student": tmp_path / "distill" / "student", "policy": tmp_path / "policy" / "student"}


def test_a_kept_row_is_another_by_whatever_its_pictures_depend_on_and_by_no_name(tmp_path):
    store = RowStore(tmp_path, {"prompts": "p"}, "reference")
    (row,) = [one for one in student_rows(stage(sampling_steps=[4]), 0, student(1)) if one.gamma == 0.0]
    others = {
        "num_steps": 3, "solver": "ddim", "guidance_scale": 2.0, "times": [999, 1, 0], "gamma": 0.5, "conditioned": True
    }  # fmt: skip
    paths = [store.path(row.model_copy(update={name: value}), None) for name, value in others.items()]
    assert len({store.path(row, None), *paths}) == 1 + len(others)
    same = row.model_copy(update={"id": "other", "name": "other", "default": not row.default})
    assert store.path(same, None) == store.path(row, None)


def test_snapshots_come_along_but_for_the_last_which_is_the_student(tmp_path):
    for name in ("student", "snapshots/phase-0-K8", "snapshots/phase-1-K4", "snapshots/phase-2-K1"):
        (tmp_path / "distill" / name).mkdir(parents=True)
        (tmp_path / "distill" / name / "student.json").write_text("{}")
    (tmp_path / "distill" / "manifest.json").write_text('{"kind": "distill", "recipe": {"name": "lcm"}}')
    parents = {"distill": tmp_path / "distill"}
    assert list(student_folders(stage(), parents)) == ["student"]
    folders = student_folders(stage(students="snapshots", also=[str(tmp_path / "distill")]), parents)
    assert list(folders) == [
        f"{name}{phase}" for name in ("student", "lcm") for phase in ("", " phase-0-K8", " phase-1-K4")
    ]
    assert folders["lcm phase-0-K8"] == tmp_path / "distill" / "snapshots" / "phase-0-K8"
    twice = student_folders(stage(also=[str(tmp_path / "distill")] * 2), {})
    assert list(twice) == ["lcm", "lcm (distill)"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "00-trajectories").symlink_to(tmp_path)
    (tmp_path / "run" / "01-distill").symlink_to(tmp_path / "distill")
    of_run = student_folders(stage(also=[str(tmp_path / "run")]), {})
    assert of_run == {"lcm": tmp_path / "run" / "01-distill" / "student"}
    with pytest.raises(ValueError, match="holds no student"):
        student_folders(stage(also=[str(tmp_path)]), {})
