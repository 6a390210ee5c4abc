import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal

from mlcm_rl.equations.policy import gaussian_log_prob, step_gaussian
from mlcm_rl.equations.prediction import prediction_from_x0, x0_from_prediction
from mlcm_rl.equations.preference import (
    LOSS_TYPES,
    SMOOTHED,
    bradley_terry_loss,
    denoising_error,
    diffusion_dpo_log_ratio,
    endpoint_log_ratio,
    implicit_accuracy,
    implicit_margin,
    offline_pso_log_ratios,
    online_pso_log_ratio,
    preference_loss,
)
from mlcm_rl.equations.schedule import Schedule, add_noise, flow_schedule, scaled_linear_betas, vp_schedule

VP = vp_schedule(scaled_linear_betas())
SCHEDULES = [VP, flow_schedule()]
BY_HAND = Schedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]), torch.arange(2))
MARGINS = torch.linspace(-30, 30, 241, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(h: torch.Tensor, loss_type: str, label_smoothing: float = 0.0) -> torch.Tensor:
    """The loss of pairs with implicit margins `h`."""
    return preference_loss(h, torch.zeros_like(h), 1.0, loss_type, label_smoothing)


# --- an explicit reward ------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand_and_where_contrary_judgements_pull_the_margin():
    chosen, rejected = torch.tensor([[2.0, 0.0], [1.0, 5.0]]), torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    margins = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    sure, turned = torch.log1p(torch.exp(-margins)), torch.log1p(torch.exp(margins))
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), sure)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, 0.25), 0.75 * sure + 0.25 * turned)
    margin = torch.tensor(math.log(19), requires_grad=True)  # log-odds of judgements of which one in twenty is contrary
    bradley_terry_loss(margin, torch.zeros(()), 0.05).backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="share of wrong labels"):
        bradley_terry_loss(chosen, rejected, 0.5)


def test_the_gradient_of_bradley_terry_in_double_precision():
    scores = [normal(4, seed=seed).requires_grad_() for seed in (0, 1)]
    assert gradcheck(lambda chosen, rejected: bradley_terry_loss(chosen, rejected, 0.1), scores)


# --- errors and log-ratios ---------------------------------------------------------------------------------------


