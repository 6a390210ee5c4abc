"""Brightness against numbers worked out by hand."""

import pytest
import torch

from reward_models.brightness import Brightness


@pytest.fixture
def brightness():
    return Brightness("cpu", torch.float64)


@pytest.mark.parametrize(
    ("colour", "luma"),
    [((0, 0, 0), 0.0), ((1, 1, 1), 1.0), ((1, 0, 0), 0.299), ((0, 1, 0), 0.587), ((0, 0, 1), 0.114)],
)
def test_a_flat_picture_has_the_luma_of_its_colour(brightness, colour, luma):
    image = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    assert brightness(image, [""]).item() == pytest.approx(luma, abs=1e-7)


def test_a_half_white_picture_and_a_quarter_yellow_one_are_told_apart(brightness):
    images = torch.zeros(2, 3, 2, 4)
    images[0, :, :, :2] = 1.0
    images[1, :2, 0, :2] = 1.0  # yellow: 0.299 + 0.587, on a quarter of the page
    scores = brightness(images, ["", ""])
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([0.5, 0.886 / 4], abs=1e-7)


def test_its_gradient_is_the_channels_share_of_a_pixel(brightness):
    images = torch.rand(1, 3, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    brightness(images, [""]).sum().backward()
    shares = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1) / 10
    torch.testing.assert_close(images.grad, shares.expand_as(images))
