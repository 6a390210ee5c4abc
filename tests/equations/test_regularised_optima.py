"""Every objective, by plain gradient descent, ends at the known optimum of what it claims to optimise.

The student is one number: its x0 (1,), the same whatever it is shown. One stochastic step of the sampler makes it a
policy N(mean, std^2) with a mean linear in that number and a std that the schedule fixes; the reference is another.

For the reward r(x) = -(x - a)^2 and KL weight w, with m the reference's mean,

    E r - w KL = -(mean - a)^2 - std^2 - w (mean - m)^2 / (2 std^2)

is greatest at a weighted average: mean* = (2 std^2 a + w m) / (2 std^2 + w).

Preference losses are shown all pairs with the probability of each label, the limit of ever more labels. Under labels of
Bradley and Terry the optimum is the reference tilted, p_ref exp(r / beta). With std fixed that stays in the family only
for a linear reward, where it is a shift; the quadratic one asks for N(mean*, 1 / (1 / std^2 + 2 / beta)), w = beta,
so there std is free. `hinge` and `conservative` have no such optimum in the family and are not here.

Expectations over noise are means over normal quantiles, scaled to variance 1: exact for what is quadratic in the noise.
"""

import math

import pytest
import torch
from torch.autograd import grad
from torch.distributions import Normal

from mlcm_rl.equations.feedback import hinge, negative, step_kl
from mlcm_rl.equations.policy import clipped_surrogate, gaussian_kl, gaussian_log_prob, group_advantages, step_gaussian
from mlcm_rl.equations.preference import (
    denoising_error,
    diffusion_dpo_log_ratio,
    endpoint_log_ratio,
    offline_pso_log_ratios,
    online_pso_log_ratio,
    preference_loss,
)
from mlcm_rl.equations.schedule import Schedule, flow_schedule, scaled_linear_betas, snr, vp_schedule
from mlcm_rl.equations.solver import gamma_step

VP = vp_schedule(scaled_linear_betas())
BOTH = pytest.mark.parametrize("schedule", [VP, flow_schedule()], ids=["vp", "flow"])
BEST, STATE, START, REFERENCE = 1.2, 0.8, 0.1, -0.4  # the reward's a, x_t, the student's x0 at first, the reference's
WEIGHT = 0.7


