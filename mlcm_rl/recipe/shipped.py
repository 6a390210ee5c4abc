"""The folders that come with this package: recipes with what they name, and reward files.

A checkout has them beside the package, an installation inside it. No torch here.
"""

import re
from itertools import takewhile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = Path(__file__).resolve().parents[1] / "shipped"
PREFIX = "mlcm:"  # of a path in a recipe that names what is shipped: mlcm:emoji/teacher


def folder(name: str) -> Path:
    """Return the shipped folder `name`, "recipes" or "reward_models"."""
    return next((place / name for place in (CHECKOUT, INSTALLED) if (place / name).is_dir()), CHECKOUT / name)


def place(text: str) -> Path | None:
    """Return the path that `text` of a recipe names if it begins with PREFIX: one under the shipped recipes."""
    return folder("recipes") / text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def recipes() -> list[Path]:
    """Return the files of the shipped recipes, sorted by name."""
    return sorted(folder("recipes").glob("*.yaml"))


def launch_files() -> list[Path]:
    """Return the shipped launch files, sorted by name."""
    return sorted((folder("recipes") / "launch").glob("*.yaml"))


def launch_file(name: str) -> Path | None:
    """Return the shipped launch file called `name`, such as zero2; None if there is none."""
    file = folder("recipes") / "launch" / f"{name}.yaml"
    return file if re.fullmatch(r"[a-z0-9_]+", name) and file.is_file() else None


def header(file: Path) -> str:
    """Return the comment at the top of a recipe or launch file in one line, without its marks."""
    comment = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    lines = (line for line in comment if not line.startswith("# yaml-language-server"))
    return " ".join(line.removeprefix("#").removeprefix(" ") for line in lines)
