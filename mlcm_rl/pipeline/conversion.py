"""A single-file checkpoint as a teacher's folder, with errors for the command line."""

from pathlib import Path

from ..models import single_file
from .errors import RunError, prefix_errors

__all__ = ["RunError", "convert"]


@prefix_errors("convert")
def convert(file: Path, like: Path, out: Path) -> Path:
    """Write the checkpoint `file` as the folder `out`, as `single_file.convert` does. Raise RunError."""
    return single_file.convert(file, like, out)
