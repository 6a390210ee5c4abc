"""The losses of a few short runs, stored: a refactor leaves them, a change of maths changes this file with a reason.

MLCM_RL_UPDATE_GOLDEN=1 pytest tests/golden      writes curves.json anew
"""

import json
import os
from pathlib import Path

import pytest

import runs
from mlcm_rl import pipeline

CURVES = Path(__file__).with_name("curves.json")
RUNS = {
    "progressive-lora": {"segments": [8, 4, 2, 1], "target": "consistency", "space": ["z", "z", "z", "x0"]},
    "conditioned-full": {
        "segments": [8, 1],
        "condition_on_target": True,
        "adapter": {"kind": "full"},
        "distance": "huber",
    },
    "random-skip-average": {
        "segments": [1],
        "target": "consistency",
        "pair": "random",
        "target_ema": 0.9,
        "num_steps": 3,
    },
    "second-stage": {"segments": [1], "method": "inter_segment", "num_steps": 3},
}


def curve(tiny_sdxl: Path, folder: Path, name: str) -> list[float]:
    stages = [runs.trajectories(runs.write_prompts(folder)), runs.distill(**RUNS[name])]
    student = pipeline.run(runs.recipe(tiny_sdxl, folder, stages))[-1].folder
    entries = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_stored(tiny_sdxl, tmp_path, name):
    found = curve(tiny_sdxl, tmp_path, name)
    stored = json.loads(CURVES.read_text()) if CURVES.is_file() else {}
    if os.environ.get("MLCM_RL_UPDATE_GOLDEN"):
        CURVES.write_text(json.dumps(stored | {name: found}, indent=1) + "\n")
        return
    # Another processor sums in another order: equal to a thousandth everywhere, to the last digit on one machine.
    assert found == pytest.approx(stored[name], rel=1e-3)
