"""The programs of recipes/scenes are run as files: their folder is on the path, and they put the emoji's behind it."""

import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES / "scenes" / name) for name in ("build", "study")]
sys.path.append(str(RECIPES / "emoji" / "build"))
