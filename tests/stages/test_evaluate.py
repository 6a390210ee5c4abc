"""Stage `evaluate` from end to end on a tiny teacher: what must be equal is, and what cannot work is refused."""

import itertools
import json
import math
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch

from evaluation_case import CONCEPTS, PICTURES, PROMPTS, PlantedJudge, recipe, run
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.evaluation import distribution, instruments, metrics
from mlcm_rl.rewards import Member
from mlcm_rl.stages import evaluate
from mlcm_rl.storage import manifest


def row(report, **expected):
    (result,) = [row for row in report["rows"] if all(row[key] == value for key, value in expected.items())]
    return result


def test_every_row_has_every_metric(report):
    # 2 references, (1 + 2 + 2) rows a solver, and 5 a student: one step has no gamma.
    assert len(report["rows"]) == 2 + 2 * 5 + 2 * 5
    keys = {
        "distance",
        "kid",
        "r@1",
        "r@5",
        "r@1/en",
        "r@1/zh",
        "r@5/en",
        "r@5/zh",
        "diversity",
        "reward/colourfulness",
    }
    for one in report["rows"]:
        assert set(one["metrics"]) == keys
        assert one["latency_ms"] > 0
        assert one["latency_ms_se"] is None  # one batch
        assert len(one["metrics"]["distance"]["values"]) == len(PROMPTS)
        assert one["metrics"]["r@5"]["values"][-1] is None  # the prompt without a concept
        assert one["metrics"]["r@5"]["n"] == len(PROMPTS) - 1


def test_the_reference_is_at_no_distance_from_itself_and_the_shorter_one_is(report):
    assert row(report, role="reference", num_steps=3)["metrics"]["distance"]["mean"] == 0.0
    assert row(report, role="reference", num_steps=2)["metrics"]["distance"]["mean"] > 0.0
    assert report["reference"] == row(report, role="reference", num_steps=3)["id"]


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_an_untrained_student_going_straight_is_the_unguided_teacher_by_ddim(report, num_steps):
    gamma = 1.0 if num_steps == 1 else 0.0
    student = row(report, name="student", num_steps=num_steps, gamma=gamma)
    teacher = row(report, role="undistilled", solver="ddim", num_evaluations=num_steps, guidance_scale=1.0)
    for key, metric in student["metrics"].items():
        assert metric["mean"] == pytest.approx(teacher["metrics"][key]["mean"], rel=1e-4), key
    assert student["metrics"]["distance"]["values"] == pytest.approx(teacher["metrics"]["distance"]["values"], rel=1e-4)


def test_renoising_and_another_student_make_other_pictures(report):
    straight = row(report, name="student", num_steps=4, gamma=0.0)["metrics"]["distance"]["mean"]
    assert row(report, name="student", num_steps=4, gamma=1.0)["metrics"]["distance"]["mean"] != straight
    assert row(report, name="other", num_steps=4, gamma=0.0)["metrics"]["distance"]["mean"] != straight


def test_values_do_not_depend_on_the_batch_size_and_repeat_bit_for_bit(place, report, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.page, "write", lambda *_: None)
    few = {
        "sampling_steps": [4],
        "teacher_solvers": ["ddim"],
        "teacher_steps": [3],
        "also": [],
        "judge": None,
        "rewards": [],
    }
    first, second = (run(place, tmp_path / str(i), **few, num_prompts=3, batch_size=4) for i in range(2))
    for one, again in zip(first["rows"], second["rows"], strict=True):
        assert one["metrics"] == again["metrics"]
        assert one["latency_ms_se"] > 0  # two batches
        whole = row(report, id=one["id"])["metrics"]["distance"]["values"]  # of all prompts, in batches of 12
        assert one["metrics"]["distance"]["values"] == pytest.approx(whole[:3], rel=1e-3, abs=1e-9)


