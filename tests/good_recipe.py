"""A good recipe in a folder that holds all it names, and what becomes of it when its text is changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlcm_rl.models import published_teachers
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import Problem, RecipeError

PUBLISHED = published_teachers.FOLDER / "stable-diffusion-xl-base-1.0"
GOOD = Path(__file__).parent / "recipe" / "good.yaml"

Broken = Callable[..., list[Problem]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(PUBLISHED, tmp_path / "teacher")
    for folder in ("data", "judge"):
        (tmp_path / folder).mkdir()
    for file in ("data/prompts.txt", "data/eval.jsonl"):
        (tmp_path / file).write_text("a cat\n" * 64)
    (tmp_path / "good.yaml").write_text(GOOD.read_text("utf-8"), "utf-8")
    return tmp_path


@pytest.fixture
def broken(root: Path) -> Broken:
    """Problems of the good recipe after `old` became `new` (each of several pairs), with overrides put over it."""

    def problems(*changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> list[Problem]:
        text = GOOD.read_text("utf-8")
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} is in good.yaml {text.count(old)} times"
            text = text.replace(old, new)
        path = root / "recipe.yaml"
        path.write_text(text, "utf-8")
        with pytest.raises(RecipeError) as raised:
            load(path, overrides, root)
        assert all(problem.file == str(path) for problem in raised.value.problems)
        return raised.value.problems

    return problems
