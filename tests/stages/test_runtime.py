"""What surrounds a training loop: its precision, and what is said before it begins."""

import pytest
import torch

import runs
from mlcm_rl import runtime


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


def test_every_stage_of_a_process_has_its_own_precision(tmp_path):
    for precision in ("bf16", "no", "bf16"):
        stage = runs.distill(precision=precision)
        rt = runtime.Runtime(runs.recipe(tmp_path, tmp_path, [stage]), stage, tmp_path)
        with rt.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
