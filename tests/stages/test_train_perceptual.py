"""A latent LPIPS is trained on distortions of known strength, resumed exactly, and then a distill stage's distance."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.distortions import KINDS, draw_pairs
from mlcm_rl.data.prompts import CaptionedImages
from mlcm_rl.models import lpips, teachers
from mlcm_rl.pipeline.fingerprint import locate
from mlcm_rl.recipe import Distill, Teacher, TrainPerceptual
from mlcm_rl.stages import distill, train_perceptual
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.seeding import generator

SMALL = {"widths": [4, 6], "depths": [1, 1]}


def stage_of(**changes) -> TrainPerceptual:
    settings = {"num_steps": 3, "batch_size": 4, "num_held_out_pairs": 16, "held_out_distortions": ["jpeg"], **SMALL}
    settings |= {"distortions": ["blur", "noise", "warp", "colour"], "log_every": 1, "save_every": 1, "warmup_steps": 0}
    return TrainPerceptual(**(settings | changes))


def train(teacher: Path, folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = runs.recipe(teacher, folder, [stage_of(images=pictures(folder), **changes)])
    pipeline.run(recipe)
    return next(Path(recipe.runs, recipe.name).glob("*-train_perceptual"))


def pictures(folder: Path) -> str:
    return str(folder / "images") if (folder / "images").is_dir() else runs.write_images(folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lpips.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_sdxl, tmp_path_factory) -> Path:
    return train(tiny_sdxl, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_distortion_of_more_strength_is_further_away(kind):
    draws = torch.Generator().manual_seed(0)
    picture = (torch.rand(3, 2, 2, generator=draws) * 255).byte().repeat_interleave(16, 1).repeat_interleave(16, 2)
    before = picture.clone()
    distorted = [KINDS[kind](picture, strength, generator(7)) for strength in (0.1, 0.5, 1.0)]
    errors = [(one.float() - picture.float()).square().mean().item() for one in distorted]
    assert errors == sorted(errors)
    assert errors[0] < errors[2]
    assert all(one.shape == picture.shape and one.dtype == torch.uint8 for one in distorted)
    assert torch.equal(picture, before)


def test_pairs_depend_on_their_row_alone():
    images = (torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).byte()
    settings = (["blur", "noise"], ["warp"], 8, ("seed", 1))
    whole, part = draw_pairs(images, *settings), draw_pairs(images[2:4], *settings, first_row=2)
    rows = whole.rows(torch.tensor([2, 3]))
    assert torch.equal(rows.pictures, part.pictures)
    assert torch.equal(rows.is_second, part.is_second)
    assert part.original.shape == (2, 3, 8, 8)
    assert set(whole.is_second.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_the_answer_of_a_pair_is_the_one_that_is_nearer_to_the_picture(kind):
    """Of one kind, whose strength is seen in the squared error too."""
    draws = torch.Generator().manual_seed(0)
    images = (torch.rand(32, 3, 4, 4, generator=draws) * 255).byte().repeat_interleave(4, 2).repeat_interleave(4, 3)
    pairs = draw_pairs(images, [kind], [kind], None, ("seed",))
    first, second = (
        (one.float() - pairs.original.float()).square().flatten(1).mean(1) for one in (pairs.first, pairs.second)
    )
    decided = first != second
    right = (second < first)[decided] == pairs.is_second.bool()[decided]
    assert decided.sum() > 24
    assert right.float().mean() > 0.9
    assert 0 < pairs.is_second.sum() < 32


def test_its_unit_and_its_measures_are_written(whole):
    measured = json.loads((whole / "measured.json").read_text())["accuracy"]
    assert set(measured) == {"trained", "untrained", "l2"}
    assert all(0.0 <= mean <= 1.0 for row in measured.values() for mean, _ in row.values())
    card = (whole / "card.md").read_text()
    assert "| trained |" in card
    assert "one unseen kind" in card
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert "held_out_accuracy/seen_one" in records[-1]
    network = lpips.load(whole, 4, torch.device("cpu"))
    assert all((one >= 0).all() for one in network.channel_weights)


def test_its_unit_and_the_shares_of_the_squared_distance_by_hand(whole, tiny_sdxl, tmp_path):
    """Its held-out pairs made again: 1 on average between two different pictures."""
    stage, base = stage_of(), teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl"), torch.device("cpu"))
    images = torch.stack(list(CaptionedImages(pictures(tmp_path), base.resolution).pictures()))
    seed = runs.recipe(tiny_sdxl, tmp_path, [stage_of(images="unused")]).seed
    _, held_out = train_perceptual.split(images, stage.held_out, seed)
    pairs = train_perceptual.held_out_pairs(stage, base, held_out, seed)["seen"]
    network, originals = lpips.load(whole, 4, torch.device("cpu")), pairs.original
    apart = train_perceptual.neighbours_apart(stage, held_out)
    with torch.no_grad():
        unit = network(originals, originals.roll(1, 0))[apart].mean()
    assert unit.item() == pytest.approx(1.0, rel=1e-4)
    nearer = [(one - originals).square().flatten(1).mean(1) for one in (pairs.first, pairs.second)]
    right = ((nearer[1] < nearer[0]) == pairs.is_second.bool()).double()
    right[nearer[0] == nearer[1]] = 0.5
    measured = json.loads((whole / "measured.json").read_text())["accuracy"]["l2"]
    for name, chosen in (("seen_one", pairs.is_one_kind), ("seen_two", ~pairs.is_one_kind)):
        assert measured[name][0] == pytest.approx(right[chosen].mean().item(), abs=1e-4)


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(whole, tiny_sdxl, tmp_path, monkeypatch):
    calls, backward = [], Runtime.backward
    with monkeypatch.context() as patched:

        def interrupted(rt: Runtime, losses):
            calls.append(rt.step)
            if rt.step == 2:
                raise KeyboardInterrupt
            return backward(rt, losses)

        patched.setattr(Runtime, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_sdxl, tmp_path / "cut")
    resumed = train(tiny_sdxl, tmp_path / "cut")
    assert calls == [0, 1, 2]
    expected, result = weights(whole), weights(resumed)
    assert expected.keys() == result.keys()
    assert all(torch.equal(value, result[name]) for name, value in expected.items())


@pytest.mark.slow
def test_micro_batches_give_the_step_of_the_whole_batch(whole, tiny_sdxl, tmp_path):
    split = train(tiny_sdxl, tmp_path, gradient_accumulation=2)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, rtol=1e-3, atol=1e-5)


def test_a_crop_that_does_not_fit_is_refused(tiny_sdxl, tmp_path):
    base = teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl"), torch.device("cpu"))
    train_perceptual.refuse_crop(stage_of(crop=8), base)
    for crop in (3, 2, 18):
        with pytest.raises(ValueError, match=rf"crop: expected a multiple of 2 from 4 to 16 pixels, .* found {crop}"):
            train_perceptual.refuse_crop(stage_of(crop=crop), base)


def test_the_unit_is_of_different_pictures_alone():
    """Pair 0 comes after the last; a picture is no neighbour of itself, nor of its copy."""
    images = torch.tensor([1, 2, 1], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(-1, 3, 4, 4)
    apart = train_perceptual.neighbours_apart(stage_of(num_held_out_pairs=4), images)
    assert apart.tolist() == [False, True, True, False]  # of pictures 1, 2, 1, 1
    with pytest.raises(ValueError, match="three different pictures or more: the 2 that only measure it are the same"):
        train_perceptual.neighbours_apart(stage_of(), images[::2])
    with pytest.raises(ValueError, match="num_held_out_pairs"):
        stage_of(num_held_out_pairs=1)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="depths has 2 entries for 3 slices"):
        TrainPerceptual(num_steps=1, widths=[4, 6, 7], depths=[1, 1])
    with pytest.raises(ValueError, match="held_out_distortions: jpeg is learned from"):
        TrainPerceptual(num_steps=1, held_out_distortions=["jpeg"])
    assert stage_of().requirements[0].kinds == ("trajectories",)


# ---- as a distance of the distill stage ----

BUDGETS = {"num_segments": [1], "condition_on_target": True, "budgets": [2, 4], "target": "trajectory"}
FORMS = {
    "log-lpips": BUDGETS | {"distance": "log_lpips"},
    "lpips-of-segments": {"num_segments": [2], "distance": "lpips", "target": "consistency"},
    "log-features": BUDGETS | {"distance": "log_features", "feature_time": 20},
    "features-in-x0": {"num_segments": [1], "distance": "features", "space": "x0", "feature_blocks": [1]},
    "second-stage": {"num_segments": [1], "method": "inter_segment", "distance": "lpips", "space": "x0"},
    "phases": {"num_segments": [8, 1], "distance": ["l2", "lpips"]},
}


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    return pipeline.run(runs.recipe(tiny_sdxl, folder, [runs.trajectories(runs.write_prompts(folder))]))[0].folder


SOON = ("log-lpips", "features-in-x0")


def distilled(teacher: Path, store: Path, folder: Path, **settings) -> list[dict]:
    """What the log of two steps says."""
    folder.mkdir(exist_ok=True)
    stage = runs.distill(num_steps=2, **settings)
    distill.run(stage, runs.recipe(teacher, folder, [stage]), {"trajectories": store}, folder)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SOON)) for name in FORMS])
def test_a_student_learns_by_it_in_every_form(whole, store, tiny_sdxl, tmp_path, name):
    place = {} if "features" in name else {"lpips": str(whole)}
    records = distilled(tiny_sdxl, store, tmp_path, held_out_every=1, **FORMS[name], **place)
    assert all(record["grad_norm"] > 0 for record in records if "grad_norm" in record)
    assert name == "second-stage" or any("held_out_loss" in record for record in records)


@pytest.mark.slow
def test_a_recipe_trains_a_distance_and_distills_by_it(tiny_sdxl, tmp_path):
    stages = [runs.trajectories(runs.write_prompts(tmp_path)), stage_of(), runs.distill(**FORMS["log-lpips"])]
    done = pipeline.run(runs.recipe(tiny_sdxl, tmp_path, stages))
    assert json.loads((done[-1].folder / "manifest.json").read_text())["memory"]["predicted"]["total"] > 0
    assert (done[1].folder / "lpips.safetensors").is_file()


@pytest.mark.parametrize("distance", [pytest.param("lpips", marks=pytest.mark.slow), "log_features"])
def test_micro_batches_give_the_distill_step_of_the_whole_batch(whole, store, tiny_sdxl, tmp_path, distance):
    settings = BUDGETS | {"distance": distance} | ({"lpips": str(whole)} if distance == "lpips" else {})
    one, two = (
        distilled(tiny_sdxl, store, tmp_path / str(parts), gradient_accumulation=parts, **settings) for parts in (1, 2)
    )
    losses = [[record["loss"] for record in records if "loss" in record] for records in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_file_and_its_folder_are_one_fingerprint(whole, tiny_sdxl, tmp_path):
    places = [whole, whole / "lpips.safetensors"]
    stages = [runs.distill(distance="lpips", lpips=str(place), **BUDGETS) for place in places]
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path)), *stages[:1]])
    assert len({locate(stage, recipe, []).fingerprint for stage in stages}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lpips": "a"}, "lpips has no effect without distance: lpips"),
        ({"feature_time": 3}, "feature_time has no effect without distance: features"),
        ({"distance": "features", "feature_blocks": [1, 0]}, "feature_blocks .* must increase"),
        ({"distance": "log_features", "space": "x0"}, "log_features weighs all jumps alike and space: x0 does not"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distill(num_steps=1, batch_size=1, num_segments=[1], **settings)
