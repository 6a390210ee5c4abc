"""The memory that a stage took at its peak beside what was predicted of it.

On CUDA that is what torch allocated. On a CPU it is how far the process grew, at its peak during the stage, beyond what
it had before, once the memory of earlier stages was given back; Linux says so, other systems do not. That is more than
tensors: libraries take some when they are first used, and the allocator keeps what is free.
"""

import ctypes
import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .memory import Memory
from .units import in_words

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
FORGET_THE_PEAK = "5"


@dataclass(frozen=True)
class Meter:
    """Measures one stage: made before it, asked after it."""

    device: torch.device
    predicted: Memory | None  # None where it could not be
    before: int | None = None  # bytes of the process, None where the system does not say

    def measured(self) -> int | None:
        """Bytes at the peak since this was made; None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        highest = _of_process("VmHWM")
        return None if highest is None or self.before is None else max(0, highest - self.before)

    def record(self) -> dict[str, Any]:
        """Both, for the manifest."""
        parts = asdict(self.predicted) | {"total": self.predicted.total} if self.predicted else None
        return {"predicted": parts, "measured": self.measured()}

    def __str__(self) -> str:
        """Both, for people: "predicted 337 MB of tensors, measured 351 MB (the process's growth, ...)"."""
        grown = "the process's growth, with what libraries take and the allocator keeps"
        measured, what = self.measured(), "allocated" if self.device.type == "cuda" else grown
        seen = "not measured on this system" if measured is None else f"measured {in_words(measured)} ({what})"
        return f"predicted {in_words(self.predicted.total)} of tensors, {seen}" if self.predicted else seen


def begin(device: torch.device, predicted: Memory | None) -> Meter:
    """Give back what earlier stages left, forget the peak so far and measure from now on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return Meter(device, predicted)
    if (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of the GNU library
        give_back(0)
    if RESET.exists():
        RESET.write_text(FORGET_THE_PEAK, encoding="utf-8")
    return Meter(device, predicted, _of_process("VmRSS"))


def _of_process(name: str) -> int | None:
    """A size that Linux gives of this process, in bytes; None elsewhere."""
    if not STATUS.is_file():
        return None
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name}:"))
    return next((1024 * int(value) for _, value, _ in lines), None)
