"""`mlcm gallery`: what it prints, and the arguments that mean nothing."""

import json
import sys

import pytest
from typer.testing import CliRunner

import planted_evaluations
from mlcm_rl.cli.app import app


@pytest.fixture
def mlcm(tmp_path, monkeypatch):
    """Runs the command beside the runs one and two, of an evaluation each."""
    for name in ("one", "two"):
        stage = planted_evaluations.write(tmp_path / "runs" / "stages" / f"evaluate-{name}", {"student": [0.1] * 4})
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "02-evaluate").symlink_to(stage)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["gallery", *arguments])


def test_it_says_what_the_page_holds(mlcm):
    result = mlcm("runs/one", "runs/two", "--out", "page.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("page.html  2 rows, 6 columns, 12 pictures, ")
    result = mlcm("runs/one", "--steps", "4", "--all", "--out", "folder")
    assert result.stdout.splitlines()[-1].startswith("folder/index.html  2 rows, 4 columns, 8 pictures, ")


def test_runs_are_looked_for_and_the_nearest_named(mlcm):
    result = mlcm("runs/one", "runs/twoo", "--out", "page.html")
    assert result.exit_code == 2
    assert "no folder runs/twoo: the nearest are runs/two" in result.output


def test_a_run_without_an_evaluation_is_told_the_ways_out_before_anything_is_imported(mlcm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlcm_rl.pipeline.galleries", None)  # to import it would fail
    stage = tmp_path / "runs" / "none" / "01-distill"
    stage.mkdir(parents=True)
    record = {"kind": "distill", "recipe": {"stages": [{"kind": "distill"}]}}
    (stage / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    result = mlcm("runs/none", "--out", "page.html")
    assert result.exit_code == 2
    assert "its recipe has no evaluate stage" in result.output
    assert "mlcm evaluate runs/none --prompts FILE" in " ".join(result.output.split())


def test_options_that_mean_nothing_are_refused(mlcm):
    result = mlcm("runs/one", "--port", "8000", "--out", "page.html")
    assert result.exit_code == 2
    assert "--port means nothing without --blind" in result.output


def test_a_column_that_is_not_there_is_refused_before_anything_is_served(mlcm):
    pytest.importorskip("mlcm_rl.cli.label_page", reason="the extra `label` is not installed")
    result = mlcm("runs/one", "runs/two", "--blind", "one:student@4", "two:student@8", "--out", "table")
    assert result.exit_code == 2
    assert "--blind: there is no column 'two:student@8'; the nearest are 'two:student@4'" in result.output
