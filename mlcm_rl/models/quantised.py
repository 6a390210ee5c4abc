"""A frozen denoiser in 8 or 4 bits: its linear layers keep their weights as integers and multiply by floats.

The weights have bitsandbytes' forms: `int8`, a scale a row (Dettmers et al. 2022, arXiv 2208.07339), 1 byte a weight;
`nf4`, a scale for 64 weights (Dettmers et al. 2023, arXiv 2305.14314), 0.5625 bytes. Its layers are not used: the one
for int8 rounds activations too, and both have a state beside their weights. Here all is in plain tensors, which a LoRA
student shares with its teacher as it shares floats.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..recipe.experiment import missing_library
from ..recipe.types import Quantised
from ..storage import finite

BLOCK = 64  # weights that share a scale in nf4
LARGEST = 127  # of int8


class QuantisedLinear(nn.Linear):
    """A frozen linear layer with its weights in `integers`, int8 (out, in) or nf4 two in a byte, and float32 `scales`.

    Its bias and the precision `dtype` that its weights had are those of the layer `source`.
    """

    integers: Tensor
    scales: Tensor

    def __init__(self, source: nn.Linear, kind: Quantised, integers: Tensor, scales: Tensor, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.kind, self.dtype = kind, dtype
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        self.bias = source.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights (out, in) as floats, a new tensor each time, for modules that do not call this layer."""
        return self.floats(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product in the precision of `x`, or in autocast's."""
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _Product.apply(x, self)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """Return the weights (out, in) in `dtype`, a new tensor."""
        if self.kind == "int8":
            return self.integers.to(dtype).mul_(self.scales[:, None] / LARGEST)
        from bitsandbytes import functional

        shape = torch.Size((self.out_features, self.in_features))
        state = functional.QuantState(self.scales, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return functional.dequantize_4bit(self.integers, state)

    def empty(self) -> "QuantisedLinear":
        """Return a layer like this one on the meta device."""
        integers, scales = (torch.empty_like(one, device="meta") for one in (self.integers, self.scales))
        layer = QuantisedLinear(self, self.kind, integers, scales, self.dtype)
        if self.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(self.bias, device="meta"), requires_grad=False)
        return layer


class _Product(torch.autograd.Function):
    """The product with a layer's weights, which are made floats in the forward pass and again in the backward pass.

    Autograd by itself would keep the floats of every layer from one to the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.floats(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.floats(gradient.dtype), None


def quantise_(network: nn.Module, kind: Quantised, device: torch.device) -> None:
    """Replace the linear layers of `network` by quantised ones on `device`, one at a time; the rest stays as it is.

    Convolutions, norms and embeddings are not quantised. Raise ValueError where bitsandbytes is not installed, or for
    weights that are not finite in float16, in which int8 reads them.
    """
    if message := missing_library(kind):
        raise ValueError(f"teacher.quantise: {message}")
    for name, layer in list(network.named_modules()):
        # Subclasses use their weights in other ways, and an odd number of columns does not go into bytes of two.
        if type(layer) is nn.Linear and layer.in_features % 2 == 0:
            integers, scales = _integers(layer.weight.detach().to(device), kind)
            if not scales.is_meta and not finite.is_finite(scales):
                raise ValueError(f"teacher.quantise: {name} has weights that are not finite in float16: leave it out")
            network.set_submodule(name, QuantisedLinear(layer, kind, integers, scales, layer.weight.dtype))


def _integers(weight: Tensor, kind: Quantised) -> tuple[Tensor, Tensor]:
    """Return `weight` (out, in) as integers, with its scales."""
    from bitsandbytes import functional

    if kind == "int8":
        rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return rows, scales
    blocks, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return blocks, state.absmax


def is_quantised(network: nn.Module) -> bool:
    """Return whether `network` has quantised layers."""
    return any(isinstance(layer, QuantisedLinear) for layer in network.modules())


def quantise_like_(network: nn.Module, source: nn.Module) -> None:
    """Replace the layers of `network` that are quantised in `source` by empty ones, to load the weights of `source`."""
    for name, layer in source.named_modules():
        if isinstance(layer, QuantisedLinear):
            network.set_submodule(name, layer.empty())
