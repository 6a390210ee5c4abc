import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler

from equations.gaussian import gaussian_2d
from mlcm_rl.equations.prediction import x0_from_prediction
from mlcm_rl.equations.schedule import Schedule, flow_schedule, scaled_linear_betas, vp_schedule
from mlcm_rl.equations.solver import ddim_step, gamma_step, guided, inverse_ddim_step, time_before_noise

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = vp_schedule(scaled_linear_betas())
SCHEDULES = [VP, flow_schedule()]
BY_HAND = Schedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]), torch.arange(2))


def latents(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def at(time: int, batch: int = 3) -> torch.Tensor:
    return torch.full((batch,), time)


def test_guidance_by_hand():
    conditional, unconditional = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    assert guided(conditional, unconditional, 1.0).tolist() == conditional.tolist()
    assert guided(conditional, unconditional, 0.0).tolist() == unconditional.tolist()
    assert guided(conditional, unconditional, 8.0).tolist() == [[17.0, -6.0]]


def test_ddim_step_by_hand():
    """x_t = 11 = 0.6 * 5 + 0.8 * 10 with x0 = 5, so eps = 10: at (0.8, 0.6) that is 4 + 6."""
    step = ddim_step(torch.tensor([[11.0]]), torch.tensor([[5.0]]), torch.tensor([1]), torch.tensor([0]), BY_HAND)
    torch.testing.assert_close(step, torch.tensor([[10.0]]))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("t", "s", "num_steps"),  # stock steps down by 1000 // num_steps, and to index 0 from the last
    [
        (999, 874, 8),
        (999, 749, 4),
        (999, 499, 2),
        (978, 957, 47),
        (374, 249, 8),
        (124, 0, 8),
        (19, 0, 50),
        (2, 1, 1000),
    ],
)
def test_ddim_step_equals_stock_ddim(kind, t, s, num_steps):
    stock = DDIMScheduler(**SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
    stock.set_timesteps(num_steps)
    prediction, x_t = latents(2, seed=t)
    expected = stock.step(prediction, t, x_t, eta=0.0).prev_sample
    x0 = x0_from_prediction(prediction, x_t, at(t), VP, kind)
    torch.testing.assert_close(ddim_step(x_t, x0, at(t), at(s), VP), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [0, 1, 499, 999])
def test_ddim_step_to_the_same_time_is_the_identity_bit_for_bit(dtype, time):
    """Also where the arithmetic is awkward: huge, tiny and zero latents, an estimate that is not finite."""
    x = torch.tensor([[0.1, 1 / 3, 3.0e4, -1e-7, 0.0, -0.0, 65504.0, 1e-45]], dtype=torch.float32).to(dtype)
    x0 = torch.tensor([[1e4, -1e4, 3.14, float("inf"), float("nan"), -7.0, 1e-3, 0.1]]).to(dtype)
    landed = ddim_step(x, x0, at(time, 1), at(time, 1), VP)
    assert torch.equal(landed, x.to(landed.dtype))  # a wider float holds the narrower one exactly
    assert torch.equal(landed.to(dtype), x)


def test_the_identity_needs_the_select():
    """Arithmetic alone misses x by float32 rounding, and by 1000 times as much in bfloat16."""
    x, x0 = latents(2)
    t = at(999)
    for dtype, least in ((torch.float32, 1e-8), (torch.bfloat16, 1e-4)):
        alpha, sigma = VP.alpha[t].to(dtype)[:, None, None, None], VP.sigma[t].to(dtype)[:, None, None, None]
        by_arithmetic = alpha * x0.to(dtype) + (sigma / sigma) * (x.to(dtype) - alpha * x0.to(dtype))
        assert (by_arithmetic - x.to(dtype)).abs().max() > least
        assert torch.equal(ddim_step(x.to(dtype), x0.to(dtype), t, t, VP), x.to(dtype).float())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_the_identity_passes_no_gradient_to_the_estimate(schedule):
    x, x0 = latents(2)
    x0.requires_grad_()
    t, s = torch.tensor([499, 499, 499]), torch.tensor([499, 374, 499])
    ddim_step(x, x0, t, s, schedule).sum().backward()
    assert torch.isfinite(x0.grad).all()
    assert x0.grad[0].abs().max() == x0.grad[2].abs().max() == 0
    gain = schedule.alpha[374] - schedule.alpha[499] * schedule.sigma[374] / schedule.sigma[499]
    torch.testing.assert_close(x0.grad[1], torch.full_like(x0.grad[1], gain.item()))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize(("t", "s"), [(999, 874), (999, 0), (499, 249), (124, 0), (20, 0)])
def test_inverse_ddim_step_undoes_ddim_step(schedule, t, s):
    x_t, x0 = latents(2).double()
    x_s = ddim_step(x_t, x0, at(t), at(s), schedule)
    torch.testing.assert_close(inverse_ddim_step(x_t, x_s, at(t), at(s), schedule), x0, atol=1e-6, rtol=1e-6)
    again = ddim_step(x_t, inverse_ddim_step(x_t, x0, at(t), at(s), schedule), at(t), at(s), schedule)
    torch.testing.assert_close(again, x0, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_steps_with_one_estimate_compose(schedule):
    """t -> r -> s with the same x0 and eps is t -> s: DDIM moves along one line."""
    x_t, x0 = latents(2).double()
    middle = ddim_step(x_t, x0, at(999), at(624), schedule)
    in_two = ddim_step(middle, x0, at(624), at(124), schedule)
    torch.testing.assert_close(in_two, ddim_step(x_t, x0, at(999), at(124), schedule), atol=1e-6, rtol=1e-6)


def test_eulers_step_of_rectified_flow_is_ddim_step():
    """x_t + (sigma_s - sigma_t) v, by hand and by stock diffusers, is DDIM on alpha = 1 - sigma."""
    schedule = flow_schedule()
    v, x_t = latents(2)
    t, s = at(999), at(499)
    ours = ddim_step(x_t, x0_from_prediction(v, x_t, t, schedule, "flow"), t, s, schedule)
    torch.testing.assert_close(ours, x_t + (schedule.sigma[499] - schedule.sigma[999]) * v, atol=1e-6, rtol=0)

    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=[schedule.sigma[999].item(), schedule.sigma[499].item()])
    torch.testing.assert_close(ours, stock.step(v, stock.timesteps[0], x_t).prev_sample, atol=2e-6, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_gamma_zero_is_ddim_and_gamma_one_is_fresh_noise(schedule):
    x_t, x0, noise = latents(3)
    t, s = at(749), at(499)
    assert torch.equal(gamma_step(x_t, x0, t, s, noise, 0.0, schedule), ddim_step(x_t, x0, t, s, schedule))
    expected = schedule.alpha[499] * x0 + schedule.sigma[499] * noise
    assert torch.equal(gamma_step(x_t, x0, t, s, noise, 1.0, schedule), expected)


def test_the_time_before_noise_by_hand():
    """All the way down to clean data at gamma 1, truncated in between as stock TCD does."""
    s = torch.tensor([874, 499, 0])
    assert time_before_noise(s, 0.0).tolist() == [874, 499, 0]
    assert time_before_noise(s, 0.3).tolist() == [611, 349, 0]
    assert time_before_noise(s, 0.5).tolist() == [437, 249, 0]
    assert time_before_noise(s, 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 8])
def test_gamma_step_equals_stock_tcd(gamma, num_steps):
    stock = TCDScheduler(**SD, clip_sample=False, original_inference_steps=8)
    stock.set_timesteps(num_steps)
    t, s = stock.timesteps[:2].tolist()
    eps, x_t = latents(2)
    expected = stock.step(eps, t, x_t, eta=gamma, generator=torch.Generator().manual_seed(7)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(7))
    x0 = x0_from_prediction(eps, x_t, at(t), VP, "epsilon")
    torch.testing.assert_close(gamma_step(x_t, x0, at(t), at(s), noise, gamma, VP), expected, atol=2e-5, rtol=2e-5)


def test_gamma_one_equals_stock_lcm():
    stock = LCMScheduler(**SD, clip_sample=False, original_inference_steps=8)
    stock.set_timesteps(4)
    t, s = stock.timesteps[:2].tolist()
    eps, x_t = latents(2)
    expected = stock.step(eps, t, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(7))
    x0 = x0_from_prediction(eps, x_t, at(t), VP, "epsilon")
    torch.testing.assert_close(gamma_step(x_t, x0, at(t), at(s), noise, 1.0, VP), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.7, 0.95])
