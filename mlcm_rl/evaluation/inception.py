"""The Inception network that defines FID: TensorFlow's of 2015-12-05, not torchvision's of the same name.

It differs from torchvision's in its average pooling, which does not count the padding; in its last block, which pools
by maximum; in 1,008 classes; and in its input: resized to 299 without half-pixel centres, then (x - 128) / 128. FID
uses the 2,048 means before the classifier, which is left out here.

The published weights are a plain state dict. Once, without executing any code in the file,

    python -m mlcm_rl.evaluation.inception pt_inception-2015-12-05-6726825d.pth inception.safetensors

converts them to safetensors. This project had no access to them: structure, shapes, parameters and every operation are
tested, but no FID with the published weights was compared with published figures.
"""

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..storage.tensors import misfits, read_tensors, write_tensors

SIDE = 299  # pixels
NUM_FEATURES = 2048
NUM_CLASSES = 1008  # by which the published weights are recognised; torchvision's have 1,000

# A branch is a chain of steps, each its width and its kernel; a step of two kernels applies both to its input and
# concatenates. Branches and weights have torchvision's names.
Step = tuple[int, *tuple[tuple[int, int], ...]]
Branches = dict[str, list[Step]]
ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
WIDE3, TALL3, WIDE7, TALL7 = (1, 3), (3, 1), (1, 7), (7, 1)


def _sevens(width: int) -> Branches:
    """Return the branches of a block at 17 x 17, of `width` channels inside."""
    deep: list[Step] = [(width, ONE), (width, TALL7), (width, WIDE7), (width, TALL7), (192, WIDE7)]
    return {"1x1": [(192, ONE)], "7x7": [(width, ONE), (width, WIDE7), (192, TALL7)], "7x7dbl": deep}


FIVES: Branches = {
    "1x1": [(64, ONE)],
    "5x5": [(48, ONE), (64, FIVE)],
    "3x3dbl": [(64, ONE), (96, THREE), (96, THREE)],
}
TO_17: Branches = {"3x3": [(384, THREE)], "3x3dbl": [(64, ONE), (96, THREE), (96, THREE)]}
TO_8: Branches = {
    "3x3": [(192, ONE), (320, THREE)],
    "7x7x3": [(192, ONE), (192, WIDE7), (192, TALL7), (192, THREE)],
}
FORKS: Branches = {
    "1x1": [(320, ONE)],
    "3x3": [(384, ONE), (384, WIDE3, TALL3)],
    "3x3dbl": [(448, ONE), (384, THREE), (384, WIDE3, TALL3)],
}


