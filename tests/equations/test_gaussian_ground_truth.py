"""The ground truth is itself checked: against autograd, against integration, against samples."""

from itertools import pairwise

import pytest
import torch

from equations.gaussian import Mixture, gaussian_1d, gaussian_2d, mixture_1d, mixture_2d
from mlcm_rl.equations.schedule import Schedule, add_noise, flow_schedule, scaled_linear_betas, vp_schedule
from mlcm_rl.equations.segments import segment_start, time_grid
from mlcm_rl.equations.solver import ddim_step

SCHEDULES = [vp_schedule(scaled_linear_betas()), flow_schedule(), flow_schedule(3.0)]


def points(dim: int, num: int = 64) -> torch.Tensor:
    return 1.5 * torch.randn(num, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solve(target: Mixture, x: torch.Tensor, grid: list[int], schedule: Schedule) -> torch.Tensor:
    """DDIM with the exact posterior mean along `grid`."""
    for t, s in pairwise(grid):
        t, s = (torch.full((len(x),), time) for time in (t, s))
        x = ddim_step(x, target.posterior_mean(x, t, schedule), t, s, schedule)
    return x


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow", "shifted"])
@pytest.mark.parametrize("target", [mixture_1d(), mixture_2d(), gaussian_2d().mixture()])
@pytest.mark.parametrize("time", [0, 124, 999])
def test_score_is_the_gradient_of_the_log_density(schedule, target, time):
    x = points(target.means.shape[1]).requires_grad_()
    t = torch.full((len(x),), time)
    gradient = torch.autograd.grad(target.log_density(x, t, schedule).sum(), x)[0]
    torch.testing.assert_close(target.score(x, t, schedule), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow", "shifted"])
def test_posterior_mean_is_the_best_guess_from_samples(schedule):
    """Averaged over noised samples in a narrow bin, x0 is the posterior mean."""
    target = mixture_1d()
    generator = torch.Generator().manual_seed(0)
    x0 = target.sample(400_000, generator)
    t = torch.full((len(x0),), 499)
    x_t = add_noise(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t, schedule)
    near = (x_t[:, 0] - 0.3).abs() < 0.02
    expected = target.posterior_mean(torch.tensor([[0.3]], dtype=torch.float64), t[:1], schedule).item()
    standard_error = x0[near].std().item() / near.sum().item() ** 0.5
    assert abs(x0[near].mean().item() - expected) < 4 * standard_error


def test_mixtures_have_mean_zero_and_unit_variance():
    for target in (mixture_1d(), mixture_2d()):
        mean = target.weights @ target.means
        variance = (target.weights @ target.means.square()).mean() + target.std**2
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)
        assert variance.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow", "shifted"])
@pytest.mark.parametrize("target", [gaussian_1d(), gaussian_2d()])
def test_closed_form_flow_is_the_limit_of_ddim(schedule, target):
    """The error of N steps falls like 1 / N: DDIM is a first-order solver of the same ODE."""
    x = points(len(target.mean))
    t, s = torch.full((len(x),), 999), torch.zeros(len(x), dtype=torch.int64)
    exact = target.flow(x, t, s, schedule)
    coarse, fine = ((solve(target.mixture(), x, time_grid(n), schedule) - exact).abs().max().item() for n in (111, 333))
    assert fine < 0.03
    assert 2.5 < coarse / fine < 3.5


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow", "shifted"])
def test_quantile_flow_is_the_limit_of_ddim_and_agrees_with_the_gaussian(schedule):
    target, x = mixture_1d(), points(1)
    t, s = torch.full((len(x),), 999), torch.zeros(len(x), dtype=torch.int64)
    exact = target.flow(x, t, s, schedule)
    coarse, fine = ((solve(target, x, time_grid(n), schedule) - exact).abs().mean().item() for n in (111, 333))
    assert fine < 0.01
    assert 2.5 < coarse / fine < 3.5

    one = gaussian_1d()
    as_mixture = type(target)(torch.ones(1, dtype=torch.float64), one.mean[None], one.std)
    torch.testing.assert_close(as_mixture.flow(x, t, s, schedule), one.flow(x, t, s, schedule), atol=1e-7, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow", "shifted"])
def test_the_perfect_student_lands_where_the_flow_does(schedule):
    target = gaussian_2d()
    x = points(2)
    t, s = torch.full((len(x),), 749), torch.full((len(x),), 499)
    landed = ddim_step(x, target.f(x, t, s, schedule), t, s, schedule)
    torch.testing.assert_close(landed, target.flow(x, t, s, schedule), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow", "shifted"])
def test_flow_composes_and_ends_at_the_consistency_function(schedule):
    """Phi(t -> s) = Phi(r -> s) Phi(t -> r); at s = 0 the leftover noise is all that separates it from clean data."""
    target = gaussian_2d()
    x = points(2)
    t, r, s = (torch.full((len(x),), time) for time in (874, 374, 0))
    there = target.flow(target.flow(x, t, r, schedule), r, s, schedule)
    torch.testing.assert_close(there, target.flow(x, t, s, schedule), atol=1e-12, rtol=0)
    at_zero = target.flow(x, t, s, schedule)
    torch.testing.assert_close(
        target.consistency(at_zero, s, schedule), target.consistency(x, t, schedule), atol=1e-12, rtol=0
    )
    assert (at_zero - target.consistency(x, t, schedule)).abs().max() < 0.02


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("target", [gaussian_1d(), gaussian_2d()])
def test_one_jump_over_all_times_is_rectified_flows_ode(target, shift):
    """K = 1: dx / d sigma = E[eps - x0 | x] from pure noise by Runge-Kutta, which knows no DDIM and no shift."""
    schedule, x = flow_schedule(shift), points(len(target.mean))

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        alpha = 1.0 - sigma
        gain = alpha * target.std**2 / (alpha**2 * target.std**2 + sigma**2)
        x0 = target.mean + gain * (x - alpha * target.mean)
        return (x - x0) / sigma

    t, s = torch.full((len(x),), 999), segment_start(torch.full((len(x),), 999), num_segments=1)
    jump = ddim_step(x, target.f(x, t, s, schedule), t, s, schedule)
    sigmas = torch.linspace(1.0, schedule.sigma[0].item(), 2001, dtype=torch.float64).tolist()
    state = x
    for here, after in pairwise(sigmas):
        step, middle = after - here, (here + after) / 2
        k1 = velocity(state, here)
        k2 = velocity(state + step / 2 * k1, middle)
        k3 = velocity(state + step / 2 * k2, middle)
        k4 = velocity(state + step * k3, after)
        state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(jump, state, atol=1e-6, rtol=0)
