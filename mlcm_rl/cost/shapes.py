"""Operations on the meta device, which compute shapes alone: the output of each is output_of once a set of shapes.

torch takes about 0.1 ms for the shape of a sum, and a large denoiser's step is a hundred thousand operations of a few
hundred kinds.
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
    """Operations inside take the shapes of their outputs from earlier ones with equal arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return output_of(function, args, kwargs or {})


@dataclass(frozen=True)
class _NewTensor:
    """How to make an output again: a new tensor that shares its storage with no other."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """Return such a tensor on the meta device."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


_Recipe = _NewTensor | tuple[_NewTensor | None, ...] | None  # None: a shape alone does not make it again
_recipes: dict[tuple, _Recipe] = {}


def output_of(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the outputs of `function`: meta tensors without content, as it would make them."""
    if function.overloadpacket in WRITES and args[0].is_meta:
        return args[0]
    key = _key((args, kwargs)) if _makes_new_tensors(function) else None
    if key is None:
        return function(*args, **kwargs)
    if (function, key) not in _recipes:
        out = function(*args, **kwargs)
        _recipes[function, key] = _recipe_of(out)
        return out
    recipe = _recipes[function, key]
    if recipe is None:
        return function(*args, **kwargs)
    return recipe.make() if isinstance(recipe, _NewTensor) else tuple(one and one.make() for one in recipe)


@cache
def _makes_new_tensors(function: OpOverload) -> bool:
    """Return whether `function` writes to none of its arguments and returns no views of them."""
    schema = function._schema
    return bool(schema.returns) and all(one.alias_info is None for one in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Any:
    """Return what the shapes of outputs depend on; None where a tensor has content."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, list | tuple):
        keys = tuple(map(_key, value))
        return None if None in keys else keys
    return type(value), value  # 1, 1.0 and True are equal, and promote to different types


def _recipe_of(out: Any) -> _Recipe:
    """Return how to make `out` again, None where its shapes do not tell."""
    if isinstance(out, tuple) and all(one is None or isinstance(one, Tensor) for one in out):
        parts = tuple(one if one is None else _of_tensor(one) for one in out)
        storages = {one.untyped_storage()._cdata for one in out if one is not None}
        whole = all((one is None) == (two is None) for one, two in zip(out, parts, strict=True))
        return parts if whole and len(storages) == sum(one is not None for one in out) else None
    return _of_tensor(out) if isinstance(out, Tensor) else None


def _of_tensor(out: Tensor) -> _NewTensor | None:
    """Return how to make `out` again, None where it has content, or storage beyond that of its shape."""
    if not out.is_meta:
        return None
    new = _NewTensor(out.shape, out.stride(), out.dtype)
    return new if new.make().untyped_storage().nbytes() == out.untyped_storage().nbytes() else None
