"""Tiny teachers to compare with stock diffusers, as folders and loaded."""

from pathlib import Path

import lora_students
import pytest

import tiny
from mlcm_rl import recipe
from mlcm_rl.models.base import Base
from mlcm_rl.models.teachers import load


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "sdxl": tiny.sdxl(folder / "sdxl"),
        "sdxl-one-tower": tiny.sdxl(folder / "sdxl-one-tower", num_towers=1),
        "sdxl-no-zeros": tiny.sdxl(folder / "sdxl-no-zeros", "v_prediction", 5, force_zeros_for_empty_prompt=False),
        "sd15": tiny.sd(folder / "sd15"),
        "sd21": tiny.sd(folder / "sd21", "v_prediction"),
    }


@pytest.fixture(scope="session")
def loaded(teachers) -> dict[str, Base]:
    families = {name: "sdxl" if name.startswith("sdxl") else "sd" for name in teachers}
    return {
        name: load(recipe.Teacher(path=str(folder), family=families[name]), "cpu") for name, folder in teachers.items()
    }


@pytest.fixture(scope="session")
def lora_exports(loaded, tmp_path_factory) -> Path:
    """Students and exports of every kind over two teachers: students/<teacher>-<kind> and exports/<teacher>-<kind>."""
    root = tmp_path_factory.mktemp("lora")
    for teacher in ("sdxl", "sd15"):
        for kind in lora_students.WHOLE + lora_students.CONDITIONED:
            lora_students.make(loaded[teacher], root, f"{teacher}-{kind}", kind)
    return root
