"""FID's Inception: its structure, one block written out, its borders and its resize, and the door of its weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from mlcm_rl.evaluation import inception


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(network, seed=0):
    """Plausible weights for `network` from a generator of its own, as a state dict."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            weights[name] = torch.rand(value.shape, generator=generator) + 0.5
        else:
            spread = value[0].numel() ** -0.5 if value.ndim == 4 else 0.3
            weights[name] = spread * torch.randn(value.shape, generator=generator)
    return weights


@pytest.fixture(scope="module")
def structure():
    with torch.device("meta"):
        return inception.InceptionV3()


@pytest.fixture(scope="module")
def published(structure, tmp_path_factory):
    """A random state dict in the layout of the published one, which has a classifier and no counters."""
    path = tmp_path_factory.mktemp("published") / "published.pth"
    weights = {name: value for name, value in random_weights(structure).items() if "num_batches" not in name}
    torch.save(weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_parameters_are_those_of_inception_v3_without_its_classifiers(structure):
    # torchvision's has 27,161,264: less the auxiliary classifier's 3,326,696 and the classifier's 1,000 x 2,049.
    assert sum(parameter.numel() for parameter in structure.parameters()) == 27_161_264 - 3_326_696 - 2_049_000


def test_shapes_between_blocks_are_the_published_ones(structure):
    shapes = {}
    for name, module in structure.named_children():
        module.register_forward_hook(
            lambda _module, _inputs, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    assert structure.eval()(torch.zeros(1, 3, 299, 299, dtype=torch.uint8, device="meta")).shape == (1, 2048)
    assert shapes["Conv2d_2b_3x3"] == (64, 147, 147)
    assert shapes["Conv2d_4a_3x3"] == (192, 71, 71)
    expected = {"5b": (256, 35), "5c": (288, 35), "5d": (288, 35), "6a": (768, 17), "6e": (768, 17)}
    expected |= {"7a": (1280, 8), "7b": (2048, 8), "7c": (2048, 8)}
    for block, (width, side) in expected.items():
        assert shapes[f"Mixed_{block}"] == (width, side, side)


@torch.no_grad()
def test_the_last_block_is_the_one_written_out():
    """Forks, order of the branches, batch norm with epsilon 0.001, and pooling by maximum."""
    block = inception.Mixed(16, inception.FORKS, inception.max_pool).eval()
    weights = random_weights(block)
    block.load_state_dict(weights)
    x = normal(2, 16, 8, 8)

    def layer(x, name, padding=0):
        part = {key.removeprefix(f"branch{name}."): w for key, w in weights.items() if key.startswith(f"branch{name}.")}
        hidden = F.conv2d(x, part["conv.weight"], padding=padding)
        mean, variance, scale, shift = (
            part[f"bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return ((hidden - mean) / (variance + 0.001).sqrt() * scale + shift).clamp(min=0)

    three = layer(x, "3x3_1")
    double = layer(layer(x, "3x3dbl_1"), "3x3dbl_2", padding=1)
    pooled = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2))
    parts = [
        layer(x, "1x1"),
        layer(three, "3x3_2a", (0, 1)),
        layer(three, "3x3_2b", (1, 0)),
        layer(double, "3x3dbl_3a", (0, 1)),
        layer(double, "3x3dbl_3b", (1, 0)),
        layer(pooled, "_pool"),
    ]
    torch.testing.assert_close(block(x), torch.cat(parts, dim=1), rtol=1e-4, atol=1e-4)


def test_which_block_pools_how(structure):
    pools = {name: getattr(structure, name).pool.__name__ for name in structure.blocks}
    assert {name for name, pool in pools.items() if pool == "halving_pool"} == {"Mixed_6a", "Mixed_7a"}
    assert {name for name, pool in pools.items() if pool == "max_pool"} == {"Mixed_7c"}


def test_average_pooling_does_not_count_the_padding():
    assert torch.equal(inception.average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    corner = inception.average_pool(torch.arange(16.0).reshape(1, 1, 4, 4))[0, 0, 0, 0]
    assert corner == (0 + 1 + 4 + 5) / 4


def test_pictures_are_resized_without_half_pixel_centres():
    row = torch.tensor([0.0, 10.0, 20.0, 50.0])
    # Output i of 3 reads at 0, 4/3, 8/3; of 8 at 0, 0.5, ... and past the end the last.
    resized = inception.resized(row.expand(1, 1, 4, 4), 3)
    torch.testing.assert_close(resized[0, 0, 0], torch.tensor([0.0, 10 + 10 / 3, 20 + 30 * 2 / 3]))
    resized = inception.resized(row.reshape(1, 1, 4, 1).expand(1, 1, 4, 4), 8)
    torch.testing.assert_close(resized[0, 0, :, 5], torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 35.0, 50.0, 50.0]))


@torch.no_grad()
def test_published_weights_are_converted_once_and_read_back(published, tmp_path):
    inception.convert(published, tmp_path / "inception.safetensors")
    network = inception.load(tmp_path / "inception.safetensors", "cpu")
    original = torch.load(published, weights_only=True)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, original[name])
        assert not parameter.requires_grad
    assert not network.training
    pictures = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = network(pictures)
    assert features.shape == (2, network.num_features)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, r"of 1008 classes, this file has one of shape \(1000, 2048\)"),
        ({"fc.weight": None}, "this file has no classifier"),
        ({"Mixed_5b.branch1x1.conv.weight": torch.zeros(64, 192, 3, 3)}, "1 tensors .* Mixed_5b.branch1x1.conv.weight"),
        ({"AuxLogits.fc.bias": torch.zeros(1000)}, "1 tensors are not those of FID's Inception, for example AuxLogits"),
    ],
)  # fmt: skip
def test_weights_of_another_inception_are_refused(published, tmp_path, change, message):
    weights = torch.load(published, weights_only=True) | change
    torch.save({name: value for name, value in weights.items() if value is not None}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        inception.convert(tmp_path / "other.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    torch.save({"fc.weight": test_a_file_that_would_run_code_is_not_read}, tmp_path / "bad.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        inception.convert(tmp_path / "bad.pth", tmp_path / "out.safetensors")


def test_another_networks_safetensors_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="are not those of FID's Inception"):
        inception.load(tmp_path / "other.safetensors", "cpu")
