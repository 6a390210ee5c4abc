"""The programs of recipes/emoji are run as files: their folders are on the path, as Python puts them there."""

import sys
from pathlib import Path

import pytest

RECIPE_FOLDER = Path(__file__).parents[2] / "recipes" / "emoji"
sys.path[:0] = [str(RECIPE_FOLDER / name) for name in ("build", "study", "../study")]


@pytest.fixture
def emoji_folder() -> Path:
    return RECIPE_FOLDER
