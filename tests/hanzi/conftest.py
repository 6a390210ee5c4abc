"""The programs of recipes/hanzi are run as files: their folders are on the path, as Python puts them there."""

import sys
from pathlib import Path

HANZI = Path(__file__).parents[2] / "recipes" / "hanzi"
sys.path[:0] = [str(HANZI), str(HANZI / "build")]
