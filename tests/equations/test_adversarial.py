"""Adversarial losses: by hand, against torch's own cross entropy, and the penalty against a derivative by hand."""

from math import log

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mlcm_rl.equations.adversarial import LOSSES, gradient_penalty

LOGITS = torch.tensor([[-2.0, 0.5], [3.0, 1.0]])
OTHERS = torch.tensor([[0.0, 1.0], [-1.0, 2.0]])


def test_hinge_by_hand():
    assert LOSSES["hinge"].heads(LOGITS, OTHERS).tolist() == [1.75 + 1.5, 0.0 + 1.5]
    assert LOSSES["hinge"].student(OTHERS, LOGITS).tolist() == [0.75, -2.0]


def test_softplus_is_the_cross_entropy_of_the_two_classes():
    def entropy(logits: torch.Tensor, label: float) -> torch.Tensor:
        labels = torch.full_like(logits, label)
        return binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)

    expected = entropy(LOGITS, 1.0) + entropy(OTHERS, 0.0)
    torch.testing.assert_close(LOSSES["softplus"].heads(LOGITS, OTHERS), expected)
    torch.testing.assert_close(LOSSES["softplus"].student(LOGITS, OTHERS), entropy(OTHERS, 1.0))


def test_relativistic_is_the_cross_entropy_of_which_of_a_pair_is_real():
    """By hand, of the differences -2, -0.5; 4, -1: log(1 + exp(-difference)), and with the roles exchanged."""
    expected = [(2.12693 + 0.97408) / 2, (0.01815 + 1.31326) / 2]
    assert LOSSES["relativistic"].heads(LOGITS, OTHERS).tolist() == pytest.approx(expected, abs=1e-5)
    assert LOSSES["relativistic"].student(OTHERS, LOGITS).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_relativistic_loss_is_of_differences_and_its_gradient_is_bounded():
    loss, fake = LOSSES["relativistic"], (OTHERS + 7.0).requires_grad_()
    value = loss.student(LOGITS + 7.0, fake)
    torch.testing.assert_close(value, loss.student(LOGITS, OTHERS))
    (gradient,) = torch.autograd.grad(value.sum(), fake)
    assert (gradient.abs() <= 0.5).all()  # of two places; the hinge's is -1/2 however real the sample looks


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_heads_and_student_pull_in_opposite_directions(loss):
    real, fake = (torch.zeros(1, 1, requires_grad=True) for _ in range(2))
    of_real, of_fake = torch.autograd.grad(loss.heads(real, fake).sum(), (real, fake))
    (of_student,) = torch.autograd.grad(loss.student(real, fake).sum(), fake)
    assert of_real < 0 < of_fake
    assert of_student < 0


@pytest.mark.parametrize(("name", "chance"), [("hinge", 2.0), ("softplus", 2 * log(2)), ("relativistic", log(2))])
def test_chance_is_what_the_page_says(name, chance):
    zeros = torch.zeros(1, 3)
    assert LOSSES[name].heads(zeros, zeros).item() == pytest.approx(chance)


def test_gradient_penalty_by_hand():
    """Logits are the squares of two features: their mean over 2 places has the gradient x, and the penalty |x|^2."""
    features = torch.tensor([[1.0, 2.0], [0.0, -3.0]], requires_grad=True)
    penalty = gradient_penalty(features.square(), features)
    assert penalty.tolist() == [5.0, 9.0]
    (again,) = torch.autograd.grad(penalty.sum(), features)  # it is trained on
    torch.testing.assert_close(again, 2 * features.detach())
