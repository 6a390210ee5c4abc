import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence

from mlcm_rl.equations.consistency import squared_l2
from mlcm_rl.equations.feedback import (
    at_known_gradient,
    bounded_target,
    centred_error,
    correlation_within,
    hinge,
    mps_hinge,
    negative,
    random_late_step,
    renoised_copies,
    step_kl,
    value_and_gradient,
)
from mlcm_rl.equations.policy import step_gaussian
from mlcm_rl.equations.schedule import Schedule, flow_schedule, scaled_linear_betas, snr, vp_schedule

VP = vp_schedule(scaled_linear_betas())
SCHEDULES = [VP, flow_schedule()]
BY_HAND = Schedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]), torch.arange(2))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- losses on a reward ------------------------------------------------------------------------------------------


def test_reward_losses_by_hand():
    reward = torch.tensor([-1.0, 1.5, 3.0])
    assert negative(reward).tolist() == [1.0, -1.5, -3.0]
    assert hinge(reward, 2.0).tolist() == [3.0, 0.5, 0.0]
    own, irrelevant = torch.tensor([10.0, 20.0, 20.0]), torch.tensor([3.0, -5.0, 4.0])
    assert mps_hinge(own, irrelevant).tolist() == [9.0, 0.0, 4.0]
    assert mps_hinge(own, irrelevant, threshold=10.0).tolist() == [3.0, 0.0, 4.0]


def test_reward_losses_have_the_gradients_of_their_formulas():
    own, irrelevant = 3 * normal(2, 8).requires_grad_()
    assert gradcheck(negative, own)
    assert gradcheck(lambda r: hinge(r, 0.5), own)
    assert gradcheck(lambda a, b: mps_hinge(a, b, threshold=1.0), (own, irrelevant))


def test_a_satisfied_hinge_asks_for_nothing():
    reward = torch.tensor([2.5, 1.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(hinge(reward, 2.0).sum(), reward)
    assert gradient.tolist() == [0.0, -1.0]


# --- which steps carry gradient ----------------------------------------------------------------------------------


def test_bounded_targets_by_hand():
    x0, gradient = (
        torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]]),
        torch.tensor([[3.0, 4.0], [-0.1, 0.1], [0.0, 0.0]]),
    )
    target = bounded_target(x0.requires_grad_(), gradient, bound=0.5)
    size = (12.5) ** 0.5  # the root mean square of 3 and 4
    expected = [[1.0 + 1.5 / size, 2.0 + 2.0 / size], [-0.5, 0.5], [5.0, 5.0]]
    torch.testing.assert_close(target, torch.tensor(expected))
    assert not target.requires_grad


def test_a_bounded_step_and_an_anchor_end_at_their_ratio_from_the_reference():
    """Of a linear reward, however steep: 2 bound g / rms(g) = 2 weight (x0 - reference)."""
    slope, reference, weight, bound = torch.tensor([[30.0, -40.0]]), torch.tensor([[1.0, 1.0]]), 2.0, 0.3
    x0 = reference.clone()
    for _ in range(200):
        x0.requires_grad_()
        loss = squared_l2(x0, bounded_target(x0, slope, bound)) + weight * squared_l2(x0, reference)
        (gradient,) = torch.autograd.grad(loss.sum(), x0)
        x0 = (x0 - 0.1 * gradient).detach()
    distance = x0 - reference
    assert distance.square().mean().sqrt().item() == pytest.approx(bound / weight, rel=1e-4)
    assert torch.cosine_similarity(distance, slope).item() == pytest.approx(1.0, abs=1e-6)


def test_a_known_gradient_is_passed_on_with_its_value():
    weights = torch.tensor([2.0, 3.0], requires_grad=True)
    x0 = weights * torch.tensor([[1.0, 1.0], [4.0, 0.0]])
    value = at_known_gradient(torch.tensor([7.0, 8.0]), torch.tensor([[1.0, 10.0], [0.5, 0.0]]), x0)
    assert value.tolist() == [7.0, 8.0]
    assert torch.autograd.grad(value.sum(), weights)[0].tolist() == [1.0 + 0.5 * 4.0, 10.0]


def test_a_value_and_its_gradient_are_each_samples_own_at_any_scale():
    x0 = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    for scale in (1.0, 1024.0):
        value, gradient = value_and_gradient(lambda x: x.square().sum(1), x0, scale)
        assert (value.tolist(), gradient.tolist()) == ([5.0, 10.0], [[2.0, 4.0], [6.0, -2.0]])
        assert not value.requires_grad
        assert not gradient.requires_grad
    (through,) = torch.autograd.grad(at_known_gradient(value, gradient, x0).sum(), x0)
    assert torch.equal(through, gradient)


