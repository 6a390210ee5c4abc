"""The judge: a few steps of training, and the shipped one."""

import pytest
import torch
from torch.nn import functional as F

import mobilenet
import train_judge as program
from captions import teacher_concepts
from mlcm_rl.evaluation import judge, metrics
from sources import cache_folder

NORM = ("gamma", "beta", "moving_mean", "moving_variance")
TINY = program.JudgeSettings(feature_width=8, num_steps=40, num_concepts=4, learning_rate=1e-2, dropout=0.0)


@pytest.fixture(scope="module")
def shipped() -> judge.Judge:
    return judge.load(program.EMOJI / "judge")


def test_a_few_steps_change_the_head_and_lower_the_loss():
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randn(6, 1, 20, generator=generator) * 3 + 5
    tapped = (concepts + torch.randn(6, 2, 20, generator=generator)).flatten(0, 1)
    rows, losses = [[2 * concept, 2 * concept + 1] for concept in range(6)], []
    head = torch.nn.Linear(20, TINY.feature_width)
    before = head.weight.clone()
    program.train(head, tapped, rows, TINY, lambda step, loss: losses.append(loss))
    assert not torch.equal(head.weight, before)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    features = F.normalize(head(tapped), dim=-1).unflatten(0, (6, 2))
    assert program.cross_style_recall(features, slice(None))["R@1"] == 1.0, "the head takes what is tapped as it is"


def test_folding_a_batch_norm_into_its_convolution_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    weights = {"c/kernel": torch.randn(3, 3, 4, 5, generator=generator)}
    weights |= {f"n/{name}": torch.rand(5, generator=generator) + 0.5 for name in NORM}
    x = torch.randn(2, 4, 6, 6, generator=generator)
    plain = F.conv2d(x, weights["c/kernel"].permute(3, 2, 0, 1))
    gamma, beta, mean, variance = (weights[f"n/{name}"] for name in NORM)
    wanted = F.batch_norm(plain, mean, variance, gamma, beta, eps=mobilenet.EPSILON)
    folded = mobilenet.fold(weights, "c", "n")
    torch.testing.assert_close(F.conv2d(x, folded["weight"], folded["bias"]), wanted, rtol=1e-4, atol=1e-4)


def test_eight_bit_weights_are_dequantised_as_their_manifest_says():
    manifest = (
        '{name:"a",shape:[2],dtype:"float32",quantization:{min:-1.5,scale:.5,dtype:"uint8"}},'
        '{name:"b",shape:[1],dtype:"float32"}'
    )
    raw = bytes([0, 4]) + torch.tensor([2.5]).numpy().tobytes()
    found = mobilenet.dequantise(manifest, raw)
    assert found["a"].tolist() == [-1.5, 0.5]
    assert found["b"].tolist() == [2.5]
    with pytest.raises(ValueError, match="6 of 7 bytes"):
        mobilenet.dequantise(manifest, raw + b"x")


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
        pytest.skip("the packages have not been fetched: python recipes/emoji/build/sources.py")
    pictures = program.load_pictures(64)
    rows = pictures.rows_by_concept(min_styles=2)[shipped.concepts[0]]
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
