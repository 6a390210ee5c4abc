"""LPIPS on latents (TLCM v6, section 4.3): a VGG without its first three maxima, whose features are compared.

`python -m mlcm_rl.models.lpips PUBLISHED.pth OUT.safetensors` converts published weights: those of E-LatentLPIPS, and
any others in the layout of the public package `lpips` (`recipe/lpips_layout.py`).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..equations.perceptual import feature_distance
from ..recipe.lpips_layout import FILE, KERNEL, Layout, layout_of
from ..storage import finite
from ..storage.tensors import load_weights, read_shapes, read_tensors, write_tensors

PREFIX = "module."  # of names in a file of torch's DataParallel
PROBE = 16  # a side of the latents by which weights are tried
COPY = "lins."  # E-LatentLPIPS writes the channels' weights a second time under it


class LatentLpips(nn.Module):
    """The distance of two latents by the features of each slice of convolutions; parameters have published names."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout
        slices = [_slice(layout, k) for k in range(len(layout.slices))]
        self.net = nn.ModuleDict({f"slice{k + 1}": one for k, one in enumerate(slices)})
        for k, width in enumerate(layout.widths):
            weights = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{k}", nn.ModuleDict({"model": nn.ModuleDict({"1": weights})}))

    @property
    def channel_weights(self) -> list[nn.Parameter]:
        """The weights (1, C, 1, 1) of the channels of each slice."""
        return [self.get_parameter(f"lin{k}.model.1.weight") for k in range(len(self.layout.slices))]

    def features(self, latents: Tensor) -> list[Tensor]:
        """Return the features (B, C_k, H, W) of each slice, half as high and wide in the last."""
        found, x = [], latents
        for k, convolutions in enumerate(self.layout.slices):
            if k + 1 == len(self.layout.slices):
                x = F.max_pool2d(x, 2)
            for one in convolutions:
                x = self.net.get_submodule(f"slice{k + 1}.{one.index}")(x)
                if one.has_norm:
                    x = self.net.get_submodule(f"slice{k + 1}.{one.index + 1}")(x)
                x = F.relu(x)
            found.append(x)
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (B,) float32 of latents (B, C, H, W) in the scale of the denoiser."""
        return self.distance(self.features(a), self.features(b))

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Return the distance (B,) float32 of the features of two batches of latents: the sum over slices."""
        layers = zip(a, b, self.channel_weights, strict=True)
        return torch.stack([feature_distance(one, other, w.flatten()) for one, other, w in layers]).sum(0)

    @torch.no_grad()
    def clamp_channels_(self) -> None:
        """Set the channels' weights that are below 0 to 0, in place: a difference never brings latents nearer."""
        for weights in self.channel_weights:
            weights.clamp_(min=0)

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply all distances by `factor`, in place."""
        for weights in self.channel_weights:
            weights.mul_(factor)


def _slice(layout: Layout, k: int) -> nn.ModuleDict:
    layers: dict[str, nn.Module] = {}
    for one in layout.slices[k]:
        layers[str(one.index)] = nn.Conv2d(one.inputs, one.outputs, KERNEL, padding=1)
        if one.has_norm:
            layers[str(one.index + 1)] = nn.BatchNorm2d(one.outputs)
    return nn.ModuleDict(layers)


def new(layout: Layout, seed: int) -> LatentLpips:
    """Return the network before training, drawn from `seed`: He's weights, and channels that all weigh alike."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = LatentLpips(layout)
        for one in network.net.modules():
            if isinstance(one, nn.Conv2d):
                nn.init.kaiming_normal_(one.weight, nonlinearity="relu")
                nn.init.zeros_(one.get_parameter("bias"))
        for weights in network.channel_weights:
            nn.init.constant_(weights, 1.0 / weights.numel())
    return network


def file_of(place: Path) -> Path:
    """Return the file of weights at `place`: itself, or that in the folder of a train_perceptual stage."""
    return place / FILE if place.is_dir() else place


def skeleton(place: Path) -> LatentLpips:
    """Return the network at `place` on the meta device. Raise as `load`."""
    path = file_of(place)
    with torch.device("meta"):
        return LatentLpips(_layout_in(path, read_shapes(path)))


def load(place: Path, channels: int, device: torch.device) -> LatentLpips:
    """Return the network at `place`, a file or a train_perceptual stage's folder, frozen, for latents of `channels`.

    Raise CheckpointError for a file that is missing or damaged, and ValueError for another network or one by which no
    latents differ.
    """
    path = file_of(place)
    network, weights = skeleton(place), read_tensors(path)
    if network.layout.channels != channels:
        raise ValueError(
            f"{path}: it compares latents of {network.layout.channels} channels, and the teacher's have {channels}: "
            "take weights that were trained for this autoencoder"
        )
    finite.refuse_of_others({name: value for name, value in weights.items() if value.ndim}, str(path))
    load_weights(network, {name: value.float() for name, value in weights.items()}, path)
    network.eval().requires_grad_(False)
    draws = torch.Generator().manual_seed(0)
    if not network(*torch.randn(2, 1, channels, PROBE, PROBE, generator=draws)).item() > 0:
        raise ValueError(
            f"{path}: two different latents are not apart by it, so that nothing could be learned: its weights are 0, "
            "below 0 or damaged; train or convert it again"
        )
    return network.to(device)


def save(network: LatentLpips, path: Path) -> None:
    """Write the weights of `network` to the safetensors file `path`."""
    write_tensors(path, network.state_dict())


def convert(source: Path, out: Path) -> Layout:
    """Write the published weights in `source` as the safetensors file `out`, and return their layout.

    Only tensors are read from `source`: torch refuses a file that would execute code. Raise ValueError for another
    network.
    """
    published = torch.load(source, map_location="cpu", weights_only=True)
    state = published.get("state_dict", published)
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if isinstance(value, Tensor)}
    for name in [name for name in weights if name.startswith(COPY)]:
        own = name.replace(COPY, "lin", 1)
        if own in weights and not torch.equal(weights[own], weights[name]):
            raise ValueError(f"{source}: {own} and {name}, its copy, differ: the file is damaged")
        weights[own] = weights.pop(name)
    layout = _layout_in(source, {name: list(value.shape) for name, value in weights.items()})
    write_tensors(out, weights)
    return layout


def _layout_in(path: Path, shapes: dict[str, list[int]]) -> Layout:
    try:
        return layout_of(shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert published weights of a latent LPIPS to safetensors.")
    parser.add_argument("source", type=Path, help="file of torch, such as sdxl_latest_vgg16_tuned.pth of E-LatentLPIPS")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.out)
