"""Operations on the meta device, where only shapes come out: what an operation makes is found once a set of shapes.

torch takes about 0.1 ms to find the shape of a sum, and a large denoiser's step is a hundred thousand operations of a
few hundred kinds.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WRITES = {aten.uniform_, aten.normal_, aten.zero_, aten.fill_, aten.copy_}  # and return what they wrote to


class Shapes(TorchDispatchMode):
    """Operations on meta tensors in it are looked up where their like was met before."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


@dataclass(frozen=True)
class _Made:
    """A new tensor that shares its storage with no other."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


_known: dict[tuple, _Made | tuple[_Made | None, ...] | None] = {}  # None: not to be made again from its shape alone


def computed(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what `function` makes of its arguments: meta tensors as it would make them, of no content."""
    if function.overloadpacket in WRITES and args[0].is_meta:
        return args[0]
    key = _key((args, kwargs)) if _only_makes(function) else None
    if key is None:
        return function(*args, **kwargs)
    if (function, key) not in _known:
        out = function(*args, **kwargs)
        _known[function, key] = _made(out)
        return out
    found = _known[function, key]
    if found is None:
        return function(*args, **kwargs)
    return found.again() if isinstance(found, _Made) else tuple(one and one.again() for one in found)


@cache
def _only_makes(function: OpOverload) -> bool:
    """Whether `function` writes to none of its arguments and returns new tensors, no views of them."""
    schema = function._schema
    return bool(schema.returns) and all(one.alias_info is None for one in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Any:
    """Return what the shapes that come out depend on; None where a tensor has content."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, list | tuple):
        keys = tuple(map(_key, value))
        return None if None in keys else keys
    return type(value), value  # 1, 1.0 and True are equal, and promote to different types


def _made(out: Any) -> _Made | tuple[_Made | None, ...] | None:
    """Return how `out` is made again, None where that cannot be said by its shapes."""
    if isinstance(out, tuple) and all(one is None or isinstance(one, Tensor) for one in out):
        parts = tuple(one if one is None else _of_tensor(one) for one in out)
        storages = {one.untyped_storage()._cdata for one in out if one is not None}
        whole = all((one is None) == (two is None) for one, two in zip(out, parts, strict=True))
        return parts if whole and len(storages) == sum(one is not None for one in out) else None
    return _of_tensor(out) if isinstance(out, Tensor) else None


def _of_tensor(out: Tensor) -> _Made | None:
    """Return how `out` is made again, None where it has content, or storage beyond what its shape says."""
    if not out.is_meta:
        return None
    made = _Made(out.shape, out.stride(), out.dtype)
    return made if made.again().untyped_storage().nbytes() == out.untyped_storage().nbytes() else None
