"""Distilling a text encoder into another: what is lost of a prompt, in the features and in the denoiser's output."""

import torch
from torch import Tensor

from .consistency import squared_l2

FLOOR = 1e-6  # of a prompt's effect, below which rounding would be divided by nothing
CONSTANT = 1e-3  # of the whole spread, below which a feature is the same for every prompt


def spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (L, D) of the features (B, L, D) of B prompts, and the deviation (L,) of each of L tokens.

    The deviation is the root of the mean square over prompts and over D. It is 0 for a token that hardly differs from
    prompt to prompt (the start mark of a causal encoder, padding): there only the mean is right.
    """
    mean = features.mean(0)
    variance = (features - mean).square().mean((0, 2))
    whole = variance.mean()
    return mean, torch.where(variance > CONSTANT**2 * whole, variance, 0.0).sqrt()


def feature_error(features: Tensor, target: Tensor, deviation: Tensor) -> Tensor:
    """Return the mean squared error (B,) float32 of features (B, L, D) in units of the `deviation` (L,) of `spread`.

    Tokens with deviation 0 do not count. The mean of the features over prompts has error 1, by expectation.
    """
    varies = deviation > 0
    error = (features.float() - target.float())[:, varies] / deviation[varies, None]
    return squared_l2(error, torch.zeros_like(error))


def effect_lost(prediction: Tensor, target: Tensor, unprompted: Tensor) -> Tensor:
    """Return |prediction - target|^2 / (|target - unprompted|^2 + FLOOR), (B,) float32, means over a sample's elements.

    All three are the denoiser's at one x_t (B, C, H, W): through the new text encoder, through its own, and without
    the prompt. The numerator is the distillation loss of PEA-Diffusion (arXiv 2311.17086); the denominator is what the
    prompt changes at all. So 0 is as good as the own encoder, 1 as bad as none, and all times weigh alike: the plain
    square is largest where little noise is left, and where the prompt changes least.
    """
    return squared_l2(prediction, target) / (squared_l2(target, unprompted) + FLOOR)
