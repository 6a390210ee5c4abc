"""Multistep consistency distillation: the transfer to the segment's start, its target, distances and the loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from .perceptual import log_distance
from .schedule import Schedule, expand, snr
from .solver import ddim_step, inverse_ddim_step

Distance = Callable[[Tensor, Tensor], Tensor]  # two (B, ...) to one value a sample, (B,) float32


def transfer(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """g(x_t, t, s) = DDIM(x_t, f, t, s) (B, ...), where f = `x0` is the student's estimate (TLCM v6, eq. 7).

    At s = t it is x_t itself, bit for bit: with x_t on the teacher's trajectory this is the anchor that keeps the
    student from collapsing (Multistep Consistency Models, eq. 8).
    """
    return ddim_step(x_t, x0, t, s, schedule)


def squared_l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean over a sample's elements of (a - b)^2, (B,) float32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """Mean over elements of sqrt((a - b)^2 + c^2) - c, (B,) float32 (arXiv 2310.14189, section 3.3; elementwise)."""
    return (((a.float() - b.float()).square() + c * c).sqrt() - c).flatten(1).mean(1)


def log_l2(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """log sqrt(mean (a - b)^2 + c^2), (B,) float32: only the relative size of an error counts.

    For a student that learns jumps of many lengths at once. The squared error of the longest is a hundred times that
    of the shortest, and its gradient drowns theirs; under the logarithm all weigh alike. It equals weighting by a
    learned uncertainty (EDM2, arXiv 2312.02696, section 3.4 and eq. 21) where each sample is its own estimate.
    """
    return log_distance(squared_l2(a, b), c)


DISTANCES: dict[str, Distance] = {"l2": squared_l2, "huber": pseudo_huber, "log_l2": log_l2}


def loss_in_z(
    x0: Tensor, x_t: Tensor, t: Tensor, target: Tensor, s: Tensor, schedule: Schedule, distance: Distance
) -> Tensor:
    """distance(g(x_t, t, s), target) (B,): the loss of TLCM v6, eq. 7, on the latents at the segment's start.

    `x0` is the student's f(x_t, t), `target` (B, ...) the latent at `s`, under no gradient.
    """
    return distance(transfer(x_t, x0, t, s, schedule), target)


def loss_in_x0(
    x0: Tensor, x_t: Tensor, t: Tensor, target: Tensor, s: Tensor, schedule: Schedule, distance: Distance
) -> Tensor:
    """(SNR_t + 1) distance(f, the x0 that leads to `target`) (B,): the error measured at t = 0; needs s < t.

    The inverse DDIM step carries the target back, and the weight is that of Multistep Consistency Models, section 3.1.
    Take it for one segment: it spends the loss on all times alike, where `loss_in_z` spends it near t = T.
    """
    return (snr(t, schedule) + 1.0) * distance(x0, inverse_ddim_step(x_t, target, t, s, schedule))


LOSSES = {"z": loss_in_z, "x0": loss_in_x0}


def weight_of_x0(t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """(alpha_s - alpha_t sigma_s / sigma_t)^2 (B,): what a squared error of f is multiplied by in its jump to `s`.

    g(x_t, t, s) is linear in f, and this is the square of its slope: with it the squared error of f against the x0
    that leads to a target is that of g against the target.
    """
    ratio = schedule.sigma[s] / schedule.sigma[t]
    return (schedule.alpha[s] - schedule.alpha[t] * ratio).square()


def perceptual_loss_in_z(
    x0: Tensor, x_t: Tensor, t: Tensor, target: Tensor, s: Tensor, schedule: Schedule, distance: Distance
) -> Tensor:
    """`weight_of_x0` distance(f, the x0 that leads to `target`) (B,), for a `distance` of clean latents; needs s < t.

    g(x_t, t, s) has noise for s > 0, which a perceptual distance was not made for, and f has none. The weight is the
    one with which a squared error would give `loss_in_z`: far jumps count as they do there.
    """
    return weight_of_x0(t, s, schedule) * distance(x0, inverse_ddim_step(x_t, target, t, s, schedule))


def log_perceptual_loss(
    x0: Tensor, x_t: Tensor, t: Tensor, target: Tensor, s: Tensor, schedule: Schedule, distance: Distance
) -> Tensor:
    """distance(f, the x0 that leads to `target`) (B,), for the logarithm of a distance of clean latents; needs s < t.

    Under a logarithm a weight is an added constant without gradient, so that there is none.
    """
    return distance(x0, inverse_ddim_step(x_t, target, t, s, schedule))


PERCEPTUAL_LOSSES = {"z": perceptual_loss_in_z, "x0": loss_in_x0}


def inter_segment_target(x0_at_r: Tensor, x_r: Tensor, r: Tensor) -> Tensor:
    """The x0 (B, ...) of a state at milestone `r` (B,): f(x_r, r), and x_r itself at r = 0, where it is x0 already.

    Second stage of TLCM (v6, eq. 10): global consistency from milestone to milestone.
    """
    return torch.where(expand(r == 0, x_r), x_r, x0_at_r)
