"""What is lost of a prompt through another text encoder: by hand, and at both ends of the scale."""

import pytest
import torch

from mlcm_rl.equations.adaptation import FLOOR, effect_lost, feature_error, spread


def test_the_spread_of_two_prompts_by_hand():
    features = torch.tensor([[[1.0, 2.0], [5.0, 5.0]], [[3.0, 6.0], [5.0, 5.0]]])
    mean, deviation = spread(features)
    assert mean.tolist() == [[2.0, 4.0], [5.0, 5.0]]
    assert deviation.tolist() == pytest.approx([(1.0 + 4.0) ** 0.5 / 2**0.5, 0.0])


def test_a_token_that_hardly_differs_counts_as_constant():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(50, 3, 4, generator=draws) * torch.tensor([1.0, 1e-4, 0.5])[:, None]
    deviation = spread(features)[1]
    assert (deviation > 0).tolist() == [True, False, True]
    assert spread(torch.ones(4, 2, 3))[1].tolist() == [0.0, 0.0]


def test_the_error_of_features_by_hand():
    target = torch.zeros(1, 2, 2)
    features = torch.tensor([[[2.0, 4.0], [100.0, 100.0]]])
    error = feature_error(features, target, torch.tensor([2.0, 0.0]))
    assert error.tolist() == [(1.0 + 4.0) / 2]


def test_the_mean_of_the_features_has_error_one():
    features = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 6.0)[:, None]
    mean, deviation = spread(features)
    errors = feature_error(mean.expand_as(features), features, deviation)
    assert errors.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert feature_error(features, features, deviation).tolist() == [0.0] * 40


def test_what_is_lost_of_a_prompts_effect_by_hand():
    target, unprompted = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert effect_lost(torch.tensor([[2.0, 1.0]]), target, unprompted).tolist() == pytest.approx([0.5 / (2.0 + FLOOR)])


def test_it_is_zero_with_the_effect_and_one_without_whatever_its_size():
    draws = torch.Generator().manual_seed(2)
    unprompted = torch.randn(3, 2, 4, 4, generator=draws)
    effect = torch.randn(3, 2, 4, 4, generator=draws) * torch.tensor([0.1, 1.0, 10.0])[:, None, None, None]
    target = unprompted + effect
    assert effect_lost(target, target, unprompted).tolist() == [0.0] * 3
    torch.testing.assert_close(effect_lost(unprompted, target, unprompted), torch.ones(3), atol=2e-4, rtol=0)
    halfway = effect_lost(unprompted + 0.5 * effect, target, unprompted)
    torch.testing.assert_close(halfway, torch.full((3,), 0.25), atol=1e-4, rtol=0)


def test_a_prompt_without_effect_is_divided_by_no_zero():
    same = torch.ones(2, 3)
    assert effect_lost(same, same, same).tolist() == [0.0, 0.0]
