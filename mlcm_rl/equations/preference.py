"""Preference pairs: log-ratios of student to reference in four forms, and the losses on their difference.

Every form gives log pi / pi_ref of the chosen and of the rejected sample, up to a scale that beta absorbs:

    Diffusion-DPO   (l_ref - l) / 2                              l the denoising error at one time
    offline PSO     l_ref - l, times kappa on the rejected       l as above, in eps space
    online PSO      of one stochastic sampling step, exactly     per element
    endpoint        sum_t (l_ref - l)                            over the student's own grid

so that h = beta (chosen - rejected) is the implicit reward margin that the losses push up. Where a reward is explicit,
its own margin takes the place of h: `bradley_terry_loss` trains one.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .schedule import Schedule, snr

# As in TRL's DPOConfig, and one more: its `sigmoid` takes no label smoothing any more, which is what cDPO was.
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "conservative")
SMOOTHED = ("robust", "conservative")


def denoising_error(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule, space: str) -> Tensor:
    """w_t mean (x0 - target)^2 (B,): `x0` (B, ...) is the network's estimate from `target` (B, ...) noised to `t` (B,).

    `space` "x0" is w_t = 1; "eps" is w_t = SNR_t, which makes it the mean squared error of the noise, whatever the
    network predicts (1 / sigma^2 in the scale of EDM). That is 0 at a time without signal, the last of a rectified
    flow. Raises ValueError for another `space`.
    """
    if space not in ("x0", "eps"):
        raise ValueError(f"error space {space!r} is none of x0, eps")
    wide = torch.promote_types(x0.dtype, torch.float32)
    error = (x0.to(wide) - target.to(wide)).square().flatten(1).mean(1)
    return snr(t, schedule) * error if space == "eps" else error


def diffusion_dpo_log_ratio(error: Tensor, reference_error: Tensor) -> Tensor:
    """(l_ref - l) / 2 (B,), l the error at one t (Diffusion-DPO, arXiv 2311.12908, eq. 14; the 1/2 is its code's).

    Chosen and rejected share eps and t. With the mean over elements beta is 2,000 to 5,000, since it includes T and the
    number of elements.
    """
    return 0.5 * (reference_error - error)


def offline_pso_log_ratios(
    chosen_error: Tensor, chosen_reference: Tensor, rejected_error: Tensor, rejected_reference: Tensor, kappa: float
) -> tuple[Tensor, Tensor]:
    """l_ref - l of the chosen and kappa (l_ref - l) of the rejected, (B,) each, for errors l (B,) in eps space.

    Pairwise sample optimisation (arXiv 2410.03190): the chosen are target pictures, the rejected the reference's own
    samples, and kappa (0.1 in the authors' script) keeps the margin from being won by wrecking the rejected.
    """
    return chosen_reference - chosen_error, kappa * (rejected_reference - rejected_error)


def online_pso_log_ratio(x_s: Tensor, mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """[||x_s - reference_mean||^2 - ||x_s - mean||^2] / (2 std^2 d) (B,): log pi / pi_ref of one step, per element.

    `x_s` (B, ...) was drawn by the step, under no gradient; the means and `std` are those of `policy.step_gaussian`.
    Every stochastic step of the two rollouts makes one pair (arXiv 2410.03190; D3PO, arXiv 2311.13231).
    """
    midpoint = 0.5 * (mean + reference_mean)
    return ((mean - reference_mean) * (x_s - midpoint) / std.square()).flatten(1).mean(1)


def endpoint_log_ratio(errors: Tensor, reference_errors: Tensor) -> Tensor:
    """sum_t (l_ref - l) (B,) for errors (N, B) at the N times of the student's grid, on its own finished samples.

    The same eps and t for student and reference, and for chosen and rejected.
    """
    return (reference_errors - errors).sum(0)


def preference_loss(
    log_ratio_chosen: Tensor,
    log_ratio_rejected: Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss (B,) of h = beta (chosen - rejected), e = `label_smoothing`, the share of labels taken to be wrong.

        sigmoid        -log sigmoid(h)                                             (DPO, arXiv 2305.18290, eq. 7)
        hinge          relu(1 - h)                                                 (SLiC, RSO, arXiv 2309.06657)
        ipo            (h / beta - 1 / (2 beta))^2                                 (arXiv 2310.12036, eq. 17)
        robust         [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e)   (arXiv 2403.00409)
        conservative   -(1 - e) log sigmoid(h) - e log sigmoid(-h)                 (cDPO, Mitchell 2023)

    The first four are TRL's of the same names for completions of one token (its `ipo` divides by the number of tokens).
    Raises ValueError for another `loss_type`, for e outside [0, 0.5), and for e > 0 with a loss that has no use for it.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is none of {', '.join(LOSS_TYPES)}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is a share of wrong labels, in [0, 0.5)")
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(f"{loss_type} has no label_smoothing; {' and '.join(SMOOTHED)} have")
    if loss_type == "ipo":
        return (log_ratio_chosen - log_ratio_rejected - 1.0 / (2.0 * beta)).square()
    h = implicit_margin(log_ratio_chosen, log_ratio_rejected, beta)
    if loss_type == "hinge":
        return torch.relu(1.0 - h)
    as_labelled, flipped = -logsigmoid(h), -logsigmoid(-h)
    if loss_type == "robust":
        return ((1.0 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)
    if loss_type == "conservative":
        return (1.0 - label_smoothing) * as_labelled + label_smoothing * flipped
    return as_labelled


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, contrary: float = 0.0) -> Tensor:
    """-log P of a judgement (...) between scores (...), P(chosen over rejected) = sigmoid(chosen - rejected).

    (Bradley and Terry, 1952; the reward models' loss of arXiv 2203.02155, eq. 1.) A share `contrary` of the judgements
    is assumed to be reversed, which bounds the margin at log((1 - contrary) / contrary).
    Raises ValueError for `contrary` outside [0, 0.5).
    """
    loss_type = "conservative" if contrary else "sigmoid"
    return preference_loss(chosen, rejected, beta=1.0, loss_type=loss_type, label_smoothing=contrary)


def implicit_margin(log_ratio_chosen: Tensor, log_ratio_rejected: Tensor, beta: float) -> Tensor:
    """h = beta (chosen - rejected) (B,): by how much the implicit reward prefers the chosen; TRL's rewards/margins."""
    return beta * (log_ratio_chosen - log_ratio_rejected)


def implicit_accuracy(log_ratio_chosen: Tensor, log_ratio_rejected: Tensor) -> Tensor:
    """1 where h > 0, else 0, (B,) float32: TRL's rewards/accuracies. A margin of exactly 0 counts as wrong."""
    return (log_ratio_chosen > log_ratio_rejected).float()
