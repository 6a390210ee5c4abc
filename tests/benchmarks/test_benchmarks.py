"""The benchmarks run: what one counts, a small shape through the GPU's program, its refusal where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import distillation
import pytest
import torch
from rich.console import Console

PROGRAM = Path(__file__).parent / "sdxl_step.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


def test_evaluations_are_split_by_part_and_count_the_store():
    store = 96 * (2048 + 64) / (2000 * 32)  # the shipped recipe's trajectories, held-out ones too, and its samples
    table, footnote = distillation.evaluations_table()
    assert footnote.startswith("* 96 x 2112 trajectories / 64000 samples drawn = 3.17")
    heads, *columns = ([str(cell) for cell in column.cells] for column in table.columns)
    assert [column.header for column in table.columns[1:]] == ["store*", *distillation.PARTS[1:], "all", "ratio"]
    rows = dict(zip(heads, zip(*columns, strict=True), strict=True))
    assert rows["data (LCM)"] == rows["plain script (LCM)"] == ("0", "2", "1", "1", "4", "1.00")
    assert rows["online (Algorithm 1)"] == ("0", "11", "1", "1", "13", "3.25")
    assert rows["stored, consistency"] == (f"{store:.3g}", "0", "1", "1", f"{store + 2:.4g}", f"{(store + 2) / 4:.2f}")
    assert rows["stored, trajectory"] == (f"{store:.3g}", "0", "0", "1", f"{store + 1:.4g}", f"{(store + 1) / 4:.2f}")
    assert Console().measure(table).maximum <= 120


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
    assert len(result["rows"]) == 15
    assert all(row["seconds"] > 0 and row["useful_share"] > 0 for row in result["rows"].values())
    plain, checkpointed = (
        result["rows"][f"distil, full, {how}checkpointing, batch 1"] for how in ("no ", "")
    )  # which does its forward pass twice
    assert plain["useful_share"] == plain["hardware_share"]
    assert checkpointed["hardware_share"] / checkpointed["useful_share"] == pytest.approx(
        1.25, abs=0.09
    )  # 4 / 3 where all is recomputed
