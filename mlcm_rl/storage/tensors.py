"""Tensors in safetensors files: checked when they are read, and refused when they are not finite."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import finite
from .files import CheckpointError, replacing, require_space
from .tensor_headers import read_header

MAX_MAPPED = 2**25  # bytes read of a file, after which it is mapped anew


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU. Raise CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        read_header(path)  # raises for a name that is there twice
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, on the CPU, each read when it is looked up and not remembered.

    Raise CheckpointError if the file is missing or damaged. What was read of a mapped file counts as memory of the
    process until the mapping is closed, so that the file is mapped anew after every `MAX_MAPPED` bytes.
    """

    def __init__(self, path: Path):
        self.path, self.shapes = path, read_shapes(path)
        self._file: Any = None
        self._num_bytes = 0  # that were read of this mapping

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        try:
            if self._file is None or self._num_bytes > MAX_MAPPED:
                self._file, self._num_bytes = safe_open(self.path, "pt"), 0
            tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from error
        self._num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def load_weights(network: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the `tensors` of the file `path` into `network`. Raise CheckpointError if names or shapes differ."""
    if odd := misfits(tensors, network.state_dict()):
        raise CheckpointError(f"{path}: {len(odd)} tensors do not fit the network, for example {odd[0]}")
    network.load_state_dict(tensors, assign=True)


def misfits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the names, sorted, that only one of two sets of tensors has, or whose shapes differ."""
    shapes = [{name: value.shape for name, value in tensors.items()} for tensors in (actual, expected)]
    return sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a safetensors file's tensors, from its header. Raise CheckpointError as `read_tensors`."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        read_header(path)  # raises for a name that is there twice
        with safe_open(path, "pt") as file:  # compares the header with the file's size
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, may_lack: bool = False
) -> None:
    """Write `tensors` as safetensors, on the CPU and contiguous. With `may_lack`, NaN marks a missing value.

    The same tensors and metadata give the same bytes. Raise CheckpointError for NaN or infinity, and if the disk is
    too full.
    """
    if not may_lack and (name := finite.first_nonfinite(tensors)) is not None:
        raise CheckpointError(f"{path} was not written: {name} is not made of finite numbers")
    with replacing(path) as temporary:
        require_space(path, sum(value.numel() * value.element_size() for value in tensors.values()))
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        if metadata and len(metadata) > 1:
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: the library writes it in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
