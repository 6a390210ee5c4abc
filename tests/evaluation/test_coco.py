"""The paper's protocol from end to end on a tiny checkpoint, and what a recipe may not leave out."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_inception import random_weights

from evaluation_case import (
    PROMPTS,
    PlantedInception,
    write_clip,
    write_inception,
    write_real_images,
)
from mlcm_rl import pipeline
from mlcm_rl.data.picture_files import read_picture, square
from mlcm_rl.evaluation import inception, instruments, metrics
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import RecipeError, key_text
from mlcm_rl.storage.tensors import write_tensors

RECIPE = Path("recipes/sdxl_coco.yaml")
NUM_REAL = 9


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    write_clip(root / "clip")
    write_inception(root / "inception.safetensors")
    write_real_images(root / "real", NUM_REAL)
    return root


def overrides(place, networks, runs, **more):
    """What size forces: folders, counts and steps."""
    settings = {
        "teacher.path": place / "teacher",
        "teacher.dtype": "float32",
        "runs": runs,
        "device": "cpu",
        "stages.0.prompts": place / "prompts.jsonl",
        "stages.0.num_prompts": len(PROMPTS),
        "stages.0.also": f"[{place / 'other'}]",
        "stages.0.sampling_steps": "[2, 4]",
        "stages.0.teacher_steps": "[3]",
        "stages.0.inception": networks / "inception.safetensors",
        "stages.0.real_images": networks / "real",
        "stages.0.clip": networks / "clip",
        "stages.0.rewards": "[colourfulness]",
        "stages.0.batch_size": 4,
    }
    return [f"{key}={value}" for key, value in (settings | more).items()]


@pytest.fixture(scope="module")
def folder(place, networks, tmp_path_factory):
    """The stage's folder, the recipe run as it is shipped but for what size forces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load", lambda path, device: PlantedInception())
        recipe = load(RECIPE, overrides(place, networks, tmp_path_factory.mktemp("runs")))
        return pipeline.run(recipe)[-1].folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_every_row_has_fid_kid_clip_and_rewards(report):
    assert {row["role"] for row in report["rows"]} == {"reference", "undistilled", "student"}
    for row in report["rows"]:
        keys = {"distance", "fid", "inception_kid", "clip", "reward/colourfulness"}
        assert set(row["metrics"]) == keys | {
            "teacher_kid",
            "teacher_patch_kid",
        }  # FID of more pictures than dimensions
        assert row["metrics"]["fid"]["mean"] > 0
        assert (row["metrics"]["fid"]["n"], row["metrics"]["fid"]["se"]) == (1, None)
        assert row["metrics"]["inception_kid"]["n"] == 3  # subsets of two prompts
        assert len(row["metrics"]["clip"]["values"]) == len(PROMPTS)
        assert row["metrics"]["clip"]["mean"] > 0


def test_fid_is_that_of_the_pictures_that_were_kept(report, folder, networks):
    """The whole way again from the files: another tool would find the same."""
    network = PlantedInception()
    real = torch.cat([network(batch) for batch in instruments.real_pictures(networks / "real", 16, 64)])
    for row in report["rows"]:
        files = sorted((folder / "samples" / row["id"]).iterdir())
        assert [file.name for file in files] == [f"{i:05d}.png" for i in range(len(PROMPTS))]
        features = torch.cat([network(square(read_picture(file, str(file)), 16)[None]) for file in files])
        x, y = real.double(), features.double()
        root = torch.linalg.eigvals(torch.cov(x.T) @ torch.cov(y.T)).sqrt().real.sum()
        expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root
        assert row["metrics"]["fid"]["mean"] == pytest.approx(expected.item(), rel=1e-3)
        kid = metrics.kid(features[:, None], real).mean().item()
        halves = [metrics.kid(features[i::3, None], real).item() for i in range(3)]
        assert row["metrics"]["inception_kid"]["mean"] == pytest.approx(sum(halves) / 3, rel=1e-3)
        assert kid != pytest.approx(0.0, abs=1e-6)


