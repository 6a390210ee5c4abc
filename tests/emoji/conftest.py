"""The programs of recipes/emoji are run as files: their folder is on the path, as Python puts it there."""

import sys
from pathlib import Path

import pytest

RECIPE_FOLDER = Path(__file__).parents[2] / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE_FOLDER))


@pytest.fixture
def emoji_folder() -> Path:
    return RECIPE_FOLDER