def test_errors_and_correlations_within_prompts_by_hand():
    """Two prompts of two samples: what their samples have in common counts for nothing."""
    predicted, scores = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[10.0, 14.0], [-5.0, -3.0]])
    assert centred_error(predicted, scores).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert correlation_within(predicted, scores) == pytest.approx(4.0 / (2.0 * 10.0) ** 0.5)
    assert correlation_within(predicted, scores + 100.0) == correlation_within(predicted, scores)
    assert correlation_within(torch.zeros(2, 2), scores) == 0.0


def test_random_late_steps_are_even_and_the_seeds():
    """ReFL's own numbers: 40 steps, one of the last 10."""
    draws = [random_late_step(40, 10, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    assert draws == [random_late_step(40, 10, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    counts = torch.bincount(torch.tensor(draws), minlength=40)
    assert counts[:30].sum() == 0
    assert (counts[30:] - 200).abs().max() < 5 * 200**0.5
    assert random_late_step(4, 1, torch.Generator().manual_seed(0)) == 3
    with pytest.raises(ValueError, match="num_late_steps is 5; of 4 sampling steps"):
        random_late_step(4, 5, torch.Generator().manual_seed(0))


def test_renoised_copies_by_hand():
    """Two copies of two samples: copy-major, each sample at its own time, without gradient to the chain before."""
    x0 = torch.tensor([[1.0], [2.0]], requires_grad=True)
    eps = torch.tensor([[[0.0], [10.0]], [[20.0], [30.0]]])
    copies = renoised_copies(x0, eps, torch.tensor([0, 1]), BY_HAND)
    torch.testing.assert_close(copies, torch.tensor([[0.8], [9.2], [12.8], [25.2]]))
    assert not copies.requires_grad


# --- the anchor --------------------------------------------------------------------------------------------------


def test_step_kl_by_hand():
    """At gamma 1 and s = 1: 0.36 (3^2 + 4^2) / (2 * 0.64); the norm is a sum."""
    student, reference = torch.tensor([[3.0, 5.0]]), torch.tensor([[0.0, 1.0]])
    t, s = torch.tensor([1]), torch.tensor([1])
    torch.testing.assert_close(step_kl(student, reference, t, s, 1.0, BY_HAND), torch.tensor([0.36 * 25 / 1.28]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_step_kl_at_gamma_1_is_a_weighted_anchor_on_x0(schedule):
    student, reference = normal(2, 3, 4, 8, 8)
    t, s = torch.tensor([999, 749, 499]), torch.tensor([749, 499, 124])
    anchor = (student - reference).square().flatten(1).sum(1)
    torch.testing.assert_close(step_kl(student, reference, t, s, 1.0, schedule), snr(s, schedule) / 2 * anchor)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.7, 1.0])
def test_step_kl_is_that_of_the_steps_own_distribution(schedule, gamma):
    """Against torch's KL of independent normals, from a state x_t that the closed form never sees."""
    student, reference, x_t = normal(3, 3, 4, 5, 5)
    t, s = torch.tensor([999, 749, 499]), torch.tensor([749, 499, 124])
    mean, std = step_gaussian(x_t, student, t, s, gamma, schedule)
    reference_mean, _ = step_gaussian(x_t, reference, t, s, gamma, schedule)
    expected = kl_divergence(Normal(mean, std), Normal(reference_mean, std)).flatten(1).sum(1)
    torch.testing.assert_close(step_kl(student, reference, t, s, gamma, schedule), expected)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_step_kl_has_the_gradient_of_its_formula_and_is_nothing_for_equals(schedule):
    student, reference = normal(2, 2, 3)
    t, s = torch.tensor([999, 499]), torch.tensor([499, 124])
    assert step_kl(student, student, t, s, 0.3, schedule).tolist() == [0.0, 0.0]
    assert gradcheck(lambda x0: step_kl(x0, reference, t, s, 0.3, schedule), student.requires_grad_())


def test_step_kl_of_half_precision_is_float32_and_of_a_deterministic_step_refused():
    student, reference = normal(2, 3, 4).bfloat16()
    t, s = torch.full((3,), 999), torch.full((3,), 499)
    assert step_kl(student, reference, t, s, 0.3, VP).dtype == torch.float32
    assert step_kl(student, reference, t, s, 0.3, VP).shape == (3,)
    with pytest.raises(ValueError, match=r"gamma is 0\.0; a step has a probability and a KL for 0 < gamma <= 1"):
        step_kl(student, reference, t, s, 0.0, VP)