def test_denoising_errors_by_hand():
    x0, target, t = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 3.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(denoising_error(x0, target, t, BY_HAND, "x0"), torch.tensor([12.5, 2.0]))
    torch.testing.assert_close(
        denoising_error(x0, target, t, BY_HAND, "eps"), torch.tensor([12.5 * 64 / 36, 2 * 36 / 64])
    )
    with pytest.raises(ValueError, match="error space 'v' is none of x0, eps"):
        denoising_error(x0, target, t, BY_HAND, "v")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_the_error_in_eps_space_is_that_of_the_noise(schedule):
    x0, target, eps = normal(3, 4, 2, 5)
    t = torch.tensor([998, 749, 499, 20])
    predicted_eps = prediction_from_x0(x0, add_noise(target, eps, t, schedule), t, schedule, "epsilon")
    expected = (predicted_eps - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(denoising_error(x0, target, t, schedule, "eps"), expected, rtol=1e-5, atol=0)


def test_in_eps_space_rectified_flow_learns_nothing_at_its_last_time():
    """SNR is 0 there, and alpha^2 times the velocity's squared error everywhere: a one-step student needs space x0."""
    schedule, t = flow_schedule(3.0), torch.tensor([999, 749, 20])
    x_t, target, v = normal(3, 3, 4)
    x0 = x0_from_prediction(v, x_t, t, schedule, "flow")
    target_velocity = prediction_from_x0(target, x_t, t, schedule, "flow")
    error = denoising_error(x0, target, t, schedule, "eps")
    velocity = (v - target_velocity).square().mean(1)
    torch.testing.assert_close(error, schedule.alpha[t] ** 2 * velocity, rtol=1e-5, atol=0)
    assert error[0] == 0.0
    torch.testing.assert_close(denoising_error(x0, target, t, schedule, "x0")[0], velocity[0])


def test_errors_are_one_float32_a_sample_in_half_precision():
    """Without rounding on the way: 1 + 1/256 is not a bfloat16, nor is a mean of squares."""
    x0, target = torch.full((3, 4, 8, 8), 1 + 1 / 128, dtype=torch.bfloat16), torch.full((3, 4, 8, 8), 1 / 256)
    error = denoising_error(x0, target.bfloat16(), torch.tensor([1, 1, 1]), VP, "x0")
    assert (error.dtype, error.shape) == (torch.float32, (3,))
    torch.testing.assert_close(error, torch.full((3,), (1 + 1 / 256) ** 2), rtol=1e-6, atol=0)


def test_diffusion_dpo_by_hand():
    """h = -(beta / 2) [(l_w - l_w_ref) - (l_l - l_l_ref)] with 0.2 - 0.3 and 0.5 - 0.4 at beta 10."""
    chosen = diffusion_dpo_log_ratio(torch.tensor([0.2]), torch.tensor([0.3]))
    rejected = diffusion_dpo_log_ratio(torch.tensor([0.5]), torch.tensor([0.4]))
    torch.testing.assert_close(implicit_margin(chosen, rejected, 10.0), torch.tensor([1.0]))
    torch.testing.assert_close(preference_loss(chosen, rejected, 10.0), torch.tensor([math.log(1 + math.exp(-1))]))


def test_offline_pso_by_hand():
    """h = beta (m_ref - m) with m = l_w - kappa l_l: m is 0.2 - 0.15, of the reference 0.25 - 0.35, for kappa 0.5."""
    errors = [torch.tensor([value]) for value in (0.2, 0.25, 0.3, 0.7)]
    chosen, rejected = offline_pso_log_ratios(*errors, kappa=0.5)
    torch.testing.assert_close(implicit_margin(chosen, rejected, 200.0), torch.tensor([200 * (-0.1 - 0.05)]))


def test_the_endpoint_form_by_hand_and_as_a_sum_of_diffusion_dpos():
    errors, reference = torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.2, 0.2], [0.6, 0.1]])
    ratio = endpoint_log_ratio(errors, reference)
    torch.testing.assert_close(ratio, torch.tensor([0.4, -0.3]))
    one_by_one = sum(2 * diffusion_dpo_log_ratio(e, r) for e, r in zip(errors, reference, strict=True))
    torch.testing.assert_close(ratio, one_by_one)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_the_online_log_ratio_is_that_of_the_steps_own_distributions(schedule, gamma):
    """By 5c.3's form, by our log-probabilities and by torch's."""
    x_t, x0, reference_x0, noise = normal(4, 3, 4, 5, 5)
    t, s = torch.tensor([999, 749, 499]), torch.tensor([749, 499, 124])
    mean, std = step_gaussian(x_t, x0, t, s, gamma, schedule)
    reference_mean, _ = step_gaussian(x_t, reference_x0, t, s, gamma, schedule)
    x_s = mean + std * noise
    actual = online_pso_log_ratio(x_s, mean, reference_mean, std)
    squares = (x_s - reference_mean).square() - (x_s - mean).square()
    torch.testing.assert_close(actual, (squares / (2 * std**2)).flatten(1).mean(1))
    ours = gaussian_log_prob(x_s, mean, std) - gaussian_log_prob(x_s, reference_mean, std)
    torch.testing.assert_close(actual, ours)
    torchs = Normal(mean, std).log_prob(x_s) - Normal(reference_mean, std).log_prob(x_s)
    torch.testing.assert_close(actual, torchs.flatten(1).mean(1))
    assert gradcheck(lambda m: online_pso_log_ratio(x_s, m, reference_mean, std), mean.requires_grad_())


# --- losses ------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    """Chosen 0.5 and rejected -1.5 at beta 0.5: h = 1."""
    chosen, rejected = torch.tensor([0.5]), torch.tensor([-1.5])
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    expected = {
        "sigmoid": right,
        "hinge": 0.0,
        "ipo": 1.0,  # (2 - 1)^2
        "robust": right,
        "conservative": right,
    }
    assert set(expected) == set(LOSS_TYPES)
    for loss_type, value in expected.items():
        torch.testing.assert_close(preference_loss(chosen, rejected, 0.5, loss_type), torch.tensor([value]))
    robust = preference_loss(chosen, rejected, 0.5, "robust", 0.1)
    torch.testing.assert_close(robust, torch.tensor([(0.9 * right - 0.1 * wrong) / 0.8]))
    conservative = preference_loss(chosen, rejected, 0.5, "conservative", 0.1)
    torch.testing.assert_close(conservative, torch.tensor([0.9 * right + 0.1 * wrong]))
    torch.testing.assert_close(preference_loss(rejected, chosen, 0.5, "hinge"), torch.tensor([2.0]))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_have_the_gradients_of_their_formulas(loss_type):
    chosen, rejected = normal(2, 6).requires_grad_()
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    loss = preference_loss(chosen, rejected, 0.7, loss_type, smoothing)
    assert loss.shape == (6,)
    assert gradcheck(lambda c, r: preference_loss(c, r, 0.7, loss_type, smoothing), (chosen, rejected))


