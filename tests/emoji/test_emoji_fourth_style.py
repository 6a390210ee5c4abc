"""OpenMoji as a fourth style by one key: pictures, captions, prompts and the widths of what is trained on them.

The styles are fixed when the programs are imported, so each test is a process of its own; archives are made up.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

PICTURES = """
import json
import sys
from pathlib import Path

import numpy as np

import captions
import sources

folder, panda = Path(sys.argv[1]), captions.teacher_concepts()[0][0]
red, blue = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64, 3), np.uint8)
sources.list_concepts = lambda: [panda]
sources.read_drawings = lambda style: {panda.codepoint: "red"}
sources.read_openmoji = lambda: {panda.codepoint: "blue"}
sources.render = lambda svg, size: blue if svg == "blue" else red
captions.write_image_folder([panda], folder)
prompts = [prompt["style"] for prompt in captions.prompts_of_split(captions.teacher_concepts()[0][:20], "train")]
print(json.dumps({"prompts": prompts, "cached": sorted(path.name for path in sources.cache_folder().iterdir())}))
"""
WIDTHS = """
import json

import train_alignment
import train_judge
import train_rewards
import train_text_towers as towers

print(json.dumps({
    "judge": train_judge.STYLES,
    "rewards": train_rewards.PREFERENCE,
    "alignment": train_alignment.STYLE_OR_NONE,
    "towers": towers.Heads(4, 4, 4).style["pooled"].out_features,
}))
"""


@pytest.fixture
def outcome(emoji_folder, tmp_path):
    """Runs a script as a program of recipes/emoji, with the key or without, and reads what it prints."""

    def run(script: str, key: str | None, *arguments: str) -> dict:
        environment = {name: value for name, value in os.environ.items() if name != "MLCM_RL_OPENMOJI"}
        environment |= {"MLCM_RL_CACHE": str(tmp_path / "cache")}
        environment["PYTHONPATH"] = os.pathsep.join([str(emoji_folder / "build"), str(emoji_folder.parents[1])])
        environment |= {"MLCM_RL_OPENMOJI": key} if key else {}
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("key", [None, "1"])
def test_pictures_and_prompts_have_the_style_where_it_is_asked_for(outcome, tmp_path, key):
    found = outcome(PICTURES, key, str(tmp_path / "images"))
    styles = ["noto", "twemoji", "fluent"] + (["openmoji"] if key else [])
    lines = (tmp_path / "images" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    entries = {entry["style"]: entry["prompts"] for entry in map(json.loads, lines)}
    assert list(entries) == styles
    shares = Counter(found["prompts"])
    assert set(shares) == {*styles, None}
    assert all(abs(shares[style] / shares[None] - 2) < 0.5 for style in styles), "each style twice, no style once"
    suffix = "_openmoji" if key else ""
    assert found["cached"] == [f"pictures_64{suffix}.json", f"pictures_64{suffix}.npy"], "neither hides the other"
    if key:
        assert any("openmoji" in text for text in entries["openmoji"])
        assert any("OpenMoji风格" in text for text in entries["openmoji"])
        assert not any("openmoji" in text.lower() for text in entries["noto"])
        assert list((tmp_path / "images" / "images").glob("openmoji_*.png"))


def test_every_training_has_the_style_where_it_is_asked_for(outcome):
    found = outcome(WIDTHS, "1")
    assert found["judge"] == ["noto", "twemoji", "fluent", "openmoji"]
    assert found["rewards"] == ["fluent", "noto", "twemoji", "openmoji"], "the three that ship keep their order"
    assert found["alignment"] == [*found["judge"], None]
    assert found["towers"] == 5
