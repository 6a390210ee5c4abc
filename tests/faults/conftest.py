"""A disk of its own for a test, where the system lets one be mounted."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A mounted folder of 64 MB, and a function that gives it other mount options (`size=...`, `ro`)."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    try:
        refused = mount("size=64m")
    except FileNotFoundError:
        refused = 1
    if refused:
        pytest.skip("this system lets no disk be mounted here")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)
