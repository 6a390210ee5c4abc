"""Metrics against arithmetic by hand, a closed form and torchmetrics' own kernel distance."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from torchmetrics.image.kid import poly_mmd

from mlcm_rl.equations import statistics
from mlcm_rl.evaluation import metrics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kid_of_two_pairs_is_the_hand_computed_one():
    # Kernel (x y / 1 + 1)^3 in one dimension: k(0, 1) = 1, k(2, 3) = 343, cross terms 1, 1, 27, 64.
    value = metrics.kid(torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[2.0], [3.0]]))
    assert value.tolist() == [1 + 343 - 2 * (1 + 1 + 27 + 64) / 4]


@pytest.mark.parametrize("rows", [2, 1024])
def test_kid_equals_torchmetrics_for_sets_of_one_size(rows, monkeypatch):
    monkeypatch.setattr(metrics, "KERNEL_ROWS", rows)
    real, fake = normal(30, 7).double(), normal(30, 7, seed=1).double() + 0.3
    torch.testing.assert_close(metrics.kid(fake[:, None], real)[0], poly_mmd(real, fake))
    torch.testing.assert_close(metrics.kid(fake[:, None], real, gamma=1.0)[0], poly_mmd(real, fake, gamma=1.0))


def test_kid_of_equal_distributions_is_unbiased_and_of_shifted_ones_is_not_zero():
    values = torch.cat([metrics.kid(normal(16, 1, 4, seed=i), normal(24, 4, seed=1000 + i)) for i in range(400)])
    mean, error = statistics.mean_and_error(values)
    assert abs(mean) < 3 * error
    assert (values < 0).float().mean() > 0.3  # the biased estimate never is
    shifted = torch.cat([metrics.kid(normal(16, 1, 4, seed=i) + 1, normal(24, 4, seed=1000 + i)) for i in range(50)])
    mean, error = statistics.mean_and_error(shifted)
    assert mean > 10 * error


def test_kid_of_a_subset_is_that_of_every_nth_prompt():
    features, reference = normal(6, 2, 3), normal(9, 3, seed=1)
    first, second = metrics.kid(features, reference, num_subsets=2)
    assert first == metrics.kid(features[[0, 2, 4]], reference)[0]
    assert second == metrics.kid(features[[1, 3, 5]], reference)[0]


def test_kid_refuses_subsets_of_one_picture():
    with pytest.raises(ValueError, match="two pictures or more"):
        metrics.kid(normal(3, 1, 4), normal(5, 4), num_subsets=2)


def test_retrieval_finds_planted_features():
    prototypes = normalize(normal(50, 32), dim=1)
    concepts = torch.arange(50)
    planted = normalize(prototypes + 0.05 * normal(50, 32, seed=1), dim=1)
    assert metrics.ranks(planted, prototypes, concepts).tolist() == [0] * 50
    # A picture halfway between its own and another concept, nearer the other: second.
    between = normalize(0.45 * prototypes[:1] + 0.55 * prototypes[1:2], dim=1)
    rank = metrics.ranks(between, prototypes, torch.tensor([0]))
    assert rank.tolist() == [1]
    assert metrics.recall(rank, 1).tolist() == [0.0]
    assert metrics.recall(rank, 5).tolist() == [1.0]


def test_retrieval_of_random_features_is_right_as_often_as_chance():
    rank = metrics.ranks(normal(4000, 16), normal(40, 16, seed=1), torch.arange(4000) % 40)
    mean, error = statistics.mean_and_error(metrics.recall(rank, 5))
    assert abs(mean - 5 / 40) < 4 * error


def test_retrieval_counts_ties_against_the_picture():
    nothing = torch.zeros(2, 8)
    assert metrics.ranks(nothing, normal(6, 8), torch.tensor([0, 5])).tolist() == [5, 5]


def test_diversity_is_the_mean_distance_of_pairs():
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0]] * 3])
    torch.testing.assert_close(metrics.diversity(features), torch.tensor([10 / 3, 0.0]))
    with pytest.raises(ValueError, match="two pictures"):
        metrics.diversity(features[:, :1])


def test_mean_and_error_are_over_the_values_that_are_there():
    mean, error = statistics.mean_and_error(torch.tensor([1.0, math.nan, 3.0, 5.0]))
    assert (mean, error) == (3.0, pytest.approx(2.0 / math.sqrt(3)))
    assert math.isnan(statistics.mean_and_error(torch.tensor([1.0]))[1])
    assert all(map(math.isnan, statistics.mean_and_error(torch.tensor([math.nan]))))


def test_paired_error_drops_what_both_rows_share():
    hard = torch.tensor([0.0, 10.0, 20.0, 30.0])
    ours, theirs = hard + torch.tensor([1.0, 2.0, 1.0, 2.0]), hard
    mean, error = statistics.paired_difference(ours, theirs)
    assert (mean, error) == (1.5, pytest.approx(math.sqrt(1 / 3) / 2))  # sd of 1, 2, 1, 2 is sqrt(1/3)
    assert error < statistics.mean_and_error(hard)[1] / 10
    assert statistics.paired_difference(ours, torch.tensor([math.nan, 10.0, 20.0, 30.0]))[0] == pytest.approx(5 / 3)


def test_the_medians_error_is_that_of_medians_of_new_samples_and_an_outlier_does_not_make_it():
    values = normal(101)
    median, error = metrics.median_and_error(values)
    assert median == values.sort().values[50].item()
    assert error == pytest.approx(normal(2000, 101, seed=1).quantile(0.5, dim=1).std().item(), rel=0.3)
    first = torch.cat([torch.tensor([1000.0]), values[1:]])
    assert metrics.median_and_error(first)[1] == pytest.approx(error, rel=0.3)
    assert metrics.median_and_error(values) == (median, error)
    assert metrics.median_and_error(torch.full((3,), 2.0)) == (2.0, 0.0)
    single = metrics.median_and_error(torch.tensor([2.0]))
    assert single[0] == 2.0
    assert math.isnan(single[1])


def test_the_sign_test_counts_the_throws_of_a_coin():
    assert statistics.sign_test(5, 0) == statistics.sign_test(0, 5) == 2 / 32
    assert statistics.sign_test(8, 2) == 2 * (1 + 10 + 45) / 1024
    assert statistics.sign_test(3, 3) == statistics.sign_test(2, 1) == statistics.sign_test(0, 0) == 1.0
