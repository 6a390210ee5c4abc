"""Cells that the network of `scene_match` learns from, and scenes with captions as pictures."""

import random

import pytest
import torch

from drawings import load_drawings
from mlcm_rl.data.scenes import STYLES
from scene_pictures import NUM_CAPTIONS, captions_of
from scenes import Object, Scene, read_concepts
from train_scene_match import Painter
from wordings import Writer


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(load_drawings(), 0)


def test_painted_cells_have_labels_and_depend_on_the_seed_alone(painter):
    num_concepts = len(painter.colours)
    painter.generator.manual_seed(1)
    cells, kinds, styles = painter.paint(64)
    assert cells.shape == (64, 3, 64, 64)
    assert 0 <= cells.min() <= cells.max() <= 1
    assert ((styles == -1) == (kinds >= num_concepts)).all()
    assert {num_concepts, num_concepts + 1} <= set(kinds.tolist())
    assert styles.max() < len(STYLES)
    painter.generator.manual_seed(1)
    assert all(map(torch.equal, painter.paint(64), (cells, kinds, styles)))


def test_an_empty_cell_is_flat_but_for_noise(painter):
    cells, kinds, _ = painter.paint(64)
    spread = cells.std((2, 3)).amax(1)
    assert spread[kinds == len(painter.colours)].max() < 0.06 < spread[kinds < len(painter.colours)].median()


def test_a_scene_has_captions_in_both_languages_from_the_trained_wordings():
    concepts = read_concepts()
    scene = Scene("count", (Object(concepts[0].codepoint, "noto", 1), Object(concepts[0].codepoint, "noto", 2)), "blue")
    captions = captions_of(scene, Writer(concepts), random.Random(0))
    assert len(captions) == NUM_CAPTIONS
    assert all(any(name in text for name in concepts[0].names[["en", "zh"][i % 2]]) for i, text in enumerate(captions))
