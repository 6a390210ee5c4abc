import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from mlcm_rl.equations.schedule import (
    Schedule,
    add_noise,
    expand,
    flow_schedule,
    flow_shift,
    noise_up,
    scaled_linear_betas,
    snr,
    vp_schedule,
)
from mlcm_rl.equations.segments import sampling_times

VP = vp_schedule(scaled_linear_betas())


@pytest.mark.parametrize("schedule", [VP, flow_schedule(), flow_schedule(3.0)], ids=["vp", "flow", "shifted"])
def test_noise_on_a_state_makes_the_state_of_a_later_time(schedule):
    """Two steps of noise have the mean alpha_t and the deviation sigma_t of one; at t = s nothing is added."""
    s, t = torch.tensor([0, 124, 499, 874, 874]), torch.tensor([600, 124, 500, 999, 900])
    one, none = torch.ones(5, 1, 1, 1), torch.zeros(5, 1, 1, 1)
    of_x0 = noise_up(add_noise(one, none, s, schedule), none, s, t, schedule)
    of_first, of_second = (
        noise_up(add_noise(none, a, s, schedule), b, s, t, schedule) for a, b in ((one, none), (none, one))
    )
    torch.testing.assert_close(of_x0.flatten(), schedule.alpha[t])
    torch.testing.assert_close((of_first**2 + of_second**2).sqrt().flatten(), schedule.sigma[t])
    torch.testing.assert_close(of_second[1], none[1])


def test_variance_preserving_scales_are_on_the_circle():
    torch.testing.assert_close(VP.alpha**2 + VP.sigma**2, torch.ones(1000), atol=1.2e-7, rtol=0)


def test_variance_preserving_scales_equal_stock_ddim():
    stock = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    torch.testing.assert_close(VP.alpha, stock.sqrt(), rtol=2e-6, atol=0)
    torch.testing.assert_close(VP.sigma, (1 - stock).sqrt(), rtol=2e-5, atol=0)  # stock subtracts in float32


def test_variance_preserving_scales_by_hand():
    """Betas 1/4 and 1/3: alpha^2 = 3/4, then 3/4 * 2/3 = 1/2."""
    schedule = vp_schedule(torch.tensor([0.25, 1 / 3]))
    torch.testing.assert_close(schedule.alpha**2, torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(schedule.sigma**2, torch.tensor([0.25, 0.5]))


def test_scales_at_the_milestones_are_those_of_stable_diffusion():
    """To three digits, as anyone can recompute from beta 0.00085 -> 0.012."""
    times = torch.tensor([999, 874, 749, 624, 499, 374, 249, 124])
    alpha = torch.tensor([0.068, 0.136, 0.238, 0.372, 0.527, 0.683, 0.822, 0.929])
    sigma = torch.tensor([0.998, 0.991, 0.971, 0.928, 0.850, 0.730, 0.570, 0.370])
    torch.testing.assert_close(VP.alpha[times], alpha, atol=6e-4, rtol=0)
    torch.testing.assert_close(VP.sigma[times], sigma, atol=6e-4, rtol=0)
    assert VP.sigma[0].item() == pytest.approx(0.00085**0.5, rel=1e-6)


@pytest.mark.parametrize("schedule", [VP, flow_schedule(), flow_schedule(shift=3.0)])
def test_noise_grows_with_time(schedule):
    assert (schedule.sigma.diff() > 0).all()
    assert (schedule.alpha.diff() < 0).all()
    assert schedule.num_times == 1000


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_scales_are_on_the_line_and_equal_stock_flow_matching(shift):
    schedule = flow_schedule(shift=shift)
    torch.testing.assert_close(schedule.alpha + schedule.sigma, torch.ones(1000), atol=1.2e-7, rtol=0)
    stock = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)  # stock lists them from noise to data
    torch.testing.assert_close(schedule.sigma, stock, atol=1e-6, rtol=0)
    assert schedule.alpha[-1] == 0.0


