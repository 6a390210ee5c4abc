"""Engines: every process holds the whole training student, or a part of it (DeepSpeed's ZeRO, PyTorch's FSDP2).

An engine takes over a student and its optimiser in place: the module that a loop calls stays the same object. Where it
is sharded, a process sees its own part of every trained weight (`parts`), which is enough for averages of weights and
other element-wise arithmetic. `full` gathers the parts; checkpoints and students are written from that, whatever the
engine.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import _GeneratorContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..recipe import Recipe, Training, missing_trackers
from . import autocast, processes, states

Weights = dict[str, Tensor]


def accelerator(recipe: Recipe, stage: Training, folder: Path, device: torch.device) -> Accelerator:
    """Return the stage's accelerator, for the engine of the launch file.

    Precision is the loop's own autocast, not accelerate's: weights, moments and sums over processes stay float32 in
    every engine. Raise ValueError for a tracker that is not installed.
    """
    for _, missing in missing_trackers(recipe):  # accelerate would leave it out silently
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
            "stage3_max_live_parameters": 0,  # gathered anew for every pass, since parts are swapped with an average's
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
    """Keep transformers from splitting text encoders and rewards under ZeRO-3 as it loads them.

    No engine would gather those, and diffusers loads a pipeline's components in an order that differs from process to
    process, so that one process would wait for another component than its neighbour sends.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def take_over(
    accelerator: Accelerator, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training
) -> "Whole":
    """Return the engine of the launch file, which takes over `student` and `optimizer` in place."""
    if processes.uses_deepspeed():
        return Zero(accelerator, student, optimizer, stage)
    if processes.uses_fsdp():
        return Sharded(accelerator, student, optimizer, stage)
    return Whole(student, optimizer, stage)


