import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence

from mlcm_rl.equations.policy import clipped_surrogate, gaussian_kl, gaussian_log_prob, group_advantages, step_gaussian
from mlcm_rl.equations.schedule import flow_schedule, scaled_linear_betas, vp_schedule
from mlcm_rl.equations.solver import ddim_step, gamma_step, time_before_noise

VP = vp_schedule(scaled_linear_betas())
SCHEDULES = [VP, flow_schedule()]
T, S = torch.tensor([999, 749, 499]), torch.tensor([749, 499, 124])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard_quantiles(num: int) -> torch.Tensor:
    """`num` evenly likely points of the standard normal (num,), scaled to variance 1: an expectation as a mean."""
    points = Normal(0.0, 1.0).icdf((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    return points / points.square().mean().sqrt()


# --- the step's distribution -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.7, 1.0])
def test_the_sampler_draws_from_the_distribution_stated(schedule, gamma):
    """x_s = mean + std noise is `gamma_step` itself; the mean does not know the noise, the std not the picture."""
    x_t, x0, noise = normal(3, 3, 4, 5, 5)
    mean, std = step_gaussian(x_t, x0, T, S, gamma, schedule)
    assert std.shape == (3, 1, 1, 1)
    torch.testing.assert_close(mean + std * noise, gamma_step(x_t, x0, T, S, noise, gamma, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_at_gamma_1_the_step_is_the_consistency_samplers(schedule):
    x_t, x0 = normal(2, 3, 4, 5, 5)
    mean, std = step_gaussian(x_t, x0, T, S, 1.0, schedule)
    assert torch.equal(mean, schedule.alpha[S].reshape(3, 1, 1, 1) * x0)
    assert torch.equal(std.flatten(), schedule.sigma[S].double())


def test_for_a_variance_preserving_schedule_the_step_is_trajectory_consistency_distillations():
    """mean = (alpha_s / alpha_s') DDIM to s', variance = 1 - (alpha_s / alpha_s')^2 (arXiv 2402.19159, section 4.2)."""
    x_t, x0 = normal(2, 3, 4, 5, 5)
    mean, std = step_gaussian(x_t, x0, T, S, 0.3, VP)
    below = time_before_noise(S, 0.3)
    up = (VP.alpha[S] / VP.alpha[below]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(mean, up * ddim_step(x_t, x0, T, below, VP))
    torch.testing.assert_close(std.square(), (1 - up**2).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.1])
def test_a_step_without_noise_has_no_distribution(gamma):
    with pytest.raises(ValueError, match=rf"gamma is {gamma}; a step has a probability .* \(0 is DDIM\)"):
        step_gaussian(normal(3, 2), normal(3, 2), T, S, gamma, VP)


# --- log-probability and KL --------------------------------------------------------------------------------------


def test_log_prob_by_hand():
    """Two elements at 1 and 3 deviations of 2: -(1 + 9) / 4 - log 2 - log(2 pi) / 2, the mean of the two."""
    actual = gaussian_log_prob(torch.tensor([[3.0, 7.0]]), torch.ones(1, 2), torch.tensor([[2.0]]))
    torch.testing.assert_close(actual, torch.tensor([-2.5 - math.log(2) - 0.5 * math.log(2 * math.pi)]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_log_prob_and_kl_are_torchs(schedule, gamma):
    x_t, x0, reference_x0, noise = normal(4, 3, 4, 5, 5)
    mean, std = step_gaussian(x_t, x0, T, S, gamma, schedule)
    reference_mean, _ = step_gaussian(x_t, reference_x0, T, S, gamma, schedule)
    x_s = gamma_step(x_t, x0, T, S, noise, gamma, schedule)
    log_prob = Normal(mean, std).log_prob(x_s).flatten(1)
    torch.testing.assert_close(gaussian_log_prob(x_s, mean, std), log_prob.mean(1))
    kl = kl_divergence(Normal(mean, std), Normal(reference_mean, std)).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, reference_mean, std), kl)


def test_log_prob_and_kl_have_the_gradients_of_their_formulas():
    x_s, mean, reference_mean = normal(3, 2, 3)
    std = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    assert gradcheck(lambda m: gaussian_log_prob(x_s, m, std), mean.requires_grad_())
    assert gradcheck(lambda m: gaussian_kl(m, reference_mean, std), mean)


def test_half_precision_states_give_float32_log_probs():
    x_t, x0, x_s = normal(3, 3, 4).bfloat16()
    mean, std = step_gaussian(x_t, x0, T, S, 0.3, VP)
    value = gaussian_log_prob(x_s, mean, std)
    assert (mean.dtype, std.dtype, value.dtype, value.shape) == (*[torch.float32] * 3, (3,))


# --- advantages and the clipped objective ------------------------------------------------------------------------


def test_group_advantages_by_hand():
    """Groups 1, 2, 3 (std 1) and 5, 5, 5: one prompt's easier reward does not enter the other's."""
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), eps=0.25)
    torch.testing.assert_close(advantages, torch.tensor([[-0.8, 0.0, 0.8], [0.0, 0.0, 0.0]]))


def test_unscaled_group_advantages_keep_each_prompts_spread():
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.3]]), scale=False)
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 0.0, 1.0], [-0.1, -0.1, 0.2]]))


def test_group_advantages_forget_each_prompts_level_and_spread():
    rewards = normal(5, 8)
    scale, level = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    advantages = group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(group_advantages(scale * rewards + level, eps=0.0), advantages)
    torch.testing.assert_close(advantages.std(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_a_group_of_one_has_no_advantage(shape):
    with pytest.raises(ValueError, match="two samples or more"):
        group_advantages(torch.zeros(shape))


def test_the_clipped_surrogate_by_hand():
    """Ratios 1.5, 1.5, 0.5, 0.5 with advantages 2, -2, 2, -2 and a range of 0.2."""
    log_prob = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss = clipped_surrogate(log_prob, torch.zeros(4), torch.tensor([2.0, -2.0, 2.0, -2.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([-2.4, 3.0, -1.0, 1.6]))


def test_the_clipped_surrogate_pushes_until_the_range_is_left():
    log_prob = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64).log().requires_grad_()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0], dtype=torch.float64)
    old = torch.zeros(5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(clipped_surrogate(log_prob, old, advantage, 0.2).sum(), log_prob)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 3.0, -1.0, 0.0, -3.3], dtype=torch.float64))
    assert gradcheck(lambda p: clipped_surrogate(p, old, advantage, 0.2), log_prob)


def test_on_policy_the_clipped_surrogate_is_the_policy_gradient():
    """At ratio 1 its gradient is -A grad log p, whatever the range."""
    log_prob, advantage = normal(2, 6)
    log_prob.requires_grad_()
    loss = clipped_surrogate(log_prob, log_prob.detach(), advantage, 0.1)
    torch.testing.assert_close(loss, -advantage)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), log_prob)[0], -advantage)