def quantiles(num: int) -> torch.Tensor:
    points = Normal(0.0, 1.0).icdf((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    return (points / points.square().mean().sqrt())[:, None]


def reward(x: torch.Tensor) -> torch.Tensor:
    return -(x - BEST).square().flatten()


def descend(parameters: torch.Tensor, loss, rate: float, num_steps: int) -> torch.Tensor:
    """`parameters` after plain gradient descent on loss(parameters)."""
    for _ in range(num_steps):
        parameters = parameters.detach().requires_grad_()
        (gradient,) = grad(loss(parameters), parameters)
        parameters = parameters - rate * gradient
    return parameters.detach()


class Step:
    """One stochastic step 999 -> 499 from x_t = STATE, taken with all of `noise` (B, 1) at once."""

    def __init__(self, noise: torch.Tensor, gamma: float, schedule: Schedule = VP):
        self.noise, self.gamma, self.schedule = noise, gamma, schedule
        self.t, self.s = torch.full((len(noise),), 999), torch.full((len(noise),), 499)
        self.x_t = torch.full_like(noise, STATE)
        self.reference_mean, self.std = self.policy(torch.tensor([REFERENCE], dtype=torch.float64))

    def batch_of(self, x0: torch.Tensor) -> torch.Tensor:
        """The estimate `x0` (1,), once a row of noise (B, 1)."""
        return x0.expand(len(self.noise), 1)

    def policy(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return step_gaussian(self.x_t, self.batch_of(x0), self.t, self.s, self.gamma, self.schedule)

    def draw(self, x0: torch.Tensor) -> torch.Tensor:
        return gamma_step(self.x_t, self.batch_of(x0), self.t, self.s, self.noise, self.gamma, self.schedule)

    def trained_mean(self, loss, rate: float = 0.5, num_steps: int = 200) -> float:
        start = torch.tensor([START], dtype=torch.float64)
        return self.policy(descend(start, loss, rate, num_steps))[0][0].item()

    def tuned_mean(self, weight: float) -> float:
        """mean* of the quadratic reward."""
        pull, std_squared = weight * self.reference_mean[0].item(), self.std[0].item() ** 2
        return (2 * std_squared * BEST + pull) / (2 * std_squared + weight)


# --- reward feedback ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("shape", [negative, lambda r: hinge(r, 100.0)], ids=["negative", "hinge"])
def test_reward_feedback_with_its_anchor(shape, gamma, schedule):
    step = Step(quantiles(51), gamma, schedule)
    reference_x0 = step.batch_of(torch.tensor([REFERENCE], dtype=torch.float64))

    def loss(x0):
        anchor = step_kl(step.batch_of(x0), reference_x0, step.t, step.s, gamma, schedule)
        return (shape(reward(step.draw(x0))) + WEIGHT * anchor).mean()

    assert step.trained_mean(loss) == pytest.approx(step.tuned_mean(WEIGHT), abs=1e-6)


def test_without_an_anchor_reward_feedback_goes_all_the_way():
    step = Step(quantiles(51), 1.0)
    assert step.trained_mean(lambda x0: negative(reward(step.draw(x0))).mean()) == pytest.approx(BEST, abs=1e-6)


# --- policy gradient ---------------------------------------------------------------------------------------------


def policy_loss(step: Step, advantages, kl):
    """The loss of fresh samples of the student as it is, whose rewards carry no gradient."""

    def loss(x0):
        mean, std = step.policy(x0)
        x_s = step.draw(x0).detach()
        log_prob = gaussian_log_prob(x_s, mean, std)
        objective = clipped_surrogate(log_prob, log_prob.detach(), advantages(reward(x_s)), 0.2)
        return (objective + WEIGHT * kl(x_s, mean, log_prob)).mean()

    return loss


@BOTH
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_policy_gradient_with_kl(gamma, schedule):
    step = Step(quantiles(51), gamma, schedule)
    loss = policy_loss(
        step, lambda r: r - r.mean(), lambda _, mean, __: gaussian_kl(mean, step.reference_mean, step.std)
    )
    assert step.trained_mean(loss) == pytest.approx(step.tuned_mean(WEIGHT), abs=1e-6)


def test_policy_gradient_with_group_relative_advantages():
    """Divided by the rewards' spread S: the optimum is where 2 (mean - a) / S = -w (mean - m) / std^2, by bisection."""
    noise = quantiles(51)
    step = Step(noise, 1.0)
    std, reference = step.std[0].item(), step.reference_mean[0].item()

    def slope(mean: float) -> float:
        spread = reward(mean + std * noise).std().item() + 1e-4
        return 2 * (mean - BEST) / spread + WEIGHT * (mean - reference) / std**2

    low, high = reference, BEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    loss = policy_loss(
        step,
        lambda r: group_advantages(r[None])[0],
        lambda _, mean, __: gaussian_kl(mean, step.reference_mean, step.std),
    )
    assert step.trained_mean(loss) == pytest.approx(low, abs=1e-6)
    assert abs(low - step.tuned_mean(WEIGHT)) > 0.05


def test_policy_gradient_with_unscaled_group_advantages_reaches_the_plain_optimum():
    step = Step(quantiles(51), 1.0)
    loss = policy_loss(
        step,
        lambda r: group_advantages(r[None], scale=False)[0],
        lambda _, mean, __: gaussian_kl(mean, step.reference_mean, step.std),
    )
    assert step.trained_mean(loss) == pytest.approx(step.tuned_mean(WEIGHT), abs=1e-6)


# --- preference pairs --------------------------------------------------------------------------------------------


def expected_loss(log_ratio: torch.Tensor, wins: torch.Tensor, **settings) -> torch.Tensor:
    """Over all ordered pairs of samples: `wins` (n, n) is the probability of the label that row beats column."""
    chosen, rejected = (side.flatten() for side in torch.broadcast_tensors(log_ratio[:, None], log_ratio[None]))
    return (wins.flatten() * preference_loss(chosen, rejected, **settings)).mean()


def differences(values: torch.Tensor) -> torch.Tensor:
    return values[:, None] - values[None]


def online_pairs_loss(step: Step, wins, **settings):
    """The loss of pairs drawn from the student as it is; `wins` gives the labels' probabilities from the samples."""

    def loss(x0):
        mean, std = step.policy(x0)
        x_s = step.draw(x0).detach()
        return expected_loss(online_pso_log_ratio(x_s, mean, step.reference_mean, std), wins(x_s.flatten()), **settings)

    return loss


@BOTH
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize(("loss_type", "flipped"), [("sigmoid", 0.0), ("robust", 0.2)])
def test_online_dpo_of_a_linear_reward_is_a_shifted_reference(loss_type, flipped, gamma, schedule):
    """r = c x tilts N(m, std^2) to N(m + c std^2 / beta, std^2); so does `robust` with labels flipped at its rate."""
    slope, beta = 1.5, 2.0
    step = Step(quantiles(31), gamma, schedule)

    def wins(x):
        true = differences(slope * x).sigmoid()
        return (1 - flipped) * true + flipped * true.T

    loss = online_pairs_loss(step, wins, beta=beta, loss_type=loss_type, label_smoothing=flipped)
    shifted = step.reference_mean[0] + slope * step.std[0] ** 2 / beta
    assert step.trained_mean(loss, rate=1.0, num_steps=400) == pytest.approx(shifted.item(), abs=1e-6)


def test_ipo_of_a_linear_preference_is_a_shifted_reference():
    """P(x beats y) = 1/2 + k (x - y) needs log-ratios (2 P - 1) / (2 beta) apart: a shift of k std^2 / beta."""
    slope, beta = 0.08, 0.1
    step = Step(quantiles(31), 1.0)

    def wins(x):
        probability = 0.5 + slope * differences(x)
        assert probability.min() > 0
        return probability

    loss = online_pairs_loss(step, wins, beta=beta, loss_type="ipo")
    shifted = step.reference_mean[0] + slope * step.std[0] ** 2 / beta
    assert step.trained_mean(loss) == pytest.approx(shifted.item(), abs=1e-6)


def offline_pso(errors: torch.Tensor, reference_errors: torch.Tensor) -> torch.Tensor:
    """At kappa 1, where chosen and rejected are measured alike."""
    return offline_pso_log_ratios(errors, reference_errors, errors, reference_errors, kappa=1.0)[1]


@pytest.mark.parametrize(
    ("form", "num_times", "share"),
    [
        (lambda e, r: diffusion_dpo_log_ratio(e[0], r[0]), 1, 1.0),
        (lambda e, r: offline_pso(e[0], r[0]), 1, 2.0),
        (endpoint_log_ratio, 3, 2.0),
    ],
    ids=["diffusion_dpo", "offline_pso", "endpoint"],
)
def test_offline_pairs_of_a_linear_reward_shift_the_reference(form, num_times, share):
    """Where x0 does not look at its input, the error of a picture is its surprise under a Gaussian around x0.

    (l_ref - l) / 2 is then log N(x; x0, 1 / SNR) / N(x; m, 1 / SNR), and every further share or time adds its SNR.
    """
    slope, beta, times = 1.5, 2.0, torch.tensor([749, 499, 374][:num_times])
    pictures = REFERENCE + quantiles(31)
    wins = differences(slope * pictures.flatten()).sigmoid()

    def errors(x0):
        estimate = x0.expand(len(pictures), 1)
        return torch.stack([denoising_error(estimate, pictures, t.expand(len(pictures)), VP, "eps") for t in times])

    reference_errors = errors(torch.tensor([REFERENCE], dtype=torch.float64))
    start = torch.tensor([START], dtype=torch.float64)
    precision = share * snr(times, VP).sum().item()
    rate = 0.5 / precision**2
    x0 = descend(start, lambda x0: expected_loss(form(errors(x0), reference_errors), wins, beta=beta), rate, 600)
    assert x0.item() == pytest.approx(REFERENCE + slope / (beta * precision), abs=1e-6)


def test_dpo_of_a_quadratic_reward_is_the_tilted_reference():
    """Mean and std free, pairs drawn from the reference; the mean is that of reward feedback with w = beta."""
    beta, std = 0.7, 0.85
    reference = Normal(torch.tensor(REFERENCE, dtype=torch.float64), std)
    x = REFERENCE + std * quantiles(31).flatten()
    wins = differences(reward(x)).sigmoid()

    def loss(parameters):
        mean, log_std = parameters
        return expected_loss(Normal(mean, log_std.exp()).log_prob(x) - reference.log_prob(x), wins, beta=beta)

    mean, log_std = descend(torch.tensor([START, 0.0], dtype=torch.float64), loss, 0.3, 2000).tolist()
    assert mean == pytest.approx((2 * std**2 * BEST + beta * REFERENCE) / (2 * std**2 + beta), abs=1e-5)
    assert math.exp(-2 * log_std) == pytest.approx(1 / std**2 + 2 / beta, rel=1e-5)
