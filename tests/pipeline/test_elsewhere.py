"""A run's folder works from any working directory, and after it was moved with what its recipe names."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import runs
from mlcm_rl import pipeline
from mlcm_rl.cli.app import app
from mlcm_rl.models import teachers
from mlcm_rl.recipe import Evaluate
from mlcm_rl.recipe.file import load
from mlcm_rl.training import replay

CLI = CliRunner()


@pytest.fixture
def place(tiny_sdxl, tmp_path, monkeypatch) -> Path:
    """A folder that a recipe was run in, all of its paths relative to the recipe's file."""
    place = tmp_path / "place"
    (place / "mine").mkdir(parents=True)
    (place / "mine" / "teacher").symlink_to(tiny_sdxl)
    runs.write_prompts(place / "mine")
    stages = [
        runs.trajectories("prompts.txt"),
        runs.distill(num_segments=[1], condition_on_target=True),
        Evaluate(prompts="prompts.txt", sampling_steps=[2], teacher_steps=[2], gammas=[0.0], num_prompts=2),
    ]
    recipe = runs.recipe(Path("teacher"), Path(), stages)
    (place / "mine" / "small.yaml").write_text(recipe.model_dump_json())
    monkeypatch.chdir(place)
    pipeline.run(load("mine/small.yaml"))
    return place


def done(*arguments: str) -> str:
    result = CLI.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output + result.stderr
    return result.output


def sample(run: Path, out: Path) -> bytes:
    done("sample", str(run), "--prompt", "a cat", "--out", str(out), "--steps", "2")
    return next(out.glob("*.png")).read_bytes()


def test_a_runs_folder_works_from_any_folder_and_after_a_move(place, tmp_path, monkeypatch):
    before = sample(Path("runs/small"), tmp_path / "before")
    report = done("evaluate", "runs/small").strip()
    monkeypatch.chdir("/")
    run = place / "runs" / "small"
    assert sample(run, tmp_path / "after") == before
    assert done("evaluate", str(run)).strip() == str(place / report)
    exported = tmp_path / "exported"
    done("export", str(run), str(exported))
    assert "place" not in (exported / "README.md").read_text()
    made = done(
        *("pairs", str(run), "--prompts", str(place / "mine" / "prompts.txt"), "--reward", "colourfulness"),
        *("--out", str(tmp_path / "pairs"), "--num-generations", "2", "--steps", "2"),
    )
    assert "of 6 prompts" in made
    moved = tmp_path / "moved"
    place.rename(moved)
    assert sample(moved / "runs" / "small", tmp_path / "moved-too") == before


def test_a_folder_of_before_that_was_recorded_is_found_by_where_runs_are(place, tmp_path, monkeypatch):
    before = sample(Path("runs/small"), tmp_path / "before")
    for manifest in place.glob("runs/stages/distill-*/manifest.json"):
        saved = json.loads(manifest.read_text())
        del saved["working_directory"], saved["seal"]
        manifest.write_text(json.dumps(saved))
    monkeypatch.chdir("/")
    assert sample(place / "runs" / "small", tmp_path / "after") == before


def test_a_replay_finds_the_teacher_from_any_folder(place, monkeypatch):
    recipe = load("mine/small.yaml")
    (folder,) = Path("runs/stages").glob("distill-*")
    (store,) = Path("runs/stages").glob("trajectories-*")
    figures = {"step": 0, "update": 0}
    bundle = replay.write(folder, recipe.stages[1], recipe, {"trajectories": store}, figures).absolute()
    monkeypatch.chdir("/")
    _, stage, read, parents = replay.read(bundle)
    assert (stage, parents["trajectories"].is_dir()) == (recipe.stages[1], True)
    assert teachers.load(read.teacher, "cpu").family == "sdxl"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("sample", "RUN", "--prompt", "a cat", "--out", "drawn"), "mine/teacher"),
        (("export", "RUN", "exported"), "mine/teacher"),
        (("evaluate", "RUN", "--num-prompts", "1"), "mine/teacher and mine/prompts.txt"),
    ],
)
def test_a_run_that_was_moved_without_its_teacher_is_refused_in_words(place, tmp_path, monkeypatch, arguments, missing):
    (place / "runs").rename(tmp_path / "runs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = str(tmp_path / "runs" / "small")
    result = CLI.invoke(app, [run if word == "RUN" else word for word in arguments])
    assert result.exit_code == 1, result.output
    assert f"{missing}, by which distill-" in result.stderr
    assert f"neither where that was run nor in the working directory, here {elsewhere}" in result.stderr
    monkeypatch.chdir(place)
    assert sample(tmp_path / "runs" / "small", tmp_path / "there")
