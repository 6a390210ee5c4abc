"""Adversarial losses on logits: what tells real samples from a student's, and what the student makes of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

# A logit is high for what looks real. Logits (B, N) are of a sample's N places; each loss is a value a sample, (B,)
# float32, of those of the real and of the student's samples.
OfLogits = Callable[[Tensor, Tensor], Tensor]


def _mean(values: Tensor) -> Tensor:
    return values.float().flatten(1).mean(1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of max(0, 1 - real) + max(0, 1 + fake): the heads' loss (arXiv 1705.02894, eq. 3); 2 is chance."""
    return _mean(relu(1.0 - real)) + _mean(relu(1.0 + fake))


def hinge_student(_: Tensor, fake: Tensor) -> Tensor:
    """Mean of -fake: the student's loss under the hinge."""
    return _mean(-fake)


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of -log sigmoid(real) - log(1 - sigmoid(fake)): the heads' loss (arXiv 1406.2661); 2 log 2 is chance."""
    return _mean(softplus(-real)) + _mean(softplus(fake))


def logistic_student(_: Tensor, fake: Tensor) -> Tensor:
    """Mean of -log sigmoid(fake): the student's loss that does not vanish where the heads are sure."""
    return _mean(softplus(-fake))


def relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of -log sigmoid(real - fake): the heads' loss on pairs (arXiv 1807.00734, section 4); log 2 is chance.

    Of a sample and its own target what the two have in common cancels, place by place.
    """
    return _mean(softplus(fake - real))


def relativistic_student(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of -log sigmoid(fake - real): the student's loss on pairs, which has nothing left to win where both agree.

    Its gradient is bounded: a sample that looks more real than its target is not pushed on (arXiv 2501.05441).
    """
    return _mean(softplus(real - fake))


class AdversarialLoss(NamedTuple):
    """The two sides of a loss, and whether the student's reads the logits of real samples."""

    heads: OfLogits
    student: OfLogits
    is_of_pairs: bool


LOSSES = {
    "hinge": AdversarialLoss(hinge, hinge_student, False),
    "softplus": AdversarialLoss(logistic, logistic_student, False),
    "relativistic": AdversarialLoss(relativistic, relativistic_student, True),
}


def gradient_penalty(logits: Tensor, features: Tensor) -> Tensor:
    """|d (sum of a sample's logits / N) / d features|^2 (B,) float32, with a graph: R1 (arXiv 1801.04406, eq. 9).

    Of the features that a head reads, as in ADD (arXiv 2311.17042, section 3.2), not of the sample: no second
    derivative of the teacher is needed. `logits` (B, N) were computed from `features` (B, ...) with their graph.
    """
    (gradient,) = torch.autograd.grad(logits.float().flatten(1).mean(1).sum(), features, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)
