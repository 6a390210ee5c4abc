"""The judge on real scenes, on empty and spoilt ones; what it calls right is right."""

import random

import pytest
import torch
from torch.nn import functional as F

from drawings import load_drawings
from mlcm_rl.data.scenes import BACKGROUNDS, CANVAS, answers, cells_of
from mlcm_rl.evaluation.scene_judge import load, read_backgrounds
from scene_judge import JUDGE, accuracy, paint_all, read_in_parts, real_scenes
from scenes import Scene, draw_scene, read_concepts

CONCEPTS = [concept.codepoint for concept in read_concepts()]


@pytest.fixture(scope="module")
def judge():
    return load(JUDGE)


def test_cells_are_read_row_by_row():
    picture = torch.arange(CANVAS * CANVAS).reshape(1, 1, CANVAS, CANVAS).expand(2, 3, -1, -1).float()
    cells = cells_of(picture)
    assert cells.shape == (8, 3, 64, 64)
    assert [cell[0, 0, 0].item() for cell in cells[:4]] == [0, 64, 64 * CANVAS, 64 * CANVAS + 64]


def test_it_reads_real_scenes_of_held_out_combinations(judge):
    scenes = real_scenes(CONCEPTS, 120, "test")
    report = accuracy(scenes, read_in_parts(judge, paint_all(load_drawings(), scenes)))
    assert report["over all"]["all"] > 0.97


def test_every_background_is_read_on_every_canvas():
    drawings, draw = load_drawings(), random.Random(0)
    scenes = [draw_scene(draw, CONCEPTS, "count", False) for _ in range(40)]
    for background in BACKGROUNDS:
        painted = paint_all(drawings, [Scene(s.relation, s.objects, background) for s in scenes])
        assert set(read_backgrounds(painted)) == {background}


def test_an_empty_canvas_has_no_object(judge):
    empty = Scene("single", (), "blue")
    assert judge.read(paint_all(load_drawings(), [empty]))[0] == empty.reading()


def test_a_smear_or_a_mixture_is_right_for_no_request(judge):
    scenes = real_scenes(CONCEPTS, 60, "spoilt")
    images = paint_all(load_drawings(), scenes)
    smeared = F.interpolate(F.interpolate(images, scale_factor=0.08, mode="bilinear", antialias=True), CANVAS)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for spoilt in (smeared, (images + images[order]) / 2):
        readings = read_in_parts(judge, spoilt)
        right = [answers(s.request(False, False), r)["all"] for s, r in zip(scenes, readings, strict=True)]
        assert sum(right) / len(right) < 0.1


def test_pictures_of_another_size_are_refused(judge):
    with pytest.raises(ValueError, match="128, 128"):
        judge.read(torch.zeros(1, 3, 64, 64))
