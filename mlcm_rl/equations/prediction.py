"""What a network predicts, turned into x0 and back, through the one form x_t = alpha x0 + sigma eps.

`kind` is the network's own parameterisation:

    epsilon        eps
    v_prediction   v = alpha eps - sigma x0    (arXiv 2202.00512, section 4; needs alpha^2 + sigma^2 = 1)
    sample         x0
    flow           eps - x0                    (rectified flow's velocity, time growing with noise)
"""

from torch import Tensor

from .schedule import Schedule, snr

X0 = "sample"
KINDS = ("epsilon", "v_prediction", X0, "flow")


def x0_from_prediction(prediction: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, kind: str) -> Tensor:
    """x0 (B, ...) from a network's prediction at (x_t, t). Raises ValueError for an unknown `kind`."""
    alpha, sigma = schedule.at(t, x_t)
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * x_t - sigma * prediction
    if kind == "sample":
        return prediction
    if kind == "flow":
        return (x_t - sigma * prediction) / (alpha + sigma)
    raise ValueError(f"prediction type {kind!r} is none of {', '.join(KINDS)}")


def prediction_from_x0(x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, kind: str) -> Tensor:
    """The prediction (B, ...) of this `kind` at (x_t, t) that stands for `x0`: the inverse of `x0_from_prediction`.

    Raises ValueError for an unknown `kind`.
    """
    alpha, sigma = schedule.at(t, x_t)
    eps = (x_t - alpha * x0) / sigma
    if kind == "epsilon":
        return eps
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    if kind == "sample":
        return x0
    if kind == "flow":
        return eps - x0
    raise ValueError(f"prediction type {kind!r} is none of {', '.join(KINDS)}")


def min_snr_weight(t: Tensor, schedule: Schedule, kind: str, gamma: float) -> Tensor:
    """Weight (B,) of a prediction's squared error, such that the error of x0 weighs min(SNR_t, gamma).

    Min-SNR (arXiv 2303.09556), for every `kind`:

        epsilon        min(SNR_t, gamma) / SNR_t, 1 where SNR_t is 0
        v_prediction   min(SNR_t, gamma) / (SNR_t + 1)
        sample         min(SNR_t, gamma)
        flow           min(SNR_t, gamma) (sigma / (alpha + sigma))^2

    All but epsilon's are 0 where SNR_t is 0. Raises ValueError for an unknown `kind`.
    """
    ratio = snr(t, schedule)
    weight = ratio.clamp(max=gamma)
    if kind == "epsilon":
        return (gamma / ratio).clamp(max=1.0)
    if kind == "v_prediction":
        return weight / (ratio + 1.0)
    if kind == "sample":
        return weight
    if kind == "flow":
        return weight * (schedule.sigma[t] / (schedule.alpha[t] + schedule.sigma[t])) ** 2
    raise ValueError(f"prediction type {kind!r} is none of {', '.join(KINDS)}")
