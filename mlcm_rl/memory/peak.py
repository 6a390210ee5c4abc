"""The memory that a stage took at its peak beside what was predicted of it.

On CUDA that is what torch allocated. On a CPU it is how far the process grew, at its peak during the stage, beyond the
size that it had when it had started up; Linux says so, other systems do not.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..quantities import in_words
from . import Memory

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
FORGET_THE_PEAK = "5"


@dataclass(frozen=True)
class Meter:
    """Measures one stage: made before it, asked after it."""

    device: torch.device
    predicted: Memory | None  # None where it could not be

    def measured(self) -> int | None:
        """Bytes at the peak since this was made; None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        highest, first = _of_process("VmHWM"), _size_at_start()
        return None if highest is None or first is None else max(0, highest - first)

    def record(self) -> dict[str, Any]:
        """Both, for the manifest."""
        parts = asdict(self.predicted) | {"total": self.predicted.total} if self.predicted else None
        return {"predicted": parts, "measured": self.measured()}

    def __str__(self) -> str:
        """Both, for people: "predicted 337 MB, measured 351 MB (the process's growth)"."""
        measured, what = self.measured(), "allocated" if self.device.type == "cuda" else "the process's growth"
        seen = "not measured on this system" if measured is None else f"measured {in_words(measured)} ({what})"
        return f"predicted {in_words(self.predicted.total)}, {seen}" if self.predicted else seen


def begin(device: torch.device, predicted: Memory | None) -> Meter:
    """Forget the peak so far and measure from now on. The process counts as started up when this is first called."""
    _size_at_start()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        RESET.write_text(FORGET_THE_PEAK, encoding="utf-8")
    return Meter(device, predicted)


@cache
def _size_at_start() -> int | None:
    return _of_process("VmRSS")


def _of_process(name: str) -> int | None:
    """A size that Linux gives of this process, in bytes; None elsewhere."""
    if not STATUS.is_file():
        return None
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name}:"))
    return next((1024 * int(value) for _, value, _ in lines), None)
