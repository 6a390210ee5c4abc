"""Perceptual distances by hand, and the identities between the losses of x0 and those of the latents."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mlcm_rl.equations.consistency import (
    log_perceptual_loss,
    loss_in_z,
    perceptual_loss_in_z,
    squared_l2,
    transfer,
    weight_of_x0,
)
from mlcm_rl.equations.perceptual import (
    feature_distance,
    log_distance,
    mean_over_layers,
    ranking_inputs,
    two_alternative_loss,
    two_alternative_score,
    unit_channels,
)
from mlcm_rl.equations.schedule import flow_schedule, scaled_linear_betas, vp_schedule

SCHEDULES = [vp_schedule(scaled_linear_betas()), flow_schedule()]


def features(*rows: list[float]) -> torch.Tensor:
    """Features (1, C, places): a row is a place's channels."""
    return torch.tensor(rows).T[None]


def test_features_are_compared_by_their_directions_at_each_place():
    a, b = features([3.0, 4.0], [0.0, 0.0]), features([5.0, 0.0], [0.0, 7.0])
    assert unit_channels(a).tolist() == features([0.6, 0.8], [0.0, 0.0]).tolist()
    by_hand = ((0.6 - 1) ** 2 + 0.8**2 + 1.0) / 2  # of the first place and of the second
    torch.testing.assert_close(feature_distance(a, b), torch.tensor([by_hand]))
    weighted = (3 * (0.6 - 1) ** 2 + 2 * 0.8**2 + 2 * 1.0) / 2
    torch.testing.assert_close(feature_distance(a, b, torch.tensor([3.0, 2.0])), torch.tensor([weighted]))
    assert feature_distance(10 * b, b).item() == pytest.approx(0.0, abs=1e-12)  # a length is not seen
    both = mean_over_layers([a, b], [b, b])
    torch.testing.assert_close(both, torch.tensor([by_hand / 2]))


def test_a_place_without_features_has_a_gradient():
    a = torch.zeros(1, 2, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.relu(feature_distance(a.relu(), torch.ones(1, 2, 1))).sum(), a)
    assert gradient.isfinite().all()


def test_the_logarithm_of_a_distance():
    torch.testing.assert_close(
        log_distance(torch.tensor([12.5, 0.0]), 0.5), torch.tensor([0.5 * math.log(12.75), -math.log(2)])
    )


def test_what_the_ranking_network_reads():
    inputs = ranking_inputs(torch.tensor([0.4]), torch.tensor([0.9]))
    torch.testing.assert_close(inputs, torch.tensor([[0.4, 0.9, -0.5, 0.4, 1.8]]))


def test_the_two_alternative_loss_and_score():
    loss = two_alternative_loss(torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log(4)]))
    score = two_alternative_score(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([2.0, 2.0, 2.0]), torch.tensor([0, 1, 1]))
    assert score.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_the_weight_of_x0_makes_its_squared_error_that_of_the_jump(schedule):
    generator = torch.Generator().manual_seed(0)
    x0, x_t, eps = (torch.randn(3, 2, 4, generator=generator) for _ in range(3))
    t, s = torch.tensor([999, 499, 124]), torch.tensor([499, 0, 0])
    target = transfer(x_t, x0 + 0.1 * eps, t, s, schedule)
    arguments = (x0, x_t, t, target, s, schedule)
    torch.testing.assert_close(
        perceptual_loss_in_z(*arguments, squared_l2), loss_in_z(*arguments, squared_l2), rtol=1e-3, atol=1e-7
    )
    plain = log_perceptual_loss(*arguments, squared_l2)
    torch.testing.assert_close(plain, 0.01 * eps.square().flatten(1).mean(1), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(
        plain * weight_of_x0(t, s, schedule), loss_in_z(*arguments, squared_l2), rtol=1e-3, atol=1e-7
    )


def test_gradients_of_feature_distances():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def in_double(a):  # `feature_distance` itself is in float32
        return ((unit_channels(a) - unit_channels(b)).square() * weights[:, None]).sum(1).mean(1)

    a.requires_grad_()
    assert gradcheck(in_double, (a,))
    (gradient,) = torch.autograd.grad(feature_distance(a, b, weights).sum(), a)
    torch.testing.assert_close(gradient, torch.autograd.grad(in_double(a).sum(), a)[0], rtol=1e-5, atol=1e-7)
