"""Who holds what of a training student: every process all of it, or each a part (DeepSpeed's ZeRO, PyTorch's FSDP2).

An engine takes a student and its optimiser over in place: the module that a loop calls stays the same object. Where it
is sharded, a process sees its own part of every trained weight (`parts`), which is enough for averages of weights and
other arithmetic element by element; `full` puts the parts together, and that is what checkpoints and students are
written from, whatever the engine.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import _GeneratorContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from ..recipe import Recipe, Training, missing_trackers
from . import autocast, processes, states

Weights = dict[str, Tensor]


def accelerator(recipe: Recipe, stage: Training, folder: Path, device: torch.device) -> Accelerator:
    """The stage's accelerator, under the launch file's engine. Precision is the loop's own autocast, not accelerate's:
    weights, moments and sums over processes stay float32 in every engine. Raises ValueError for a tracker that is not
    installed."""
    for _, missing in missing_trackers(recipe):  # accelerate would leave it out in silence
        raise ValueError(f"trackers: {missing}")
    AcceleratorState._reset_state()  # accelerate keeps the first stage's settings for the whole process otherwise
    plugin = DeepSpeedPlugin() if processes.uses_deepspeed() else None
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": max(1, stage.micro_batch // processes.world_size()),
            "gradient_accumulation_steps": stage.gradient_accumulation,
            "gradient_clipping": stage.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,  # accelerate would rebuild AdamW with L2 decay, off the set rate
        }
        plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,  # all weights in parts,
            "stage3_max_live_parameters": 0,  # gathered anew for every pass: parts change places with an average's
            "stage3_max_reuse_distance": 0,
        }
    started = Accelerator(
        cpu=device.type == "cpu" and plugin is None,
        mixed_precision="no",
        gradient_accumulation_steps=stage.gradient_accumulation if plugin is not None else 1,
        deepspeed_plugin=plugin,
        log_with=list(recipe.trackers) or None,
        project_dir=str(folder),
    )
    if plugin is not None:
        _keep_frozen_models_whole()
    return started


def _keep_frozen_models_whole() -> None:
    """Let transformers forget ZeRO-3: it would split text encoders and rewards as it loads them. No engine puts those
    together again, and diffusers loads a pipeline's parts in an order that differs from process to process, so that one
    would wait for another part than its neighbour sends."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def take_over(
    accelerator: Accelerator, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training
) -> "Whole":
    """The engine that the launch file asks for, with `student` and `optimizer` in its hands."""
    if processes.uses_deepspeed():
        return Zero(accelerator, student, optimizer, stage)
    if processes.uses_fsdp():
        return Sharded(accelerator, student, optimizer, stage)
    return Whole(student, optimizer, stage)


