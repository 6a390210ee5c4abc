"""What makes a stage, and a row of an evaluation, another one: the content of what it reads, wherever that is named."""

import json
from pathlib import Path

import pytest

import reward_models
import runs
import text_adapters
from mlcm_rl.evaluation.row_store import open_store
from mlcm_rl.pipeline.fingerprint import locate
from mlcm_rl.recipe import Evaluate, TrainReward, TrainTeacher
from mlcm_rl.report.types import SampledRow

NAMES = {"id": "teacher-2", "role": "reference", "name": "teacher", "sampler": "DDIM"}
REFERENCE = SampledRow(**NAMES, num_steps=2, num_evaluations=2, solver="ddim", guidance_scale=1.0)
WARMTH = "from ._tint import tint\n\nclass Warmth:\n    pass\n"


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose teacher is a folder with one file."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model_index.json").write_text("{}")
    return runs.recipe(teacher, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])


@pytest.fixture
def fingerprint(recipe):
    """A function that gives the fingerprint of a stage alone."""
    return lambda stage: locate(stage, recipe, []).fingerprint


@pytest.fixture
def row(recipe):
    """A function that gives the place of an evaluation's reference row among those that were measured."""
    return lambda stage: open_store(stage, recipe, {}, REFERENCE, "cpu").path(REFERENCE, None)


@pytest.fixture
def evaluation(tmp_path):
    """A function that gives an evaluation with the settings given."""
    prompts = runs.write_prompts(tmp_path)
    return lambda **settings: Evaluate(prompts=prompts, **settings)


