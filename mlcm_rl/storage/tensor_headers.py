"""Headers of safetensors files, without torch: what tensors a file has, and whether it is whole."""

from pathlib import Path
from typing import Any

from .untrusted import parse_json

MAX_HEADER = 10**8  # bytes, of a safetensors file: the format's own limit
LENGTH_BYTES = 8  # in front of the header


def read_header(path: Path) -> tuple[Any, int]:
    """Return the header of a safetensors file and where its tensors begin, in bytes.

    Raise ValueError if the header is not JSON or has a name twice: readers differ in which they take.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = file.read(min(length, MAX_HEADER))
    return parse_json(header.decode("utf-8")), LENGTH_BYTES + length


def tensors_in(path: Path) -> dict[str, Any]:
    """Return dtype, shape and place of each tensor in a safetensors file, by name.

    Raise ValueError for a file that is damaged, or not as long as its header says.
    """
    try:
        header, begin = read_header(path)
        tensors = {name: dict(entry) for name, entry in dict(header).items() if name != "__metadata__"}
        expected = begin + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if expected != (actual := path.stat().st_size):
        raise ValueError(
            f"{path} is damaged: it has {actual:,} bytes, and {expected:,} by its header: copy or download it again"
        )
    return tensors