def convolution(
    width_in: int, width_out: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True
) -> nn.Sequential:
    """Return convolution, batch norm and ReLU; `padded` keeps the size."""
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
    layers = {
        "conv": nn.Conv2d(width_in, width_out, kernel, stride, padding, bias=False),
        "bn": nn.BatchNorm2d(width_out, eps=1e-3),
        "relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


def average_pool(x: Tensor) -> Tensor:
    """Return the mean over 3 x 3 of `x` (B, C, H, W), at the border over the pixels inside."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halving_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class Mixed(nn.Module):
    """Branches over one input and a pooling of it, concatenated.

    With `halving_pool` the last step of every branch has stride 2; the other poolings are projected to `pool_width`.
    """

    def __init__(self, width_in: int, branches: Branches, pool=average_pool, pool_width: int = 192):
        super().__init__()
        self.pool, halves = pool, pool is halving_pool
        self.chains: list[list[list[str]]] = []  # branch -> step -> names of the parallel convolutions
        self.width_out = width_in if halves else pool_width
        for branch, steps in branches.items():
            width, chain = width_in, []
            for number, (width_out, *kernels) in enumerate(steps, 1):
                strided = halves and number == len(steps)
                name = f"branch{branch}_{number}" if len(steps) > 1 else f"branch{branch}"
                names = [name] if len(kernels) == 1 else [f"{name}a", f"{name}b"]
                for one, kernel in zip(names, kernels, strict=True):
                    self.add_module(one, convolution(width, width_out, kernel, 1 + strided, padded=not strided))
                chain.append(names)
                width = width_out * len(kernels)
            self.chains.append(chain)
            self.width_out += width
        if not halves:
            self.branch_pool = convolution(width_in, pool_width, ONE)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            hidden = x
            for names in chain:
                hidden = torch.cat([self.get_submodule(name)(hidden) for name in names], dim=1)
            outputs.append(hidden)
        pooled = self.pool(x)
        return torch.cat([*outputs, pooled if self.pool is halving_pool else self.branch_pool(pooled)], dim=1)


class InceptionV3(nn.Module):
    """FID's features (B, 2048) float32 of pictures (B, 3, H, W) uint8 of any size."""

    num_features = NUM_FEATURES

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = convolution(3, 32, THREE, stride=2, padded=False)
        self.Conv2d_2a_3x3 = convolution(32, 32, THREE, padded=False)
        self.Conv2d_2b_3x3 = convolution(32, 64, THREE)
        self.Conv2d_3b_1x1 = convolution(64, 80, ONE)
        self.Conv2d_4a_3x3 = convolution(80, 192, THREE, padded=False)
        blocks: dict[str, tuple[Any, ...]] = {
            "5b": (FIVES, average_pool, 32),
            "5c": (FIVES, average_pool, 64),
            "5d": (FIVES, average_pool, 64),
            "6a": (TO_17, halving_pool),
            "6b": (_sevens(128),),
            "6c": (_sevens(160),),
            "6d": (_sevens(160),),
            "6e": (_sevens(192),),
            "7a": (TO_8, halving_pool),
            "7b": (FORKS,),
            "7c": (FORKS, max_pool),
        }
        self.blocks, width = [f"Mixed_{place}" for place in blocks], 192
        for name, settings in zip(self.blocks, blocks.values(), strict=True):
            block = Mixed(width, *settings)
            self.add_module(name, block)
            width = block.width_out

    def forward(self, pictures: Tensor) -> Tensor:
        x = (resized(pictures.float(), SIDE) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))  # 71
        x = halving_pool(x)  # 35
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def resized(x: Tensor, side: int) -> Tensor:
    """Resize `x` (B, C, H, W) to (B, C, side, side), bilinear as in TensorFlow 1: output i samples i * size / side.

    There are no half-pixel centres and no smoothing, so that larger pictures alias, as in FID's own code.
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        place = torch.arange(side, device=x.device, dtype=x.dtype) * (size / side)
        low = place.long()
        share = (place - low).reshape(-1, 1) if dim == -2 else place - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1)), share)
    return x


def load(path: Path | str, device: torch.device | str) -> InceptionV3:
    """Load the network from a safetensors file, frozen. Raise ValueError for another network's weights."""
    with torch.device("meta"):
        network = InceptionV3()
    network.load_state_dict(_checked(read_tensors(Path(path)), network, path), assign=True)
    return network.to(device).eval().requires_grad_(False)


def convert(source: Path | str, out: Path | str) -> None:
    """Write the published state dict in `source` as the safetensors file `out`, without the classifier.

    Only tensors are read from `source`: torch refuses a file that would execute code. Raise ValueError for weights of
    another Inception, such as torchvision's, with which the distances would not be FID.
    """
    published = torch.load(source, map_location="cpu", weights_only=True)
    classifier = published.get("fc.weight")
    if classifier is None or classifier.shape != (NUM_CLASSES, NUM_FEATURES):
        shape = "no classifier" if classifier is None else f"one of shape {tuple(classifier.shape)}"
        raise ValueError(f"{source}: FID's Inception has a classifier of {NUM_CLASSES} classes, this file has {shape}")
    with torch.device("meta"):
        network = InceptionV3()
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    weights = counters | {name: value for name, value in published.items() if not name.startswith("fc.")}
    write_tensors(Path(out), _checked(weights, network, source))


def _checked(weights: dict[str, Tensor], network: nn.Module, path: Path | str) -> dict[str, Tensor]:
    if names := misfits(weights, network.state_dict()):
        raise ValueError(
            f"{path}: {len(names)} tensors are not those of FID's Inception, for example {names[0]}; "
            "`python -m mlcm_rl.evaluation.inception` converts the published weights"
        )
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert the published weights of FID's Inception to safetensors.")
    parser.add_argument("source", help="pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("out", help="safetensors file to write")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.out)
