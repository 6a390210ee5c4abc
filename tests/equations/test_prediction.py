import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from mlcm_rl.equations.prediction import KINDS, min_snr_weight, prediction_from_x0, x0_from_prediction
from mlcm_rl.equations.schedule import Schedule, add_noise, flow_schedule, scaled_linear_betas, snr, vp_schedule

VP = vp_schedule(scaled_linear_betas())
FLOW = flow_schedule(shift=3.0)
BY_HAND = Schedule(torch.tensor([0.8]), torch.tensor([0.6]), torch.arange(1))  # x_t = 0.8 x0 + 0.6 eps

latents = st.lists(st.floats(-5, 5), min_size=3, max_size=3).map(lambda row: torch.tensor([row], dtype=torch.float64))
times = st.integers(0, 998).map(lambda time: torch.tensor([time]))  # at 999 rectified flow holds no signal


@pytest.mark.parametrize("schedule", [VP, FLOW])
@pytest.mark.parametrize("kind", KINDS)
@given(x0=latents, x_t=latents, t=times)
def test_x0_survives_the_round_trip(schedule, kind, x0, x_t, t):
    if kind == "v_prediction" and schedule is FLOW:
        return  # v is defined on the circle only
    prediction = prediction_from_x0(x0, x_t, t, schedule, kind)
    torch.testing.assert_close(x0_from_prediction(prediction, x_t, t, schedule, kind), x0, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(prediction=latents, x_t=latents, t=times)
def test_the_prediction_survives_the_round_trip(kind, prediction, x_t, t):
    x0 = x0_from_prediction(prediction, x_t, t, VP, kind)
    torch.testing.assert_close(prediction_from_x0(x0, x_t, t, VP, kind), prediction, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(x0=latents, eps=latents, t=times)
def test_all_kinds_tell_of_the_same_point(kind, x0, eps, t):
    """From x_t = alpha x0 + sigma eps every kind finds the x0 and the eps that it was made of."""
    x_t = add_noise(x0, eps, t, VP)
    prediction = prediction_from_x0(x0, x_t, t, VP, kind)
    estimate = x0_from_prediction(prediction, x_t, t, VP, kind)
    torch.testing.assert_close(estimate, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction_from_x0(estimate, x_t, t, VP, "epsilon"), eps, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [
        ("epsilon", 5.0),  # eps
        ("v_prediction", 0.8 * 5 - 0.6 * 10),  # alpha eps - sigma x0 = -2
        ("sample", 10.0),  # x0
        ("flow", 5.0 - 10.0),  # eps - x0
    ],
)
def test_each_kind_by_hand(kind, prediction):
    """x0 = 10 and eps = 5 at alpha 0.8, sigma 0.6: x_t = 11."""
    x0, x_t, t = torch.tensor([[10.0]]), torch.tensor([[11.0]]), torch.tensor([0])
    torch.testing.assert_close(prediction_from_x0(x0, x_t, t, BY_HAND, kind), torch.tensor([[prediction]]))
    torch.testing.assert_close(x0_from_prediction(torch.tensor([[prediction]]), x_t, t, BY_HAND, kind), x0)


def test_rectified_flow_by_hand():
    """On the line (alpha 0.25, sigma 0.75) x0 = x_t - sigma v."""
    schedule = Schedule(torch.tensor([0.25]), torch.tensor([0.75]), torch.arange(1))
    x_t, v = torch.tensor([[2.0]]), torch.tensor([[4.0]])
    torch.testing.assert_close(
        x0_from_prediction(v, x_t, torch.tensor([0]), schedule, "flow"), torch.tensor([[2.0 - 3.0]])
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("time", [999, 749, 124])
def test_conversions_equal_stock_ddim(kind, time):
    stock = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, clip_sample=False
    )
    stock.set_timesteps(8)
    prediction, x_t = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(time))
    ours = x0_from_prediction(prediction, x_t, torch.full((3,), time), VP, kind)
    torch.testing.assert_close(ours, stock.step(prediction, time, x_t).pred_original_sample, atol=2e-4, rtol=1e-5)


def test_v_equals_stock_velocity():
    stock = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 499, 999])
    ours = prediction_from_x0(x0, add_noise(x0, eps, t, VP), t, VP, "v_prediction")
    torch.testing.assert_close(ours, stock.get_velocity(x0, eps, t), atol=2e-5, rtol=0)


def test_rectified_flow_needs_no_signal_to_be_read():
    """At the last time x_t is pure noise: x0 does not follow from eps, but from the velocity."""
    t, x0, eps = torch.tensor([999]), torch.tensor([[3.0]]), torch.tensor([[-1.0]])
    x_t = add_noise(x0, eps, t, FLOW)
    torch.testing.assert_close(x_t, eps)
    torch.testing.assert_close(x0_from_prediction(eps - x0, x_t, t, FLOW, "flow"), x0)


def test_an_unknown_kind_is_refused_by_name():
    zero, t = torch.zeros(1, 1), torch.tensor([1])
    for convert in (x0_from_prediction, prediction_from_x0):
        with pytest.raises(ValueError, match=r"'velocity'.*epsilon, v_prediction, sample, flow"):
            convert(zero, zero, t, VP, "velocity")


@pytest.mark.parametrize(
    ("kind", "gamma", "expected"),
    [
        ("epsilon", 1.0, [9 / 16, 1.0]),
        ("epsilon", 5.0, [1.0, 1.0]),
        ("v_prediction", 1.0, [9 / 25, 0.0]),
        ("v_prediction", 5.0, [16 / 25, 0.0]),
        ("sample", 1.0, [1.0, 0.0]),
        ("sample", 5.0, [16 / 9, 0.0]),
        ("flow", 1.0, [9 / 49, 0.0]),
    ],
)
def test_min_snr_weights_by_hand_also_where_there_is_no_signal(kind, gamma, expected):
    """SNR 16/9, and 0 at the last time."""
    schedule = Schedule(torch.tensor([0.8, 0.0]), torch.tensor([0.6, 1.0]), torch.arange(2))
    weight = min_snr_weight(torch.tensor([0, 1]), schedule, kind, gamma)
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_x0_alike_whatever_is_predicted(kind):
    schedule = FLOW if kind == "flow" else VP
    t = torch.tensor([1, 300, 600, 990])
    x_t, prediction, other = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = x0_from_prediction(prediction, x_t, t, schedule, kind) - x0_from_prediction(other, x_t, t, schedule, kind)
    expected = snr(t, schedule).clamp(max=5.0) * errors.square().mean(1)
    weighted = min_snr_weight(t, schedule, kind, 5.0) * (prediction - other).square().mean(1)
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=0)


def test_min_snr_for_rectified_flow_is_alpha_or_sigma_squared_and_nothing_without_signal():
    """min(SNR, gamma) sigma^2 = min(alpha^2, gamma sigma^2): finite at both ends, 0 at the last time alone."""
    t = torch.arange(1000)
    weight = min_snr_weight(t, FLOW, "flow", 5.0)
    torch.testing.assert_close(weight, torch.minimum(FLOW.alpha**2, 5.0 * FLOW.sigma**2), rtol=1e-5, atol=0)
    assert (weight == 0).nonzero().flatten().tolist() == [999]


def test_a_min_snr_weight_of_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'score' is none of epsilon"):
        min_snr_weight(torch.tensor([0]), BY_HAND, "score", 5.0)
