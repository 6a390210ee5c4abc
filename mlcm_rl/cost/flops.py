"""How many floating-point operations a stage takes, and how long a device is at them.

Operations are those of matrix products and convolutions, counted by taking one pass of each kind on the meta device,
forward and backward, and multiplied by how often a stage takes it. Left out, as small beside these: text encoders, an
evaluation's own networks, sample grids, held-out losses, reading and writing, what processes say to each other.
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
    """Floating-point operations; of float32 a GPU takes convolutions in TF32 and other products not, as torch does."""

    convolutions: float = 0.0
    products: float = 0.0

    @property
    def total(self) -> float:
        return self.convolutions + self.products

    def __sub__(self, other: "Operations") -> "Operations":
        return Operations(self.convolutions - other.convolutions, self.products - other.products)

    def seconds(self, device: Device, precision: str) -> float:
        """How long `device` is at them, at the share of its rate that a step reaches."""
        convolving = "tf32" if precision == "float32" else precision
        ideal = self.convolutions / device.rates[convolving] + self.products / device.rates[precision]
        return ideal / 1e12 / device.share


@dataclass(frozen=True)
class Work:
    """One kind of pass of a stage: how often it is taken, what one takes, and in which precision."""

    kind: str
    count: float
    each: Operations
    precision: str


def counted(function: Callable[[], Any]) -> Operations:
    """What calling `function` takes."""
    with _Counter() as counter:
        function()
    convolutions = sum(counter.found[kind] for kind in CONVOLUTIONS)
    return Operations(convolutions, counter.found.total() - convolutions)


class _Counter(Shapes):
    """Counts by torch's own formulas, kind by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if formula := flop_registry.get(function.overloadpacket):
            self.found[function.overloadpacket] += formula(*args, **(kwargs or {}), out_val=out)
        return out


def of_stage(stage: Stage, recipe: Recipe, passes: Tally, distilled: Lora | Full) -> list[Work]:
    """The work of `stage`, a kind of pass after another; `distilled` as in `memory.of_stage`."""
    with Shapes():
        models, _ = memory.rewards_of(stage, recipe)
        roles = memory.roles_of(stage, recipe, distilled, models, partial(checkpoint, use_reentrant=False))
    taken = _one_of_each(stage, roles)
    precisions = _precisions(stage, recipe, distilled)
    work = [Work(kind, n, counted(taken[kind]), precisions[kind]) for kind, n in asdict(passes).items() if n]
    return [part for one in work for part in _split(one, stage, recipe, roles, distilled)]


def _split(work: Work, stage: Stage, recipe: Recipe, roles: Roles, distilled: Lora | Full) -> list[Work]:
    """`work` in parts of one precision each: what is drawn between steps is outside autocast, and a reward computes in
    its own precision."""
    if work.kind == "student" and isinstance(stage, Training):
        passes = stage.passes(recipe)
        outside = evaluations_of(one for one in passes if kind_of(one) == "student" and not one.in_step)
        own = _precisions(stage.model_copy(update={"precision": "no"}), recipe, distilled)["student"]
        if stage.precision == "bf16" and own == "float16":
            own = "bfloat16"  # as its frozen weights are taken then
        parts = [replace(work, count=work.count - outside), replace(work, count=outside, precision=own)]
        return [part for part in parts if part.count]
    if work.kind not in ("scored", "graded", "watched"):
        return [work]
    drawn = counted(_of_pictures(work.kind, roles, []))
    asked = stage.reward_models if work.kind == "watched" else stage.trained_on
    return [replace(work, each=drawn)] + [
        replace(work, each=counted(_of_pictures(work.kind, roles, [one])) - drawn, precision=one.dtype) for one in asked
    ]


def _of_pictures(kind: str, roles: Roles, asked: list[Reward]) -> Callable[[], Any]:
    """One picture drawn and put to the rewards `asked`."""
    if kind == "graded":
        return lambda: _graded(roles, asked)
    return torch.no_grad()(lambda: roles.scores(_latents(roles), asked))


def seconds(work: list[Work], device: Device, launch: Launch) -> float:
    """How long the processes of `launch` are at the `work` of a stage, each on a `device` of its own."""
    alone = sum(one.count * one.each.seconds(device, one.precision) for one in work)
    return alone / (1 if device.is_shared else launch.processes)


def this_device(device: torch.device) -> Device:
    """The device that runs here, with rates measured by products of square matrices, which takes a second or two."""
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = {name: _rate(device, dtype, SIDES[name]) for name, dtype in PRECISIONS.items()}
    rates["tf32"] = _tf32_rate(device) if device.type == "cuda" else rates["float32"]
    return Device(THIS, device.type, size, rates)


def _one_of_each(stage: Stage, roles: Roles) -> dict[str, Callable[[], Any]]:
    """One pass of every kind, of one sample."""
    asked, watched = stage.trained_on, stage.reward_models
    return {
        "teacher": torch.no_grad()(lambda: roles.teacher_x0(1, 1.0)),
        "student": torch.no_grad()(lambda: roles.x0(1)),
        "trained": lambda: roles.x0(1).sum().backward(),
        "decoded": torch.no_grad()(lambda: roles.scores(_latents(roles), [])),
        "scored": torch.no_grad()(lambda: roles.scores(_latents(roles), asked)),
        "graded": lambda: _graded(roles, asked),
        "watched": torch.no_grad()(lambda: roles.scores(_latents(roles), watched)),
    }


def _latents(roles: Roles) -> Tensor:
    return roles.points(1)[0]


def _graded(roles: Roles, asked: list[Reward]) -> None:
    roles.scores(_latents(roles).requires_grad_(), asked, roles.small_decoder).sum().backward()


def _precisions(stage: Stage, recipe: Recipe, distilled: Lora | Full) -> dict[str, str]:
    """What each kind of pass is taken in: autocast's precision inside a student's step, else that of the weights."""
    is_own = isinstance(stage.networks(distilled).student, Full)
    own = "float32" if is_own and isinstance(stage, Training) else recipe.teacher.dtype
    teacher, pictures = recipe.teacher.dtype, "float32"
    if isinstance(stage, Training) and stage.precision == "bf16":
        inside = "bfloat16"
        found = dict.fromkeys(("student", "trained", "decoded", "scored", "graded"), inside)
        return found | {"teacher": teacher, "watched": pictures}
    found = {"teacher": teacher, "student": own, "trained": own}
    return found | dict.fromkeys(("decoded", "scored", "graded", "watched"), pictures)


def _rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """10^12 operations a second of a product of two matrices (side, side), the best of a few.

    On a CPU the process's own seconds count, so that other programs running there do not.
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
