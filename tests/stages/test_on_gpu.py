"""The stages on a CUDA device: the CPU's numbers, and half precision that stays close to them."""

import pytest
import torch
from test_distill import records, student_weights

import runs
from mlcm_rl import pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def run(tiny_sdxl, folder, device, **settings):
    folder.mkdir()
    recipe = runs.whole(tiny_sdxl, folder, num_segments=[8, 1], **settings).model_copy(update={"device": device})
    return pipeline.run(recipe)


def test_a_gpu_gives_the_cpus_losses_and_student(tiny_sdxl, tmp_path):
    cpu, gpu = (run(tiny_sdxl, tmp_path / device, device)[1].folder for device in ("cpu", "cuda"))
    for a, b in zip(records(cpu), records(gpu), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    expected, result = student_weights(cpu), student_weights(gpu)
    assert max((expected[name] - result[name]).abs().max() for name in expected) < 2e-2


def test_bfloat16_trains_close_to_single_precision(tiny_sdxl, tmp_path):
    single = records(run(tiny_sdxl, tmp_path / "single", "cuda")[1].folder)
    half = records(run(tiny_sdxl, tmp_path / "half", "cuda", precision="bf16")[1].folder)
    for a, b in zip(single, half, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.1)
