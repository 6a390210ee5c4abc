"""`mlcm runs` and `mlcm clean`: stages listed with their state, and only those deleted that nothing needs."""

import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlcm_rl.cli.app import app
from mlcm_rl.cli.console import console
from mlcm_rl.pipeline import results
from mlcm_rl.pipeline.errors import RunError
from mlcm_rl.recipe import Distill
from mlcm_rl.storage.lock import folder_lock
from mlcm_rl.storage.manifest import BEGUN


def finished(runs: Path, name: str, **manifest: object) -> Path:
    folder = runs / "stages" / name
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"0" * 1000)
    kind, fingerprint = name.split("-")
    text = json.dumps({"kind": kind, "fingerprint": fingerprint, "seconds": 90, "network_evaluations": 7, **manifest})
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return folder


def link(runs: Path, run: str, number: int, folder: Path) -> None:
    (runs / run).mkdir(exist_ok=True)
    (runs / run / f"{number:02d}-{folder.name.split('-')[0]}").symlink_to(Path("..") / "stages" / folder.name)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """One run of two linked stages; the unlinked parent of its student; an older student; a stopped one."""
    monkeypatch.setattr(console, "_width", 160)  # a test before this one may have made it narrower
    place = tmp_path / "runs"
    finished(place, "trajectories-aa")
    student = finished(place, "distill-bb", parents={"trajectories": "trajectories-aa"})
    report = finished(place, "evaluate-cc", stage={"also": ["runs/stages/distill-ee"]})
    finished(place, "distill-dd", parents={"trajectories": "trajectories-aa"})
    finished(place, "distill-ee")
    (place / "stages" / "distill-ff" / "checkpoints" / "step-00000040").mkdir(parents=True)
    link(place, "mine", 0, student)
    link(place, "mine", 1, report)
    return place


def states(runs: Path) -> dict[str, results.StageFolder]:
    return {stage.folder.name: stage for stage in results.stages(runs)}


def test_what_a_run_links_to_and_what_that_was_made_from_is_needed(runs):
    assert {name for name, stage in states(runs).items() if not stage.is_needed} == {"distill-dd"}


def test_states(runs):
    (runs / "stages" / "distill-ee" / "manifest.json").write_text("{", encoding="utf-8")
    with folder_lock(runs / "stages" / "policy-gg"):
        found = {name: stage.state for name, stage in states(runs).items()}
    assert found == {
        **dict.fromkeys(("trajectories-aa", "distill-bb", "evaluate-cc", "distill-dd"), "done"),
        **{"distill-ee": "damaged", "distill-ff": "unfinished", "policy-gg": "running"},
    }
    assert states(runs)["policy-gg"].state == "unfinished"  # its lock is free again
    assert states(runs)["distill-ff"].steps == 40


