"""The cores and the memory that this process may use: the machine's, or those of the container that it runs in."""

import os
import sys
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # the limits of a container


def unlike_linux() -> str | None:
    """Return what to know of runs on this system; None on Linux, where everything is tested."""
    if sys.platform == "linux":
        return None
    return (
        "it is not tested on this system: run one process, on its CPU or Apple's GPU; ZeRO, FSDP and quantised "
        "teachers need Linux, and memory is not measured (docs/platforms.md)"
    )


def memory() -> int:
    """Return the bytes of memory that this process may use."""
    total = psutil.virtual_memory().total
    limit = container_memory()
    return min(total, limit) if limit else total


def cores() -> int:
    """Return the number of cores that this process may run on."""
    process = psutil.Process()
    affinity = process.cpu_affinity() if hasattr(process, "cpu_affinity") else None  # macOS has none
    return len(affinity or []) or os.cpu_count() or 1


def container_cores() -> float | None:
    """Return how many cores the container of this process may use; None if it has no limit."""
    text = _text_of(CGROUP / "cpu.max").split()
    return int(text[0]) / int(text[1]) if len(text) == 2 and text[0].isdecimal() else None


def container_memory() -> int | None:
    """Return how many bytes the container of this process may use; None if it has no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        if (text := _text_of(CGROUP / name).strip()).isdecimal() and int(text) < 2**60:
            return int(text)
    return None


def _text_of(path: Path) -> str:
    """Return the text of a file of the kernel; "" where there is none."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