class Whole:
    """Every process holds all weights and moments; several average their gradients before the update."""

    holds_all = True  # whether each process could write a checkpoint alone
    weights_in_parts = False

    def __init__(self, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        self.student, self.optimizer, self.stage = student, optimizer, stage
        self.trained = trained_of(student)  # once: a large student has thousands of parameters
        self.shapes = {
            name: value.shape for name, value in self.trained.items()
        }  # of the whole weights, not of a process's parts

    def parts(self) -> Weights:
        """Return this process's part of the trained weights, by name; the tensors change as they are trained."""
        return dict(self.trained)

    def full(self) -> Weights:
        """Return the whole trained weights, by name.

        Where processes hold parts it waits for all, and only rank 0 is given them, on its host: a machine has no room
        for as many copies as it has devices.
        """
        return {name: value.detach() for name, value in self.trained.items()}

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the trained weights by the whole `weights`."""
        for name, value in self.trained.items():
            value.data.copy_(weights[name])

    def moments(self) -> Weights:
        """Return the whole state of the optimiser, by `optimizer.<index>.<name>`, to whom `full` returns weights."""
        return states.optimizer_tensors(self.optimizer)

    def fill_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `moments` returned, after `fill`."""
        states.load_optimizer(self.optimizer, tensors)

    @contextmanager
    def swapped(self, parts: Weights) -> Iterator[None]:
        """Put `parts` in place of the student's own while the block runs."""
        with autocast.swapped(self.trained, parts):
            yield

    def whole_student(self) -> nn.Module:
        """Return a student with whole weights, to write its files from."""
        return self.student

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a micro-batch's share of the step's loss."""
        loss.backward()

    def step(self, figures: Tensor, should_update: bool) -> tuple[list[float], float | None]:
        """Clip the gradients and, with `should_update`, update if they and `figures` (n,) are finite.

        Return the figures and the gradients' norm before clipping. They are read together, since each reading waits for
        the device.
        """
        *values, norm = torch.cat([figures, self._clip().reshape(1)]).tolist()
        self._update(should_update and math.isfinite(sum(values)) and norm < float("inf"))
        return values, norm

    def _clip(self) -> Tensor:
        """Clip the gradients, averaged over the processes. Return their norm () before clipping, on the device."""
        if processes.world_size() > 1:
            processes.average_([value.grad for value in self.trained.values() if value.grad is not None])
        return nn.utils.clip_grad_norm_(self.trained.values(), self.stage.max_grad_norm)

    def _update(self, should_update: bool) -> None:
        if should_update:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class _InParts(Whole):
    """What the engines share in which a process holds a part of every trained weight."""

    holds_all = False

    def __init__(self, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        super().__init__(student, optimizer, stage)
        for value in student.parameters():
            value.data = value.data.contiguous()  # neither engine takes weights of another layout, channels_last
        empty: dict[int, Any] = {id(value): _empty(value) for value in student.parameters()}
        empty |= {id(value): value for value in student.buffers()}  # never written: no copy of quantised weights
        self._outline = copy.deepcopy(student, memo=empty)  # modules without weights, to write files from

    @contextmanager
    def swapped(self, parts: Weights) -> Iterator[None]:
        """As in Whole, but contents are exchanged: an engine refers to the parts by their tensors."""
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


def blocks_of(denoiser: nn.Module, class_names: Sequence[str]) -> list[nn.Module]:
    """Return the blocks of `denoiser` that are gathered one by one.

    They are of the classes `class_names` of a launch file or, if it has none of them, of those that diffusers keeps on
    one device.
    """
    modules = list(denoiser.modules())
    for names in (class_names, getattr(denoiser, "_no_split_modules", None) or ()):
        if blocks := [module for module in modules if type(module).__name__ in names]:
            return blocks
    return []


class Sharded(_InParts):
    """PyTorch's FSDP2, by the blocks of the launch file. (accelerate's own preparation does not work on a CPU.)"""

    trained: dict[str, Any]  # parameters that are distributed tensors
    weights_in_parts = True

    def __init__(self, accelerator: Accelerator, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        super().__init__(student, optimizer, stage)
        plugin = FullyShardedDataParallelPlugin()
        mesh = init_device_mesh(accelerator.device.type, (processes.world_size(),))
        settings = {"mesh": mesh, "reshard_after_forward": plugin.reshard_after_forward}
        for block in [*reversed(blocks_of(student, plugin.transformer_cls_names_to_wrap or ())), student]:
            fully_shard(block, **settings)
        self.trained = trained_of(student)  # new parameters: fully_shard replaces them by distributed tensors
        optimizer.param_groups[0]["params"] = list(self.trained.values())

    def parts(self) -> Weights:
        return {name: value.to_local() for name, value in self.trained.items()}

    def full(self) -> Weights:
        return _on_host_of_rank_zero((name, value.detach()) for name, value in self.trained.items())

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self.trained.items():
            value.detach().to_local().copy_(self._shard(value, weights[name]).to_local())

    def moments(self) -> Weights:
        return _on_host_of_rank_zero(
            (f"optimizer.{index}.{key}", entry)
            for index, value in enumerate(self.trained.values())
            for key, entry in self.optimizer.state.get(value, {}).items()  # none for weights that no loss reaches
        )

    def fill_moments(self, tensors: Mapping[str, Tensor]) -> None:
        for index, value in enumerate(self.trained.values()):
            entries = states.under_prefix(f"optimizer.{index}", tensors)
            if entries:
                self.optimizer.state[value] = {
                    key: self._shard(value, one) if one.ndim else one.to(value.device) for key, one in entries.items()
                }

    def _shard(self, like: Any, whole: Tensor) -> Any:
        """Return this process's part of `whole`, which all processes have, placed as `like` is."""
        mesh, placements = like.device_mesh, like.placements
        return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)

    def _clip(self) -> Tensor:
        norm: Any = nn.utils.clip_grad_norm_(self.trained.values(), self.stage.max_grad_norm)
        return norm.full_tensor()


