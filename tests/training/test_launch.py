"""Several processes of one recipe have the result of one; what cannot be launched is reported."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launched_runs import (
    LAUNCHES,
    ROOT,
    SECONDS,
    all_stages,
    assert_alike,
    command_of,
    environment,
    launch,
    launched,
    records,
    stage_folders,
    whole_and_launched,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

import runs
import text_adapters
import tiny
from mlcm_rl import pipeline
from mlcm_rl.cli.app import app
from mlcm_rl.pipeline import preflight
from mlcm_rl.recipe import Training
from mlcm_rl.recipe.file import load
from mlcm_rl.storage import checkpoints, lock
from mlcm_rl.training import launch as launcher
from mlcm_rl.training import processes as distributed
from mlcm_rl.training.launch import Killed, LaunchError, exit_code, read, refuse_killed, run_under
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.processes import rows, share
from tiny_families import CASES


def test_two_processes_make_what_one_makes(tiny_sdxl, tmp_path):
    stages = [
        runs.trajectories(runs.write_prompts(tmp_path), shard_size=2),
        runs.distill(num_segments=[2], num_steps=3, gradient_accumulation=2, target="consistency", target_ema=0.9),
    ]
    alone, together = whole_and_launched(tiny_sdxl, tmp_path, stages, "cpu2")
    assert_alike(alone, together)
    shards = [sorted(stage_folders(recipe)[0].resolve().glob("shard-*")) for recipe in (alone, together)]
    assert [shard.read_bytes() for shard in shards[0]] == [shard.read_bytes() for shard in shards[1]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cpu2", "zero2", "zero3", "fsdp2"])
def test_every_stage_runs_in_two_processes(tiny_sdxl, tmp_path, mode):
    stages = all_stages(runs.write_prompts(tmp_path))
    alone, together = whole_and_launched(tiny_sdxl, tmp_path, stages, mode)
    assert_alike(alone, together)
    launched(together, tmp_path, mode)  # again: every stage is found, none is run
    tables = [stage_folders(recipe)[-1] / "report.md" for recipe in (alone, together)]
    assert all("DDIM" in table.read_text(encoding="utf-8") for table in tables)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3", "fsdp2"])
def test_stable_diffusion_3_is_trained_in_two_processes(tmp_path, mode):
    """FSDP2 gathers its own blocks, which the launch file does not name."""
    prompts = runs.write_prompts(tmp_path)
    stages = [
        runs.trajectories(prompts, shard_size=2),
        runs.distill(num_segments=[2], num_steps=3, condition_on_target=True),
        runs.tuning("feedback", prompts, gradient_accumulation=2, num_grad_steps=2, normalise=False),
        runs.tuning("dpo", prompts, gamma=1.0),
        runs.tuning("policy", prompts, num_iterations=2),
    ]
    alone, together = whole_and_launched(tiny.sd3(tmp_path / "teacher"), tmp_path, stages, mode, "sd3")
    assert_alike(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind"), [("cpu2", "int8"), ("zero2", "int8"), ("zero3", "nf4"), ("fsdp2", "nf4")])
def test_a_quantised_teacher_s_students_train_in_two_processes(tiny_sdxl, tmp_path, mode, kind):
    """Each process has all of the quantised weights, which no engine shards, and its part of what is trained."""
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")
    prompts = runs.write_prompts(tmp_path)
    stages = [
        runs.trajectories(prompts, shard_size=2),
        runs.distill(num_segments=[2], num_steps=3, condition_on_target=True),
        runs.tuning("dpo", prompts, gamma=1.0),
    ]
    alone, together = whole_and_launched(tiny_sdxl, tmp_path, stages, mode, quantise=kind)
    assert_alike(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode", "kind"), [("flux", "zero3", "nf4"), ("qwen_image", "fsdp2", "int8")])
def test_students_of_other_quantised_families_train_in_two_processes(tmp_path, family, mode, kind):
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")
    prompts, case = runs.write_prompts(tmp_path), CASES[family]
    stages = [runs.trajectories(prompts, shard_size=2), runs.distill(num_segments=[2], num_steps=3)]
    settings = {"quantise": kind, "resolution": case.resolution}
    alone, together = whole_and_launched(
        case.write(tmp_path / "teacher"), tmp_path, stages, mode, case.family, **settings
    )
    assert_alike(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 2, "alpha": 2.0}, {"kind": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("mode", ["cpu2", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("family", ["qwen_image", "hunyuan_dit"])
def test_a_denoiser_with_weights_that_no_loss_reaches_is_trained_in_two_processes(tmp_path, family, mode, adapter):
    """The last block of Qwen-Image's denoiser changes the prompt's states, which nothing reads.

    Hunyuan-DiT's pools T5's states by weights of layers that it never calls, and its checkpoints are our own.
    """
    checkpoints = {"gradient_checkpointing": family == "hunyuan_dit"}
    prompts, case = runs.write_prompts(tmp_path), CASES[family]
    stages = [
        runs.trajectories(prompts, shard_size=2),
        runs.distill(num_segments=[2], num_steps=3, condition_on_target=True, adapter=adapter, **checkpoints),
        runs.tuning("feedback", prompts, gradient_accumulation=2, num_grad_steps=2, normalise=False, **checkpoints),
    ]
    folder = case.write(tmp_path / "teacher")
    alone, together = (
        runs.recipe(folder, tmp_path, stages, case.family, case.resolution, name="small", runs=str(tmp_path / name))
        for name in ("alone", "together")
    )
    pipeline.run(alone)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runtime, "save", interrupted(Runtime.save))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(together)
    assert launch(together, tmp_path, mode).returncode == 0
    assert_alike(alone, together)


def interrupted(save):
    """A method that is interrupted as soon as `save` has written a checkpoint."""

    def interrupting(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    return interrupting


@pytest.mark.slow
def test_processes_that_cannot_share_a_batch_are_told_once_before_any_stage(tiny_sdxl, tmp_path):
    stages = [
        runs.trajectories(runs.write_prompts(tmp_path)),
        runs.distill(num_segments=[1], batch_size=3, num_steps=1),
    ]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    failed = launch(recipe, tmp_path, "cpu2")
    assert failed.returncode == 1
    message = "stages[1] (distill): batch_size: 3 samples cannot be shared evenly by 2 processes"
    assert failed.stderr.count(message) == 1
    assert "Traceback" not in failed.stderr
    assert not Path(recipe.runs).exists()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_runs_on_up_to_eight_processes(path, processes, monkeypatch):
    """With fewer micro-batches than for one device, where that has room for few samples."""
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for stage in load(path).stages:
        if isinstance(stage, Training):
            counts = [n for n in range(1, stage.gradient_accumulation + 1) if stage.gradient_accumulation % n == 0]
            forms = [stage.model_copy(update={"gradient_accumulation": count}) for count in counts]
            assert any(dict(preflight.problems(form)).get("batch_size") is None for form in forms)


def test_a_process_takes_its_rows_and_its_items(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert rows(6) == slice(3, 6)
    assert share(range(5)) == [1, 3]
    with pytest.raises(ValueError, match="5 samples cannot be shared evenly by 2 processes: choose batch_size"):
        rows(5)


def test_a_group_of_samples_stays_in_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert rows(8, together=4) == slice(4, 8)
    with pytest.raises(ValueError, match="3 groups of 2 samples cannot be shared evenly by 2 processes"):
        rows(6, together=2)


@pytest.mark.parametrize("path", sorted(LAUNCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_configurations_of_accelerate(path):
    assert read(path)["num_processes"] == (1 if path.stem == "one_gpu" else 2)


def test_deepspeed_missing_is_an_error_in_words(monkeypatch):
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="DeepSpeed is not installed: pip install"):
        run_under(LAUNCHES / "zero2.yaml", ["recipe.yaml"])


ONE = "distributed_type: 'NO'\n"
TWO = "distributed_type: MULTI_GPU\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a: [", "is not YAML"),
        (b"a: 1", "is not an accelerate configuration"),
        (b"distributed_type: 'NO' # \xe9", "is not UTF-8: .* at byte 25"),
        (
            "distributed_type: FOO",
            "distributed_type: expected one of NO, MULTI_CPU, MULTI_GPU, DEEPSPEED, FSDP, found 'FOO'",
        ),
        ("compute_environment: CLOUD\n" + ONE, "compute_environment: expected LOCAL_MACHINE, found 'CLOUD'"),
        ("mixed_precision: half\n" + ONE, "mixed_precision: expected one of no, fp16, bf16, fp8, found 'half'"),
        (TWO, "num_processes: expected a whole number from 1 to 100,000, found None"),
        (TWO + "num_processes: two", "num_processes: expected a whole number from 1 to 100,000, found 'two'"),
        (TWO + "num_processes: 0", "num_processes: expected a whole number from 1 to 100,000, found 0"),
        (ONE + "num_processes: true", "num_processes: expected a whole number from 1 to 100,000, found True"),
        (
            TWO + "num_processes: 1000000000",
            "num_processes: expected a whole number from 1 to 100,000, found 1000000000",
        ),
        (ONE + "main_process_port: 70000", "main_process_port: expected a whole number from 0 to 65,535, found 70000"),
        ("a: " + "[" * 5000, "is nested too deeply to be a configuration"),
        (ONE + "# long\n" * 10_000, "more than 65,536 bytes"),
        (ONE + "num_processes: 2", "num_processes: expected 1 on one machine with distributed_type NO"),
        (ONE + "num_proceses: 1", "num_proceses: unknown key; did you mean num_processes"),
        (ONE + "use_cpu: maybe", "use_cpu: expected true or false, found 'maybe'"),
        (ONE + "gpu_ids: 0", "gpu_ids: expected numbers in quotes, .* found 0"),
        (ONE + "fsdp_config: 2", "fsdp_config: expected settings with names, found 2"),
    ],
)
def test_a_launch_file_that_is_wrong_is_an_error_that_names_file_and_key_in_run_and_in_plan(
    tiny_sdxl, tmp_path, monkeypatch, text, problem
):
    monkeypatch.setattr(pipeline, "plan", lambda *_: pytest.fail("the launch file was taken"))
    file = tmp_path / "launch.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))]).model_dump_json()
    )
    for command in ("run", "plan"):
        result = CliRunner().invoke(app, [command, str(recipe), "--launch", str(file)], env={"COLUMNS": "1000"})
        assert result.exit_code == 2, result.output
        assert re.search(rf"launch\.yaml:? {problem}", result.stderr), result.stderr


@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop"])
def test_a_launch_file_that_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    file = tmp_path / "launch.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "zeros" else file.name)
    with pytest.raises(LaunchError, match=r"launch\.yaml: (a pipe, a socket or a device|Too many levels)"):
        read(file)


def test_what_accelerate_refuses_is_told_with_the_file(tmp_path):
    (tmp_path / "launch.yaml").write_text(TWO + "num_processes: 2\ngpu_ids: '0'\n")
    with pytest.raises(LaunchError, match=r"launch\.yaml: Less than two GPU ids"):
        run_under(tmp_path / "launch.yaml", ["recipe.yaml"])


def test_the_words_that_people_leave_unquoted_are_read_as_accelerate_reads_them(tmp_path):
    (tmp_path / "launch.yaml").write_text(
        "distributed_type: NO\nmixed_precision: no\nmain_process_port:\nfsdp_config:\n"
    )
    settings = read(tmp_path / "launch.yaml")
    assert (settings["distributed_type"], settings["mixed_precision"], settings["num_processes"]) == ("NO", "no", 1)


# ---- one process ----


def started(recipe, folder, mode: str) -> subprocess.Popen:
    """`mlcm run RECIPE --launch MODE` in a group of its own, as a terminal starts a command."""
    return subprocess.Popen(
        command_of(recipe, folder, mode),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number", "code"),
    [
        pytest.param(os.kill, signal.SIGTERM, 143, id="sigterm"),
        pytest.param(os.killpg, signal.SIGINT, 130, id="ctrl_c"),
    ],
)
def test_a_signal_to_a_launch_of_one_process_ends_the_training_after_a_step_that_is_saved(
    tiny_sdxl, tmp_path, send, number, code
):
    stages = [runs.trajectories(runs.write_prompts(tmp_path)), runs.distill(num_steps=100_000, save_every=100_000)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    process = started(recipe, tmp_path, "one_gpu")
    try:
        deadline = time.monotonic() + SECONDS
        while not (logs := list(tmp_path.glob("runs/stages/distill-*/log.jsonl"))) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        send(process.pid, number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, output + errors
    assert "Interrupted. The same command takes the run up where it was saved." in errors
    assert "Traceback" not in errors
    (folder,) = (log.parent for log in logs)
    assert checkpoints.checkpoints(folder)
    with lock.folder_lock(folder):  # nobody is left behind who holds it
        pass


@pytest.mark.slow
def test_a_launch_of_one_process_that_fails_ends_with_its_code_and_its_message_alone(tiny_sdxl, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "stages").write_text("in the way")
    stages = [runs.trajectories(runs.write_prompts(tmp_path))]
    failed = launch(runs.recipe(tiny_sdxl, tmp_path, stages), tmp_path, "one_gpu")
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.startswith("failed  stages[0] (trajectories): ")
    assert "Traceback" not in failed.stderr


# ---- several processes, of which one is lost ----


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_launch_in_words_that_say_what_is_saved(tiny_sdxl, tmp_path, rank):
    stages = [
        runs.trajectories(runs.write_prompts(tmp_path)),
        runs.distill(num_steps=100_000, save_every=50_000, log_every=1),
    ]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    process = started(recipe, tmp_path, "cpu2")
    try:
        deadline = time.monotonic() + SECONDS
        while not any(tmp_path.glob("runs/stages/distill-*/log.jsonl")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(children(process.pid)[rank], signal.SIGKILL)
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 3, output + errors
    assert re.search(
        r"failed  stages\[1\] \(distill\): another process .* has ended, and this one stops: .*/step-\d+ is whole, and "
        "the same command goes on",
        errors,
    ), errors
    assert f"process {rank} of 2 was ended by SIGKILL (the system does that where memory runs out)" in errors
    assert "Traceback" not in errors
    (folder,) = tmp_path.glob("runs/stages/distill-*")
    (saved,) = checkpoints.checkpoints(folder)  # by the process that is left: none was due
    assert int(saved.name.removeprefix("step-")) >= len((folder / "log.jsonl").read_text().splitlines()) > 0


def test_the_code_of_a_launch_is_that_of_the_process_that_failed_and_not_of_those_that_lost_it():
    def failed(*codes: int) -> ChildFailedError:
        failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate(codes)}
        return ChildFailedError("mlcm", failures)

    assert exit_code(failed(3, 1)) == 1
    assert exit_code(failed(2, 3)) == 2
    assert exit_code(failed(3, 3)) == 3
    refuse_killed(failed(3, 1, -signal.SIGTERM), 3)
    with pytest.raises(Killed, match=r"process 1 of 2 was ended by SIGSEGV: the others were stopped"):
        refuse_killed(failed(3, -signal.SIGSEGV), 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cpu2", "zero2", "fsdp2"])
def test_a_text_adapter_is_the_same_from_two_processes(tiny_sdxl, tmp_path, mode):
    logs = []
    for name in ("alone", mode):
        (tmp_path / name).mkdir()
        recipe = text_adapters.recipe(tiny_sdxl, tmp_path / name, learning_rate=1e-4)
        if name == "alone":
            pipeline.run(recipe)
        else:
            launched(recipe, tmp_path / name, mode)
        folder = stage_folders(recipe)[-1]
        assert (folder / "text_adapter" / "encoder" / "model.safetensors").is_file()
        logs.append(records(folder))
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
