"""Adversarial losses on logits: what tells real samples from a student's, and what the student makes of it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

# A logit is high for what looks real. The logits (B, N) are of a sample's N places; each loss is a value a sample.
AdversarialLoss = Callable[[Tensor], Tensor]


def _mean(values: Tensor) -> Tensor:
    return values.float().flatten(1).mean(1)


def hinge_real(logits: Tensor) -> Tensor:
    """Mean of max(0, 1 - logit) (B,) float32: the heads' loss on real samples (arXiv 1705.02894, eq. 3)."""
    return _mean(relu(1.0 - logits))


def hinge_fake(logits: Tensor) -> Tensor:
    """Mean of max(0, 1 + logit) (B,) float32: the heads' loss on the student's samples."""
    return _mean(relu(1.0 + logits))


def hinge_student(logits: Tensor) -> Tensor:
    """Mean of -logit (B,) float32: the student's loss under the hinge."""
    return _mean(-logits)


def softplus_real(logits: Tensor) -> Tensor:
    """Mean of -log sigmoid(logit) (B,) float32: the heads' loss on real samples (arXiv 1406.2661)."""
    return _mean(softplus(-logits))


def softplus_fake(logits: Tensor) -> Tensor:
    """Mean of -log(1 - sigmoid(logit)) (B,) float32: the heads' loss on the student's samples."""
    return _mean(softplus(logits))


def softplus_student(logits: Tensor) -> Tensor:
    """Mean of -log sigmoid(logit) (B,) float32: the student's loss that does not vanish where the heads are sure."""
    return _mean(softplus(-logits))


# loss -> the heads' on real samples, the heads' on the student's, the student's
LOSSES: dict[str, tuple[AdversarialLoss, AdversarialLoss, AdversarialLoss]] = {
    "hinge": (hinge_real, hinge_fake, hinge_student),
    "softplus": (softplus_real, softplus_fake, softplus_student),
}


def gradient_penalty(logits: Tensor, features: Tensor) -> Tensor:
    """|d (sum of a sample's logits / N) / d features|^2 (B,) float32, with a graph: R1 (arXiv 1801.04406, eq. 9).

    Of the features that a head reads, as in ADD (arXiv 2311.17042, section 3.2), not of the sample: no second
    derivative of the teacher is needed. `logits` (B, N) were computed from `features` (B, ...) with their graph.
    """
    (gradient,) = torch.autograd.grad(logits.float().flatten(1).mean(1).sum(), features, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)
