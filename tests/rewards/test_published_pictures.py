"""What the published reward models do to a picture before they look at it, held to PIL and to transformers."""

import math

import numpy
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from reward_models._published import covered, normalised, resized
from reward_models.hps_v2 import padded
from rewards.published import as_tensor, pictures

LEVEL = 1 / 255  # PIL rounds to 8 bits twice, after the rows and after the columns
SIZES = [(97, 64), (64, 97), (200, 133), (48, 48), (32, 24), (60, 48)]


def by_pil(picture: Image.Image, width: int, height: int, resample=Image.BICUBIC) -> torch.Tensor:
    return as_tensor(picture.resize((width, height), resample))


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_pils_bicubic_to_a_level_or_so(size):
    (picture,) = pictures(size)
    prepared = resized(as_tensor(picture), [40, 56])
    difference = (prepared - by_pil(picture, 56, 40)).abs()
    assert difference.max() < 1.5 * LEVEL
    assert difference.mean() < 0.4 * LEVEL


@pytest.mark.parametrize("resample", [Image.BILINEAR, Image.LANCZOS, Image.BOX, Image.NEAREST])
def test_another_filter_is_told_from_it(resample):
    (picture,) = pictures((200, 133))
    prepared = resized(as_tensor(picture), [40, 56])
    assert (prepared - by_pil(picture, 56, 40, resample)).abs().max() > 5 * LEVEL


def test_what_overshoots_is_cut_off_between_rows_and_columns():
    (picture,) = pictures((97, 64))
    at_once = torch.nn.functional.interpolate(as_tensor(picture), (40, 56), mode="bicubic", antialias=True)
    assert (at_once.clamp(0, 1) - by_pil(picture, 56, 40)).abs().max() > 5 * LEVEL


def test_shrinking_without_a_wider_filter_is_told_from_it():
    (picture,) = pictures((200, 133))
    aliased = torch.nn.functional.interpolate(as_tensor(picture), (40, 56), mode="bicubic")
    assert (aliased.clamp(0, 1) - by_pil(picture, 56, 40)).abs().max() > 5 * LEVEL


@pytest.mark.parametrize("size", SIZES)
def test_covering_and_normalising_are_transformers_own(size):
    (picture,) = pictures(size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = torch.as_tensor(numpy.array(processor(picture)["pixel_values"]))
    prepared = normalised(covered(as_tensor(picture), 28))
    assert prepared.shape == expected.shape == (1, 3, 28, 28)
    assert (prepared - expected).abs().max() < 1.5 * LEVEL / 0.26


@pytest.mark.parametrize(("surplus", "floor", "nearest"), [(0, 0, 0), (1, 0, 0), (3, 1, 2), (5, 2, 2), (7, 3, 4)])
def test_an_odd_surplus_is_cut_as_each_library_cuts_it(surplus, floor, nearest):
    ramp = torch.linspace(0, 1, 28 + surplus, dtype=torch.double).expand(1, 3, 28, -1)
    for rounding, start in ((math.floor, floor), (round, nearest)):
        torch.testing.assert_close(covered(ramp, 28, rounding), ramp[..., start : start + 28])
        torch.testing.assert_close(covered(ramp.mT, 28, rounding), ramp.mT[..., start : start + 28, :])


def test_the_longer_side_is_rounded_down():
    image = torch.rand(1, 3, 10, 18, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    wide = resized(image, [7, 12])  # 7 x 18 / 10 = 12.6
    torch.testing.assert_close(covered(image, 7), wide[..., 2:9])


def test_black_bars_fill_the_shorter_side():
    (picture,) = pictures((100, 61))  # 28 x 17.08
    prepared = padded(as_tensor(picture), 28)
    assert prepared.shape == (1, 3, 28, 28)
    assert prepared[..., :5, :].abs().max() == 0
    assert prepared[..., 22:, :].abs().max() == 0
    assert prepared.max() > 1 + LEVEL  # what overshoots is kept, so near sharp edges PIL's picture is another
    assert (prepared[..., 5:22, :].clamp(0, 1) - by_pil(picture, 28, 17)).abs().mean() < LEVEL
    torch.testing.assert_close(padded(as_tensor(picture).mT, 28), prepared.mT)


def test_channels_are_normalised_by_their_own_constants_red_first():
    image = torch.tensor([0.1, 0.5, 0.9], dtype=torch.double).reshape(1, 3, 1, 1)
    expected = [(0.1 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (0.9 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(normalised(image).flatten(), torch.tensor(expected, dtype=torch.double))


@pytest.mark.parametrize("prepared", [lambda image: covered(image, 6), lambda image: padded(image, 6)])
def test_gradients_pass(prepared):
    image = 0.3 + 0.4 * torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    assert torch.autograd.gradcheck(lambda image: normalised(prepared(image)), image.requires_grad_())
