"""Reward feedback: losses on a differentiable reward, the step that carries its gradient, the tie to a reference."""

from collections.abc import Callable

import torch
from torch import Tensor

from .policy import gaussian_kl, step_gaussian
from .schedule import Schedule, add_noise


def negative(reward: Tensor) -> Tensor:
    """-r (B,) (DRaFT, arXiv 2309.17400; AlignProp, arXiv 2310.03739)."""
    return -reward


def hinge(reward: Tensor, threshold: float) -> Tensor:
    """relu(threshold - r) (B,): no gradient above `threshold` (ReFL, arXiv 2304.05977: 2 for ImageReward)."""
    return torch.relu(threshold - reward)


def mps_hinge(positive: Tensor, negative: Tensor, threshold: float = 16.0) -> Tensor:
    """relu(threshold - s(x0, prompt)) + relu(s(x0, irrelevant prompt)) (B,) (TLCM v6, eq. 11).

    `positive` and `negative` (B,) are the scores of one picture under its own prompt and under an irrelevant one. The
    paper's 16 is on the scale of the MPS model; another reward model needs its own threshold.
    """
    return torch.relu(threshold - positive) + torch.relu(negative)


def bounded_target(x0: Tensor, gradient: Tensor, bound: float) -> Tensor:
    """x0 + bound g / rms(g), detached: the target (B, ...) of samples `x0` (B, ...) up the reward's `gradient` g.

    The step has the root mean square `bound` in every sample, however steep its reward is; where g is 0 it is 0. The
    squared error to such a target is OPSD's form of a reward's gradient (DiffusionOPSD, 2026); of its two targets only
    the one above is here: no network is evaluated for one below.
    """
    each = gradient.detach().flatten(1)
    size = each.square().mean(1, keepdim=True).sqrt()
    step = bound * torch.where(size > 0, each / size, 0.0)
    return x0.detach() + step.view_as(x0)


def value_and_gradient(f: Callable[[Tensor], Tensor], x0: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """f(x0) (B,) and its gradient by `x0` (B, ...), each sample's by its own row; both are detached.

    The gradient is taken of `scale` times the value and divided by it: spread over many elements, it would be rounded
    to 0 inside a network in half precision.
    """
    leaf = x0.detach().requires_grad_()
    value = f(leaf)
    (scaled,) = torch.autograd.grad(value.sum() * scale, leaf)
    return value.detach(), scaled / scale


def at_known_gradient(value: Tensor, gradient: Tensor, x0: Tensor) -> Tensor:
    """`value` (B,), with `gradient` (B, ...) as its gradient by `x0` (B, ...), which was taken at the sample alone."""
    rise = (x0 - x0.detach()) * gradient.detach()
    return value.detach() + rise.flatten(1).sum(1)


def centred_error(predicted: Tensor, scores: Tensor) -> Tensor:
    """((p - mean p) - (r - mean r))^2 (P, n) for predictions and scores (P, n) of n samples of each of P prompts.

    What a prompt's samples have in common drops out: it has no gradient by a sample, and a learned reward that is right
    between samples need not know it.
    """
    return _centred(predicted.float() - scores.float()).square()


def correlation_within(predicted: Tensor, scores: Tensor) -> float:
    """Correlation of `predicted` and `scores` (P, n) between the n samples of a prompt, pooled over P prompts.

    Both are centred within each prompt. 0 where the samples of no prompt differ.
    """
    p, r = _centred(predicted), _centred(scores)
    norm = (p.square().sum() * r.square().sum()).sqrt().item()
    return (p * r).sum().item() / norm if norm else 0.0


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(1, keepdim=True)


def random_late_step(num_steps: int, num_late_steps: int, generator: torch.Generator) -> int:
    """Return the one step that carries gradient, uniform over the last `num_late_steps` of 0 .. num_steps - 1.

    The sampler stops there and its x0 at that step is scored (ReFL, arXiv 2304.05977, algorithm 1: the last 10 of 40).
    Raises ValueError unless 1 <= num_late_steps <= num_steps.
    """
    if not 1 <= num_late_steps <= num_steps:
        raise ValueError(f"num_late_steps is {num_late_steps}; of {num_steps} sampling steps it takes 1 to {num_steps}")
    late = torch.randint(num_late_steps, (), generator=generator, device=generator.device)
    return num_steps - num_late_steps + int(late)


def renoised_copies(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """n noised copies (n B, ...) at `t` (B,) of the finished samples `x0` (B, ...), for `eps` (n, B, ...); no gradient.

    DRaFT-LV (arXiv 2309.17400): each copy repeats the last sampling step, from `t`, and the n rewards are averaged. The
    gradient has less variance, for n evaluations instead of n chains. The rows of copy 1 come first.
    """
    copies = len(eps)
    repeated = x0.detach().repeat(copies, *[1] * (x0.ndim - 1))
    return add_noise(repeated, eps.flatten(0, 1), t.repeat(copies), schedule)


def step_kl(x0: Tensor, reference_x0: Tensor, t: Tensor, s: Tensor, gamma: float, schedule: Schedule) -> Tensor:
    """KL (B,), in nats, from the student's sampling step t -> s to the reference's, both from one x_t; needs s > 0.

    alpha_s^2 ||x0 - reference_x0||^2 / (2 sigma_s^2) at gamma 1: an anchor on x0, weighted by SNR_s / 2. The norm is a
    sum over elements; divide by their number to weigh pictures of all sizes alike. x_t moves both means alike and drops
    out; for gamma < 1 the coefficient of x0 and the std are the step's. Raises ValueError at gamma 0, which has no KL.
    """
    x_t = torch.zeros_like(x0)  # any state: it moves both means alike
    mean, std = step_gaussian(x_t, x0, t, s, gamma, schedule)
    reference_mean, _ = step_gaussian(x_t, reference_x0, t, s, gamma, schedule)
    return gaussian_kl(mean, reference_mean, std)