class Whole:
    """Every process holds all weights and moments; with several, gradients are averaged before the update."""

    holds_all = True  # so that each could save them alone

    def __init__(self, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        self.student, self.optimizer, self.stage = student, optimizer, stage
        self.trained = trained_of(student)  # found once: a large student has thousands of parameters
        self.shapes = {name: value.shape for name, value in self.trained.items()}  # whole, whoever holds them

    def parts(self) -> Weights:
        """This process's part of what is trained; it changes with the weights."""
        return dict(self.trained)

    def full(self) -> Weights:
        """What is trained, whole. Waits for all processes where they hold parts."""
        return {name: value.detach() for name, value in self.trained.items()}

    def fill(self, weights: Weights) -> None:
        """Put whole `weights` in place."""
        for name, value in self.trained.items():
            value.data.copy_(weights[name])

    def moments(self) -> Weights:
        """The optimiser's state, whole: `optimizer.<index>.<name>`."""
        return states.optimizer_tensors(self.optimizer)

    def fill_moments(self, tensors: Weights) -> None:
        """Put back what `moments` gave, after `fill`."""
        states.load_optimizer(self.optimizer, tensors)

    @contextmanager
    def swapped(self, parts: Weights) -> Iterator[None]:
        """The student with `parts` in place of its own, for as long as the block lasts."""
        with autocast.swapped(self.trained, parts):
            yield

    def whole_student(self) -> nn.Module:
        """A student from which its files can be written."""
        return self.student

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a micro-batch's share of the step's."""
        loss.backward()

    def step(self, figures: Tensor, wanted: bool) -> tuple[list[float], float]:
        """Clip and, where an update is `wanted`, make it if `figures` (n,) and the gradients are finite.

        Returns the figures and the gradients' norm before clipping, read together: each reading waits for the device.
        """
        *found, norm = torch.cat([figures, self._clip().reshape(1)]).tolist()
        self._update(wanted and math.isfinite(sum(found)) and norm < float("inf"))
        return found, norm

    def _clip(self) -> Tensor:
        """The norm () of the gradients of all processes before clipping, on the device."""
        if processes.world_size() > 1:
            processes.average_([value.grad for value in self.trained.values() if value.grad is not None])
        return nn.utils.clip_grad_norm_(self.trained.values(), self.stage.max_grad_norm)

    def _update(self, wanted: bool) -> None:
        if wanted:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class _InParts(Whole):
    """What engines share in which a process holds a part of every trained weight."""

    holds_all = False

    def __init__(self, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        super().__init__(student, optimizer, stage)
        empty = {id(value): _empty(value) for value in student.parameters()}
        self._outline = copy.deepcopy(student, memo=empty)  # structure without weights, to write files from

    @contextmanager
    def swapped(self, parts: Weights) -> Iterator[None]:
        """As above; parts stay where an engine knows them to be, so contents change places."""
        own = self.parts()
        if all(parts[name] is value for name, value in own.items()):
            yield
            return
        _exchange(own.values(), parts.values())
        autocast.forget_copies()
        try:
            yield
        finally:
            _exchange(own.values(), parts.values())
            autocast.forget_copies()

    def whole_student(self) -> nn.Module:
        self._outline.load_state_dict(self.full(), strict=False, assign=True)
        return self._outline


def blocks_of(denoiser: nn.Module, named: Sequence[str]) -> list[nn.Module]:
    """The blocks of `denoiser` that are gathered one by one: of the classes `named` by a launch file, or, where it has
    none of them, of those that diffusers keeps on one device."""
    modules = list(denoiser.modules())
    for names in (named, getattr(denoiser, "_no_split_modules", None) or ()):
        if found := [module for module in modules if type(module).__name__ in names]:
            return found
    return []


class Sharded(_InParts):
    """PyTorch's FSDP2, block by block as the launch file says. (accelerate's own preparation leaves a CPU out.)"""

    trained: dict[str, Any]  # parameters that are distributed tensors

    def __init__(self, accelerator: Accelerator, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        super().__init__(student, optimizer, stage)
        plugin = FullyShardedDataParallelPlugin()
        mesh = init_device_mesh(accelerator.device.type, (processes.world_size(),))
        settings = {"mesh": mesh, "reshard_after_forward": plugin.reshard_after_forward}
        for block in [*reversed(blocks_of(student, plugin.transformer_cls_names_to_wrap or ())), student]:
            fully_shard(block, **settings)
        self.trained = trained_of(student)  # they are new ones: parts
        optimizer.param_groups[0]["params"] = list(self.trained.values())
        self._whole = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)

    def parts(self) -> Weights:
        return {name: value.to_local() for name, value in self.trained.items()}

    def full(self) -> Weights:
        whole: dict[str, Any] = get_model_state_dict(self.student, options=self._whole)  # the model's buffers too
        return {name: value.cpu() for name, value in whole.items() if name in self.trained}

    def fill(self, weights: Weights) -> None:
        device = next(iter(self.parts().values())).device
        set_model_state_dict(
            self.student, {name: value.to(device) for name, value in weights.items()}, options=self._whole
        )

    def moments(self) -> Weights:
        state: Any = get_optimizer_state_dict(self.student, self.optimizer, options=self._whole)["state"]
        return {
            f"optimizer.{index}.{key}": value.cpu()
            for index, name in enumerate(self.trained)
            for key, value in state[name].items()
        }

    def fill_moments(self, tensors: Weights) -> None:
        found: dict[str, Any] = get_optimizer_state_dict(self.student, self.optimizer, options=self._whole)
        for index, name in enumerate(self.trained):
            entry = found["state"][name]
            found["state"][name] = {
                key: tensors[f"optimizer.{index}.{key}"].to(value.device) for key, value in entry.items()
            }
        set_optimizer_state_dict(self.student, self.optimizer, found, options=self._whole)

    def _clip(self) -> Tensor:
        norm: Any = nn.utils.clip_grad_norm_(self.trained.values(), self.stage.max_grad_norm)
        return norm.full_tensor()


class Zero(_InParts):
    """DeepSpeed's ZeRO through accelerate; stages 1 and 2 hold whole weights and parts of what Adam knows of them."""

    trained: dict[str, Any]  # parameters with what DeepSpeed has put on them

    def __init__(self, accelerator: Accelerator, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        super().__init__(student, optimizer, stage)
        self.engine, _ = accelerator.prepare(student, optimizer)
        self.zero = self.engine.optimizer
        self.zero.check_grad_overflow = True  # in float32 too: no update where gradients are no numbers
        self.micro_batches = 0  # of this step, so far
        self.weights_in_parts = self.engine.zero_optimization_partition_weights()

    def parts(self) -> Weights:
        if not self.weights_in_parts:
            return super().parts()
        return {name: value.ds_tensor for name, value in self.trained.items()}

    def swapped(self, parts: Weights) -> _GeneratorContextManager[None]:
        """As above; whole weights only point elsewhere: autograd has kept some, and they must not change."""
        return super().swapped(parts) if self.weights_in_parts else Whole.swapped(self, parts)

    def full(self) -> Weights:
        found = {}
        for name, value in self.trained.items():
            with self._gathered(value):
                found[name] = value.detach().cpu().clone()
        return found

    def fill(self, weights: Weights) -> None:
        """As above; the copy that the optimiser updates too."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, value in self.trained.items():
            with self._gathered(value, modifier_rank=0):
                value.data.copy_(weights[name])
            safe_set_full_fp32_param(value, weights[name].to(value.device))

    def moments(self) -> Weights:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        step = self.optimizer.state[self._flats()[0]]["step"].detach().cpu()
        found = {}
        for index, value in enumerate(self.trained.values()):
            found[f"optimizer.{index}.step"] = step.clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer.{index}.{key}"] = safe_get_full_optimizer_state(value, key).cpu()
        return found

    def fill_moments(self, tensors: Weights) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_room(tensors["optimizer.0.step"])
        for index, value in enumerate(self.trained.values()):
            for key in ("exp_avg", "exp_avg_sq"):
                moment = tensors[f"optimizer.{index}.{key}"].to(value.device)
                safe_set_full_optimizer_state(value, moment, key)

    def backward(self, loss: Tensor) -> None:
        """The loop calls the module itself, several times a loss, so that what DeepSpeed's forward would have hooked to
        its one output is said here; it divides by the number of micro-batches, which the loss has already been."""
        self.micro_batches += 1
        last = self.micro_batches == self.stage.gradient_accumulation
        self.engine.set_gradient_accumulation_boundary(last)
        self.zero.clear_backward_seen_flag()  # the next micro-batch: add to the gradients that are there
        self.zero.backward_prologue()
        self.zero.enter_backward()
        self.zero.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, figures: Tensor, wanted: bool) -> tuple[list[float], float]:
        """As above, but that DeepSpeed clips and updates at once, so that the figures are read before."""
        self.micro_batches = 0
        found = figures.tolist()
        if not (wanted and math.isfinite(sum(found))):
            return found, float("nan")
        self.engine.step()
        return found, float(self.engine.get_global_grad_norm())  # infinite where it has updated nothing

    def _flats(self) -> list[Tensor]:
        """This process's parts of the float32 weights, one a group, as the optimiser inside knows them."""
        if self.weights_in_parts:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    def _make_room(self, step: Tensor) -> None:
        """Adam's state, all zeros, before a first step would have made it."""
        for flat in self._flats():
            zeros = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **zeros}
        self._link()

    def _link(self) -> None:
        """Let DeepSpeed know which of Adam's state is whose: it does so once, and a loop may reset the state later."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if not self.weights_in_parts:
            for weights, flat in zip(self.zero.bit16_groups, self._flats(), strict=True):
                lazy_init_hp_params_optimizer_state(weights, flat, self.optimizer.state)

    @contextmanager
    def _gathered(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
        if not self.weights_in_parts:
            yield
            return
        from deepspeed import zero

        with zero.GatheredParameters([parameter], modifier_rank=modifier_rank):
            yield


def trained_of(student: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of `student`, by name."""
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


@torch.no_grad()
def _exchange(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