class Zero(_InParts):
    """DeepSpeed's ZeRO through accelerate; stages 1 and 2 hold whole weights and parts of Adam's state."""

    trained: dict[str, Any]  # parameters with DeepSpeed's attributes

    def __init__(self, accelerator: Accelerator, student: nn.Module, optimizer: torch.optim.Optimizer, stage: Training):
        super().__init__(student, optimizer, stage)
        self.engine, _ = accelerator.prepare(student, optimizer)
        self.zero = self.engine.optimizer
        self.zero.check_grad_overflow = True  # in float32 too: no update if gradients are not finite
        self.micro_batches = 0  # of this step, so far
        self.weights_in_parts = self.engine.zero_optimization_partition_weights()

    def parts(self) -> Weights:
        if not self.weights_in_parts:
            return super().parts()
        return {name: value.ds_tensor for name, value in self.trained.items()}

    def swapped(self, parts: Weights) -> _GeneratorContextManager[None]:
        """As in _InParts; whole weights are replaced instead, since autograd may refer to the old ones."""
        return super().swapped(parts) if self.weights_in_parts else Whole.swapped(self, parts)

    def full(self) -> Weights:
        weights = {}
        for name, value in self.trained.items():
            with self._gathered(value):
                if processes.rank() == 0:
                    weights[name] = value.detach().cpu().clone()
        return weights

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """As in Whole, and replace the float32 copy that the optimiser updates too."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, value in self.trained.items():
            with self._gathered(value, modifier_rank=0):
                value.data.copy_(weights[name])
            safe_set_full_fp32_param(value, weights[name].to(value.device))

    def moments(self) -> Weights:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        step = self.optimizer.state[self._flats()[0]]["step"].detach().cpu()
        moments: Weights = {}
        for index, value in enumerate(self.trained.values()):
            whole = {key: safe_get_full_optimizer_state(value, key) for key in ("exp_avg", "exp_avg_sq")}
            if processes.rank() == 0:
                entries = {"step": step.clone()} | {key: one.cpu() for key, one in whole.items()}
                moments |= {f"optimizer.{index}.{key}": one for key, one in entries.items()}
        return moments

    def fill_moments(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_room(tensors["optimizer.0.step"])
        for index, value in enumerate(self.trained.values()):
            for key in ("exp_avg", "exp_avg_sq"):
                moment = tensors.get(f"optimizer.{index}.{key}")
                if moment is not None:  # else of a weight that no loss reaches, whose moments stay zero
                    safe_set_full_optimizer_state(value, moment.to(value.device), key)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, with the calls that DeepSpeed's own forward would have hooked to its output.

        The loop calls the module itself, several times a loss. The loss is divided by the number of micro-batches
        already, which `scale_wrt_gas` would do again.
        """
        self.micro_batches += 1
        last = self.micro_batches == self.stage.gradient_accumulation
        self.engine.set_gradient_accumulation_boundary(last)
        self.zero.clear_backward_seen_flag()  # the next micro-batch: add to the gradients that are there
        self.zero.backward_prologue()
        self.zero.enter_backward()
        self.zero.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, figures: Tensor, should_update: bool) -> tuple[list[float], float | None]:
        """As in Whole, but the figures are read first, since DeepSpeed clips and updates at once.

        So there is no norm, None, where nothing is updated.
        """
        self.micro_batches = 0
        values = figures.tolist()
        if not (should_update and math.isfinite(sum(values))):
            return values, None
        self.engine.step()
        return values, float(self.engine.get_global_grad_norm())  # infinite if nothing was updated

    def _flats(self) -> list[Tensor]:
        """Return this process's parts of the float32 weights, one a group: the inner optimiser's parameters."""
        if self.weights_in_parts:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    def _make_room(self, step: Tensor) -> None:
        """Create Adam's state with zeros, which its first step would else do."""
        for flat in self._flats():
            zeros = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **zeros}
        self._link()

    def _link(self) -> None:
        """Tell DeepSpeed anew which parameter each of Adam's states belongs to: a loop may have reset the state."""
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


def _on_host_of_rank_zero(named: Iterable[tuple[str, Any]]) -> Weights:
    """Return the whole tensors of distributed ones in rank 0, gathered one at a time; none in the others."""
    whole = {}
    for name, value in named:
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        if processes.rank() == 0:
            whole[name] = gathered.cpu()
    return whole


def trained_of(student: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of `student`, by name."""
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


@torch.no_grad()
def _exchange(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        previous = our.clone()
        our.copy_(their)
        their.copy_(previous)