def test_distances_and_latencies_of_planted_samples_by_hand(place, tmp_path, monkeypatch):
    """Three guided DDIM steps draw 1, two of them 3, all else 0: 0, 4 and 1 from the first.

    Both batches take 2 s, of 4 and 2 prompts: 500 ms and 1,000 ms a picture, whose median is 750.
    """
    monkeypatch.setattr(evaluate.page, "write", lambda *_: None)
    seconds = itertools.count(0, 2)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))

    def planted(scene, row, student, batch, conditioning):
        value = {3: 1.0, 2: 3.0}.get(row.num_steps, 0.0) if (row.solver, row.guidance_scale) == ("ddim", 3.0) else 0.0
        return torch.full((len(batch), *scene.base.latent_shape), value)

    monkeypatch.setattr(evaluate, "sample", planted)
    few = {"judge": None, "rewards": [], "also": [], "images_per_prompt": 1, "num_prompts": 6, "batch_size": 4}
    found = run(place, tmp_path, **few)
    for one in found["rows"]:
        is_guided = (one["solver"], one["guidance_scale"]) == ("ddim", 3.0)
        expected = {3: 0.0, 2: 4.0}.get(one["num_steps"], 1.0) if is_guided else 1.0
        assert one["metrics"]["distance"]["values"] == [expected] * 6
        assert one["latency_ms"] == pytest.approx(750.0)


@pytest.fixture
def drawn(monkeypatch):
    """The (row, first sample) of every batch that is drawn, and the number of the one to be interrupted at."""
    batches, draw, at = [], evaluate.draw, {"stop": None}

    def counting(scene, row, student, batch):
        batches.append((row.id, batch[0]))
        if len(batches) == at["stop"]:
            raise KeyboardInterrupt
        return draw(scene, row, student, batch)

    monkeypatch.setattr(evaluate, "draw", counting)
    monkeypatch.setattr(evaluate.page, "write", lambda *_: None)
    return batches, at


def test_an_interrupted_evaluation_goes_on_after_its_last_batch(place, tmp_path, drawn):
    batches, at = drawn
    few = {"sampling_steps": [4], "teacher_steps": [3], "num_prompts": 3, "batch_size": 2, "keep_pictures": True}
    whole = run(place, tmp_path / "whole", **few)
    expected = list(batches)
    batches.clear()
    at["stop"] = 5  # in the middle of the second row's three batches
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", **few)
    saved = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "samples").rglob("*.png")}
    resumed = run(place, tmp_path / "cut", **few)
    assert batches == [*expected[:5], *expected[4:]]  # only the batch that was cut was begun again
    assert [one["metrics"] for one in resumed["rows"]] == [one["metrics"] for one in whole["rows"]]
    assert len(saved) == 4 * 2
    assert {path: path.stat().st_mtime_ns for path in saved} == saved
    manifest.finish(tmp_path / "cut", {})
    assert not (tmp_path / "cut" / "rows").exists()


def test_a_resumed_evaluation_may_have_another_batch_size(place, tmp_path, drawn):
    few = {"sampling_steps": [4], "teacher_steps": [3], "num_prompts": 3, "also": [], "judge": None, "rewards": []}
    whole = run(place, tmp_path / "whole", **few, batch_size=3)
    drawn[0].clear()
    drawn[1]["stop"] = 4
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", **few, batch_size=2)
    for one, other in zip(run(place, tmp_path / "cut", **few, batch_size=3)["rows"], whole["rows"], strict=True):
        values, expected = (row["metrics"]["distance"]["values"] for row in (one, other))
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-9)


FEW = {"sampling_steps": [2], "teacher_steps": [2], "num_prompts": 3, "batch_size": 6}


