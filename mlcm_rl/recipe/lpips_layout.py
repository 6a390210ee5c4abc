"""The layers of a latent LPIPS network by the names and shapes of its tensors. Imports no torch.

Names are those of the public package `lpips` and of E-LatentLPIPS (arXiv 2405.05967): convolutions
`net.slice1.0.weight` (out, in, 3, 3), each with a bias and perhaps a batch norm one index on, in slices from 1; the
channels' weights of slice 1 in `lin0.model.1.weight` (1, C, 1, 1). Widths, depths and the latent's channels are any.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

KERNEL = 3
CONVOLUTION = re.compile(r"net\.slice(\d+)\.(\d+)\.weight")
VGG_WIDTHS, VGG_DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
FILE = "lpips.safetensors"  # in the folder of a train_perceptual stage
CONVERT = "`python -m mlcm_rl.models.lpips PUBLISHED.pth OUT.safetensors` converts published weights"


@dataclass(frozen=True)
class Convolution:
    """A convolution with its index in its slice, its channels in and out, and whether a batch norm follows it."""

    index: int
    inputs: int
    outputs: int
    has_norm: bool = False


@dataclass(frozen=True)
class Layout:
    """The convolutions of each slice; a 2 x 2 maximum stands before the last slice and nowhere else.

    VGG has one before each but the first: latents are small already, and the first three are left out (TLCM v6,
    section 4.3).
    """

    slices: tuple[tuple[Convolution, ...], ...]

    @property
    def channels(self) -> int:
        """The channels of the latents."""
        return self.slices[0][0].inputs

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each slice's features."""
        return tuple(convolutions[-1].outputs for convolutions in self.slices)

    def shapes(self) -> dict[str, list[int]]:
        """Return the names and shapes of all tensors."""
        shapes: dict[str, list[int]] = {}
        for k, convolutions in enumerate(self.slices):
            for one in convolutions:
                name = f"net.slice{k + 1}.{one.index}"
                shapes |= {f"{name}.weight": [one.outputs, one.inputs, KERNEL, KERNEL], f"{name}.bias": [one.outputs]}
                if one.has_norm:
                    norm = f"net.slice{k + 1}.{one.index + 1}"
                    parts = ("weight", "bias", "running_mean", "running_var")
                    shapes |= {f"{norm}.{part}": [one.outputs] for part in parts}
                    shapes[f"{norm}.num_batches_tracked"] = []
            shapes[f"lin{k}.model.1.weight"] = [1, convolutions[-1].outputs, 1, 1]
        return shapes


def new_layout(channels: int, widths: Sequence[int], depths: Sequence[int]) -> Layout:
    """Return the layout for latents of `channels`, with slices of these widths and numbers of convolutions.

    With VGG_WIDTHS and VGG_DEPTHS it is VGG16, and its indices are those of torchvision's.
    """
    slices, index, inputs = [], 0, channels
    for width, depth in zip(widths, depths, strict=True):
        convolutions = []
        for _ in range(depth):
            convolutions.append(Convolution(index, inputs, width))
            index, inputs = index + 2, width  # the other is the ReLU
        slices.append(tuple(convolutions))
        index += 1  # VGG's maximum
    return Layout(tuple(slices))


def layout_of(shapes: Mapping[str, Sequence[int]]) -> Layout:
    """Return the layout of tensors of these `shapes`. Raise ValueError that names a tensor that does not fit."""
    indices: dict[int, list[int]] = {}
    for name in shapes:
        if (match := CONVOLUTION.fullmatch(name)) and len(shapes[name]) == 4:
            indices.setdefault(int(match[1]), []).append(int(match[2]))
    if sorted(indices) != list(range(1, len(indices) + 1)) or not indices:
        raise ValueError(f"no convolutions net.slice1.N.weight, net.slice2.N.weight, ...: no LPIPS network; {CONVERT}")
    slices = tuple(tuple(_convolutions(shapes, k, sorted(indices[k]))) for k in sorted(indices))
    layout = Layout(slices)
    ordered = [one for convolutions in slices for one in convolutions]
    for before, after in pairwise(ordered):
        if before.outputs != after.inputs:
            raise ValueError(f"a convolution of {before.outputs} channels is followed by one that takes {after.inputs}")
    expected = layout.shapes()
    actual = {name: list(shape) for name, shape in shapes.items()}
    odd = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
    if odd:
        raise ValueError(
            f"{len(odd)} tensors are not those of an LPIPS network, for example {odd[0]}: expected "
            f"{expected.get(odd[0], 'none')}, found {actual.get(odd[0], 'none')}; {CONVERT}"
        )
    return layout


def _convolutions(shapes: Mapping[str, Sequence[int]], k: int, indices: Sequence[int]) -> Iterator[Convolution]:
    for index in indices:
        outputs, inputs = shapes[f"net.slice{k}.{index}.weight"][:2]
        yield Convolution(index, inputs, outputs, f"net.slice{k}.{index + 1}.running_mean" in shapes)
