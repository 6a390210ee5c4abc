"""The surroundings of a training loop: its precision, its figures, and the messages before it begins."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

import runs
import tiny
from mlcm_rl import pipeline, stages
from mlcm_rl.models import students, teachers
from mlcm_rl.recipe import Evaluate, Lora
from mlcm_rl.storage import commit, files, manifest
from mlcm_rl.training import engines, loop, processes


@pytest.mark.parametrize(
    ("precision", "native", "warned"), [("bf16", False, True), ("bf16", True, False), ("no", False, False)]
)
def test_bfloat16_that_the_cpu_emulates_is_said_before_the_run(
    monkeypatch, capsys, tmp_path, precision, native, warned
):
    monkeypatch.setattr(loop, "cpu_has_bfloat16", lambda: native)
    stage = runs.distill(precision=precision)
    loop.Runtime(runs.recipe(tmp_path, tmp_path, [stage]), stage, tmp_path)
    assert ("set precision: no" in capsys.readouterr().out) is warned


def test_without_git_a_run_ends_as_with_it_and_records_no_commit(tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    prompts = runs.write_prompts(tmp_path)
    report = Evaluate(prompts=prompts, num_prompts=2, sampling_steps=[1], teacher_steps=[2])
    for stage in pipeline.run(runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), report])):
        assert manifest.verify(stage.folder)["commit"] is None
    assert files.read_json(stage.folder / "report.json")["environment"]["commit"] is None


GITS = {
    "hangs": "sleep 600 & sleep 600",  # the first outlives it
    "says something else": "echo usage: git; exit 0",
    "says no text": "printf '\\377\\376'; exit 0",
    "refuses": "echo fatal: detected dubious ownership >&2; exit 128",
    "is no program": None,
}


@pytest.mark.parametrize("kind", GITS)
def test_a_git_that_does_not_name_the_commit_is_none(tmp_path, monkeypatch, kind):
    program = tmp_path / "git"
    program.write_bytes(b"\x7fELF" if GITS[kind] is None else f"#!/bin/sh\n{GITS[kind]}\n".encode())
    program.chmod(0o755)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(commit, "__file__", str(tmp_path / "mlcm_rl" / "storage" / "commit.py"))
    monkeypatch.setattr(commit, "GIT_SECONDS", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert commit.commit() is None


def test_the_commit_is_that_of_a_checkout_of_this_package_alone(tmp_path, monkeypatch):
    """Installed into an environment that lies within another checkout, it has none."""
    name = commit.commit()
    assert name is None or len(name) == 40
    inside = Path(commit.__file__).parents[2] / "venv" / "mlcm_rl" / "storage" / "commit.py"
    monkeypatch.setattr(commit, "__file__", str(inside))
    assert commit.commit() is None


def test_trackers_are_given_the_recipe_without_a_path_of_this_machine(tmp_path):
    stage = runs.distill()
    loop.Runtime(runs.recipe(tmp_path / "teacher", tmp_path, [stage], trackers=["tensorboard"]), stage, tmp_path)
    (file,) = tmp_path.glob("tensorboard/*/hparams.yml")
    config = YAML(typ="safe").load(file)
    assert (config["stages.0.kind"], config["stages.0.learning_rate"], config["seed"]) == ("distill", 1e-3, 0)
    assert (config["teacher.path"], config["teacher.revision"]) == ("teacher", "None")
    assert str(tmp_path) not in file.read_text()


def test_a_tracker_that_is_not_installed_is_no_silence(tmp_path, monkeypatch):
    monkeypatch.setattr("mlcm_rl.recipe.experiment.find_spec", lambda name: None)
    stage = runs.distill()
    with pytest.raises(ValueError, match="trackers: tensorboard is not installed"):
        loop.Runtime(runs.recipe(tmp_path, tmp_path, [stage], trackers=["tensorboard"]), stage, tmp_path)


def test_every_stage_of_a_process_has_its_own_precision(tmp_path):
    for precision in ("bf16", "no", "bf16"):
        stage = runs.distill(precision=precision)
        rt = loop.Runtime(runs.recipe(tmp_path, tmp_path, [stage]), stage, tmp_path)
        network = torch.nn.Linear(2, 2)
        rt.prepare(network, torch.optim.AdamW(network.parameters()))
        with rt.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_weights_swapped_in_bfloat16_are_the_ones_that_a_pass_takes(tiny_sdxl, tmp_path):
    """Autocast has kept copies of the student's own, made in the same block."""
    stage = runs.distill(precision="bf16", target="consistency", target_ema=0.9, adapter=Lora(rank=2, alpha=2.0))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    rt, base = loop.Runtime(recipe, stage, tmp_path), teachers.load(recipe.teacher, "cpu")
    student = students.student(base, stage.adapter, 0)
    trained = rt.prepare(student, torch.optim.AdamW(students.trainable_parameters(student)))
    tiny.perturb(list(trained.values()))
    average = {name: value.detach().clone() for name, value in trained.items()}
    tiny.perturb(list(average.values()), seed=1)
    x_t, t, conditioning = torch.randn(2, *base.latent_shape), torch.tensor([999, 499]), base.unconditional(2)
    with rt.autocast(), rt.swapped(average), torch.no_grad():
        expected = base.x0(student, x_t, t, conditioning)
    with rt.autocast():
        own = base.x0(student, x_t, t, conditioning)
        with rt.swapped(average), torch.no_grad():
            x0 = base.x0(student, x_t, t, conditioning)
        again = base.x0(student, x_t, t, conditioning)
    assert torch.equal(x0, expected)
    assert torch.equal(own, again)
    assert not torch.equal(own, x0)