@pytest.fixture
def warmth(tmp_path, monkeypatch):
    """The folder of a reward `warmth` of two modules and a file of weights, found beside ours."""
    folder = tmp_path / "dropped"
    folder.mkdir()
    (folder / "warmth.py").write_text(WARMTH)
    (folder / "_tint.py").write_text("def tint(): ...\n")
    (folder / "warmth.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(reward_models, "__path__", [*reward_models.__path__, str(folder)])
    return folder


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


# --- folders -------------------------------------------------------------------------------------------------------


def test_every_picture_of_a_folder_that_is_trained_on_is_hashed(fingerprint, tmp_path):
    images, pairs = Path(runs.write_images(tmp_path)), Path(runs.write_pairs(tmp_path / "pairs"))
    teacher = TrainTeacher(images=str(images), num_steps=3, batch_size=2)
    stages = {
        images / "2.png": [teacher, runs.distill(source="data", images=str(images), target="consistency")],
        pairs / "1-dark.png": [
            TrainReward(pairs=str(pairs)),
            runs.tuning("dpo", runs.write_prompts(tmp_path), pairs=str(pairs)),
        ],
    }
    for picture, reading in stages.items():
        before = [fingerprint(stage) for stage in reading]
        assert before == [fingerprint(stage) for stage in reading]
        append(picture)
        after = [fingerprint(stage) for stage in reading]
        assert not set(before) & set(after)
        picture.rename(picture.with_name("renamed.png"))
        assert not set(after) & {fingerprint(stage) for stage in reading}


def test_the_same_folder_elsewhere_is_the_same_stage(fingerprint, tmp_path):
    images = Path(runs.write_images(tmp_path))
    before = fingerprint(TrainTeacher(images=str(images), num_steps=3, batch_size=2))
    moved = images.rename(tmp_path / "moved")
    assert fingerprint(TrainTeacher(images=str(moved), num_steps=3, batch_size=2)) == before


def test_real_pictures_weights_of_a_judge_and_words_of_a_clip_are_hashed_for_reports_and_for_rows(
    fingerprint, row, evaluation, tmp_path
):
    for name in ("real", "judge", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    changing = (tmp_path / "real" / "0.jpg", tmp_path / "judge" / "judge.safetensors", tmp_path / "clip" / "merges.txt")
    inception = tmp_path / "inception.safetensors"
    for path in (*changing, inception):
        path.write_bytes(b"as it was")
    named = {"real_images": "real", "judge": "judge", "clip": "clip", "inception": inception.name}
    stage = evaluation(**{name: str(tmp_path / value) for name, value in named.items()})
    seen = {(fingerprint(stage), row(stage))}
    for path in (*changing, inception):
        append(path)
        seen.add((fingerprint(stage), row(stage)))
    assert [len(set(one)) for one in zip(*seen, strict=True)] == [5, 5]


def test_a_folder_that_is_not_there_or_holds_no_index_is_named(fingerprint, evaluation, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        fingerprint(evaluation(judge=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"holds no metadata\.jsonl"):
        fingerprint(TrainTeacher(images=str(tmp_path), num_steps=3, batch_size=2))


# --- students of other runs ----------------------------------------------------------------------------------------


def finished(folder: Path, **manifest: str) -> Path:
    """A stage's folder with a student, whose weights are its own name."""
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "adapter.safetensors").write_text(folder.name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("key", ["fingerprint", "kind"])
def test_a_link_to_another_student_makes_another_evaluation_and_another_link_to_the_same_none(
    fingerprint, evaluation, tmp_path, key
):
    """By the fingerprint in the manifest, and by the student where an older manifest has none."""
    one, other = (finished(tmp_path / name, **{key: name}) for name in ("one", "other"))
    link, second = tmp_path / "02-distill", tmp_path / "03-distill"
    link.symlink_to(one)
    second.symlink_to(one)
    before = fingerprint(evaluation(also=[str(link)]))
    assert fingerprint(evaluation(also=[str(second)])) == fingerprint(evaluation(also=[str(one)])) == before
    link.unlink()
    link.symlink_to(other)
    assert fingerprint(evaluation(also=[str(link)])) != before
    assert fingerprint(evaluation()) != before


def test_an_entry_of_also_without_a_student_is_named(fingerprint, evaluation, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no student"):
        fingerprint(evaluation(also=[str(tmp_path / "gone")]))


# --- rewards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["warmth.py", "_tint.py", "warmth.safetensors"])
def test_an_edited_reward_is_not_found_again_as_the_old_one(fingerprint, row, evaluation, tmp_path, warmth, file):
    rewards = [{"name": "warmth"}]
    tuned = runs.tuning("feedback", runs.write_prompts(tmp_path), rewards=rewards)
    guarded = runs.tuning("dpo", runs.write_prompts(tmp_path), guard={"rewards": rewards, "num_prompts": 4})
    stage, other = evaluation(rewards=["warmth"]), evaluation(rewards=["brightness"])

    def found():
        return [*map(fingerprint, (tuned, guarded, stage)), row(stage)]

    before, untouched = found(), fingerprint(other)
    assert found() == before
    append(warmth / file)
    assert not set(before) & set(found())
    assert fingerprint(other) == untouched


# --- what changes nothing ------------------------------------------------------------------------------------------


def test_recomputing_activations_finds_finished_stages_again(fingerprint, tmp_path):
    prompts, images = runs.write_prompts(tmp_path), runs.write_images(tmp_path)
    stages = [
        TrainTeacher(images=images, num_steps=3, batch_size=2),
        runs.distill(),
        *(runs.tuning(kind, prompts) for kind in runs.TUNING),
    ]
    for stage in stages:
        assert fingerprint(stage.model_copy(update={"gradient_checkpointing": True})) == fingerprint(stage)


def test_where_and_how_a_reward_runs_stays_hashed(fingerprint, evaluation):
    asked = [{"name": "brightness"}, {"name": "brightness", "chunk_size": 2}, {"name": "brightness", "device": "cpu"}]
    assert len({fingerprint(evaluation(rewards=[one])) for one in asked}) == 3


# ---- a text adapter ----


def test_a_text_adapter_is_known_by_its_content(recipe, tmp_path):
    (stage,) = recipe.stages
    folders = [tmp_path / name for name in ("one", "copy", "other")]
    for folder in folders:
        (folder / "encoder").mkdir(parents=True)
        (folder / "text_adapter.json").write_text("{}")
        (folder / "encoder" / "model.safetensors").write_text("weights")
    append(folders[2] / "encoder" / "model.safetensors")

    def place(folder: Path | None) -> str:
        teacher = recipe.teacher.model_copy(update={"text_adapter": folder and str(folder)})
        return locate(stage, recipe.model_copy(update={"teacher": teacher}), []).fingerprint

    without, one, copy, other = map(place, [None, *folders])
    assert one == copy
    assert len({without, one, other}) == 3
    assert without == locate(stage, recipe, []).fingerprint


def test_a_stage_after_an_adapted_text_encoder_is_another_than_before(recipe, tmp_path):
    adapt = text_adapters.stage(text_adapters.write_parallel(tmp_path), text_adapters.encoder(tmp_path / "encoder"))
    (store,) = recipe.stages
    first = locate(store, recipe, [])
    made = locate(adapt, recipe, [first])
    assert locate(store, recipe, [first, made]).fingerprint != first.fingerprint
    assert locate(adapt, recipe, [first, made]).fingerprint == made.fingerprint  # it adapts the teacher's own
    append(tmp_path / "encoder" / "model.safetensors")
    assert locate(adapt, recipe, [first]).fingerprint != made.fingerprint
