"""Sharpness against numbers worked out by hand."""

import math

import pytest
import torch

from reward_models.sharpness import Sharpness


@pytest.fixture
def sharpness():
    return Sharpness("cpu", torch.float64)


def test_a_flat_picture_has_the_floor_and_a_gradient_of_zero(sharpness):
    image = torch.full((1, 3, 5, 5), 0.4, dtype=torch.float64, requires_grad=True)
    value = sharpness(image, [""])
    value.sum().backward()
    assert value.item() == pytest.approx(-8.0, abs=1e-6)
    assert image.grad.abs().max() < 1e-6


def test_a_ramp_is_as_flat_as_a_flat_picture(sharpness):
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64).expand(1, 3, 6, 8)
    assert sharpness(ramp, [""]).item() == pytest.approx(-8.0, abs=1e-6)


def test_a_checkerboard_of_single_pixels_has_the_logarithm_of_16(sharpness):
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    board = ((rows + columns) % 2).double().expand(1, 3, 6, 8)  # the Laplacian is 4 on black squares, -4 on white
    assert sharpness(board, [""]).item() == pytest.approx(math.log10(16), abs=1e-6)


def test_a_white_dot_has_the_hand_computed_variance(sharpness):
    image = torch.zeros(1, 3, 5, 5)
    image[..., 2, 2] = 1.0  # of the 3 x 3 inner pixels: one -4, four 1, four 0; mean 0, mean square 20 / 9
    assert sharpness(image, [""]).item() == pytest.approx(math.log10(20 / 9), abs=1e-6)


def test_it_is_the_variance_of_a_laplacian_written_out_by_slices(sharpness):
    images = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    red, green, blue = images.unbind(1)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * y[:, 1:-1, 1:-1]
    scores = sharpness(images, [""] * 3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.log10(laplacian.var((1, 2), correction=0) + 1e-8).float())


def test_a_blurred_picture_scores_lower_than_itself(sharpness):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(image, 3, stride=1, padding=1)
    assert sharpness(blurred, [""]) < sharpness(image, [""]) - 0.5


def test_its_gradient_is_right(sharpness):
    images = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(sharpness(images, [""]).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ahead, behind = (sharpness(images.detach() + sign * 1e-3 * direction, [""]).double() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / 2e-3).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_type_gives_nearly_the_same(sharpness, dtype):
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    scores = Sharpness("cpu", dtype)(images, ["", ""])
    torch.testing.assert_close(scores, sharpness(images, ["", ""]), atol=0.02, rtol=0)
