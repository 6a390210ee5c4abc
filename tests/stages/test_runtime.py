"""What surrounds a training loop: its precision, and what is said before it begins."""

from pathlib import Path

import pytest
import torch

import runs
import tiny
from mlcm_rl import adapters, bases, checkpoint, pipeline, runtime
from mlcm_rl.recipe import Evaluate, Lora


@pytest.mark.parametrize(
    ("precision", "native", "warned"), [("bf16", False, True), ("bf16", True, False), ("no", False, False)]
)
def test_bfloat16_that_the_cpu_emulates_is_said_before_the_run(
    monkeypatch, capsys, tmp_path, precision, native, warned
):
    monkeypatch.setattr(runtime, "cpu_has_bfloat16", lambda: native)
    stage = runs.distill(precision=precision)
    runtime.Runtime(runs.recipe(tmp_path, tmp_path, [stage]), stage, tmp_path)
    assert ("set precision: no" in capsys.readouterr().out) is warned


def test_without_git_a_run_ends_as_with_it_and_records_no_commit(tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    prompts = runs.write_prompts(tmp_path)
    report = Evaluate(prompts=prompts, num_prompts=2, num_steps=[1], teacher_steps=[2])
    for stage in pipeline.run(runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), report])):
        assert checkpoint.verify(stage.folder)["commit"] is None
    assert checkpoint.read_json(stage.folder / "report.json")["environment"]["commit"] is None


def test_the_commit_is_that_of_a_checkout_of_this_package_alone(tmp_path, monkeypatch):
    """Installed into an environment that lies within another checkout, it has none."""
    found = runtime.commit()
    assert found is None or len(found) == 40
    monkeypatch.setattr(runtime, "__file__", str(Path(runtime.__file__).parents[1] / "venv" / "mlcm_rl" / "runtime.py"))
    assert runtime.commit() is None


def test_every_stage_of_a_process_has_its_own_precision(tmp_path):
    for precision in ("bf16", "no", "bf16"):
        stage = runs.distill(precision=precision)
        rt = runtime.Runtime(runs.recipe(tmp_path, tmp_path, [stage]), stage, tmp_path)
        with rt.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_weights_swapped_in_bfloat16_are_the_ones_that_a_pass_takes(tiny_sdxl, tmp_path):
    """Autocast has kept copies of the student's own, made in the same block."""
    stage = runs.distill(precision="bf16", target_ema=0.9, adapter=Lora(rank=2, alpha=2.0))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    rt, base = runtime.Runtime(recipe, stage, tmp_path), bases.load(recipe.teacher, "cpu")
    student = adapters.student(base, stage.adapter, 0)
    trained = rt.prepare(student, torch.optim.AdamW(adapters.trainable_parameters(student)))
    tiny.perturb(list(trained.values()))
    average = {name: value.detach().clone() for name, value in trained.items()}
    tiny.perturb(list(average.values()), seed=1)
    x_t, t, conditioning = torch.randn(2, *base.latent_shape), torch.tensor([999, 499]), base.unconditional(2)
    with rt.autocast(), rt.swapped(average), torch.no_grad():
        expected = base.x0(student, x_t, t, conditioning)
    with rt.autocast():
        own = base.x0(student, x_t, t, conditioning)
        with rt.swapped(average), torch.no_grad():
            found = base.x0(student, x_t, t, conditioning)
        again = base.x0(student, x_t, t, conditioning)
    assert torch.equal(found, expected)
    assert torch.equal(own, again)
    assert not torch.equal(own, found)
