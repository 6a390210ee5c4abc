import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from equations.gaussian import gaussian_1d, gaussian_2d, mixture_2d
from mlcm_rl.equations.consistency import (
    DISTANCES,
    LOSSES,
    inter_segment_target,
    log_l2,
    loss_in_x0,
    loss_in_z,
    pseudo_huber,
    squared_l2,
    transfer,
)
from mlcm_rl.equations.prediction import prediction_from_x0, x0_from_prediction
from mlcm_rl.equations.schedule import Schedule, flow_schedule, scaled_linear_betas, snr, vp_schedule
from mlcm_rl.equations.segments import milestones, segment_start, time_grid
from mlcm_rl.equations.solver import ddim_step, inverse_ddim_step

VP = vp_schedule(scaled_linear_betas())
SCHEDULES = [VP, flow_schedule()]
BY_HAND = Schedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]), torch.arange(2))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_grid(num: int, grid: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`num` random starts t on `grid` and their next points r."""
    index = torch.randint(len(grid) - 1, (num,), generator=torch.Generator().manual_seed(seed))
    times = torch.tensor(grid)
    return times[index], times[index + 1]


def squared_l2_in_double(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().flatten(1).mean(1)


# --- distances ---------------------------------------------------------------------------------------------------


def test_distances_by_hand():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert squared_l2(a, b).tolist() == [12.5, 0.0]
    torch.testing.assert_close(pseudo_huber(a, b, c=4.0), torch.tensor([(1.0 + 32**0.5 - 4) / 2, 0.0]))
    torch.testing.assert_close(pseudo_huber(a, b), torch.tensor([3.5 - 1e-3, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_l2(a, b, c=0.5), torch.tensor([math.log(12.75) / 2, math.log(0.5)]))


@pytest.mark.parametrize("distance", DISTANCES.values())
def test_distances_return_one_float32_a_sample(distance):
    a, b = torch.ones(2, 5, 4, 8, 8, dtype=torch.bfloat16)
    value = distance(a, b)
    assert value.shape == (5,)
    assert value.dtype == torch.float32


def test_distances_have_the_gradients_of_their_formulas():
    a, b = normal(2, 3, 7)
    a.requires_grad_()
    (by_l2,) = torch.autograd.grad(squared_l2(a, b).sum(), a)
    torch.testing.assert_close(by_l2, 2 * (a - b).detach() / 7, atol=1e-6, rtol=1e-6)
    (by_huber,) = torch.autograd.grad(pseudo_huber(a, b, c=0.5).sum(), a)
    difference = (a - b).detach()
    torch.testing.assert_close(by_huber, difference / (difference**2 + 0.25).sqrt() / 7, atol=1e-6, rtol=1e-6)


def test_under_the_logarithm_an_error_ten_times_as_large_pulls_a_tenth_as_hard():
    """Adam's step is set by the sum of gradients: relative errors then count alike, whatever the jump's length."""
    b = torch.zeros(2, 7)
    a = (normal(1, 7) * torch.tensor([[1.0], [10.0]])).requires_grad_()
    (gradient,) = torch.autograd.grad(log_l2(a, b, c=0.0).sum(), a)
    torch.testing.assert_close(gradient, a.detach() / a.detach().square().sum(1, keepdim=True))
    torch.testing.assert_close(gradient[0], 10 * gradient[1])


# --- the transfer and its anchor ---------------------------------------------------------------------------------


def test_loss_in_z_by_hand():
    """x_t = 11 at (0.6, 0.8) with f = 5 lands at 10 on (0.8, 0.6): 2 away from a target of 12, squared 4."""
    x_t, x0, target = torch.tensor([[11.0]]), torch.tensor([[5.0]]), torch.tensor([[12.0]])
    t, s = torch.tensor([1]), torch.tensor([0])
    torch.testing.assert_close(loss_in_z(x0, x_t, t, target, s, BY_HAND, squared_l2), torch.tensor([4.0]))


def test_loss_in_x0_by_hand():
    """From x_t = 11 a target of 12 needs x0 = (12 - 0.75 * 11) / (0.8 - 0.6 * 0.75) = 75 / 7; SNR + 1 = 25 / 16."""
    x_t, x0, target = torch.tensor([[11.0]]), torch.tensor([[5.0]]), torch.tensor([[12.0]])
    t, s = torch.tensor([1]), torch.tensor([0])
    expected = torch.tensor([25 / 16 * (5 - 75 / 7) ** 2])
    torch.testing.assert_close(loss_in_x0(x0, x_t, t, target, s, BY_HAND, squared_l2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_segments", [8, 4, 2, 1])
def test_the_target_at_a_segments_start_is_the_state_itself(num_segments, dtype):
    """The anchor: at r = s the network's prediction is ignored, to the last bit."""
    r = s = milestones(num_segments)
    x_r = normal(len(s), 4, 8, 8).to(dtype)
    for guess in (normal(len(s), 4, 8, 8, seed=1).to(dtype), torch.full_like(x_r, float("nan"))):
        assert torch.equal(transfer(x_r, guess, r, s, VP).to(dtype), x_r)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@given(t=st.integers(1, 999), num_segments=st.sampled_from([1, 2, 4, 8]))
def test_for_squared_l2_the_two_losses_differ_by_a_known_factor(schedule, t, num_segments):
    """loss_in_x0 = loss_in_z (SNR_t + 1) / (alpha_s - alpha_t sigma_s / sigma_t)^2."""
    x0, x_t, target = normal(3, 2, 5, seed=t)
    t = torch.tensor([t, t])
    s = segment_start(t, num_segments)
    ratio = schedule.sigma[s] / schedule.sigma[t]
    gain = schedule.alpha[s] - schedule.alpha[t] * ratio
    expected = (snr(t, schedule) + 1) / gain**2 * loss_in_z(x0, x_t, t, target, s, schedule, squared_l2_in_double)
    actual = loss_in_x0(x0, x_t, t, target, s, schedule, squared_l2_in_double)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=0)  # one time below, the gain is a small difference


