"""What surrounds a training loop: its precision, and what is said before it begins."""

import pytest
import torch
from ruamel.yaml import YAML

import runs
import tiny
from mlcm_rl import adapters, bases, runtime
from mlcm_rl.recipe import Lora


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


def test_trackers_are_given_the_recipe_without_a_path_of_this_machine(tmp_path):
    stage = runs.distill()
    runtime.Runtime(runs.recipe(tmp_path / "teacher", tmp_path, [stage], trackers=["tensorboard"]), stage, tmp_path)
    (file,) = tmp_path.glob("tensorboard/*/hparams.yml")
    kept = YAML(typ="safe").load(file)
    assert (kept["stages.0.kind"], kept["stages.0.learning_rate"], kept["seed"]) == ("distill", 1e-3, 0)
    assert (kept["teacher.path"], kept["teacher.revision"]) == ("teacher", "None")
    assert str(tmp_path) not in file.read_text()


def test_a_tracker_that_is_not_installed_is_no_silence(tmp_path, monkeypatch):
    monkeypatch.setattr("mlcm_rl.recipe.find_spec", lambda name: None)
    stage = runs.distill()
    with pytest.raises(ValueError, match="trackers: tensorboard is not installed"):
        runtime.Runtime(runs.recipe(tmp_path, tmp_path, [stage], trackers=["tensorboard"]), stage, tmp_path)


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
