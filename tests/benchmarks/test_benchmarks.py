"""The benchmarks run: each at its smallest, what one counts, the GPU's program on a CPU and its refusal without one."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import distillation
import pytest
import torch
from rich.console import Console

FOLDER = Path(__file__).parent
ON_GPU = "sdxl_step"
# what makes each program take the least, and what its tables then say
SMALLEST = {
    "before_after": (
        ["--repeats", "1", "--batch-size", "1"],
        ["captions encoded once, LCM step of 1", "switch to the reference and back", "resume of 160 MB of weights"],
    ),
    "distillation": (
        ["--steps", "1", "--batch-size", "1", "--trajectories", "1", "--pictures", "1"],
        [*distillation.VARIANTS, distillation.PLAIN, "* 96 x 2112 trajectories", "student, 1 steps"],
    ),
    "preference": (
        ["--steps", "1", "--batch-size", "4"],  # a group of samples that are compared
        ["feedback, K = 4", "... K = 4, checkpointing", "dpo online, 4 samples a pair", "policy, groups of 4"],
    ),
    "quantised": (
        ["--steps", "1", "--batch-size", "1", "--trajectories", "1"],
        ["LoRA distillation, 1 steps of 1", "float32", "int8", "nf4", "float16"],
    ),
    "store": (["--sizes", "64"], ["first start", "next start", "SDXL, 1024 px"]),
    "teacher": (
        ["--rounds", "1", "--steps", "1", "--batch-size", "1", "--trajectories", "1"],
        ["all three", "two threads that sleep", "s, 1 trajectories", "two processes"],
    ),
}


def run(program: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(FOLDER / f"{program}.py"), *options]
    root = FOLDER.parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8", check=False)


def test_every_program_is_run_here():
    programs = {path.stem for path in FOLDER.glob("*.py") if "\nif __name__ ==" in path.read_text(encoding="utf-8")}
    assert programs == {*SMALLEST, ON_GPU}


@pytest.mark.slow
@pytest.mark.parametrize("program", SMALLEST)
def test_every_program_runs_at_its_smallest(program):
    if program == "quantised" and find_spec("bitsandbytes") is None:
        pytest.skip("needs the extra `quantised`")
    options, texts = SMALLEST[program]
    result = run(program, *options)
    assert result.returncode == 0, result.stderr
    assert [text for text in texts if text not in result.stdout] == [], result.stdout


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
    result = run(ON_GPU)
    assert result.returncode == 1
    assert "needs a CUDA GPU and this machine has none" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_every_row_of_the_gpu_benchmark_runs_at_a_small_shape(tmp_path):
    options = ("--shape", "tiny", "--device", "cpu", "--steps", "1", "--batches", "1")
    result = run(ON_GPU, *options, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*-tiny.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["rows"]) == 15
    assert all(row["seconds"] > 0 and row["useful_share"] > 0 for row in record["rows"].values())
    plain, checkpointed = (
        record["rows"][f"distil, full, {how}checkpointing, batch 1"] for how in ("no ", "")
    )  # which does its forward pass twice
    assert plain["useful_share"] == plain["hardware_share"]
    assert checkpointed["hardware_share"] / checkpointed["useful_share"] == pytest.approx(
        1.25, abs=0.09
    )  # 4 / 3 where all is recomputed