# ---- a step ----


@pytest.fixture
def linear(tmp_path):
    """A loop's surroundings and a small network to train, batches of 8; the micro-batches are to be chosen."""

    def prepared(accumulation: int) -> tuple[loop.Runtime, nn.Module]:
        stage = runs.distill(batch_size=8, gradient_accumulation=accumulation)
        folder = tmp_path / str(accumulation)
        folder.mkdir()
        rt = loop.Runtime(runs.recipe(tmp_path, tmp_path, [stage]), stage, folder)
        student = nn.Linear(3, 2)
        nn.init.ones_(student.weight)
        rt.resume({"student": rt.prepare(student, torch.optim.AdamW(student.parameters(), lr=0.1, fused=True))})
        return rt, student

    return prepared


def losses_of(student: nn.Module, accumulation: int):
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return (student(part).square().mean(1) for part in inputs.chunk(accumulation))


@pytest.fixture
def readings(monkeypatch) -> list[str]:
    """How figures are read from tensors, one entry a reading: on a GPU each waits for all that is under way."""
    names: list[str] = []

    def counted(name: str):
        original = getattr(torch.Tensor, name)

        def read_and_note(self, *arguments):
            names.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, read_and_note)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        counted(name)
    return names


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_a_step_reads_the_device_once_whatever_its_micro_batches(linear, readings, accumulation):
    rt, student = linear(accumulation)
    for _ in rt.steps(0, 2, "distill"):
        readings.clear()
        record = rt.backward(losses_of(student, accumulation))
        assert readings == ["tolist"]
        assert record["loss"] > 0
        assert record["grad_norm"] > 0


def test_the_loss_is_the_sum_of_the_micro_batches_in_their_order_to_the_bit(linear):
    rt, student = linear(4)
    sums = [loss.sum().item() for loss in losses_of(student, 4)]
    for _ in rt.steps(0, 1, "distill"):
        figures = rt.backward(losses_of(student, 4))
    assert figures["loss"] == sum(sums) / 8


@pytest.mark.parametrize("position", [0, 3])
def test_every_samples_loss_is_in_the_report_of_a_step_that_is_not_finite(linear, position):
    rt, student = linear(4)
    losses = list(losses_of(student, 4))
    expected = [value for loss in losses for value in loss.tolist()]
    expected[2 * position] = "nan"
    losses[position] = losses[position] * torch.tensor([math.nan, 1.0])
    before = student.weight.detach().clone()
    step = rt.steps(0, 1, "distill")
    next(step)
    with pytest.raises(loop.NonFiniteLoss) as raised:
        rt.backward(losses)
    step.close()
    assert raised.value.figures["losses"] == expected
    assert torch.equal(student.weight, before)


def test_parameters_are_found_once_and_not_in_every_step(linear, monkeypatch):
    rt, student = linear(1)
    average = {name: value.detach().clone() for name, value in student.named_parameters()}
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *_: pytest.fail("all parameters were gone through"))
    for _ in rt.steps(0, 2, "distill"):
        rt.backward(losses_of(student, 1))
        with rt.swapped(average):
            pass


def test_gradients_are_averaged_where_they_are(monkeypatch):
    """Two processes: what is exchanged is the gradients themselves, and no copy of all of them."""
    exchanged = []

    def all_reduce(tensor, async_op):
        exchanged.append(tensor)
        return SimpleNamespace(wait=lambda: tensor.mul_(4))  # it is there when it was waited for

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    gradients = [torch.ones(2, 3), torch.ones(4, dtype=torch.bfloat16), torch.ones(())]
    places = [one.data_ptr() for one in gradients]
    processes.average_(gradients)
    assert [one.data_ptr() for one in exchanged] == places
    assert all((one == 2).all() for one in gradients)


@pytest.mark.parametrize(("num_steps", "log_every", "logged"), [(3, 10, [1, 3]), (1, 10, [1]), (5, 2, [1, 2, 4, 5])])
def test_the_first_and_the_last_step_are_logged_whatever_lies_between(tmp_path, num_steps, log_every, logged):
    stage = runs.distill(precision="no", log_every=log_every)
    runtime = loop.Runtime(runs.recipe(tmp_path, tmp_path, [stage]), stage, tmp_path)
    runtime.parts = {}
    assert [step + 1 for step in runtime.steps(0, num_steps, "distill") if runtime.is_logged(step)] == logged


def test_every_training_stage_logs_by_the_rule():
    """No stage asks for its own multiple of log_every, which would leave a short run without a log."""
    for path in Path(stages.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "log_every" not in text, path
        assert ("is_logged" in text) is ("rt.backward" in text), path


def test_the_optimiser_has_the_stages_betas_decay_and_norm():
    weight = torch.nn.Parameter(torch.ones(4))
    stage = runs.distill(betas=(0.5, 0.6), weight_decay=0.3, max_grad_norm=1e-3)
    (group,) = loop.adamw([weight], stage).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.3)
    network = torch.nn.Linear(2, 2)
    engine = engines.Whole(network, loop.adamw(network.parameters(), stage), stage)
    engine.backward(network(torch.ones(1, 2)).square().sum())
    _, norm = engine.step(torch.zeros(1), should_update=False)
    assert norm > 0.1  # before clipping
    left = torch.stack([value.grad.norm() for value in network.parameters()]).norm().item()
    assert left == pytest.approx(1e-3, rel=1e-3)