def test_the_network_files_and_their_hashes_are_named_in_every_report(report, folder, networks):
    files = {"inception": networks / "inception.safetensors", "clip": networks / "clip" / "model.safetensors"}
    texts = [(folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md")]
    for name, file in files.items():
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        assert report["networks"][name]["files"] == {file.name: checksum}
        assert all(f"{file.name}, sha256 {checksum}" in text for text in texts)
    assert report["networks"]["inception"]["num_real_images"] == NUM_REAL
    assert all(f"{NUM_REAL} real pictures" in text for text in texts)


def test_the_page_has_the_columns_and_their_plots(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for head in ("FID", "KID (Inception features)", "CLIP score", "Training evals"):
        assert f'<th scope="col">{head}</th>' in text
        assert f"<dt>{head}</dt>" in text
    for label in ("FID", "CLIP score"):
        assert f'aria-label="{label} against network evaluations' in text


def test_clip_stands_in_the_headline_beside_the_distance(report):
    assert [check["metric"] for check in report["headline"]["checks"]] == ["distance", "clip"]


def test_the_plan_knows_what_it_takes(place, networks, folder, tmp_path):
    (stage,) = pipeline.plan(load(RECIPE, overrides(place, networks, tmp_path)), memory=True)
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    assert stage.network_evaluations >= len(PROMPTS) * sum(row["num_evaluations"] for row in rows)
    num_bytes = (
        3 * 16 * 16 * len(PROMPTS) * len(rows)
    )  # bytes of the pictures; those that the page shows are there thrice
    features = 2 * 4 * 2 * 2048 * len(PROMPTS)  # of the reference's pictures and patches, stored twice
    assert num_bytes <= stage.disk_bytes - features < 5 * num_bytes
    without = overrides(place, networks, tmp_path, **{"stages.0.clip": "null"})
    (other,) = pipeline.plan(load(RECIPE, without), memory=True)
    assert stage.memory.parameters - other.memory.parameters == pytest.approx(
        (networks / "clip" / "model.safetensors").stat().st_size, rel=0.2
    )


def test_the_recipe_asks_for_the_papers_rewards_and_is_planned_before_they_are_fetched(place, networks, tmp_path):
    shipped = [line for line in overrides(place, networks, tmp_path) if not line.startswith("stages.0.rewards=")]
    recipe = load(RECIPE, shipped)
    assert [reward.name for reward in recipe.stages[0].reward_models] == [
        "aesthetic",
        "image_reward",
        "hps_v2",
        "pick_score",
    ]
    (stage,) = pipeline.plan(recipe, memory=True)
    assert stage.network_evaluations > 0


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"stages.0.inception": "null", "stages.0.real_images": "null"},
            "stages[0].distribution",
            "distribution needs judge or inception",
        ),
        ({"stages.0.confidences": "[0.1, 0.5]"}, "stages[0].confidences", "confidences are those of a detector"),
        ({"stages.0.num_prompts": 2}, "stages[0].distribution", "distribution needs num_prompts of 3 or more, is 2"),
        (
            {"stages.0.real_images": "null", "stages.0.distribution": "false"},
            "stages[0].inception",
            "inception needs real_images, a folder of real",
        ),
        ({"stages.0.inception": "null"}, "stages[0].real_images", "real_images needs inception: the network"),
        ({"stages.0.inception": "x.pt"}, "stages[0].inception", "inception must be a .safetensors file, found x.pt"),
    ],
)
def test_fid_needs_its_network_and_its_pictures(place, networks, tmp_path, changes, key, message):
    with pytest.raises(RecipeError) as error:
        load(RECIPE, overrides(place, networks, tmp_path, **changes))
    (problem,) = error.value.problems
    assert key_text(problem.key) == key
    assert message in problem.text


def test_real_pictures_are_central_squares_at_the_drawn_ones_size(tmp_path):
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("white", (20, 0, 40, 20))
    wide.save(tmp_path / "b.png")
    Image.new("L", (7, 9), 255).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (batch,) = instruments.real_pictures(tmp_path, 8, 5)
    assert (batch.shape, batch.dtype) == ((2, 3, 8, 8), torch.uint8)
    assert batch[..., 1:-1].min() > 250  # white; at the sides the filter sees a little of the red beyond
    assert batch.min() > 230
    assert [len(part) for part in instruments.real_pictures(tmp_path, 8, 1)] == [1, 1]


def test_real_pictures_that_are_not_there_or_not_pictures_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds 0 pictures; FID and KID need two"):
        next(instruments.real_pictures(tmp_path, 8, 2))
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(ValueError, match=r"a.jpg is not a readable picture"):
        next(instruments.real_pictures(tmp_path, 8, 2))


@pytest.mark.slow
def test_the_protocol_runs_with_inception_itself(place, networks, tmp_path):
    with torch.device("meta"):
        structure = inception.InceptionV3()
    write_tensors(tmp_path / "inception.safetensors", random_weights(structure))
    small = {
        "stages.0.inception": tmp_path / "inception.safetensors",
        "stages.0.sampling_steps": "[1]",
        "stages.0.teacher_steps": "[1]",
        "stages.0.num_prompts": 4,
    }
    stage = pipeline.run(load(RECIPE, overrides(place, networks, tmp_path / "runs", **small)))[-1]
    for row in json.loads((stage.folder / "report.json").read_text(encoding="utf-8"))["rows"]:
        assert row["metrics"]["fid"]["mean"] > 0
        assert row["metrics"]["inception_kid"]["mean"] is not None
