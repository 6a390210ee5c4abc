"""The bodies under the emoji rewards, against plain functional networks with their batch norms in place."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mlcm_rl.evaluation import judge
from mlcm_rl.rewards.weights import MissingWeights
from reward_models import _efficientnet_lite, emoji_style_judge
from reward_models._efficientnet_lite import BATCH_NORM_EPSILON, EFFICIENTNET_LITE0_WEIGHTS, EfficientNetLite0
from reward_models._mobile_trunk import EFFICIENTNET_LITE0, MOBILENET_V2, Block, TappedTrunk, Trunk, pad_same, resized

EMOJI = Path(__file__).parents[2] / "recipes" / "emoji"


def convolve(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """TensorFlow's "same" convolution as its documentation defines it, for any size."""
    kernel = weight.shape[-1]
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def published_state(seed: int = 0) -> dict[str, Tensor]:
    """A random checkpoint with the names and shapes of the published one, its batch norms far from trivial."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def add(name: str, norm: str, *shape: int) -> None:
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        for key, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            state[f"{norm}.{key}"] = torch.rand(shape[0], generator=generator) + low

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    width = 32
    for i, block in enumerate(EFFICIENTNET_LITE0):
        hidden = width * block.expansion
        if block.expansion > 1:
            add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", hidden, width, 1, 1)
        add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", hidden, 1, block.kernel, block.kernel)
        add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", block.width, hidden, 1, 1)
        width = block.width
    add("_conv_head", "_bn1", 1280, width, 1, 1)
    state["_fc.weight"] = torch.randn(1000, 1280, generator=generator) / 36
    state["_fc.bias"] = torch.randn(1000, generator=generator)
    return state


def published_forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published network, written down once more: logits (B, 1000)."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=BATCH_NORM_EPSILON)

    x = F.relu6(norm(convolve(x, state["_conv_stem.weight"], 2), "_bn0"))
    for i, block in enumerate(EFFICIENTNET_LITE0):
        name, before = f"_blocks.{i}", x
        if block.expansion > 1:
            x = F.relu6(norm(convolve(x, state[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
        depthwise = state[f"{name}._depthwise_conv.weight"]
        x = F.relu6(norm(convolve(x, depthwise, block.stride, groups=len(depthwise)), f"{name}._bn1"))
        x = norm(convolve(x, state[f"{name}._project_conv.weight"]), f"{name}._bn2")
        x = x + before if before.shape == x.shape else x
    x = F.relu6(norm(convolve(x, state["_conv_head.weight"]), "_bn1"))
    return F.linear(x.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])


@pytest.mark.parametrize("side", [32, 64, 96])
def test_the_folded_network_is_the_published_one(side):
    state = published_state()
    network = EfficientNetLite0()
    network.load_state_dict(_efficientnet_lite.folded_weights(state))
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), published_forward(state, pixels), rtol=1e-3, atol=1e-3)


def test_efficientnet_lite0_has_its_published_number_of_parameters():
    unfolded = sum(value.numel() for name, value in published_state().items() if "running" not in name)
    assert unfolded == 4_652_008
    assert EFFICIENTNET_LITE0[-1] == Block(kernel=3, stride=1, expansion=6, width=320)
    assert len(EFFICIENTNET_LITE0) == 16


def test_its_pixels_are_centred_at_127_of_255():
    images = torch.full((1, 3, 64, 64), 127 / 255)
    torch.testing.assert_close(
        _efficientnet_lite.efficientnet_pixels(images, 64), torch.zeros(1, 3, 64, 64), atol=1e-5, rtol=0
    )
    images = torch.ones(1, 3, 32, 32)
    torch.testing.assert_close(_efficientnet_lite.efficientnet_pixels(images, 64), torch.ones(1, 3, 64, 64))


def test_a_picture_of_the_right_size_is_not_resampled():
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized(images, 64), images)


@pytest.mark.parametrize(("kernel", "stride", "padded"), [(3, 1, 10), (5, 1, 12), (3, 2, 9), (5, 2, 11)])
def test_padding_is_same_padding(kernel, stride, padded):
    x = torch.arange(64.0).view(1, 1, 8, 8)
    assert pad_same(x, kernel, stride).shape[-1] == padded
    weight = torch.randn(1, 1, kernel, kernel, generator=torch.Generator().manual_seed(0))
    assert torch.equal(F.conv2d(pad_same(x, kernel, stride), weight, stride=stride), convolve(x, weight, stride))


def test_a_tapped_trunk_reads_unit_vectors_of_the_blocks_it_names():
    torch.manual_seed(0)
    tapped = TappedTrunk(MOBILENET_V2, (2, 4))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    _, second, _, fourth = tapped.maps(pixels)
    expected = [F.normalize(x.mean((2, 3)), dim=-1) for x in (second, fourth)]
    torch.testing.assert_close(tapped(pixels), torch.cat(expected, dim=-1))
    assert tapped(pixels).shape == (2, tapped.width) == (2, 24 + 32)
    assert torch.equal(Trunk.forward(tapped, pixels), fourth)


def test_the_style_judges_body_is_the_judges():
    encoder = judge.load(EMOJI / "judge").encoder
    classifier = emoji_style_judge.untrained().requires_grad_(False)
    classifier.load_state_dict(load_file(emoji_style_judge.SHIPPED))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = encoder.first(F.relu6(encoder.stem(F.pad(pixels, (0, 1, 0, 1)))))
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(Trunk.forward(classifier.trunk, pixels), x, rtol=1e-4, atol=1e-4)


def test_the_shipped_part_is_the_beginning_of_the_published_network():
    try:
        published = load_file(EFFICIENTNET_LITE0_WEIGHTS.path())
    except MissingWeights:
        pytest.skip("EfficientNet-Lite0 has not been fetched: mlcm rewards fetch imagenet_class")
    for name, value in load_file(_efficientnet_lite.SHIPPED).items():
        assert torch.equal(value, published[f"trunk.{name}"].half()), name
