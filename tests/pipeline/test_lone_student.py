"""`mlcm sample` with a student of no run: a file, and what it does not state named by options."""

import json
from pathlib import Path

import pytest

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import teachers
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.pipeline.errors import BadArgument
from mlcm_rl.pipeline.lone_student import Over
from mlcm_rl.recipe import Start
from teacher_loras import as_kohya, write

TIMES = "999,499"


@pytest.fixture(scope="module")
def lora(tiny_sdxl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    return as_kohya(write(tiny_sdxl, folder, texts=()), folder / "fast.safetensors", "sdxl")


def draw(file: Path, out: Path, gamma: float | None = 1.0, **over: object) -> list[Path]:
    given = Over(**{"gamma": gamma, "grid": TIMES, **over})
    return finished_runs.sample(file, ["a cat"], [2], 7, None, out, over=given)


def test_a_file_draws_what_a_run_that_starts_from_it_draws(tiny_sdxl, lora, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [Start(path=str(lora), gamma=1.0, grid=[999, 499])])
    pipeline.run(recipe)
    (of_run,) = finished_runs.sample(Path(recipe.runs, recipe.name), ["a cat"], [2], 7, None, tmp_path / "run")
    (own,) = draw(lora, tmp_path / "file", teacher=tiny_sdxl)
    assert pixels(own) == pixels(of_run)
    for name, changes in (("other", {"gamma": 0.0}), ("x0", {"prediction": "x0"})):
        (other,) = draw(lora, tmp_path / name, teacher=tiny_sdxl, **changes)
        assert pixels(other) != pixels(own)


def pixels(file: Path) -> bytes:
    from PIL import Image

    return Image.open(file).tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": None}, r"does not state how it is sampled: add --gamma \.\.\., where gamma: 1"),
        ({"grid": None}, r"add --grid \.\.\., where grid: lcm, trailing"),
        ({"grid": "499,999"}, "--grid: grid: lcm, trailing"),
        ({"family": "sdx"}, "--family: no family is called sdx; known are sdxl, sd"),
        ({"teacher": Path("nowhere")}, "--teacher: nowhere holds no model_index.json"),
        ({"alpha": 3.0}, "alpha has no effect"),
        ({"prediction": "v"}, r"--prediction: prediction: x0 \(as the one-step SDXL-Lightning\), or teacher"),
    ],
)
def test_what_no_one_states_is_asked_for_by_option_before_anything_is_loaded(
    tiny_sdxl, lora, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(teachers, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(BadArgument, match=message):
        draw(lora, tmp_path / "out", **{"teacher": tiny_sdxl, **changes})


def test_a_pipeline_of_no_family_is_refused(tiny_sdxl, lora, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WuerstchenPipeline"}), encoding="utf-8")
    with pytest.raises(BadArgument, match="--family: no family loads WuerstchenPipeline"):
        draw(lora, tmp_path / "out", teacher=tmp_path)
