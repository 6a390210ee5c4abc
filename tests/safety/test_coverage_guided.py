"""The same readers under a fuzzer that is led by coverage, for a few thousand inputs each."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from safety.test_fuzz import PICTURES, PROMPTS, SHARD, WHEEL

ROOT = Path(__file__).resolve().parents[2]
GOOD_RECIPE = (ROOT / "tests" / "recipe" / "good.yaml").read_bytes()
SEEDS = {"recipe": GOOD_RECIPE, "prompts": PROMPTS, "tensors": SHARD, "picture": PICTURES["PNG"], "wheel": WHEEL}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install 'mlcm-rl[fuzz]'")
@pytest.mark.parametrize("reader", sorted(SEEDS))
def test_a_reader_stands_inputs_that_are_led_by_coverage(tmp_path, reader):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "good").write_bytes(SEEDS[reader])
    options = ["-seed=1", "-max_len=4096", "-timeout=60", "-rss_limit_mb=4096"]
    command = [sys.executable, "-m", "safety.coverage_guided", reader, "-atheris_runs=3000", *options, "corpus"]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