def test_a_row_measured_once_is_found_again_by_another_evaluation(place, tmp_path, drawn):
    """Another table of the same runs draws what is new in it, and says of the rest what was said before."""
    batches, _ = drawn
    first = run(place, tmp_path / "first", runs=tmp_path, **FEW, also=[])
    assert len(batches) == len(first["rows"])
    batches.clear()
    second = run(place, tmp_path / "second", runs=tmp_path, **FEW | {"sampling_steps": [2, 4]}, gammas=[0.0])
    known = {one["id"]: one for one in first["rows"]}
    same = {"ddim-guided-4"}  # two guided steps are the reference, drawn as "teacher-2"
    assert {row for row, _ in batches} == {one["id"] for one in second["rows"]} - set(known) - same
    assert known["student0-2-gamma0-milestones"] in second["rows"]
    alone = run(place, tmp_path / "alone", **FEW | {"sampling_steps": [2, 4]}, gammas=[0.0])
    for one, again in zip(alone["rows"], second["rows"], strict=True):
        assert one["metrics"] == again["metrics"]  # distances too: to the reference's latents of the first
    for path in (tmp_path / "alone" / "pictures").rglob("*.png"):
        assert (tmp_path / "second" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()


def test_rows_kept_before_latency_had_an_error_are_read(place, tmp_path):
    few = FEW | {"also": [], "judge": None, "batch_size": 3}
    first = run(place, tmp_path / "first", runs=tmp_path, **few)
    for path in (tmp_path / "rows").glob("*/record.json"):
        record = json.loads(path.read_text())
        assert record.pop("latency_ms_se") > 0
        path.write_text(json.dumps(record))
    second = run(place, tmp_path / "second", runs=tmp_path, **few)
    without = [{name: value for name, value in one.items() if name != "latency_ms_se"} for one in first["rows"]]
    assert second["rows"] == without
    assert (tmp_path / "second" / "report.html").is_file()


def test_distances_of_distributions_are_those_of_the_pictures_and_of_their_patches(place, tmp_path, drawn, monkeypatch):
    batches, at = drawn
    pictures, save = {}, evaluate.save_pictures

    def saving(scene, row, batch, images):
        pictures.setdefault(row.id, []).append(images)
        save(scene, row, batch, images)

    monkeypatch.setattr(evaluate, "save_pictures", saving)
    few = {"sampling_steps": [2], "teacher_steps": [2], "batch_size": 5, "also": [], "gammas": [0.0]}
    few |= {"distribution": True, "teacher_solvers": ["ddim"]}
    whole = run(place, tmp_path / "whole", runs=tmp_path, **few)
    features, network = {}, PlantedJudge()
    for one in whole["rows"]:
        images = torch.cat(pictures[one["id"]])
        samples = [(i, j) for i in range(len(PROMPTS)) for j in range(PICTURES)]
        views = {"": images, "patch_": distribution.patches(images, 3, samples)}
        read = {part: network.features(view).unflatten(0, (-1, PICTURES)) for part, view in views.items()}
        features[one["id"]] = read
        for part in views:  # to those of the first row, the reference
            expected = metrics.kid_by_prompt(read[part], features["teacher-2"][part], gamma=1.0)
            measured = one["metrics"][f"teacher_{part}kid"]
            assert measured["values"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-7)
            assert f"teacher_{part}fid" not in one["metrics"]  # twelve pictures, twelve dimensions
    assert whole["rows"][0]["metrics"]["teacher_kid"]["values"] == [0.0] * len(PROMPTS)
    batches.clear()
    more = run(place, tmp_path / "more", runs=tmp_path, **few | {"sampling_steps": [2, 4]})
    assert {row for row, _ in batches} == {"ddim-unguided-4", "student0-4-gamma0-milestones"}
    known = {one["id"]: one["metrics"] for one in more["rows"]}  # the reference's features come from the store
    assert all(known[one["id"]] == one["metrics"] for one in whole["rows"])
    at["stop"] = len(batches) + 5  # in the second row: the reference's features are on the disk
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", **few)
    resumed = run(place, tmp_path / "cut", **few)
    assert [one["metrics"] for one in resumed["rows"]] == [one["metrics"] for one in whole["rows"]]


def test_a_row_without_distances_of_distributions_is_not_taken_for_one_with_them(place, tmp_path, drawn):
    few = FEW | {"also": [], "teacher_solvers": ["ddim"]}
    first = run(place, tmp_path / "first", runs=tmp_path, **few)
    assert "teacher_kid" not in first["rows"][0]["metrics"]
    drawn[0].clear()
    changed = run(place, tmp_path / "second", runs=tmp_path, **few, distribution=True)
    assert len({row for row, _ in drawn[0]}) == len(changed["rows"])
    drawn[0].clear()
    assert run(place, tmp_path / "third", runs=tmp_path, **few, distribution=False)["rows"] == first["rows"]
    assert not drawn[0]  # a recipe that does not ask for them finds its rows as before


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"num_prompts": 2}, {"rewards": ["brightness"]}, {"images_per_prompt": 1}, {"teacher_steps": [2, 3]}],
    ids=lambda change: next(iter(change)),
)
def test_a_row_of_other_noise_prompts_or_instruments_is_another(place, tmp_path, drawn, change):
    few = FEW | {"also": [], "judge": None, "teacher_solvers": ["ddim"]}
    run(place, tmp_path / "first", runs=tmp_path, **few)
    drawn[0].clear()
    changed = run(place, tmp_path / "second", runs=tmp_path, **few | change)
    assert len({row for row, _ in drawn[0]}) == len(changed["rows"])


