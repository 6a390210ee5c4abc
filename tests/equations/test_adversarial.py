"""Adversarial losses: by hand, against torch's own cross entropy, and the penalty against a derivative by hand."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mlcm_rl.equations.adversarial import LOSSES, gradient_penalty

LOGITS = torch.tensor([[-2.0, 0.5], [3.0, 1.0]])


def test_hinge_by_hand():
    real, fake, student = (loss(LOGITS) for loss in LOSSES["hinge"])
    assert real.tolist() == [1.75, 0.0]
    assert fake.tolist() == [0.75, 3.0]
    assert student.tolist() == [0.75, -2.0]


def test_softplus_is_the_cross_entropy_of_the_two_classes():
    real, fake, student = (loss(LOGITS) for loss in LOSSES["softplus"])
    for value, label in ((real, 1.0), (fake, 0.0), (student, 1.0)):
        expected = binary_cross_entropy_with_logits(LOGITS, torch.full_like(LOGITS, label), reduction="none").mean(1)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_heads_and_student_pull_in_opposite_directions(loss):
    logits = torch.zeros(1, 1, requires_grad=True)
    real, fake, student = (torch.autograd.grad(one(logits).sum(), logits)[0].item() for one in LOSSES[loss])
    assert real < 0 < fake
    assert student < 0


def test_gradient_penalty_by_hand():
    """Logits are the squares of two features: their mean over 2 places has the gradient x, and the penalty |x|^2."""
    features = torch.tensor([[1.0, 2.0], [0.0, -3.0]], requires_grad=True)
    penalty = gradient_penalty(features.square(), features)
    assert penalty.tolist() == [5.0, 9.0]
    (again,) = torch.autograd.grad(penalty.sum(), features)  # it is trained on
    torch.testing.assert_close(again, 2 * features.detach())
