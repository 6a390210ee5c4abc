"""The peak memory of a stage beside its prediction.

On CUDA it is the memory that torch allocated. On a CPU it is the growth of the process, at its peak during the stage,
after the memory of earlier stages was released; only Linux reports it. That is more than tensors: libraries allocate
when they are first used, and the allocator keeps freed memory.
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
    """A meter of one stage: created before it, read after it."""

    device: torch.device
    predicted: Memory | None  # None where the prediction failed
    before: int | None = None  # bytes of the process; None where the system does not report them

    def measured(self) -> int | None:
        """Return the bytes at the peak since this was created; None where the system does not report them."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        highest = _of_process("VmHWM")
        return None if highest is None or self.before is None else max(0, highest - self.before)

    def record(self) -> dict[str, Any]:
        """Return prediction and measurement for the manifest."""
        parts = asdict(self.predicted) | {"total": self.predicted.total} if self.predicted else None
        return {"predicted": parts, "measured": self.measured()}

    def __str__(self) -> str:
        """Return both in words: "predicted 337 MB of tensors, measured 351 MB (the process's growth, ...)"."""
        grown = "the process's growth, with what libraries take and the allocator keeps"
        measured, what = self.measured(), "allocated" if self.device.type == "cuda" else grown
        measurement = "not measured on this system" if measured is None else f"measured {in_words(measured)} ({what})"
        return (
            f"predicted {in_words(self.predicted.total)} of tensors, {measurement}" if self.predicted else measurement
        )


def begin(device: torch.device, predicted: Memory | None) -> Meter:
    """Release the memory of earlier stages, reset the peak and return a meter that measures from now on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return Meter(device, predicted)
    if (release := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of the GNU library
        release(0)
    if RESET.exists():
        RESET.write_text(FORGET_THE_PEAK, encoding="utf-8")
    return Meter(device, predicted, _of_process("VmRSS"))


def _of_process(name: str) -> int | None:
    """Return a size of this process, in bytes, by its `name` in Linux's status file; None on other systems."""
    if not STATUS.is_file():
        return None
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name}:"))
    return next((1024 * int(value) for _, value, _ in lines), None)