def test_a_student_with_other_weights_is_drawn_though_its_folder_has_the_same_name(place, tmp_path, drawn):
    few = FEW | {"judge": None, "teacher_solvers": ["ddim"]}
    moved = shutil.copytree(place / "same", tmp_path / "moved")
    run(place, tmp_path / "first", runs=tmp_path, **few, also=[str(moved)])
    drawn[0].clear()
    shutil.rmtree(moved / "student")
    shutil.copytree(place / "other" / "student", moved / "student")
    run(place, tmp_path / "second", runs=tmp_path, **few, also=[str(moved)])
    assert {row for row, _ in drawn[0]} == {"student1-2-gamma0-milestones", "student1-2-gamma1-milestones"}


def test_rows_found_again_have_no_pictures_to_keep_so_keep_pictures_draws_them(place, tmp_path, drawn):
    few = FEW | {"judge": None, "also": []}
    run(place, tmp_path / "first", runs=tmp_path, **few)
    drawn[0].clear()
    kept = run(place, tmp_path / "second", runs=tmp_path, **few, keep_pictures=True)
    assert len(drawn[0]) == len(kept["rows"])


def test_every_picture_is_kept_where_it_is_asked_for(place, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.page, "write", lambda *_: None)
    few = {"sampling_steps": [2], "teacher_steps": [2], "also": [], "judge": None, "num_prompts": 3, "batch_size": 4}
    found = run(place, tmp_path, **few, keep_pictures=True)
    for one in found["rows"]:
        names = sorted(path.name for path in (tmp_path / "samples" / one["id"]).iterdir())
        assert names == [f"{i:05d}.png" for i in range(3 * PICTURES)]
        for i in range(3):  # the page's pictures are the first ones of their prompts
            shown = (tmp_path / "pictures" / one["id"] / f"{i:04d}.png").read_bytes()
            assert shown == (tmp_path / "samples" / one["id"] / f"{i * PICTURES:05d}.png").read_bytes()


def test_of_a_batch_only_readings_stay(place, tmp_path, monkeypatch):
    """Numbers and features a sample, no picture and no latent: memory does not grow with the pictures drawn."""
    sizes, draw = [], evaluate.draw
    monkeypatch.setattr(evaluate.page, "write", lambda *_: None)
    monkeypatch.setattr(evaluate, "draw", lambda *given: sizes.append(draw(*given)) or sizes[-1])
    run(place, tmp_path, sampling_steps=[2], teacher_steps=[2], also=[], num_prompts=3, batch_size=4)
    for readings in sizes:
        (count,) = readings["distance"].shape
        shapes = {name: tuple(value.shape) for name, value in readings.items()}
        numbers = ("distance", "latency_ms", "reward/colourfulness")
        assert shapes == {"judge": (count, 12), **dict.fromkeys(numbers, (count,))}


def test_one_student_is_in_memory_at_a_time(place, tmp_path, monkeypatch):
    alive, load = [], evaluate.load_student

    def watched(*arguments):
        assert all(seen() is None for seen in alive)
        student = load(*arguments)
        alive.append(weakref.ref(student.denoiser))
        return student

    monkeypatch.setattr(evaluate.page, "write", lambda *_: None)
    monkeypatch.setattr(evaluate, "load_student", watched)
    few = {"sampling_steps": [2], "teacher_steps": [2], "judge": None, "rewards": [], "num_prompts": 2, "batch_size": 4}
    run(place, tmp_path, **few, also=[str(place / "other"), str(place / "feedback")])
    assert len(alive) == 3