def test_networks_of_variance_preserving_schedules_are_given_the_index():
    assert torch.equal(VP.network_time, torch.arange(1000))
    assert VP.network_time.dtype == torch.int64


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 6.0, flow_shift(4096)])
def test_flow_milestones_are_the_even_steps_of_stock_flow_matching(shift, num_steps):
    """sampling_times(N) is u = 1, (N - 1) / N, ...; stock is handed these u and shifts them itself."""
    times = torch.tensor(sampling_times(num_steps))
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=[(num_steps - i) / num_steps for i in range(num_steps)])
    schedule = flow_schedule(shift)
    torch.testing.assert_close(schedule.sigma[times], stock.sigmas[:-1], atol=1.2e-7, rtol=0)
    torch.testing.assert_close(schedule.network_time[times], stock.timesteps, atol=1.3e-4, rtol=0)
    assert schedule.network_time.dtype == stock.timesteps.dtype == torch.float32
    assert schedule.network_time[999] == 1000.0
    assert schedule.alpha[999] == 0.0


def test_a_flow_networks_time_may_be_any_function_of_sigma():
    clean_share = flow_schedule(3.0, network_time=lambda sigma: 1.0 - sigma)
    assert torch.equal(clean_share.network_time, clean_share.alpha)
    assert torch.equal(flow_schedule(3.0, network_time=lambda sigma: sigma).network_time, flow_schedule(3.0).sigma)


def test_the_shift_from_tokens_by_hand():
    assert flow_shift(256) == math.exp(0.5)
    assert flow_shift(4096) == pytest.approx(math.exp(1.15))
    assert flow_shift(1024) == pytest.approx(math.exp(0.63))  # a fifth of the way
    assert flow_shift(4096, max_shift=0.9, max_seq_len=8192) == pytest.approx(2.0008, abs=5e-5)  # Qwen-Image at 1024


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096, 9216])
def test_the_shift_from_tokens_equals_stock_dynamic_shifting(num_tokens):
    """diffusers' FLUX.1 pipeline computes mu from the tokens and hands it to the scheduler, which shifts by exp(mu)."""
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=calculate_shift(num_tokens))
    sigma = flow_schedule(flow_shift(num_tokens)).sigma[sampling_times(4)]
    torch.testing.assert_close(sigma, stock.sigmas[:-1], atol=1.2e-7, rtol=0)


def test_scales_in_another_precision_are_refused():
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        Schedule(VP.alpha.bfloat16(), VP.sigma.bfloat16(), VP.network_time)
    with pytest.raises(TypeError, match="float64"):
        Schedule(VP.alpha, VP.sigma.double(), VP.network_time)
    with pytest.raises(TypeError, match=r"network_time is torch\.float64"):
        Schedule(VP.alpha, VP.sigma, VP.network_time.double())
    with pytest.raises(ValueError, match=r"alpha \(1000,\), sigma \(999,\), network_time \(1000,\)"):
        Schedule(VP.alpha, VP.sigma[1:], VP.network_time)
    with pytest.raises(ValueError, match=r"network_time \(999,\)"):
        Schedule(VP.alpha, VP.sigma, VP.network_time[1:])


def test_scales_stay_float32_when_the_latents_are_not():
    alpha, sigma = VP.at(torch.tensor([3, 5]), torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16))
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)


def test_add_noise_and_snr_by_hand():
    schedule = Schedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]), torch.arange(2))
    x0, eps = torch.tensor([[10.0, 20.0], [10.0, 20.0]]), torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    noisy = add_noise(x0, eps, torch.tensor([0, 1]), schedule)
    torch.testing.assert_close(noisy, torch.tensor([[8.6, 15.4], [6.8, 11.2]]))
    torch.testing.assert_close(snr(torch.tensor([0, 1]), schedule), torch.tensor([16 / 9, 9 / 16]))


def test_add_noise_equals_stock():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 20, 499, 874, 999])
    stock = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(add_noise(x0, eps, t, VP), stock.add_noise(x0, eps, t), atol=5e-6, rtol=0)


def test_expand_keeps_one_value_a_sample():
    assert expand(torch.arange(3), torch.zeros(3, 4, 8, 8)).shape == (3, 1, 1, 1)
    assert expand(torch.arange(3), torch.zeros(3, 2)).tolist() == [[0], [1], [2]]
