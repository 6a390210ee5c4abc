"""Devices by name, and the share of its matrix rate that a step is assumed to reach on each.

Rates are 10^12 operations a second of dense matrix products with float32 sums, memory in bytes of 10^9 to the GB, both
from the makers' data sheets (with sparsity they print twice as much).
"""

from dataclasses import dataclass

from ..training.devices import device_of

GPU_SHARE = 0.4  # of the matrix rate: an assumption, no GPU has been measured
CPU_SHARE = 0.6  # measured over trajectories and distillation of recipes/emoji_demo.yaml, see docs/log.md
THIS = "this"


@dataclass(frozen=True)
class Device:
    """A device: its `memory` in bytes, and its `rates` in 10^12 operations a second by precision.

    Precisions are "float32", "tf32", "bfloat16" and "float16".
    """

    name: str
    kind: str
    memory: int
    rates: dict[str, float]

    @property
    def share(self) -> float:
        """The share of the matrix rate that a step reaches."""
        return CPU_SHARE if self.kind == "cpu" else GPU_SHARE

    @property
    def is_shared(self) -> bool:
        """Whether all processes of a launch share this device and its memory, as they do a CPU."""
        return self.kind == "cpu"


def _gpu(name: str, memory_gb: int, float32: float, tf32: float, half: float) -> Device:
    rates = {"float32": float32, "tf32": tf32, "bfloat16": half, "float16": half}
    return Device(name, "cuda", memory_gb * 10**9, rates)


DEVICES = {
    "h100": _gpu("H100 SXM", 80, 67.0, 494.5, 989.5),
    "h200": _gpu("H200 SXM", 141, 67.0, 494.5, 989.5),
    "a100": _gpu("A100 80GB", 80, 19.5, 156.0, 312.0),
    "l40s": _gpu("L40S", 48, 91.6, 183.0, 362.0),
    "rtx4090": _gpu("RTX 4090", 24, 82.6, 82.6, 165.2),
    "rtx3090": _gpu("RTX 3090", 24, 35.6, 35.6, 71.0),
}


def kind_for(name: str, device: Device | None = None) -> str:
    """Return the kind ("cuda", "cpu", ...) of `device`, else of a recipe's device `name`, which need not be here."""
    if device is not None:
        return device.kind
    return device_of("auto").type if name == "auto" else name