def test_a_student_of_another_teacher_is_refused_before_anything_is_drawn(place, tmp_path, drawn):
    odd = shutil.copytree(place / "other", tmp_path / "odd")
    file = odd / "student" / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="the student's prediction_type is v_prediction, the teacher's epsilon"):
        run(place, tmp_path / "run", also=[str(odd)])
    assert not drawn[0]


def test_every_student_row_says_what_its_training_cost(report):
    for one in report["rows"]:
        if one["role"] != "student":
            assert one["training"] is None
            continue
        # Eight trajectories of 8 guided steps; ten steps of four samples, one pass each.
        assert one["training"]["samples"] == 40
        assert (one["training"]["store"], one["training"]["online"], one["training"]["student"]) == (128, 0, 40)
        assert (one["training"]["teacher_per_sample"], one["training"]["student_per_sample"]) == (3.2, 1.0)
        assert one["training"]["total"] == 168


def test_pictures_are_kept_for_the_page_of_every_row(finished, report):
    for one in report["rows"]:
        names = sorted(path.name for path in (finished / "pictures" / one["id"]).iterdir())
        assert names == [f"{i:04d}.png" for i in range(len(PROMPTS))]


def test_a_teacher_alone_is_a_table_too(place, tmp_path):
    made = recipe(place, tmp_path, also=[], sampling_steps=[2], teacher_solvers=["ddim"], judge=None, rewards=[])
    evaluate.run(made.stages[0], made, {}, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [one["role"] for one in found["rows"]] == ["reference"] * 2 + ["undistilled"] * 2
    assert found["headline"]["passed"] is False
    assert "<h1>The teacher, measured</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_samples_that_are_not_numbers_stop_the_evaluation(place, tmp_path, monkeypatch):
    def sample(scene, *_):
        return torch.full((1, *scene.base.latent_shape), math.nan, device=scene.base.device)

    monkeypatch.setattr(evaluate, "sample", sample)
    with pytest.raises(
        ValueError,
        match="row teacher-3: the teacher draws NaN or infinity for the prompt 'a red apple'",
    ):
        run(place, tmp_path / "run")


def test_more_prompts_than_there_are_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match=f"holds {len(PROMPTS)} prompts, num_prompts is 7"):
        run(place, tmp_path / "run", num_prompts=7)


def test_a_concept_that_the_judge_does_not_know_is_refused():
    prompts = [Prompt("x", "en", CONCEPTS[1]), Prompt("y", "en"), Prompt("z", "en", "dragon")]
    with pytest.raises(ValueError, match=r"p.jsonl: the judge has no prototype of 1 concepts, for example 'dragon'"):
        instruments.concept_indices(prompts, CONCEPTS, "p.jsonl")
    assert instruments.concept_indices(prompts[:2], CONCEPTS, "p.jsonl").tolist() == [1, -1]
    assert instruments.concept_indices(prompts, [], "p.jsonl").tolist() == [-1, -1, -1]


def test_shown_prompts_are_the_first_of_each_language():
    prompts = [Prompt(str(i), "zh" if i % 3 == 0 else "en") for i in range(12)]
    assert evaluate.page_prompts(prompts) == [0, 3, 6, 9, 1, 2, 4, 5]


def test_a_reward_scores_only_the_languages_that_it_reads():
    class Length:
        needs_prompt, languages, differentiable = True, ("en",), False

        def __call__(self, images, prompts):
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    prompts = [Prompt("four", "en"), Prompt("鲸", "zh"), Prompt("three", "en")]
    length = Member("length", Length(), chunk_size=1)
    scores = instruments.score(length, torch.zeros(3, 3, 4, 4), prompts)
    assert scores[[0, 2]].tolist() == [4.0, 5.0]
    assert scores[1].isnan()
    assert instruments.score(length, torch.zeros(1, 3, 4, 4), prompts[1:2]).isnan().all()


def test_samples_of_a_prompt_stand_together(place, report):
    diversity = row(report, role="reference", num_steps=3)["metrics"]["diversity"]
    assert diversity["n"] == len(PROMPTS)
    assert diversity["mean"] > 0  # pictures of one prompt come from different noise
    assert report["settings"]["images_per_prompt"] == PICTURES
