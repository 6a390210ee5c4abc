"""The floating-point operations (FLOPs) of a stage, and the time that a device takes for them.

Counted are those of matrix products and convolutions: one pass of each kind, forward and backward, is taken on the meta
device and multiplied by the number of such passes in the stage. Left out, as small beside these: text encoders, an
evaluation's own networks, sample grids, held-out losses, reading and writing, communication between processes.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ..recipe import Full, Lora, Recipe, Reward, Stage, Training
from . import memory
from .evaluations import Tally, evaluations_of, kind_of
from .gpus import THIS, Device
from .launches import Launch
from .passes import Roles
from .shapes import Shapes

CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDES = {"float32": 1024, "bfloat16": 256, "float16": 256}  # on a CPU, of which some emulate halves
GPU_SIDE = 8192
TRIES = 5


@dataclass(frozen=True)
class Operations:
    """FLOPs of convolutions and of other products: a GPU computes float32 convolutions in TF32, and products not."""

    convolutions: float = 0.0
    products: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs of both."""
        return self.convolutions + self.products

    def __sub__(self, other: "Operations") -> "Operations":
        return Operations(self.convolutions - other.convolutions, self.products - other.products)

    def seconds(self, device: Device, precision: str) -> float:
        """Return the seconds that `device` takes for them, at the share of its rate that a step reaches."""
        convolving = "tf32" if precision == "float32" else precision
        ideal = self.convolutions / device.rates[convolving] + self.products / device.rates[precision]
        return ideal / 1e12 / device.share


@dataclass(frozen=True)
class Work:
    """One kind of pass of a stage: their count, the operations of each, and their precision."""

    kind: str
    count: float
    each: Operations
    precision: str


def count_operations(function: Callable[[], Any]) -> Operations:
    """Return the operations of calling `function`."""
    with _Counter() as counter:
        function()
    convolutions = sum(counter.flops[kind] for kind in CONVOLUTIONS)
    return Operations(convolutions, counter.flops.total() - convolutions)