def test_the_list_has_two_lines_a_stage(runs):
    result = CliRunner().invoke(app, ["runs", str(runs)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = {
        line[:10]: (line, below.strip()) for line, below in itertools.pairwise(lines) if line.startswith("distill-")
    }
    assert rows["distill-bb"][1] == "mine; 7 evaluations; 1.5 min"
    assert rows["distill-dd"][1].startswith("none needs it")
    assert rows["distill-ee"][1].startswith("another stage needs it")
    assert "unfinished at 40" in rows["distill-ff"][0]
    assert "No run needs 1 of them" in result.stdout
    listed = json.loads(CliRunner().invoke(app, ["runs", str(runs), "--json"]).stdout)
    assert {row["stage"]: row["runs"] for row in listed}["evaluate-cc"] == ["mine"]


def test_a_stage_that_was_stopped_has_its_recipe_and_its_evaluations_so_far(runs):
    stage = Distill(num_steps=100, batch_size=2).model_dump(mode="json")
    record = {"stage": stage, "recipe": {"name": "half"}, "network_evaluations": 1000}
    begun = runs / "stages" / "distill-ff" / BEGUN
    begun.write_text(json.dumps(record), encoding="utf-8")
    assert (states(runs)["distill-ff"].begun_by, states(runs)["distill-ff"].network_evaluations) == ("half", 400)
    assert "begun by half; 400 evaluations so far" in CliRunner().invoke(app, ["runs", str(runs)]).stdout
    assert "begun by half" in CliRunner().invoke(app, ["clean", str(runs), "--unfinished", "--dry-run"]).stdout
    begun.write_text(json.dumps(record | {"stage": {"kind": "distill", "gone": 1}}), encoding="utf-8")
    assert states(runs)["distill-ff"].network_evaluations is None
    for damaged in ("{", json.dumps(record | {"recipe": {"name": ["half"]}})):
        begun.write_text(damaged, encoding="utf-8")
        assert states(runs)["distill-ff"].begun_by is None
    (begun.parent / "step-abc").mkdir()  # not one of ours
    lines = CliRunner().invoke(app, ["runs", str(runs)]).stdout.splitlines()
    assert "  no record says which recipe began it; 400 evaluations so far" in lines


def test_the_list_fits_80_columns_with_names_whole(runs, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    stage = finished(runs, "train_teacher-0123456789ab")
    for number in range(9):
        link(runs, f"a_run_of_a_long_name_{number}", 0, stage)
    lines = CliRunner().invoke(app, ["runs", str(runs)]).stdout.splitlines()
    assert max(map(len, lines[: lines.index("")])) <= 80
    assert all(any(f"a_run_of_a_long_name_{number}" in line for line in lines) for number in range(9))


def test_clean_asks_and_a_no_deletes_nothing(runs):
    result = CliRunner().invoke(app, ["clean", str(runs)], input="n\n")
    assert result.exit_code == 1
    assert "distill-dd" in result.stdout
    assert len(states(runs)) == 6


@pytest.mark.parametrize(
    ("options", "gone", "said"),
    [
        (["--yes"], {"distill-dd"}, "deleted"),
        (["--yes", "--unfinished"], {"distill-dd", "distill-ff"}, "deleted"),
        (["--dry-run"], set(), "would be deleted"),
    ],
)
def test_clean_deletes_what_nothing_needs(runs, options, gone, said):
    before = set(states(runs))
    result = CliRunner().invoke(app, ["clean", str(runs), *options])
    assert result.exit_code == 0, result.output
    assert before - set(states(runs)) == gone
    assert said in result.stdout
    assert ("would be" in result.stdout) == ("--dry-run" in options)


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("best", "stages/distill-dd"),
        ("mine/final", "../stages/distill-dd"),
        ("mine/01-weights", "../stages/distill-dd/weights"),
        ("group/a [b]/01-distill", "../../stages/distill-dd"),
        ("other/01-distill", "../best"),
        ("stages/distill-hh", "distill-dd"),
    ],
)
def test_any_link_under_the_folder_makes_a_stage_needed(runs, place, target):
    if place.startswith(("other", "stages")):
        (runs / "best").symlink_to("stages/distill-hh" if place.startswith("stages") else "stages/distill-dd")
    (runs / place).parent.mkdir(parents=True, exist_ok=True)
    (runs / place).symlink_to(target)
    (runs / "mine" / "nowhere").symlink_to("nowhere")
    (runs / "mine" / "nowhere-else").symlink_to("../stages/gone")
    assert all(stage.is_needed for stage in results.stages(runs))


def test_what_an_unfinished_stage_is_made_from_is_needed(runs):
    record = runs / "stages" / "distill-ff" / "checkpoints" / "begun.json"
    record.write_text(json.dumps({"parents": {"distill": "distill-dd"}}), encoding="utf-8")
    assert states(runs)["distill-dd"].is_needed


def test_a_run_that_comes_to_need_a_stage_while_clean_asks_gets_it(runs, monkeypatch):
    def answer(question: str) -> bool:
        link(runs, "late", 0, runs / "stages" / "distill-dd")
        return True

    monkeypatch.setattr("typer.confirm", answer)
    result = CliRunner().invoke(app, ["clean", str(runs)])
    assert (result.exit_code, "0 stages deleted" in result.stdout) == (0, True)
    assert states(runs)["distill-dd"].runs == ("late",)


def test_a_stage_that_is_a_link_is_deleted_where_it_lies(runs, tmp_path):
    """Moved to another disk, say. What a link leads to and is no stage stays, and a stage of two names goes once."""
    place, link = tmp_path / "disk" / "distill-dd", runs / "stages" / "distill-dd"
    place.parent.mkdir()
    link.rename(place)
    link.symlink_to(place)
    (runs / "stages" / "distill-gg").symlink_to("distill-dd")
    (tmp_path / "mine").mkdir()
    (runs / "stages" / "distill-hh").symlink_to(tmp_path / "mine")
    result = CliRunner().invoke(app, ["clean", str(runs), "--yes", "--unfinished"])
    assert result.exit_code == 0, result.output
    assert f"{link} -> {place}" in result.stdout
    assert not place.exists()
    assert set(states(runs)) == {"trajectories-aa", "distill-bb", "evaluate-cc", "distill-ee"}
    assert not [path for path in (runs / "stages").iterdir() if path.is_symlink()]
    assert (tmp_path / "mine").is_dir()


def test_before_any_run_it_says_so_and_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for command in ("runs", "clean"):
        result = CliRunner().invoke(app, [command])
        assert result.exit_code == 2
        assert f"there are no runs yet in {tmp_path / 'runs'}: `mlcm run emoji_demo` makes the first" in result.output
    (tmp_path / "runs").touch()
    assert "runs is a file" in CliRunner().invoke(app, ["runs"]).output


def test_one_stage_is_called_so(tmp_path):
    finished(tmp_path, "distill-dd")
    assert "1 stage, 1.1 kB" in CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout
    assert "1 stage deleted" in CliRunner().invoke(app, ["clean", str(tmp_path), "--yes"]).stdout


def test_figures_that_are_no_numbers_are_left_out(runs):
    path = runs / "stages" / "distill-dd" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": "x", "network_evaluations": "y"}))
    assert CliRunner().invoke(app, ["runs", str(runs)]).exit_code == 0


def test_clean_when_everything_is_needed(runs):
    CliRunner().invoke(app, ["clean", str(runs), "--yes"])
    result = CliRunner().invoke(app, ["clean", str(runs)])
    assert (result.exit_code, "nothing to delete" in result.stdout) == (0, True)


def test_a_stage_that_is_written_now_is_not_deleted(runs):
    stage = states(runs)["distill-dd"]
    with folder_lock(stage.folder), pytest.raises(RunError, match="is being written by process"):
        results.remove(stage)
    assert stage.folder.is_dir()


def test_a_folder_without_stages_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert (result.exit_code, "holds no stages" in result.stderr) == (1, True)
