"""Colourfulness against numbers worked out by hand."""

import math

import pytest
import torch

from reward_models.colourfulness import Colourfulness


@pytest.fixture
def colourfulness():
    return Colourfulness("cpu", torch.float64)


def test_a_grey_picture_has_none_and_a_gradient_that_is_a_number(colourfulness):
    image = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    value = colourfulness(image, [""])
    value.sum().backward()
    assert value.item() == 0.0
    assert image.grad.isfinite().all()


def test_a_flat_red_picture_has_only_its_mean(colourfulness):
    image = torch.zeros(1, 3, 5, 5)
    image[:, 0] = 1.0  # rg = 255, yb = 127.5, no spread
    assert colourfulness(image, [""]).item() == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-6)


def test_a_half_red_half_cyan_picture_is_the_hand_computed_one(colourfulness):
    image = torch.zeros(1, 3, 2, 4)
    image[:, 0, :, :2] = 1.0  # red: rg 255, yb 127.5
    image[:, 1:, :, 2:] = 1.0  # cyan: rg -255, yb -127.5; means 0, deviations 255 and 127.5
    assert colourfulness(image, [""]).item() == pytest.approx(math.hypot(255, 127.5), rel=1e-6)


def test_it_is_the_papers_formula_on_any_picture(colourfulness):
    images = torch.rand(3, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    r, g, b = (255 * images.double()).unbind(1)
    rg, yb = r - g, 0.5 * (r + g) - b
    sigma = (rg.var((1, 2), correction=0) + yb.var((1, 2), correction=0)).sqrt()
    mu = (rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2).sqrt()
    scores = colourfulness(images, [""] * 3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (sigma + 0.3 * mu).float())


def test_its_gradient_is_right(colourfulness):
    images = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    value = colourfulness(images, [""])
    (gradient,) = torch.autograd.grad(value.sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-3
    ahead, behind = (colourfulness(images.detach() + sign * step * direction, [""]).double() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-3)
