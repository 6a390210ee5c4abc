"""The judge: a few steps of training, and the shipped one."""

import pytest
import torch
from torch.nn import functional as F

import train_judge as program
from captions import teacher_concepts
from mlcm_rl import judge, metrics
from sources import cache_folder

TINY = program.JudgeSettings(widths=(8, 16), feature_width=8, num_steps=30, num_concepts=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def shipped() -> judge.Judge:
    return judge.load(program.HERE / "judge")


@pytest.fixture
def squares() -> torch.Tensor:
    """Six concepts (colours) in two styles (large and small squares), uint8 (12, 16, 16, 3), concept by concept."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.full((6, 2, 16, 16, 3), 255, dtype=torch.uint8)
    colours = torch.randint(0, 256, (6, 1, 1, 3), generator=generator, dtype=torch.uint8)
    pictures[:, 0, 2:14, 2:14], pictures[:, 1, 5:11, 5:11] = colours, colours
    return pictures.flatten(0, 1)


def test_a_few_steps_change_the_encoder_and_lower_the_loss(squares):
    torch.manual_seed(0)
    encoder, losses = judge.PictureEncoder(TINY.widths, TINY.feature_width), []
    before = encoder.stem.weight.clone()
    rows = [[2 * concept, 2 * concept + 1] for concept in range(6)]
    program.train(encoder, squares, rows, TINY, lambda step, loss: losses.append(loss))
    assert not torch.equal(encoder.stem.weight, before)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_features_are_unit_vectors_without_gradient(shipped):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    features = shipped.features(images)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    assert features.dtype == torch.float32
    assert not features.requires_grad, "nothing can be trained against the judge"


def test_another_size_is_refused(shipped):
    with pytest.raises(ValueError, match="64"):
        shipped.features(torch.zeros(1, 3, 32, 32))


def test_the_shipped_judge_knows_the_teachers_concepts_in_order(shipped):
    assert shipped.concepts == [concept.codepoint for concept in teacher_concepts()[0]]
    assert shipped.prototypes.shape[0] == len(shipped.concepts)
    assert len(shipped.reference_features) == len(shipped.reference_concepts) == len(shipped.reference_styles)


def test_real_pictures_are_nearest_to_their_own_prototype(shipped):
    index = {codepoint: number for number, codepoint in enumerate(shipped.concepts)}
    concepts = torch.tensor([index[codepoint] for codepoint in shipped.reference_concepts])
    rank = metrics.ranks(shipped.reference_features, shipped.prototypes, concepts)
    assert metrics.recall(rank, 1).mean() > 0.97


def test_the_stored_references_are_the_features_of_the_real_pictures(shipped):
    if not (cache_folder() / "pictures_64.json").exists():
        pytest.skip("the packages have not been fetched: python recipes/emoji/sources.py")
    pictures = program.load_pictures(64)
    rows = program.group_by_concept(pictures)[shipped.concepts[0]]
    found = program.encode(shipped.encoder, pictures.pixels[rows])
    torch.testing.assert_close(found, shipped.style_prototypes[0], rtol=0, atol=1e-4)


def test_the_shipped_files_are_small(emoji_folder):
    assert sum(path.stat().st_size for path in (emoji_folder / "judge").iterdir()) < 8_000_000


def test_cross_style_recall_agrees_with_features_made_by_hand():
    unit = torch.eye(4)
    features = torch.stack([unit, unit, unit], dim=1)  # four concepts, three equal styles
    assert program.cross_style_recall(features, slice(None)) == {"R@1": 1.0, "R@5": 1.0}
    features[0, 0] = F.normalize(0.5 * unit[0] + unit[1], dim=0)  # one drawing of nine looks like concept 1
    found = program.cross_style_recall(features, slice(0, 3), ks=(1, 2))
    assert found["R@1"] == pytest.approx(8 / 9, abs=1e-4)
    assert found["R@2"] == 1.0


def test_features_that_say_nothing_find_nothing():
    same = torch.ones(10, 3, 4) / 2
    assert program.cross_style_recall(same, slice(None)) == {"R@1": 0.0, "R@5": 0.0}


def test_the_contrast_of_perfect_features_is_lower_than_of_shuffled_ones():
    unit, order = torch.eye(8), torch.arange(8)
    right = program.contrast(torch.cat([unit, unit]), unit, order, 0.1)
    wrong = program.contrast(torch.cat([unit, unit.roll(1, 0)]), unit, order, 0.1)
    assert right < wrong - 1


def test_augmentation_leaves_the_unit_range_alone_and_fills_with_white():
    white = torch.ones(4, 3, 16, 16)
    found = program.augment(white, torch.Generator().manual_seed(0))
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.mean() > 0.7, "nothing dark comes in from outside the picture"
