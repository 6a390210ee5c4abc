"""The small evaluation, run once for all tests of this folder."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import evaluation_case
import pytest

BRIGHTNESS = {"name": "brightness", "chunk_size": 5}  # an entry as tuning stages have them, beside names


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return evaluation_case.write_place(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="session")
def finished(place) -> Path:
    """The folder of the finished evaluation."""
    evaluation_case.run(place, place / "evaluate")
    return place / "evaluate"


@pytest.fixture(scope="session")
def tuned(place) -> Path:
    """The folder of a finished evaluation of a student and of what preference learning made of it."""
    settings = {"also": [], "teacher_solvers": ["ddim"], "rewards": ["colourfulness", BRIGHTNESS, "sharpness"]}
    evaluation_case.run(place, place / "tuned", ("distill", "feedback"), **settings)
    return place / "tuned"


@pytest.fixture(scope="session")
def report(finished) -> dict:
    return json.loads((finished / "report.json").read_text(encoding="utf-8"))
