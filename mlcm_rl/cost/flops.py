"""The floating-point operations (FLOPs) of a stage, and the time that a device takes for them.

Counted are those of matrix products and convolutions: one pass of each kind, forward and backward, is taken on the meta
device and multiplied by the number of such passes in the stage; where the prompt's keys and values are computed once
for several passes (`Base.same_prompts`), so are they here. Left out, as small beside these: text encoders, an
evaluation's own networks, sample grids, held-out losses, reading and writing, communication between processes.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ..recipe import Full, Lora, Recipe, Reward, Stage, Training
from ..recipe.takes import Pass
from ..training import machine
from . import memory
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


def of_stage(stage: Stage, recipe: Recipe, distilled: Lora | Full) -> list[Work]:
    """Return the work of `stage`, one kind of pass after another; `distilled` as in `memory.of_stage`."""
    with Shapes():
        models, _ = memory.rewards_of(stage, recipe)
        roles = memory.roles_of(stage, recipe, distilled, models, partial(checkpoint, use_reentrant=False))
    evaluations: dict[tuple[str, bool, str], float] = defaultdict(float)
    pictures: dict[tuple[str, str], float] = defaultdict(float)
    scores: dict[tuple[str, str], float] = defaultdict(float)
    for one in stage.passes(recipe):
        kind = kind_of(one)
        precision = _precision(kind, one.in_step, stage, recipe, distilled)
        evaluations[kind, True, precision] += one.samples * (one.evaluations - one.num_without_keys)
        evaluations[kind, False, precision] += one.samples * one.num_without_keys
        if one.viewer:
            seen = kind_of_pictures(one)
            place = seen, _precision(seen, one.in_step, stage, recipe, distilled)
            pictures[place] += one.samples
            scores[place] += one.samples * one.num_scores
    each = cache(lambda kind, with_keys: _evaluation(kind, with_keys, roles))
    work = [Work(kind, n, each(kind, keys), precision) for (kind, keys, precision), n in evaluations.items() if n]
    of_pictures = [_scoring(*place, n, scores[place], stage, roles) for place, n in pictures.items() if n]
    return [*work, *chain.from_iterable(of_pictures)]


def kind_of(one: Pass) -> str:
    """Return the kind of the evaluations of `one`: of the teacher, or of the student without or with gradient.

    Those of the target and of the reference are the student's. Networks beside it, and what the student learns from
    them, have kinds of their own.
    """
    if one.role in ("lpips", "features"):
        return one.role
    if one.role in ("fake", "heads"):
        return f"trained {one.role}" if one.beside else one.role
    return "teacher" if one.role == "teacher" else "trained" if one.gradient else "student"


def kind_of_pictures(one: Pass) -> str:
    """Return the kind of the pictures of `one`: sampled and nothing more, scored without or with gradient, watched."""
    of_rewards = "graded" if one.gradient else "scored"
    return {"person": "decoded", "rewards": of_rewards, "guard": "watched"}[one.viewer]


def _evaluation(kind: str, with_keys: bool, roles: Roles) -> Operations:
    """Return the operations of one evaluation of this `kind`, or without the keys and values of the prompt."""
    evaluate: Callable[[], Any] = {
        "teacher": torch.no_grad()(lambda: roles.teacher_x0(1, 1.0)),
        "student": torch.no_grad()(lambda: roles.x0(1)),
        "trained": lambda: roles.x0(1).sum().backward(),
        "lpips": lambda: roles.distance("lpips", 1).sum().backward(),
        "features": lambda: roles.distance("features", 1).sum().backward(),
        "fake": torch.no_grad()(lambda: roles.fake_x0(1)),
        "trained fake": lambda: roles.fake_loss(1).backward(),
        "heads": lambda: roles.passing_for_real(1).backward(),
        "trained heads": lambda: roles.heads_loss(1).backward(),
    }[kind]
    if with_keys:
        return count_operations(evaluate)
    with roles.base.same_prompts(roles.base.denoiser if kind == "teacher" else roles.student):
        count_operations(evaluate)
        return count_operations(evaluate)


def _scoring(
    kind: str, precision: str, num_pictures: float, num_scores: float, stage: Stage, roles: Roles
) -> list[Work]:
    """Return the work of pictures of this `kind`: decoding each once, and each reward's scores in its own precision."""
    rewards = {"decoded": [], "watched": stage.reward_models}.get(kind, stage.trained_on)

    def operations(rewards: list[Reward]) -> Operations:
        if kind == "graded":
            return count_operations(lambda: _graded(roles, rewards))
        small = roles.small_decoder if kind == "scored" else None  # the guard and the report see the real pictures
        return count_operations(torch.no_grad()(lambda: roles.scores(_latents(roles), rewards, small)))

    decoding = operations([])
    scoring = [Work(kind, num_scores, operations([one]) - decoding, one.dtype) for one in rewards]
    return [Work(kind, num_pictures, decoding, precision), *scoring]


def _latents(roles: Roles) -> Tensor:
    return roles.points(1)[0]


def _graded(roles: Roles, rewards: list[Reward]) -> None:
    roles.scores(_latents(roles).requires_grad_(), rewards, roles.small_decoder).sum().backward()


def _precision(kind: str, in_step: bool, stage: Stage, recipe: Recipe, distilled: Lora | Full) -> str:
    """Return the precision of a `kind` of pass: autocast's inside a student's step, else that of the weights."""
    has_autocast = isinstance(stage, Training) and stage.precision == "bf16"
    if kind in ("teacher", "features", "heads", "trained heads"):
        return recipe.teacher.dtype
    if kind == "lpips":
        return "float32"
    of_student = kind in ("student", "trained", "fake", "trained fake")
    if has_autocast and (in_step or of_student):
        return "bfloat16"
    if not of_student:
        return "float32"  # of pictures
    is_own = "fake" not in kind and isinstance(stage.networks(distilled).student, Full)
    return "float32" if is_own and isinstance(stage, Training) else recipe.teacher.dtype


def seconds(work: list[Work], device: Device, launch: Launch) -> float:
    """Return the seconds that the processes of `launch` take for `work`, each on a `device` of its own."""
    alone = sum(one.count * one.each.seconds(device, one.precision) for one in work)
    return alone / (1 if device.is_shared else launch.processes)


def this_device(device: torch.device) -> Device:
    """Return the device that runs here, with rates measured by matrix products, which takes a second or two."""
    size = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine.memory()
    rates = {name: _rate(device, dtype, SIDES[name]) for name, dtype in PRECISIONS.items()}
    rates["tf32"] = _tf32_rate(device) if device.type == "cuda" else rates["float32"]
    return Device(THIS, device.type, size, rates)


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
