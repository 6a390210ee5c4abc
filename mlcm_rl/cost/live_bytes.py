"""The peak memory of passes in bytes, measured by taking them on the meta device: shapes without data.

`Live` counts the tensors that are alive. `Kernels` stands in for a device's own kernels where the meta device computes
in another way: attention in one kernel, and autocast, which the meta device does not have.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .shapes import output_of

LOWERED = {F.linear, F.conv2d, F.conv3d, torch.matmul, torch.bmm, torch.baddbmm, F.scaled_dot_product_attention}
RAISED_ON_CUDA = {F.group_norm, F.layer_norm, F.rms_norm}  # autocast computes these in float32 there, not on a CPU


class Live(TorchDispatchMode):
    """Bytes of the meta tensors made inside: of those alive `now`, and the `peak` since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.counted: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = output_of(function, args, kwargs or {})
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.is_meta:
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count `storage` until it is freed; views share one, which is counted once."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.counted:
            self.counted.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.now -= size


class Attention(torch.autograd.Function):
    """Attention in one kernel: it saves its inputs, its output and one float32 a query, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any, **options: Any) -> Tensor:
    """Return `F.scaled_dot_product_attention` in one kernel; masks and other settings change no size."""
    return Attention.apply(query, key, value)


class Kernels(TorchFunctionMode):
    """Functions as a device of `kind` ("cuda", "cpu", ...) computes them, under autocast to bfloat16 where `autocast`.

    torch disables such modes in a backward pass: there only `checkpointed` applies them.
    """

    def __init__(self, kind: str, autocast: bool, caches: bool = True):
        super().__init__()
        self.kind, self.autocast, self.caches = kind, autocast, caches
        self.lowered: dict[int, Tensor] = {}  # copies of trained weights, which a cache keeps until it is cleared

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.autocast and function in LOWERED:
            args, kwargs = [self._low(one) for one in args], {name: self._low(one) for name, one in kwargs.items()}
        if self.autocast and function in RAISED_ON_CUDA and self.kind == "cuda":
            args, kwargs = [_raised(one) for one in args], {name: _raised(one) for name, one in kwargs.items()}
        is_plain = self.kind == "cpu" and self.autocast  # `training.autocast` turns the kernel off there
        if function is F.scaled_dot_product_attention and not is_plain:
            return attention(*args, **kwargs)
        return function(*args, **kwargs)

    def checkpointed(self, module: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return `module` of its arguments, computed again in the backward pass by these kernels.

        It is then under autocast if it is now.
        """
        again = partial(self._again, self.autocast)
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)

    @contextmanager
    def _again(self, autocast: bool) -> Iterator[None]:
        with self._under(autocast), self:
            yield

    @contextmanager
    def _under(self, autocast: bool) -> Iterator[None]:
        before, self.autocast = self.autocast, autocast
        try:
            yield
        finally:
            self.autocast = before

    def own_precision(self) -> AbstractContextManager[None]:
        """Return a block without autocast, as for a teacher or a reward."""
        return self._under(False)

    def forget_copies(self) -> None:
        """Clear autocast's cache, as where trained weights change places."""
        self.lowered.clear()

    def _low(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not (self.caches and value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(torch.bfloat16)
        if id(value) not in self.lowered:
            with torch.enable_grad():  # autocast's copies of a pass without gradient serve one with gradient too
                self.lowered[id(value)] = value.to(torch.bfloat16)
        return self.lowered[id(value)]


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