def test_as_beta_goes_to_0_every_pair_costs_log_2_and_pulls_alike():
    """-log sigmoid(beta d) = log 2 - beta d / 2 + O(beta^2), and ipo's target 1 / (2 beta) goes to infinity."""
    chosen, rejected = normal(2, 6).requires_grad_()
    torch.testing.assert_close(preference_loss(chosen, rejected, 0.0), torch.full((6,), math.log(2)).double())
    loss = preference_loss(chosen, rejected, 1e-7).sum()
    (gradient,) = torch.autograd.grad(loss, chosen)
    torch.testing.assert_close(gradient / 1e-7, torch.full((6,), -0.5).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "flow"])
def test_a_student_that_is_its_reference_pays_log_2(schedule):
    error = denoising_error(*normal(2, 4, 3), torch.tensor([999, 749, 499, 249]), schedule, "eps")
    equal = diffusion_dpo_log_ratio(error, error)
    for beta in (0.1, 5000.0):
        torch.testing.assert_close(preference_loss(equal, equal, beta), torch.full((4,), math.log(2)).double())


@pytest.mark.parametrize("e", [0.0, 0.1, 0.45])
def test_robust_undoes_flipped_labels_in_expectation(e):
    """(1 - e) robust(h) + e robust(-h) = sigmoid(h): an unbiased estimate of the loss under clean labels."""
    expected = (1 - e) * loss_of(MARGINS, "robust", e) + e * loss_of(-MARGINS, "robust", e)
    torch.testing.assert_close(expected, loss_of(MARGINS, "sigmoid"), atol=1e-9, rtol=0)


@pytest.mark.parametrize("e", [0.0, 0.1, 0.45])
def test_conservative_is_the_average_of_sigmoid_over_flipped_labels(e):
    """(1 - e) sigmoid(h) + e sigmoid(-h): what TRL's `sigmoid` was while it took label smoothing."""
    expected = (1 - e) * loss_of(MARGINS, "sigmoid") + e * loss_of(-MARGINS, "sigmoid")
    torch.testing.assert_close(loss_of(MARGINS, "conservative", e), expected)


def test_conservative_pulls_a_pair_to_a_finite_margin():
    """log((1 - e) / e), where sigmoid pushes for ever: the gradient is nothing there and of both signs around."""
    best = math.log(0.9 / 0.1)
    chosen = torch.tensor([best - 1, best, best + 1], dtype=torch.float64, requires_grad=True)
    below, at, above = torch.autograd.grad(loss_of(chosen, "conservative", 0.1).sum(), chosen)[0].tolist()
    assert below < -0.01
    assert at == pytest.approx(0.0, abs=1e-12)
    assert above > 0.01
    (push,) = torch.autograd.grad(loss_of(chosen, "sigmoid").sum(), chosen)
    assert (push < 0).all()


def test_what_a_loss_has_no_use_for_is_refused():
    pair = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"loss_type 'dpo' is none of sigmoid, hinge, ipo, robust, conservative"):
        preference_loss(*pair, 0.1, "dpo")
    for loss_type in ("sigmoid", "hinge", "ipo"):
        with pytest.raises(ValueError, match=f"{loss_type} has no label_smoothing; robust and conservative have"):
            preference_loss(*pair, 0.1, loss_type, 0.1)
    for wrong in (-0.1, 0.5):
        with pytest.raises(ValueError, match=rf"label_smoothing is {wrong}; it is a share of wrong labels"):
            preference_loss(*pair, 0.1, "robust", wrong)


def test_what_is_logged_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.5, 1.0])
    torch.testing.assert_close(implicit_margin(chosen, rejected, 2.0), torch.tensor([2.0, -1.0, 0.0]))
    assert implicit_accuracy(chosen, rejected).tolist() == [1.0, 0.0, 0.0]
