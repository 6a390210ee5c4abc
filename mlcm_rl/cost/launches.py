"""Memory that a training student takes in one of several processes, by the engine of a launch file.

The arithmetic is ZeRO's (Rajbhandari et al. 2020, section 3): of W weights a process keeps parameters, gradients and
optimiser states, and each level shards one more of them. Our engines (`training.engines`) keep all of it in float32:
4 bytes of weights and of gradients, 8 of moments, and under DeepSpeed 4 more, of a copy of its shard that it updates
though the weights are float32 already. Autocast's bfloat16 copies belong to the passes; of weights in parts there are
none beyond their use.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..training.engines import blocks_of
from ..training.launch import LaunchError, read
from ..training.processes import uses_deepspeed, uses_fsdp, world_size

FLOAT = 4  # bytes of a weight, a gradient and a copy
ADAM = 8  # two float32 moments a weight
BUCKET = 500_000_000  # elements that DeepSpeed exchanges at a time, and sets aside whatever the student's size
LEVELS = {"whole": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}


@dataclass(frozen=True)
class Launch:
    """How processes share a student: `engine` is one of LEVELS; `offload` keeps ZeRO-2's optimiser in host memory.

    `blocks` are the classes that FSDP2 gathers one by one.
    """

    engine: str = "whole"
    processes: int = 1
    offload: bool = False
    blocks: tuple[str, ...] = ()

    @property
    def level(self) -> int:
        """What is sharded: 0 nothing, 1 the optimiser's states, 2 gradients too, 3 weights too."""
        return LEVELS[self.engine]


def read_launch(path: Path) -> Launch:
    """Return the launch of the file `path`.

    Raises LaunchError as `read` does, and for settings whose memory cannot be predicted.
    """
    settings = read(path)
    processes, kind = settings["num_processes"], settings["distributed_type"]
    if kind == "DEEPSPEED":
        return _deepspeed(settings.get("deepspeed_config") or {}, processes, path)
    if kind == "FSDP":
        return _fsdp(settings.get("fsdp_config") or {}, processes, path)
    return Launch("whole", processes)


def of_this_process() -> Launch:
    """Return the launch that this process belongs to, from the environment that accelerate's launcher sets."""
    processes = world_size()
    if uses_deepspeed():
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu"
        return Launch(f"zero{os.environ['ACCELERATE_DEEPSPEED_ZERO_STAGE']}", processes, offload)
    if uses_fsdp():
        return Launch("fsdp2", processes, blocks=_names(os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")))
    return Launch("whole", processes)


def _deepspeed(settings: dict[str, Any], processes: int, path: Path) -> Launch:
    stage, offload = settings.get("zero_stage"), settings.get("offload_optimizer_device", "none")
    is_supported = (
        stage in (1, 2, 3) and offload in ("none", "cpu") and settings.get("offload_param_device", "none") == "none"
    )
    if not is_supported or (offload == "cpu" and stage != 2):
        raise LaunchError(
            f"{path}: plan knows zero_stage 1, 2 and 3, and the optimiser in host memory (cpu) with 2; "
            "write them as in recipes/launch/zero2_offload.yaml"
        )
    return Launch(f"zero{stage}", processes, offload == "cpu")


def _fsdp(settings: dict[str, Any], processes: int, path: Path) -> Launch:
    if settings.get("fsdp_version") != 2 or settings.get("fsdp_reshard_after_forward") is not True:
        raise LaunchError(
            f"{path}: plan knows fsdp_version 2 with fsdp_reshard_after_forward: true, as recipes/launch/fsdp2.yaml"
        )
    return Launch("fsdp2", processes, blocks=_names(str(settings.get("fsdp_transformer_layer_cls_to_wrap", ""))))


def _names(listed: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, listed.split(","))))


def part(size: int, processes: int) -> int:
    """Return the largest shard of `size` among `processes`."""
    return -(-size // processes)


def zero_bytes(
    weights: int, processes: int, level: int, parameter: int = FLOAT, gradient: int = FLOAT, optimiser: int = ADAM
) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients and optimiser states in one process, at ZeRO's `level` (0: all whole).

    The paper's own case is mixed precision: 2 and 2 bytes a weight, and K = 12 of optimiser states.
    """
    shared_from = zip((parameter, gradient, optimiser), (3, 2, 1), strict=True)
    parts = [part(size * weights, processes) if level >= first else size * weights for size, first in shared_from]
    return parts[0], parts[1], parts[2]


@dataclass(frozen=True)
class Outline:
    """Sizes of a training student, in bytes; `trained` alone counts weights."""

    trained: int
    weights: int  # of all its parameters, frozen ones too
    own: int  # of the parameters that it does not share with the teacher
    largest: int  # of one module's own parameters, which ZeRO-3 gathers at a time
    gathered: int  # of the parameters that FSDP2 gathers at a time, and of their gradients


@dataclass(frozen=True)
class Shard:
    """Bytes of a student in one process."""

    saved: int  # of parameters, beside a process on its own
    gradients: int
    optimiser: int
    averaged: int  # of one average of the trained weights
    exchange: int  # of buffers, and of gathered weights
    host: int  # of the optimiser in the memory of the CPU


def outline(student: nn.Module, teacher: nn.Module, blocks: Sequence[str]) -> Outline:
    """Return the sizes of `student`; `teacher` may share weights with it, `blocks` are gathered one by one."""
    shared = {value.untyped_storage()._cdata for value in teacher.parameters()}
    values = list(student.parameters())
    trained = sum(value.numel() for value in values if value.requires_grad)
    inside = blocks_of(student, blocks)
    working = sorted((_bytes(module) + _gradients(module) for module in inside), reverse=True)
    outside = _bytes(student) + _gradients(student) - sum(working)
    return Outline(
        trained=trained,
        weights=_bytes(student),
        own=sum(value.nbytes for value in values if value.untyped_storage()._cdata not in shared),
        largest=max(sum(value.nbytes for value in module.parameters(recurse=False)) for module in student.modules()),
        gathered=outside + sum(working[:2]),  # a block, and the next one that is fetched meanwhile
    )


def shard(student: Outline, launch: Launch) -> Shard:
    """Return the bytes of `student` in one process of `launch`; its passes come on top."""
    size, level, processes = student.trained, launch.level, launch.processes
    copy = FLOAT if launch.engine in ("zero1", "zero2", "zero3") else 0
    _, gradients, optimiser = zero_bytes(size, processes, level, optimiser=ADAM + copy)
    saved = student.own - part(student.weights, processes) if level == 3 else 0
    averaged = part(FLOAT * size, processes) if level == 3 else FLOAT * size
    exchange = {
        "whole": 0,  # gradients are exchanged where they are
        "zero1": FLOAT * BUCKET,
        "zero2": FLOAT * BUCKET,
        "zero3": FLOAT * BUCKET + student.largest,
        "fsdp2": student.gathered,
    }[launch.engine]
    if launch.offload:
        return Shard(saved, 0, 0, averaged, exchange, host=gradients + optimiser)
    return Shard(saved, gradients, optimiser, averaged, exchange, host=0)


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters())


def _gradients(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters() if value.requires_grad)
