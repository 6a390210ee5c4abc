"""The loop that gives a teacher another text encoder: exact resumption, what it leaves, and what it then serves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
import text_adapters
import tiny
from mlcm_rl import pipeline
from mlcm_rl.models import teachers
from mlcm_rl.recipe import Teacher


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_sdxl, tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a finished stage, and that of its recipe's files."""
    folder = tmp_path_factory.mktemp("adapted")
    return pipeline.run(text_adapters.recipe(tiny_sdxl, folder))[1].folder, folder


def test_the_teacher_serves_both_languages_and_its_own_as_before(tiny_sdxl, finished):
    place, _ = finished
    teacher = Teacher(path=str(tiny_sdxl), family="sdxl")
    plain = teachers.load(teacher, "cpu")
    base = teachers.load(teacher.model_copy(update={"text_adapter": str(place / "text_adapter")}), "cpu")
    own, adapted = plain.encode_prompts(["a cat", "熊猫"]), base.encode_prompts(["a cat", "熊猫"])
    english = plain.encode_prompts(["a cat"])
    for name, value in adapted.items():
        assert value.shape == own[name].shape
        assert torch.equal(value[0], english[name][0])
        assert not torch.allclose(value[1], own[name][1])
    base.encode_ahead(["熊猫"])
    assert base.adapted is None
    torch.testing.assert_close(base.encode_prompts(["熊猫"])["context"][0], adapted["context"][1])
