"""SIGTERM and Ctrl-C at any time: out soon, with a code of their own, and the same command goes on."""

import os
import signal
import time

import pytest
from typer.testing import CliRunner

import runs
from mlcm_rl.cli.app import app
from mlcm_rl.recipe import Evaluate
from mlcm_rl.stages import evaluate, trajectories
from mlcm_rl.storage import manifest
from mlcm_rl.training import signals

CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def test_a_signal_outside_a_training_loop_ends_with_its_code_and_what_is_whole_stays(tiny_sdxl, tmp_path, monkeypatch):
    prompts = runs.write_prompts(tmp_path)
    report = Evaluate(prompts=prompts, num_prompts=4, sampling_steps=[1], teacher_steps=[2], batch_size=1)
    store = runs.trajectories(prompts, batch_size=2, shard_size=2)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [store, runs.distill(num_segments=[1], num_steps=1), report])
    path = tmp_path / "small.yaml"
    path.write_text(recipe.model_dump_json())
    monkeypatch.chdir(tmp_path)

    def run_signalled(module, name: str, number: int, code: int):
        original, calls = getattr(module, name), []

        def signalled(*arguments):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), number)
            return original(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, signalled)
            result = CliRunner().invoke(app, ["run", str(path)])
        assert result.exit_code == code, result.output
        assert "The same command takes the run up where it was saved." in result.stderr

    for count, (number, code) in enumerate(CODES, start=1):
        run_signalled(trajectories, "solve", number, code)
        (folder,) = (tmp_path / "runs" / "stages").glob("trajectories-*")
        whole = [f"shard-{2 * i:07d}.safetensors" for i in range(count)]
        assert sorted(shard.name for shard in folder.glob("shard-*.safetensors")) == whole
    for number, code in CODES:
        run_signalled(evaluate, "draw", number, code)
    assert CliRunner().invoke(app, ["run", str(path)]).exit_code == 0
    assert manifest.is_finished(folder)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_step_that_takes_too_long_after_a_signal_is_left_and_so_is_one_at_a_second_signal(monkeypatch, number, code):
    monkeypatch.setattr(signals, "STEP_SECONDS", 0.1)

    def step(count: int, seconds: float) -> None:
        with signals.deferral() as pending:
            for _ in range(count):
                os.kill(os.getpid(), number)
                assert pending.number == number
            time.sleep(seconds)

    with pytest.raises(signals.Stopped, match="took over") as stopped:
        step(1, 20)
    assert stopped.value.code == code
    with pytest.raises(signals.Stopped, match="stopped within a step; the last save is intact"):
        step(2, 0)
    step(1, 0)
    time.sleep(0.2)  # no alarm is left behind
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_the_codes_are_in_the_help():
    words = " ".join(CliRunner().invoke(app, ["run", "--help"]).output.replace("│", " ").split())
    assert "130 after Ctrl-C and 143 after SIGTERM" in words