# --- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_with_a_segment_per_grid_step_the_loss_is_one_teacher_step(schedule):
    """K = 48: s is the next stored time, the target the stored state, so the perfect student is the teacher itself."""
    teacher, grid = mixture_2d(), time_grid(48)
    t, r = on_grid(200, grid)
    assert torch.equal(segment_start(t, 48), r)
    x_t = normal(200, 2)
    x0 = teacher.posterior_mean(x_t, t, schedule)
    x_r = ddim_step(x_t, x0, t, r, schedule)
    target = transfer(x_r, normal(200, 2, seed=1), r, segment_start(t, 48), schedule)
    assert loss_in_z(x0, x_t, t, target, r, schedule, squared_l2).max() == 0.0

    gain = schedule.alpha[r] - schedule.alpha[t] * schedule.sigma[r] / schedule.sigma[t]
    off_by_one = loss_in_z(x0 + 1.0, x_t, t, target, r, schedule, squared_l2)
    torch.testing.assert_close(off_by_one, gain**2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_with_one_segment_it_is_a_plain_consistency_model(schedule):
    """K = 1: g = c_skip(t) x_t + c_out(t) f with c_skip(0) = 1 and c_out(0) = 0 (Consistency Models, section 3)."""
    t = torch.tensor([0, 20, 499, 999])
    s = segment_start(t, 1)
    assert s.tolist() == [0, 0, 0, 0]
    x_t, x0 = normal(2, 4, 6)
    c_skip = (schedule.sigma[0] / schedule.sigma[t])[:, None]
    c_out = (schedule.alpha[0] - schedule.alpha[t] * schedule.sigma[0] / schedule.sigma[t])[:, None]
    assert (c_skip[0].item(), c_out[0].item()) == (1.0, 0.0)
    torch.testing.assert_close(transfer(x_t, x0, t, s, schedule), c_skip * x_t + c_out * x0, atol=1e-6, rtol=0)

    alpha, sigma = (
        torch.cat([torch.ones(1), schedule.alpha[1:]]),
        torch.cat([torch.full((1,), 1e-12), schedule.sigma[1:]]),
    )
    clean_end = Schedule(alpha, sigma, schedule.network_time)
    landed = transfer(x_t[1:], x0[1:], t[1:], s[1:], clean_end)
    torch.testing.assert_close(landed, x0[1:], atol=1e-6, rtol=0)  # where time 0 is clean, the jump is f itself


@pytest.mark.parametrize("num_segments", [8, 4, 2, 1])
@pytest.mark.parametrize("target", [gaussian_1d(), gaussian_2d()])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_the_exact_student_of_gaussian_data_has_no_loss_on_its_trajectory(schedule, target, num_segments):
    """In every segment, for every pair on one trajectory, by the consistency target and by the state at the start."""
    t, r = on_grid(256, time_grid(48))
    s = segment_start(t, num_segments)
    x_t = target.marginal_std(t, schedule) * normal(256, len(target.mean))
    x_t = x_t + schedule.alpha[t].double()[:, None] * target.mean
    x_r, x_s = target.flow(x_t, t, r, schedule), target.flow(x_t, t, s, schedule)
    f_t = target.f(x_t, t, s, schedule)
    inside = (r > s)[:, None]
    f_r = torch.where(inside, target.f(x_r, r, torch.where(r > s, s, r - 1).clamp(min=0), schedule), 0.0)
    for aim in (transfer(x_r, f_r, r, s, schedule), x_s):
        assert loss_in_z(f_t, x_t, t, aim, s, schedule, squared_l2).max() < 1e-11
    assert (
        loss_in_z(f_t, x_t, t, x_r, s, schedule, squared_l2).mean() > 1e-4
    )  # the pair's second point is not the target


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("num_segments", [8, 2, 1])
def test_with_solver_steps_the_exact_students_loss_falls_as_the_fourth_power_of_the_step(schedule, num_segments):
    """x_r now comes from one DDIM step of the exact teacher: its error is O(h^2), squared O(h^4), and 3^4 = 81."""
    target, losses = gaussian_2d(), []
    t = torch.arange(999, 100, -9)  # further down a step of 9 is not small: sigma changes by half
    t = t[t - segment_start(t, num_segments) > 9]
    s = segment_start(t, num_segments)
    x_t = target.marginal_std(t, schedule) * normal(len(t), 2) + schedule.alpha[t].double()[:, None] * target.mean
    for step in (9, 3):
        r = t - step
        x_r = ddim_step(x_t, target.mixture().posterior_mean(x_t, t, schedule), t, r, schedule)
        aim = transfer(x_r, target.f(x_r, r, s, schedule), r, s, schedule)
        losses.append(
            loss_in_z(target.f(x_t, t, s, schedule), x_t, t, aim, s, schedule, squared_l2_in_double).mean().item()
        )
    assert losses[1] < 1e-10
    assert 75 < losses[0] / losses[1] < 100


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_for_rectified_flow_the_loss_in_x0_is_one_of_velocities(shift):
    """An error e of the velocity is sigma e in x0, and SNR + 1 is (alpha^2 + sigma^2) / sigma^2: e^2 / 2 to e^2."""
    schedule = flow_schedule(shift)
    t, s = torch.tensor([999, 600, 21]), torch.tensor([874, 0, 0])
    x_t, x_s, v = normal(3, 3, 4)
    target = inverse_ddim_step(x_t, x_s, t, s, schedule)
    target_velocity = prediction_from_x0(target, x_t, t, schedule, "flow")
    x0 = x0_from_prediction(v, x_t, t, schedule, "flow")
    share = schedule.alpha[t] ** 2 + schedule.sigma[t] ** 2
    loss = loss_in_x0(x0, x_t, t, x_s, s, schedule, squared_l2_in_double)
    torch.testing.assert_close(loss, share * squared_l2_in_double(v, target_velocity), rtol=1e-5, atol=0)
    assert loss[0] > 0.1  # the last time counts, where there is no signal


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("loss", LOSSES.values())
def test_losses_have_right_gradients(schedule, loss):
    """In double precision against finite differences, through the step and through its inverse."""
    t, s = torch.tensor([999, 600, 21]), torch.tensor([874, 0, 0])
    x0, x_t, target = normal(3, 3, 4)

    def of_student(x0, x_t):
        return loss(x0, x_t, t, target, s, schedule, squared_l2_in_double)

    assert gradcheck(of_student, (x0.requires_grad_(), x_t.requires_grad_()))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_losses_reach_the_students_estimate_only_through_the_gain(schedule):
    """d loss / d f = 2 gain (g - target) / D."""
    t, s = torch.tensor([999]), torch.tensor([874])
    x0, x_t, target = normal(3, 1, 4)
    x0.requires_grad_()
    loss_in_z(x0, x_t, t, target, s, schedule, squared_l2_in_double).sum().backward()
    gain = schedule.alpha[874] - schedule.alpha[999] * schedule.sigma[874] / schedule.sigma[999]
    expected = 2 * gain * (transfer(x_t, x0, t, s, schedule) - target).detach() / 4
    torch.testing.assert_close(x0.grad, expected, atol=1e-6, rtol=1e-6)


# --- second stage ------------------------------------------------------------------------------------------------


def test_the_inter_segment_target_is_f_and_at_zero_the_state():
    x0_at_r, x_r = normal(2, 3, 4, 8, 8)
    target = inter_segment_target(x0_at_r, x_r, torch.tensor([124, 0, 874]))
    assert torch.equal(target[0], x0_at_r[0])
    assert torch.equal(target[1], x_r[1])
    assert torch.equal(target[2], x0_at_r[2])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_the_inter_segment_loss_is_nothing_for_the_exact_consistency_function(schedule):
    """One trajectory, two milestones, one clean end; at r = 0 the state is it, up to its noise."""
    target = gaussian_2d()
    t, r = milestones(8)[1:], milestones(8)[:-1]
    x_t = target.marginal_std(t, schedule) * normal(8, 2) + schedule.alpha[t].double()[:, None] * target.mean
    x_r = target.flow(x_t, t, r, schedule)
    aim = inter_segment_target(target.consistency(x_r, r, schedule), x_r, r)
    loss = squared_l2_in_double(target.consistency(x_t, t, schedule), aim)
    assert loss[1:].max() < 1e-12
    assert 0 < loss[0] < (schedule.sigma[0] + 1 - schedule.alpha[0]) ** 2