class _Counter(Shapes):
    """Counts FLOPs by torch's own formulas, by kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[Any] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if formula := flop_registry.get(function.overloadpacket):
            self.flops[function.overloadpacket] += formula(*args, **(kwargs or {}), out_val=out)
        return out


def of_stage(stage: Stage, recipe: Recipe, passes: Tally, distilled: Lora | Full) -> list[Work]:
    """Return the work of `stage`, one kind of pass after another; `distilled` as in `memory.of_stage`."""
    with Shapes():
        models, _ = memory.rewards_of(stage, recipe)
        roles = memory.roles_of(stage, recipe, distilled, models, partial(checkpoint, use_reentrant=False))
    one_of_each = _one_of_each(stage, roles)
    precisions = _precisions(stage, recipe, distilled)
    work = [
        Work(kind, n, count_operations(one_of_each[kind]), precisions[kind]) for kind, n in asdict(passes).items() if n
    ]
    return [part for one in work for part in _split(one, stage, recipe, roles, distilled)]


def _split(work: Work, stage: Stage, recipe: Recipe, roles: Roles, distilled: Lora | Full) -> list[Work]:
    """Return `work` in parts of one precision each.

    Samples between steps are outside autocast, and a reward computes in its own precision.
    """
    if work.kind == "student" and isinstance(stage, Training):
        passes = stage.passes(recipe)
        outside = evaluations_of(one for one in passes if kind_of(one) == "student" and not one.in_step)
        own = _precisions(stage.model_copy(update={"precision": "no"}), recipe, distilled)["student"]
        if stage.precision == "bf16" and own == "float16":
            own = "bfloat16"  # as its frozen weights are cast then
        parts = [replace(work, count=work.count - outside), replace(work, count=outside, precision=own)]
        return [part for part in parts if part.count]
    if work.kind not in ("scored", "graded", "watched"):
        return [work]
    decoding = count_operations(_of_pictures(work.kind, roles, []))
    rewards = stage.reward_models if work.kind == "watched" else stage.trained_on
    return [replace(work, each=decoding)] + [
        replace(work, each=count_operations(_of_pictures(work.kind, roles, [one])) - decoding, precision=one.dtype)
        for one in rewards
    ]


def _of_pictures(kind: str, roles: Roles, rewards: list[Reward]) -> Callable[[], Any]:
    """Return a function that decodes one picture and scores it by `rewards`."""
    if kind == "graded":
        return lambda: _graded(roles, rewards)
    return torch.no_grad()(lambda: roles.scores(_latents(roles), rewards))


def seconds(work: list[Work], device: Device, launch: Launch) -> float:
    """Return the seconds that the processes of `launch` take for `work`, each on a `device` of its own."""
    alone = sum(one.count * one.each.seconds(device, one.precision) for one in work)
    return alone / (1 if device.is_shared else launch.processes)


def this_device(device: torch.device) -> Device:
    """Return the device that runs here, with rates measured by matrix products, which takes a second or two."""
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = {name: _rate(device, dtype, SIDES[name]) for name, dtype in PRECISIONS.items()}
    rates["tf32"] = _tf32_rate(device) if device.type == "cuda" else rates["float32"]
    return Device(THIS, device.type, size, rates)


def _one_of_each(stage: Stage, roles: Roles) -> dict[str, Callable[[], Any]]:
    """Return a function for each kind of pass that takes it with one sample."""
    trained_on, watched = stage.trained_on, stage.reward_models
    return {
        "teacher": torch.no_grad()(lambda: roles.teacher_x0(1, 1.0)),
        "student": torch.no_grad()(lambda: roles.x0(1)),
        "trained": lambda: roles.x0(1).sum().backward(),
        "decoded": torch.no_grad()(lambda: roles.scores(_latents(roles), [])),
        "scored": torch.no_grad()(lambda: roles.scores(_latents(roles), trained_on)),
        "graded": lambda: _graded(roles, trained_on),
        "watched": torch.no_grad()(lambda: roles.scores(_latents(roles), watched)),
    }


def _latents(roles: Roles) -> Tensor:
    return roles.points(1)[0]


def _graded(roles: Roles, rewards: list[Reward]) -> None:
    roles.scores(_latents(roles).requires_grad_(), rewards, roles.small_decoder).sum().backward()


def _precisions(stage: Stage, recipe: Recipe, distilled: Lora | Full) -> dict[str, str]:
    """Return the precision of each kind of pass: autocast's inside a student's step, else that of the weights."""
    is_own = isinstance(stage.networks(distilled).student, Full)
    own = "float32" if is_own and isinstance(stage, Training) else recipe.teacher.dtype
    teacher, pictures = recipe.teacher.dtype, "float32"
    if isinstance(stage, Training) and stage.precision == "bf16":
        inside = "bfloat16"
        precisions = dict.fromkeys(("student", "trained", "decoded", "scored", "graded"), inside)
        return precisions | {"teacher": teacher, "watched": pictures}
    precisions = {"teacher": teacher, "student": own, "trained": own}
    return precisions | dict.fromkeys(("decoded", "scored", "graded", "watched"), pictures)


def _rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the rate of a product of two matrices (side, side) in 10^12 operations a second, the best of a few.

    On a CPU it is by the process's own seconds, so that other programs running there do not count.
    """
    side = GPU_SIDE if device.type == "cuda" else side
    one = torch.ones(side, side, dtype=dtype, device=device)
    clock, threads = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.perf_counter, 1)
    best = min(_timed(one, clock) for _ in range(TRIES)) / threads
    return 2 * side**3 / best / 1e12


def _timed(one: Tensor, clock: Callable[[], float]) -> float:
    started = clock()
    (one @ one)[0, 0].item()
    return clock() - started


def _tf32_rate(device: torch.device) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _rate(device, torch.float32, SIDES["float32"])
    finally:
        torch.set_float32_matmul_precision(before)
