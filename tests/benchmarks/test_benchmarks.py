"""The benchmarks run: a small shape through the GPU's program, and its refusal where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "sdxl_step.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")
def test_without_a_gpu_the_program_says_so_in_one_line():
    found = run()
    assert found.returncode == 1
    assert "needs a CUDA GPU and this machine has none" in found.stderr.splitlines()[-1]


@pytest.mark.slow
def test_every_row_of_the_gpu_benchmark_runs_at_a_small_shape(tmp_path):
    found = run("--shape", "tiny", "--device", "cpu", "--steps", "1", "--batches", "1", "--out", str(tmp_path))
    assert found.returncode == 0, found.stderr
    (file,) = tmp_path.glob("*-tiny.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["rows"]) == 13
    assert all(row["seconds"] > 0 and row["share_of_matrix_rate"] > 0 for row in result["rows"].values())
