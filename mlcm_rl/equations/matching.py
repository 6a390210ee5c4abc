"""Distribution matching: the gradient that moves a student's samples from their own distribution to the teacher's."""

import torch
from torch import Tensor

from .consistency import squared_l2
from .schedule import expand

FLOOR = 1e-6  # of the teacher's mean error, which is divided by


def matching_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """((x - x_real) - (x - x_fake)) / mean |x - x_real| (B, ...): DMD2's gradient on the samples x = `x0` (B, ...).

    `real_x0` is the x0 that the teacher finds in x with noise, `fake_x0` the one of the score of the student's own
    samples, at the same time. Times `mean |x - x_real|` and SNR_t its expectation is the gradient of
    KL(student || teacher) of the noised distributions, since a score is (alpha x0 - x_t) / sigma^2
    (TLCM v6, eq. 12; DMD, arXiv 2311.18828, eq. 7; the mean, a sample's own, makes times weigh alike: eq. 8 there).
    """
    size = (x0.float() - real_x0.float()).abs().flatten(1).mean(1)
    return (fake_x0.float() - real_x0.float()) / expand(size.clamp(min=FLOOR), x0)


def loss_of_gradient(x0: Tensor, gradient: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - g))^2 (B,) float32: a loss whose gradient at x = `x0` (B, ...) is g / N.

    N is the number of a sample's elements (DMD2, arXiv 2405.14867).
    """
    return 0.5 * squared_l2(x0, (x0.float() - gradient.float()).detach())


def times_between(share: Tensor, low: float, high: float, num_times: int, start: Tensor | int = 0) -> Tensor:
    """The times (B,) int64 at `share` (B,) in [0, 1) of the way between the parts `low` and `high` of the time axis.

    All times between have the same share: DMD2 draws from 0.02 to 0.98. The axis is that from `start` (B,) up.
    """
    length = num_times - 1 - torch.as_tensor(start)
    first, last = (start + (part * length.double()).to(torch.int64) for part in (low, high))
    return first + (share * (last - first + 1)).to(torch.int64)
