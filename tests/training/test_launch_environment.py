"""Processes that were not started by `--launch`: joined as torchrun does, or refused before anything is done."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched_runs import SECONDS, environment

import runs
from mlcm_rl.recipe import Recipe
from mlcm_rl.training import launch_environment
from mlcm_rl.training import processes as distributed
from mlcm_rl.training.processes import refuse_unshared, start, world_size

NAMES = {*launch_environment.RENDEZVOUS, *launch_environment.COUNTS, *launch_environment.RANKS, "SLURM_NTASKS"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 means .* LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "1"}, "RANK=1 means .* WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
            "WORLD_SIZE=8 means .* and LOCAL_RANK is not set",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            r"SLURM_STEP_NUM_TASKS=2 means .* \(under srun: --ntasks=1\)",
        ),
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3 means .*`torchrun -m mlcm_rl run"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "unset OMPI_COMM_WORLD_SIZE"),
    ],
)
def test_one_of_several_that_cannot_find_the_others_is_refused(monkeypatch, variables, words):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        start(torch.device("cpu"))


VARIABLES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "2", "RANK: expected a whole number from 0 to 1, found '2'"),
        ("RANK", "-1", "RANK: expected a whole number from 0 to 1, found '-1'"),
        ("RANK", "first", "RANK: expected a whole number from 0 to 1, found 'first'"),
        ("RANK", "", "WORLD_SIZE=2 means .* and RANK is not set"),
        ("LOCAL_RANK", "x", "LOCAL_RANK: expected a whole number from 0 to 1"),
        ("MASTER_PORT", "99999", "MASTER_PORT: expected a whole number from 1 to 65535"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
        ("WORLD_SIZE", "٢", "WORLD_SIZE: expected a whole number"),
    ],
)
def test_a_place_among_others_that_cannot_be_is_refused_by_name(monkeypatch, name, value, words):
    """Also under a launcher that does not check them itself."""
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    for other, text in (VARIABLES | {name: value, "TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(other, text)
    assert distributed.rank() >= 0  # called on import, before an error can be reported
    assert world_size() > 0
    with pytest.raises(ValueError, match=words):
        start(torch.device("cpu"))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TORCHELASTIC_RUN_ID": "of a launcher that has ended"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_on_its_own_is_asked_nothing(monkeypatch, tmp_path, variables):
    """Also the one that a script of Slurm's for several starts, or that is to start them."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "PartialState", lambda **_: pytest.fail("it waits for others"))
    start(torch.device("cpu"))
    refuse_unshared(tmp_path / "runs")
    assert (distributed.rank(), world_size()) == (0, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [("sys.exit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError: division by zero"), ("", 0, "")],
)
def test_a_process_of_several_ends_at_once_with_its_code(ends, code, says):
    """Whatever its threads do: gloo's abort it now and then, where the interpreter ends before them."""
    lines = [
        "import sys, threading, time",
        "from mlcm_rl.cli import app as cli",
        "from mlcm_rl.training import processes",
        "def app(prog_name):",
        "    threading.Thread(target=time.sleep, args=(1_000,)).start()",
        "    print('all', end='')",
        f"    {ends}",
        "cli.app = app",
        "cli.main()",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment(**VARIABLES),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (ended.returncode, ended.stdout) == (code, "all")
    assert says in ended.stderr
    assert bool(says) == bool(ended.stderr)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def joined(recipe: Recipe, folders: list[Path]) -> list[subprocess.CompletedProcess]:
    """`mlcm run` in one process for each of `folders`, each with the recipe and the variables that a cluster sets."""
    port, processes = str(free_port()), []
    for rank, folder in enumerate(folders):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(folders))}
        place = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **places)
        (folder / "small.yaml").write_text(recipe.model_dump_json())
        command = [sys.executable, "-m", "mlcm_rl", "run", "small.yaml"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=place, **pipes))
    outputs = [process.communicate(timeout=SECONDS) for process in processes]
    return [
        subprocess.CompletedProcess([], process.returncode, *both)
        for process, both in zip(processes, outputs, strict=True)
    ]


@pytest.mark.slow
def test_processes_that_are_told_of_each_other_share_a_run_and_two_machines_without_a_shared_folder_are_refused(
    tiny_sdxl, tmp_path
):
    stages = [runs.trajectories(runs.write_prompts(tmp_path), shard_size=2)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages, runs="runs")
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    for rank, process in enumerate(joined(recipe, folders)):
        assert process.returncode == 1, process.stdout + process.stderr
        assert f"failed  runs: process 1 of 2 does not see in {folders[rank] / 'runs'} what process 0" in process.stderr
        assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.glob("*/runs/*")] == []
    together = joined(recipe, [folders[0], folders[0]])
    assert [process.returncode for process in together] == [0, 0], together
    assert [process.stdout.count("done  1 stages") for process in together] == [1, 0]
    assert len(list(tmp_path.glob("one/runs/stages/trajectories-*/shard-*"))) == 4
