"""What one of several processes holds of a training student, by the engine that a launch file asks for.

The arithmetic is ZeRO's (Rajbhandari et al. 2020, section 3): of W weights a process keeps parameters, gradients and
optimiser states, and each level leaves it one more of them only in part. What our engines keep (`training.engines`)
is float32 throughout: 4 bytes of weights and of gradients, 8 of moments, and under DeepSpeed 4 more of a copy of its
part that it updates, though the weights are float32 already. The bfloat16 copies of autocast are the passes' own and
whole in every engine.
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
    """Who holds what: `engine` is one of LEVELS; `offload` keeps what ZeRO-2 knows of the optimiser in host memory.

    `blocks` are the classes that FSDP2 gathers one by one.
    """

    engine: str = "whole"
    processes: int = 1
    offload: bool = False
    blocks: tuple[str, ...] = ()

    @property
    def level(self) -> int:
        """Of what a process keeps only its part: 1 the optimiser's states, 2 gradients too, 3 weights too."""
        return LEVELS[self.engine]


def read_launch(path: Path) -> Launch:
    """The launch that the file at `path` describes. Raises LaunchError as `read`, and for what is not predicted."""
    settings = read(path)
    processes, kind = settings["num_processes"], settings["distributed_type"]
    if kind == "DEEPSPEED":
        return _deepspeed(settings.get("deepspeed_config") or {}, processes, path)
    if kind == "FSDP":
        return _fsdp(settings.get("fsdp_config") or {}, processes, path)
    return Launch("whole", processes)


def of_this_process() -> Launch:
    """The launch that this process is one of, as accelerate's launcher says in the environment."""
    processes = world_size()
    if uses_deepspeed():
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu"
        return Launch(f"zero{os.environ['ACCELERATE_DEEPSPEED_ZERO_STAGE']}", processes, offload)
    if uses_fsdp():
        return Launch("fsdp2", processes, blocks=_names(os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")))
    return Launch("whole", processes)


def _deepspeed(settings: dict[str, Any], processes: int, path: Path) -> Launch:
    stage, offload = settings.get("zero_stage"), settings.get("offload_optimizer_device", "none")
    known = stage in (1, 2, 3) and offload in ("none", "cpu") and settings.get("offload_param_device", "none") == "none"
    if not known or (offload == "cpu" and stage != 2):
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
    """The largest part where `size` is divided among `processes`."""
    return -(-size // processes)


def zero_bytes(
    weights: int, processes: int, level: int, parameter: int = FLOAT, gradient: int = FLOAT, optimiser: int = ADAM
) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimiser states in one process, at ZeRO's `level` (0: every one is whole).

    The paper's own case is mixed precision: 2 and 2 bytes a weight, and K = 12 of optimiser states.
    """
    shared_from = zip((parameter, gradient, optimiser), (3, 2, 1), strict=True)
    parts = [part(size * weights, processes) if level >= first else size * weights for size, first in shared_from]
    return parts[0], parts[1], parts[2]


@dataclass(frozen=True)
class Outline:
    """A training student as engines see it, in bytes but for `trained`, which counts weights."""

    trained: int
    weights: int  # of all its parameters, frozen ones too
    own: int  # of those that it does not share with the teacher
    largest: int  # of one module's own parameters: what ZeRO-3 gathers at a time
    gathered: int  # what FSDP2 gathers at a time, and of gradients until they have left


@dataclass(frozen=True)
class Held:
    """Bytes of a student in one process. `saved` is what its parameters are less than in a process on its own."""

    saved: int
    gradients: int
    optimiser: int
    averaged: int  # one average of what is trained
    exchange: int
    host: int


def outline(student: nn.Module, teacher: nn.Module, blocks: Sequence[str]) -> Outline:
    """Sizes of `student`; `teacher` may share weights with it, `blocks` are classes that are gathered one by one."""
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
        gathered=outside + sum(working[:2]),  # a block and the one that is fetched meanwhile
    )


def held(student: Outline, launch: Launch) -> Held:
    """What one process holds of `student` under `launch`, beside what its passes hold."""
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
        return Held(saved, 0, 0, averaged, exchange, host=gradients + optimiser)
    return Held(saved, gradients, optimiser, averaged, exchange, host=0)


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters())


def _gradients(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters() if value.requires_grad)
