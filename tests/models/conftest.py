"""Tiny teachers of every family and prediction type, loaded once."""

from pathlib import Path

import pytest

import tiny
from mlcm_rl import recipe
from mlcm_rl.models import teachers as bases
from mlcm_rl.models.base import Base
from tiny_families import CASES
from tiny_families.case import Case


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "sdxl": tiny.sdxl(folder / "sdxl"),
        "sdxl-v-5-channels": tiny.sdxl(folder / "sdxl-v", "v_prediction", latent_channels=5),
        "sd15": tiny.sd(folder / "sd15"),
        "sd21": tiny.sd(folder / "sd21", "v_prediction"),
    }


@pytest.fixture(scope="session", params=["sdxl", "sdxl-v-5-channels", "sd15", "sd21"])
def base(request, teachers) -> Base:
    return load(teachers[request.param])


@pytest.fixture(scope="session", params=["sdxl-v-5-channels", "sd15"])
def either(request, teachers) -> Base:
    """One teacher a family, where prediction types change nothing."""
    return load(teachers[request.param])


@pytest.fixture(scope="session")
def sdxl(teachers) -> Base:
    return load(teachers["sdxl"])


@pytest.fixture(scope="session")
def sd15(teachers) -> Base:
    return load(teachers["sd15"])


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request) -> Case:
    """A tiny teacher of each family in its published layout."""
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory) -> Path:
    return case.write(tmp_path_factory.mktemp(case.family) / "teacher")


def load(folder: Path, **settings) -> Base:
    family = "sdxl" if folder.name.startswith("sdxl") else "sd"
    return bases.load(recipe.Teacher(path=str(folder), family=family, **settings), "cpu")
