"""What surrounds a training loop: device, progress with ETA, seeds by step, logs, signals, and the optimiser step."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.helpers import disable_input_dtype_casting
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..recipe import Recipe, Training
from ..storage import checkpoints, files
from . import autocast, engines, processes, replay, signals, states, trackers
from .beside import Beside
from .devices import device_of
from .progress import progress, tell
from .seeding import seed_of

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, if it is installed, looks for a GPU and warns


class StoppedBeforeUpdate(Exception):
    """A step computed its gradient and updated nothing; `figures` are its losses, norm and seeds, as JSON."""

    def __init__(self, text: str, figures: dict):
        super().__init__(text)
        self.figures = figures


class NonFiniteLoss(StoppedBeforeUpdate):
    """A loss or a gradient is NaN or infinite; nothing was updated."""


# ---- where it runs ----


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies in bfloat16 itself; one that does not took 17 times as long as in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- a training loop's surroundings ----


class Stateful(Protocol):
    """An object that changes from step to step beside the weights. `load_state` raises if the state does not fit."""

    def state(self) -> dict: ...  # as JSON

    def load_state(self, state: dict) -> None: ...


class Runtime:
    """The surroundings of a training stage: `steps` yields step numbers, `backward` updates, `log` records."""

    def __init__(self, recipe: Recipe, stage: Training, folder: Path):
        self.recipe, self.stage, self.folder = recipe, stage, folder
        device = device_of(recipe.device)
        processes.start(device)
        processes.rows(stage.micro_batch, stage.samples_together)  # raises if processes cannot share it
        self.accelerator = engines.accelerator(recipe, stage, folder, device)
        self.device = self.accelerator.device
        self.pending = signals.Pending()
        self.all_stop = False
        self.last_loss = math.nan
        self.total: int | None = None  # steps of the stage, once they begin
        self.seeds: dict[str, int] = {}  # of the step, by purpose
        self.samples: list = []  # of the step's losses: rows of the stage's data, or prompts
        self.beside: list[Beside] = []  # networks trained beside the student
        self.replayed = replay.stop_point(folder)
        if stage.precision == "bf16" and self.device.type == "cpu" and not cpu_has_bfloat16():
            problem = (
                f"{stage.kind}: this CPU has no bfloat16 arithmetic and emulates it, many times slower than float32"
            )
            tell("precision", f"{problem}: set precision: no", "yellow")
        name = "tensorboard" if recipe.trackers == ["tensorboard"] else recipe.name
        config = flat(files.public(recipe.model_dump(mode="json")))
        named = {"name": folder.name}  # else the runs of a recipe's stages have random names there
        trackers.start(self.accelerator, name, config, {"wandb": named, "trackio": named})

    @property
    def stopping(self) -> bool:
        """Whether one of the processes received a signal, so that this step is the last and is saved."""
        return self.all_stop if processes.world_size() > 1 else self.pending.number is not None

    def prepare(
        self, student: torch.nn.Module, optimizer: torch.optim.Optimizer, whole: bool = False
    ) -> dict[str, Tensor]:
        """Give the student to the launch file's engine. Return this process's part of its trained weights, by name.

        With `whole` every process keeps all of it, whatever the launch file says: a small network, which is called in
        other ways than as one module. The student's frozen float16 weights become bfloat16 if the stage's passes are in
        bfloat16.
        """
        self.optimizer = optimizer
        if self.stage.precision == "bf16":
            autocast.frozen_in_bfloat16(student)
        take_over = engines.Whole if whole else partial(engines.take_over, self.accelerator)
        self.engine = take_over(student, optimizer, self.stage)
        return self.engine.parts()

    def train_beside(self, name: str, network: torch.nn.Module, learning_rate: float) -> Beside:
        """Return the training of `network` beside the student, which checkpoints hold too from here on."""
        self.beside.append(Beside(name, network, learning_rate, self.stage))
        return self.beside[-1]

    def micro_batches(self) -> list[slice]:
        """Return this process's rows of each micro-batch of a step."""
        stage = self.stage
        own = processes.micro_batches(stage.batch_size, stage.micro_batch, stage.samples_together)
        return [slice(rows.start, rows.stop) for rows in own]

    def generator(self, purpose: str, step: int) -> torch.Generator:
        """Return a CPU generator for `purpose` at `step`, and note its seed for the replay of a step."""
        self.seeds[purpose] = seed_of(self.recipe.seed, self.stage.kind, purpose, step)
        return torch.Generator().manual_seed(self.seeds[purpose])

    def resume(self, weights: dict[str, dict[str, Tensor]], **parts: Stateful) -> int:
        """Load the newest checkpoint into groups of `weights` (as `prepare` returned them), the optimiser and `parts`.

        Return the number of finished steps, 0 without a checkpoint. From here on `save` writes the same groups and
        parts. Raise CheckpointError if one of them cannot be loaded.
        """
        self.weights, self.parts = weights, parts
        shapes = dict.fromkeys(weights, self.engine.shapes) | {one.name: one.shapes for one in self.beside}
        checkpoint = states.read_training(self.folder, shapes, parts)
        if checkpoint is None:
            return 0
        steps, tensors, record = checkpoint
        for prefix, group in reversed(weights.items()):  # the student's own last
            with self.engine.swapped(group):
                self.engine.fill(states.under_prefix(prefix, tensors))
        try:
            if states.under_prefix("optimizer", tensors):
                self.engine.fill_moments(tensors)
            for one in self.beside if steps else ():
                one.load(tensors)
        except ValueError as error:
            place = checkpoints.checkpoints(self.folder)[-1]
            raise files.CheckpointError(f"{place}: {error}: delete checkpoints/") from error
        for name, part in parts.items():
            part.load_state(record[name])
        tell(self.stage.kind, f"goes on from step {steps}, where it was saved")
        return steps

    def save(self, steps: int) -> None:
        """Write a checkpoint after `steps` steps: whole tensors by name, from which any world size can go on."""
        self._save(steps, {name: part.state() for name, part in self.parts.items()})

    def _save(self, steps: int, record: dict) -> None:
        keep = self.stage.keep_checkpoints
        processes.on_rank_zero(checkpoints.save_state, self.folder, steps, self._tensors(), record, keep)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the whole state of the optimiser and all groups of weights. Waits for all processes."""
        tensors = self.engine.moments() if self.optimizer.state else {}
        for prefix, group in self.weights.items():
            with self.engine.swapped(group):
                tensors |= states.add_prefix(prefix, self.engine.full())
        for one in self.beside:
            tensors |= one.tensors()
        return tensors

    def steps(
        self, first: int, total: int, description: str, finished: Callable[[], bool] = lambda: False
    ) -> Iterator[int]:
        """Yield the step numbers `first` .. `total` - 1 under a progress bar, until `finished()` is true.

        SIGTERM and Ctrl-C stop the loop after a whole step: `stopping` is then true, so that the loop saves, and
        Stopped is raised.
        """
        self._truncate_log(first)
        self.total = total
        with signals.deferral() as self.pending, progress(total, description, first) as bar:
            for step in range(first, total):
                if finished():
                    break
                self.step, self.update, self.seeds, self.samples = step, 0, {}, []
                self.before = {name: part.state() for name, part in self.parts.items()}
                yield step
                bar.advance(note=f"loss {self.last_loss:.4g}")
                if self.stopping:
                    text = f"stopped after step {step + 1} of {total}; the same command resumes it"
                    raise signals.Stopped(self.pending.number or signal.SIGTERM, text)
        # not end_training: the processes stay together for the next stage
        trackers.for_each(self.accelerator, lambda tracker: tracker.finish())

    def is_logged(self, step: int) -> bool:
        """Return whether `step` has a record in the log: one of every `log_every`, the first and the last."""
        return step == 0 or self.due(step, self.stage.log_every, self.total)

    def due(self, step: int, every: int, total: int | None = None) -> bool:
        """Return whether `step` is one of every `every` steps, or the last of `total`."""
        return (step + 1) % every == 0 or step + 1 == total

    def backward(self, losses: Iterable[Tensor], beside: Beside | None = None) -> dict[str, float]:
        """Make one optimiser step from the per-sample `losses` (b,) of its micro-batches, each a lazy forward pass.

        The step is the student's, or that of a network trained `beside` it. The mean over all samples of the step is
        minimised, whatever the split into micro-batches and the world size: gradients are averaged over the processes.
        Return loss and gradient norm. Raise NonFiniteLoss, in every process, before anything is updated; the state
        before the step is then saved, to repeat the step from.
        """
        engine, count, each, sums = beside.engine if beside else self.engine, self.stage.batch_size, [], []
        for loss in self._until_stopped(losses):
            total = loss.sum()
            with autocast.own(self.device):  # each gradient then has the precision of its forward operation
                engine.backward(total * processes.world_size() / count)
            sums.append(total.detach())
            each.append(loss.detach())
        # Nothing is read before all micro-batches are queued: a GPU would be idle while each figure is waited for.
        figures = torch.stack([*sums, sums[0].new_full((), self.pending.number is not None)])
        replaying = self.replayed == (self.step, self.update)
        with self._save_if_a_rank_is_lost():
            (*totals, stopping), norm = engine.step(processes.all_reduce(figures), not replaying)
        mean = sum(totals) / count
        autocast.forget_copies()
        if not (math.isfinite(mean) and (norm is None or math.isfinite(norm))):
            self._save_before()
            result = f"{beside.name} was not updated" if beside else "nothing was updated"
            text = f"step {self.step + 1}: loss {mean}, gradient norm {replay.plain([norm])[0]}: {result} in this step"
            raise NonFiniteLoss(text, self._figures(each, mean, norm))
        if replaying:
            raise StoppedBeforeUpdate(f"step {self.step + 1} was repeated", self._figures(each, mean, norm))
        assert norm is not None  # since there was an update
        self.all_stop = stopping > 0  # summed over the processes, so that all save and leave after the same step
        self.update += 1
        if beside is None:
            self.last_loss = mean
        return {"loss": mean, "grad_norm": norm}

    def _until_stopped(self, losses: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the `losses` of a step's micro-batches.

        Where a signal came, save the state at the start of the step after one of them and raise Stopped: the rest of a
        large student's step can take longer than there is. Several processes finish the step: to agree on less they
        would wait for their devices after every micro-batch.
        """
        for number, loss in enumerate(losses, start=1):
            yield loss
            is_signalled = processes.world_size() == 1 and self.pending.number is not None
            if is_signalled and number < self.stage.gradient_accumulation and self._is_intact():
                self._save_before()
                text = f"stopped within step {self.step + 1} of {self.total}; the same command begins it again"
                raise signals.Stopped(self.pending.number or signal.SIGTERM, text)

    def _save_before(self) -> None:
        """Save the state at the start of this step, if it is still there, to repeat the step from."""
        if self._is_intact() and not processes.broadcast(checkpoints.state_path(self.folder, self.step).exists()):
            self._save(self.step, self.before)

    def _is_intact(self) -> bool:
        """Return whether the state at the start of this step is still there: the step has made no update yet.

        A phase that resets the optimiser's state has deleted it; a replay then starts from an earlier checkpoint.
        """
        return self.update == 0 and (self.step == 0 or bool(self.optimizer.state))

    @contextmanager
    def _save_if_a_rank_is_lost(self) -> Iterator[None]:
        """Save the state at the start of this step if another process ends inside the block and this one holds it all.

        Only rank 0 does, or the other one of two: no two processes write at once.
        """
        try:
            yield
        except RuntimeError as error:
            is_writer = processes.rank() == 0 or processes.world_size() == 2
            if processes.is_lost_rank(error) and is_writer and self.engine.holds_all and self._is_intact():
                place = checkpoints.state_path(self.folder, self.step)
                if self.step > 0 and not place.exists():
                    tensors, keep = self._tensors(), self.stage.keep_checkpoints
                    checkpoints.save_state(self.folder, self.step, tensors, self.before, keep)
            raise

    def _figures(self, each: list[Tensor], mean: float, norm: float | None) -> dict:
        """Return the figures of the step, as JSON; `each` has this process's losses (b,), one tensor a micro-batch."""
        loss, grad_norm = replay.plain([mean, norm])
        own = [losses.tolist() for losses in each]
        together = zip(*processes.gather_objects(own), strict=True)  # a micro-batch's, process by process
        return {
            "step": self.step,
            "update": self.update,
            "seed": self.recipe.seed,
            "seeds": self.seeds,
            "samples": self.samples,
            "losses": replay.plain([value for parts in together for part in parts for value in part]),
            "loss": loss,
            "grad_norm": grad_norm,
        }

    def swapped(self, parts: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Put `parts` of other weights in place of the student's own while the block runs."""
        return self.engine.swapped(parts)

    def write(self, function: Callable[..., object], *arguments: object) -> None:
        """Call `function` on rank 0 with a student to write files from and `arguments`; the other processes wait."""
        processes.on_rank_zero(function, self.engine.whole_student(), *arguments)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run the student's passes in the stage's precision.

        Where processes hold parts of the weights, autocast keeps no copies: they would be of all that are gathered. An
        adapter takes what its layer takes: PEFT would copy it to float32, for autocast to copy back.

        In bfloat16 on a CPU attention is computed by separate operations: the backward pass of PyTorch's fused one
        takes five times as long there, a third of a whole step.
        """
        if self.stage.precision != "bf16":
            yield
            return
        half = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.engine.weights_in_parts)
        slow = self.device.type == "cpu"
        as_it_is = disable_input_dtype_casting(self.engine.student)
        with half, as_it_is, sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            yield

    def log(self, step: int, **values: float) -> None:
        """Append a record to log.jsonl and send it to the trackers, on rank 0."""
        if processes.rank() > 0:
            return
        path = self.folder / "log.jsonl"
        with files.report_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before a later checkpoint
        trackers.for_each(self.accelerator, lambda tracker: tracker.log(values, step=step + 1))

    def log_picture(self, step: int, name: str, draw: Callable[..., Image.Image], *arguments: object) -> None:
        """Send the picture that `draw` makes of `arguments` to the trackers, on rank 0. Without any it is not drawn."""
        if processes.rank() > 0 or not self.accelerator.trackers:
            return
        picture = draw(*arguments)
        trackers.for_each(self.accelerator, lambda tracker: trackers.log_picture(tracker, name, picture, step + 1))

    def _truncate_log(self, first: int) -> None:
        """Delete the records after step `first`, from which the run resumes: they will be written again."""
        path = self.folder / "log.jsonl"
        if path.is_file() and processes.rank() == 0:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill can cut the last one short
            records = "".join(line for line in whole if json.loads(line)["step"] <= first)
            with files.replacing(path) as temporary:
                temporary.write_text(records, encoding="utf-8")


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Return `settings` for a tracker, in one level (`stages.1.learning_rate`), other values than scalars as text."""
    if isinstance(settings, dict | list):
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        parts = [flat(value, f"{name}.{key}".removeprefix(".")) for key, value in items]
        return {key: value for part in parts for key, value in part.items()}
    return {name: settings if isinstance(settings, bool | int | float | str) else str(settings)}


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the learning-rate factor in [0, 1]: linear warm-up, then a cosine that would reach 0 at `num_steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    fraction = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * fraction))


def adamw(parameters: Iterable[nn.Parameter], stage: Training) -> torch.optim.AdamW:
    """Return AdamW on `parameters` with the betas and weight decay of `stage`; its rate is set in every step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=stage.betas, weight_decay=stage.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
