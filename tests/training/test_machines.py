"""Several machines: two launches on this one, each with its rank, as two machines would start them."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from launched_runs import LAUNCHES, ROOT, SECONDS, all_stages, assert_alike, command_of, environment, stage_folders

import runs
from mlcm_rl import pipeline
from mlcm_rl.recipe import Recipe
from mlcm_rl.recipe.file import load
from mlcm_rl.training import launch
from mlcm_rl.training.launch import LaunchError, Machine, read, refuse_machines, run_under


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def started(recipe: Recipe, folders: list[Path], launch_file: Path) -> list[subprocess.Popen]:
    """Start the run of `recipe` on two machines, which work in `folders`."""
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for rank, folder in enumerate(folders):
        command = [*command_of(recipe, folder, "cpu2")[:-1], str(launch_file)]
        command += ["--machine-rank", str(rank), "--main-address", address]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment(), **pipes))
    return processes


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Return exit code, output and errors of each."""
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@pytest.fixture
def on_the_cpu(tmp_path) -> Path:
    """The launch file of docs/several_machines.md for a rehearsal: that of two processes, as two machines."""
    text = (LAUNCHES / "cpu2.yaml").read_text(encoding="utf-8")
    assert "num_machines: 1\n" in text
    path = tmp_path / "rehearsal.yaml"
    path.write_text(text.replace("num_machines: 1\n", "num_machines: 2\n"), encoding="utf-8")
    return path


@pytest.mark.slow
def test_every_stage_runs_on_two_machines(tiny_sdxl, tmp_path, on_the_cpu):
    stages = all_stages(runs.write_prompts(tmp_path))
    alone, together = (
        runs.recipe(tiny_sdxl, tmp_path, stages, name="small", runs=str(tmp_path / name)) for name in ("one", "two")
    )
    pipeline.run(alone)
    results = ended(started(together, [tmp_path, tmp_path], on_the_cpu))
    assert [code for code, _, _ in results] == [0, 0], results
    assert "done  6 stages" in results[0][1]
    assert "done" not in results[1][1]  # the first machine speaks
    assert_alike(alone, together)
    shards = [sorted(stage_folders(recipe)[0].resolve().glob("*.safetensors")) for recipe in (alone, together)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


@pytest.mark.slow
def test_machines_that_do_not_share_runs_are_told_before_anything_is_computed(tiny_sdxl, tmp_path, on_the_cpu):
    """`runs` is relative to the folder that each works in, and the folders are two."""
    folders = [tmp_path / name for name in ("machine0", "machine1")]
    for folder in folders:
        folder.mkdir()
    stages = [runs.trajectories(runs.write_prompts(tmp_path))]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages, name="small", runs="runs")
    results = ended(started(recipe, folders, on_the_cpu))
    assert all(code != 0 for code, _, _ in results), results
    message = re.compile(r"runs: process 1 of 2 does not see in \S+ what process 0 wrote there: every machine needs")
    assert message.search(" ".join(results[0][2].split())), results
    assert all("Traceback" not in errors for _, _, errors in results)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("store.json"))


@pytest.mark.parametrize(
    ("changes", "machine", "message"),
    [
        (
            {},
            Machine(rank=1),
            "2 machines meet at an address of the first one: give every machine the same",
        ),
        ({}, Machine(0, "here"), "--main-address: expected host:port, found 'here'"),
        ({}, Machine(0, "here:0"), "--main-address: expected host:port, found 'here:0'"),
        ({}, Machine(2, "here:29500"), "machine_rank: expected a whole number from 0 to 1, found 2"),
        ({"num_processes": 3}, Machine(0, "here:29500"), "expected as many for each of 2 machines, found 3 in all"),
        ({"num_machines": 1}, Machine(1, "here:29500"), "num_machines is 1, which leaves nothing to --machine-rank"),
    ],
    ids=str,
)
def test_machines_that_could_not_find_each_other_are_told(tmp_path, changes, machine, message):
    text = (LAUNCHES / "two_nodes.yaml").read_text(encoding="utf-8")
    for key, value in changes.items():
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
    (tmp_path / "launch.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LaunchError, match=re.escape(message)):
        run_under(tmp_path / "launch.yaml", [], machine)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_the_others_do_not_join_says_so(tmp_path, monkeypatch, capfd, rank):
    monkeypatch.setattr(launch, "MEETING_SECONDS", 3)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(LaunchError, match=r"the 2 machines did not find each other: .* Does the command run on each"):
        run_under(LAUNCHES / "two_nodes.yaml", [], Machine(rank, address))
    assert f"{rank}, of 2 from 0, waits for the others at {address}" in capfd.readouterr().out


def test_an_address_that_is_not_there_or_in_use_is_told(tmp_path):
    with pytest.raises(LaunchError, match=r"nowhere\.invalid cannot be found from this machine"):
        run_under(LAUNCHES / "two_nodes.yaml", [], Machine(1, "nowhere.invalid:29500"))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        port = place.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is in use on this machine, by another run or by a second"):
            run_under(LAUNCHES / "two_nodes.yaml", [], Machine(0, f"127.0.0.1:{port}"))


SLURM = {
    "scontrol": "echo node0; echo node1",
    "srun": 'shift; for rank in 0 1; do SLURM_NODEID=$rank "$@"; done',
    "mlcm": 'while [ "$1" != --launch ]; do echo "argument $1"; shift; done; echo "$@"; cp "$2" "launch$4.yaml"',
}


@pytest.mark.parametrize("name", ["two_nodes", "zero2", "fsdp2"])
def test_the_script_for_slurm_launches_a_process_for_each_gpu_of_the_job(tmp_path, name):
    """In place of Slurm's commands and of `mlcm` are scripts that say what they were given."""
    for command, body in SLURM.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / command).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[0-1]", "TMPDIR": str(tmp_path)}
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LAUNCH": str(LAUNCHES / f"{name}.yaml")}
    command = ["bash", str(LAUNCHES / "two_nodes.sbatch"), "recipe.yaml", "seed=1"]
    script = subprocess.run(command, cwd=tmp_path, env=os.environ | job | path, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    assert script.stdout.count("argument run\nargument recipe.yaml\nargument seed=1\n--launch ") == 2
    for rank in (0, 1):
        assert f"--machine-rank {rank} --main-address node0:29500" in script.stdout
        settings = read(tmp_path / f"launch{rank}.yaml")
        assert (settings["num_machines"], settings["num_processes"]) == (2, 16)
        refuse_machines(LAUNCHES, settings | {"main_process_ip": "node0", "main_process_port": 29500})


def test_the_shipped_recipe_is_shared_by_the_gpus_of_two_machines():
    """As docs/several_machines.md says: with gradient_accumulation=2 sixteen processes share a step."""
    distill = load(ROOT / "recipes" / "sdxl_mlcm.yaml", ["stages.distill.gradient_accumulation=2"]).stages[1]
    assert distill.micro_batch % 16 == 0


def test_the_shipped_file_is_for_two_machines():
    settings = read(LAUNCHES / "two_nodes.yaml")
    refuse_machines(LAUNCHES, settings | {"main_process_ip": "here", "main_process_port": 29500})
    assert (settings["num_machines"], settings["num_processes"]) == (2, 2)