@pytest.mark.parametrize(("t", "s"), [(749, 499), (999, 874), (999, 124), (124, 1)])
def test_gamma_step_keeps_the_marginal_of_gaussian_data(schedule, t, s, gamma):
    """With the exact jump to s' = (1 - gamma) s the step is linear, so its output's mean and variance are sums."""
    target = gaussian_2d()
    t, s = at(t, 1), at(s, 1)
    below = time_before_noise(s, gamma)

    def step(x_t, noise):
        return gamma_step(x_t, target.f(x_t, t, below, schedule), t, s, noise, gamma, schedule)

    zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    centre = schedule.alpha[t].double() * target.mean[None]
    mean = step(centre, zero)
    along, across = step(centre + one, zero) - mean, step(centre, one) - mean
    variance = (along * target.marginal_std(t, schedule)) ** 2 + across**2
    torch.testing.assert_close(mean, schedule.alpha[s].double() * target.mean[None], atol=1e-6, rtol=0)
    expected = target.marginal_std(s, schedule) ** 2
    torch.testing.assert_close(variance, expected.expand(1, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("gamma", [0.001, 0.3, 0.999])
def test_every_gamma_step_of_every_grid_is_finite_and_never_adds_negative_variance(schedule, gamma):
    """alpha falls and sigma grows with time: a = alpha_s / alpha_s' <= 1, so a sigma_s' <= sigma_s, as it must be.

    alpha = 0 divides nothing: only the first state of a chain is at the last time, and s' <= s < t.
    """
    s = torch.arange(999)
    below = time_before_noise(s, gamma)
    up = schedule.alpha[s] / schedule.alpha[below]
    assert up.isfinite().all()
    assert (up * schedule.sigma[below] <= schedule.sigma[s]).all()
    x_t, x0, noise = torch.ones(3, 999, 1)
    landed = gamma_step(x_t, x0, s + 1, s, noise, gamma, schedule)
    assert landed.isfinite().all()


def test_a_gamma_step_back_up_from_no_signal_is_nothing_over_nothing():
    """Where it breaks: alpha_s' = 0 needs s' = s = T - 1, where no jump ends; then 0 / 0."""
    t = at(999, 1)
    zero = torch.zeros(1, 1)
    assert time_before_noise(t, 1e-9).item() == 999
    assert gamma_step(zero, zero, t, t, zero, 1e-9, flow_schedule()).isnan().all()
    assert gamma_step(zero, zero, t, t, zero, 0.3, flow_schedule()).item() == 0.0
