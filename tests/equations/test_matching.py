"""Distribution matching: DMD2's arithmetic, and in closed form the gradient of a KL divergence and where it ends."""

import math

import numpy as np
import pytest
import torch

from equations.gaussian import Gaussian
from mlcm_rl.equations.matching import loss_of_gradient, matching_gradient, times_between
from mlcm_rl.equations.schedule import Schedule, add_noise, flow_schedule, scaled_linear_betas, snr, vp_schedule

SCHEDULES = pytest.mark.parametrize(
    "schedule", [vp_schedule(scaled_linear_betas()), flow_schedule(3.0)], ids=["vp", "flow"]
)
NUM_QUANTILES = 41  # of Gauss-Hermite's rule, exact for the polynomials here
TEACHER = Gaussian(torch.tensor([0.7], dtype=torch.float64), 0.4)


def normal_rule() -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights (N,) of an expectation over N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(NUM_QUANTILES)
    return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def two_normals() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z (N^2, 1), eps (N^2, 1) and weights (N^2,) of an expectation over two independent normals."""
    points, weights = normal_rule()
    z, eps = torch.meshgrid(points, points, indexing="ij")
    return z.reshape(-1, 1), eps.reshape(-1, 1), (weights[:, None] * weights).flatten()


def noised_kl(mean: torch.Tensor, std: torch.Tensor, t: int, schedule: Schedule) -> torch.Tensor:
    """KL(student_t || teacher_t) of N(mean, std^2) against the teacher, both with the noise of `t`."""
    alpha, sigma = schedule.alpha[t].double(), schedule.sigma[t].double()
    student, teacher = ((alpha * one) ** 2 + sigma**2 for one in (std, torch.tensor(TEACHER.std)))
    shift = alpha * (mean - TEACHER.mean)
    return (0.5 * ((student + shift**2) / teacher - 1 + (teacher / student).log())).squeeze()


def gradient_on_students_samples(mean: torch.Tensor, std: torch.Tensor, t: int, schedule: Schedule):
    """x (N, 1) of the student N(mean, std^2) and `matching_gradient` there, both scores exact."""
    z, eps, weights = two_normals()
    x0 = mean + std * z
    times = torch.full((len(z),), t)
    x_t = add_noise(x0, eps, times, schedule).detach()
    student = Gaussian(mean.detach().reshape(1), std.item())
    real, fake = (one.mixture().posterior_mean(x_t, times, schedule) for one in (TEACHER, student))
    return x0, real, fake, weights


@SCHEDULES
@pytest.mark.parametrize("t", [124, 499, 874])
def test_without_its_normaliser_it_is_the_gradient_of_the_kl_divergence(schedule, t):
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.3, 0.9))
    x0, real, fake, weights = gradient_on_students_samples(mean, std, t, schedule)
    normaliser = (x0 - real).abs().mean(1, keepdim=True).detach()
    direction = matching_gradient(x0.detach(), real, fake).double() * normaliser * snr(torch.tensor(t), schedule)
    actual = torch.autograd.grad((weights[:, None] * direction * x0).sum(), (mean, std))
    expected = torch.autograd.grad(noised_kl(mean, std, t, schedule), (mean, std))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@SCHEDULES
def test_its_descent_ends_at_the_teachers_distribution(schedule):
    """With both scores exact the student's mean and deviation become the teacher's, whatever the normaliser."""
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.3, 0.9))
    optimizer = torch.optim.SGD([mean, std], lr=0.1)
    for step in range(600):
        x0, real, fake, weights = gradient_on_students_samples(mean, std, (249, 499, 749)[step % 3], schedule)
        loss = (weights * loss_of_gradient(x0, matching_gradient(x0.detach(), real, fake))).sum()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 600)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(TEACHER.mean.item(), abs=1e-3)
    assert std.item() == pytest.approx(TEACHER.std, abs=1e-3)


@SCHEDULES
def test_it_is_dmd2s_own_statement_in_eps(schedule):
    """Written out in numpy from predicted noise, as DMD2's program states it: x0 of each, differences, their mean."""
    draws = np.random.default_rng(0)
    x, eps, eps_real, eps_fake = draws.standard_normal((4, 3, 2, 4, 4)).astype(np.float32)
    t = torch.tensor([60, 400, 900])
    alpha, sigma = (value[t].numpy().reshape(-1, 1, 1, 1) for value in (schedule.alpha, schedule.sigma))
    noisy = alpha * x + sigma * eps
    real, fake = ((noisy - sigma * one) / alpha for one in (eps_real, eps_fake))
    p_real, p_fake = x - real, x - fake
    gradient = (p_real - p_fake) / np.abs(p_real).mean(axis=(1, 2, 3), keepdims=True)

    x0 = torch.from_numpy(x).requires_grad_()
    actual = matching_gradient(x0.detach(), torch.from_numpy(real), torch.from_numpy(fake))
    np.testing.assert_allclose(actual.numpy(), gradient, rtol=2e-4, atol=1e-4)
    loss = loss_of_gradient(x0, actual)
    np.testing.assert_allclose(loss.detach().numpy(), 0.5 * (gradient**2).mean(axis=(1, 2, 3)), rtol=1e-3)
    loss.sum().backward()
    torch.testing.assert_close(x0.grad, actual / x0[0].numel(), rtol=1e-4, atol=1e-6)


def test_where_the_teacher_finds_the_sample_itself_nothing_is_divided_by_zero():
    x0 = torch.ones(1, 2, 2, 2)
    assert matching_gradient(x0, x0, x0).abs().max() == 0.0


def test_times_fill_the_part_of_the_axis_evenly():
    share = torch.linspace(0, 1 - 1e-6, 9600)
    times = times_between(share, 0.02, 0.98, 1000)
    counts = times.bincount()
    assert (times.min().item(), times.max().item()) == (19, 979)
    assert counts[19:].min() >= 9
    assert counts[19:].max() <= 11


def test_times_above_a_time_are_parts_of_what_is_above_it_by_hand():
    """Above 499 the axis is 500 long: 10 % to 20 % are 50 to 100 above; above 899 it is 100 long."""
    start = torch.tensor([0, 499, 499, 899, 899])
    share = torch.tensor([0.0, 0.0, 0.999, 0.0, 0.999])
    assert times_between(share, 0.1, 0.2, 1000, start).tolist() == [99, 549, 599, 909, 919]
