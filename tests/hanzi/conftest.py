"""The programs of recipes/hanzi are run as files: their folder is on the path, as Python puts it there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "hanzi"))
