"""What survives: a kill at any byte of a save, signals, damaged and missing results."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.pipeline import RunError
from mlcm_rl.storage import checkpoints, files, manifest
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.signals import Stopped

SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from mlcm_rl.storage import checkpoints
for step in range(1, 100_000):
    checkpoints.save_state(Path(sys.argv[1]), step, {"value": torch.full((300_000,), float(step))})
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """One process saves as fast as it can and is killed a few times at moments that nobody chose."""
    for milliseconds in (3, 11, 29):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        reported = int(process.stdout.readline())
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
        process.wait()
        step, tensors, _ = checkpoints.load_state(tmp_path)
        assert step >= reported  # what was reported as saved is there
        assert torch.equal(tensors["value"], torch.full((300_000,), float(step)))
        files.remove(tmp_path / "checkpoints")


def test_a_save_cut_at_any_byte_is_not_seen(tmp_path):
    """A half-written folder has another name until it is whole, however much of it there is."""
    whole = checkpoints.save_state(tmp_path, 1, {"value": torch.arange(9.0)})
    data = (whole / "state.safetensors").read_bytes()
    for length in range(0, len(data), 7):
        half = whole.with_name(".step-00000002.1.part")
        half.mkdir(exist_ok=True)
        (half / "state.safetensors").write_bytes(data[:length])
        assert checkpoints.load_state(tmp_path)[0] == 1


def test_only_the_newest_checkpoints_are_kept_and_the_old_go_last(tmp_path):
    for step in range(1, 6):
        checkpoints.save_state(tmp_path, step, {"value": torch.tensor(float(step))})
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert files.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_every_changed_or_missing_result_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    manifest.finish(tmp_path, {"kind": "test"})
    assert manifest.verify(tmp_path)["kind"] == "test"
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(CheckpointError, match=r"a\.txt is damaged"):
        manifest.verify(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.txt is missing"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_the_same_command_resumes(tiny_sdxl, tmp_path, monkeypatch, number):
    prompts = runs.write_prompts(tmp_path)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[1], num_steps=4, save_every=100)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    backward, steps = Runtime.backward, []

    def signalled(self, *arguments):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return backward(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Runtime, "backward", signalled)
        with pytest.raises(Stopped, match="the same command resumes it") as stopped:
            pipeline.run(recipe)
    assert stopped.value.code == 128 + number
    folder = next((tmp_path / "runs" / "stages").glob("distill-*"))
    assert checkpoints.load_state(folder)[0] == 2
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert pipeline.run(recipe)[1].folder == folder
    assert [record["step"] for record in runs.records(folder)] == [1, 2, 3, 4]


def test_a_result_that_was_damaged_stops_the_run_and_says_what_to_delete(tiny_sdxl, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])
    folder: Path = pipeline.run(recipe)[0].folder
    (folder / "store.json").write_text("{}")
    with pytest.raises(RunError, match=r"stages\[0\] \(trajectories\).*store\.json is damaged.*delete"):
        pipeline.run(recipe)
