"""Tensors in safetensors files: checked when they are read, refused where they are not finite."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import finite
from .files import CheckpointError, replacing, require_space
from .untrusted import parse_json

MAX_HEADER = 10**8  # bytes, of a safetensors file: the format's own limit


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError where it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        refuse_duplicate_names(path)
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def refuse_duplicate_names(path: Path) -> None:
    """Raise ValueError for a safetensors header that is no JSON or has a name twice, of which readers take either."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MAX_HEADER))
    parse_json(header.decode("utf-8"))


def load_weights(network: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give `network` the `tensors` of the file `path` for its own. Raises CheckpointError where they are another's."""
    if odd := misfits(tensors, network.state_dict()):
        raise CheckpointError(f"{path}: {len(odd)} tensors do not fit the network, for example {odd[0]}")
    network.load_state_dict(tensors, assign=True)


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names that only one of two sets of tensors has, or under which their shapes differ."""
    shapes = [{name: value.shape for name, value in tensors.items()} for tensors in (found, expected)]
    return sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, from its header. Raises CheckpointError as `read_tensors`."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        refuse_duplicate_names(path)
        with safe_open(path, "pt") as file:  # compares the header with the file's size
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, may_lack: bool = False
) -> None:
    """Save `tensors` as safetensors, on the CPU and contiguous; with `may_lack` NaN may stand where there is no value.

    The same tensors and metadata are the same bytes. Raises CheckpointError where the disk is too full, and for NaN or
    infinity.
    """
    if not may_lack and (name := finite.first_nonfinite(tensors)) is not None:
        raise CheckpointError(f"{path} was not written: {name} is not made of finite numbers")
    with replacing(path) as temporary:
        require_space(path, sum(value.numel() * value.element_size() for value in tensors.values()))
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        if metadata and len(metadata) > 1:
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, in place: the library writes it in one drawn at random."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
