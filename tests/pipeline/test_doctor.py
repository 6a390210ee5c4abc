"""`mlcm doctor`: each finding with what it depends on taken away; a machine without a home folder, git, a compiler."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mlcm_rl.cli.app import app
from mlcm_rl.pipeline import doctor
from mlcm_rl.storage.caches import cache_folder
from mlcm_rl.training import machine

ROOT = Path(__file__).resolve().parents[2]


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.findings()}


def installed_as(versions: dict[str, str | None]):
    """Return `importlib.metadata.version` of a machine with other `versions`."""

    def answer(name: str) -> str:
        if name not in versions:
            return version(name)
        if versions[name] is None:
            raise PackageNotFoundError(name)
        return versions[name]

    return answer


def test_a_whole_installation_has_no_bad_finding():
    result = findings()
    assert all(finding.state != "bad" for finding in result.values())
    assert result["torch"].value == version("torch")
    assert all(finding.advice for finding in result.values() if finding.state != "ok")


@pytest.mark.parametrize(
    ("here", "value", "advice"),
    [(None, "missing", "pip install 'peft>=0.21.2'"), ("0.3.0", "0.3.0", "mlcm_rl needs peft")],
)
def test_a_requirement_that_is_missing_or_too_old_is_bad(monkeypatch, here, value, advice):
    monkeypatch.setattr(doctor, "version", installed_as({"peft": here}))
    monkeypatch.setattr(doctor, "requires", lambda name: ["peft>=0.21.2"])
    finding = findings()["peft"]
    assert (finding.state, finding.value) == ("bad", value)
    assert advice in finding.advice
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_an_extra_that_is_missing_is_a_note_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "version", installed_as({"bitsandbytes": None}))
    finding = findings()["quantised"]
    assert finding.state == "note"
    assert "pip install 'mlcm-rl[quantised]'" in finding.advice


def test_every_extra_says_what_it_is_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) == set(doctor.FOR_PEOPLE)


def test_a_container_s_limits_count(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2 * 2**30}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    result = findings()
    assert "0.5" in result["CPU"].value
    assert result["CPU"].advice.endswith("OMP_NUM_THREADS=1")
    assert result["memory"].value == "2.1 GB in this container"
    assert result["memory"].state == "note"


def test_limits_that_are_not_set_do_not_count(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert "container" not in findings()["CPU"].value + findings()["memory"].value


def test_a_cpu_without_bfloat16_is_told_so(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_has_bfloat16", lambda: False)
    assert "precision: bf16 is emulated" in findings()["arithmetic"].advice


def test_json_is_the_same_findings():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert [row["name"] for row in json.loads(result.stdout)] == list(findings())


@pytest.mark.slow  # a process that imports torch
def test_it_works_without_a_home_folder_git_or_a_compiler(tmp_path):
    python = Path(sys.executable).absolute()
    program = "import os.path; os.path.expanduser = lambda path: path; from mlcm_rl.__main__ import main; main()"
    environment = {
        "COLUMNS": "200",
        "PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [python, "-c", program, "doctor"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert ".mlcm_rl_cache" in result.stdout
    assert not (tmp_path / ".mlcm_rl_cache").exists()


def test_caches_are_where_the_variables_say(monkeypatch, tmp_path):
    for variable in ("MLCM_RL_CACHE", "MLCM_RL_ESTIMATES"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder("rewards") == Path.home() / ".cache" / "mlcm_rl" / "rewards"
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    assert cache_folder("estimates", "MLCM_RL_ESTIMATES") == tmp_path / "estimates"
    monkeypatch.setenv("MLCM_RL_ESTIMATES", str(tmp_path / "other"))
    assert cache_folder("estimates", "MLCM_RL_ESTIMATES") == tmp_path / "other"
