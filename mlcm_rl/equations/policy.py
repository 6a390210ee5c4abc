"""The few-step sampler as a Gaussian policy: its step's distribution, advantages, the clipped objective, KL.

A gamma step with gamma > 0 draws x_s ~ N(mean, std^2 I) with a mean that is linear in the network's x0. Its sample has
a probability, so that a reward needs no gradient (RLCM, arXiv 2404.03673). The sampler's last step returns x0 without
noise: it is not an action and has no probability, so that N evaluations are N - 1 actions, each with s > 0.
"""

import math

import torch
from torch import Tensor

from .schedule import Schedule, expand
from .solver import gamma_step


def step_gaussian(
    x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, gamma: float, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and std (B, 1, ..., 1) of the x_s that `gamma_step` draws; needs s > 0.

    The step is mean + std noise, so both are read off the step itself, at noise 0 and at noise 1: alpha_s x0 and
    sigma_s for gamma 1. Raises ValueError unless 0 < gamma <= 1: a deterministic step has no density.
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma is {gamma}; a step has a probability and a KL for 0 < gamma <= 1 only (0 is DDIM)")
    mean = gamma_step(x_t, x0, t, s, torch.zeros_like(x0), gamma, schedule)
    zero, one = x0.new_zeros(len(x0)), x0.new_ones(len(x0))
    std = gamma_step(zero, zero, t, s, one, gamma, schedule)
    return mean, expand(std, mean)


def gaussian_log_prob(x_s: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x_s; mean, std^2 I) / d (B,): the mean over a sample's d elements, not the sum.

    The code of DDPO and its descendants takes the mean too: a clip range or a beta then does not depend on the size of
    the picture. The ratio of two such policies is the d-th root of the ratio of densities (for sequences it is GSPO's,
    arXiv 2507.18071), so that a clip range of 1e-3 is a small step, not a tight bound on the density.
    """
    z = (x_s - mean) / std
    return (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2 I) || N(reference_mean, std^2 I)) = ||mean - reference_mean||^2 / (2 std^2) (B,), in nats.

    The sum over a sample's elements, and the same in both directions: the two share their std.
    """
    return 0.5 * ((mean - reference_mean) / std).square().flatten(1).sum(1)


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each prompt's group (P, n), for `rewards` (P, n): n samples of each of P prompts.

    std is over n - 1, as in TRL's GRPOTrainer; a group of equal rewards gets 0 (GRPO, arXiv 2402.03300, section 4.1.2).
    The division makes a group's spread the unit of reward: a KL weight then counts in those units, and a prompt whose
    samples hardly differ pushes as hard as one whose samples differ much. Without `scale` it is r - mean (Dr. GRPO,
    arXiv 2503.20783, eq. 3). Raises ValueError for groups of one.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are {tuple(rewards.shape)}; groups are (prompts, samples), two samples or more")
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps) if scale else centred


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """-min(ratio A, clamp(ratio, 1 - c, 1 + c) A) (B,), ratio = p / p_old: PPO's loss (arXiv 1707.06347, eq. 7).

    `old_log_prob` (B,) is that of the policy which drew the sample, under no gradient. Once the ratio has left the
    range on the side that the advantage pushes to, the gradient is zero.
    """
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantage)
