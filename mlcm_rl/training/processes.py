"""Several processes of one run: the rank of this one, its part of a batch, and what all of them do together.

Every process draws the whole batch of a step, since draws are a function of (seed, purpose, step), and takes its own
rows: the batch is the same for every world size. A single process runs the same code and waits for nobody.

A function that waits for the other processes says so: all of them must call it, in the same order.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils import gather as accelerate_gather
from torch import Tensor

from ..storage.files import write_json
from .launch_environment import launched, number, refuse_strangers

Item = TypeVar("Item")
LONGEST_WAIT = timedelta(hours=2)  # for a process that is still at work, on a file of slow trajectories, say
LOOKS, LOOK_SECONDS = 20, 0.5  # for a file that another machine wrote: it may appear late in a shared folder


def rank() -> int:
    """Return the rank of this process. Rank 0 writes and prints."""
    return number("RANK") if launched() else 0


def world_size() -> int:
    """Return how many processes run this recipe."""
    return max(1, number("WORLD_SIZE")) if launched() else 1


def uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def start(device: torch.device) -> None:
    """Join the other processes, once, on `device`: over gloo on a CPU, else over the accelerator's own backend.

    Raise ValueError if the launch file asks for DeepSpeed and it is not installed, or if the processes do not find each
    other.
    """
    refuse_strangers()
    if not launched():
        return
    on_cpu = device.type == "cpu"
    settings: dict[str, Any] = {"cpu": on_cpu}
    if on_cpu and uses_deepspeed():
        # Without a backend, accelerate finds none for DeepSpeed on a CPU and takes every process for the only one.
        settings = {"backend": "gloo"}
        _compile_nothing()
    try:
        state = PartialState(timeout=LONGEST_WAIT, **settings)
    except ImportError as error:
        raise ValueError(f"DeepSpeed cannot start: {error}") from error
    except torch.distributed.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"the {world_size()} processes of this run did not find each other at {place}: {error}"
        ) from error
    if state.num_processes != world_size():
        raise ValueError(f"{world_size()} processes were launched and {state.num_processes} found each other")


def _compile_nothing() -> None:
    """Keep DeepSpeed from building the all-reduce of its inference, which it does at its start on a CPU.

    It is not called here. The build takes a C++ compiler, ninja and a minute, and hangs if an earlier one was killed.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def finish() -> None:
    """Leave the group of processes."""
    if launched():
        torch.distributed.destroy_process_group()


def leave(error: BaseException | None) -> None:
    """End this process at once if it is one of several, with the exit code of `error`.

    Print the traceback of `error` unless it is a SystemExit. PyTorch lets threads of gloo run on, and a process whose
    interpreter ends before they do is sometimes aborted ("terminate called without an active exception"): its exit
    code, and so the launch, would report that it was killed.
    """
    if not launched():
        return
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def refuse_unshared(folder: Path) -> None:
    """Raise ValueError, in every process, if one of them does not see in `folder` what rank 0 writes there.

    Waits for all; a single process checks nothing.
    """
    if world_size() == 1:
        return
    check = folder / f".seen-{broadcast(secrets.token_hex(8))}.json"
    on_rank_zero(write_json, check, {"processes": world_size()})
    blind = [str(number) for number, sees in enumerate(gather_objects(_appears(check))) if not sees]
    on_rank_zero(check.unlink)
    if blind:
        raise ValueError(
            f"runs: process {', '.join(blind)} of {world_size()} does not see in {folder.resolve()} what process 0 "
            "wrote there: every machine needs the same folder, on a disk that they share; set runs: to one that is"
        )


def _appears(path: Path) -> bool:
    for _ in range(LOOKS):
        if path.is_file():
            return True
        time.sleep(LOOK_SECONDS)
    return False


def is_lost_rank(error: Exception) -> bool:
    """Return whether `error`, raised in an exchange between processes, means that another one has ended."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


# ---- a process's part ----


def part(size: int, processes: int, together: int = 1) -> int:
    """Return how many of `size` samples each of `processes` takes, with groups of `together` not split.

    Raise ValueError if the parts cannot be equal.
    """
    if size % (processes * together):
        what, whole = f"{size} samples", "is a multiple of the number of processes"
        if together > 1:
            what, whole = f"{size // together} groups of {together} samples", "holds as many groups for each process"
        raise ValueError(
            f"{what} cannot be shared evenly by {processes} processes: choose batch_size and "
            f"gradient_accumulation so that every micro-batch {whole}"
        )
    return size // processes


def rows(size: int, together: int = 1) -> slice:
    """Return this process's rows of a batch of `size`, with groups of `together` not split.

    Raise ValueError if the parts cannot be equal.
    """
    own = part(size, world_size(), together)
    return slice(rank() * own, (rank() + 1) * own)


def micro_batches(total: int, size: int, together: int = 1) -> Iterator[range]:
    """Yield this process's indices of each micro-batch of `size` of `total` samples, groups of `together` not split.

    Raise ValueError if the parts cannot be equal.
    """
    for first in range(0, total, size):
        own = rows(min(size, total - first), together)
        yield range(first + own.start, first + own.stop)


def equal_parts(total: int, size: int) -> list[list[int]]:
    """Return the indices of this process's share of `total` samples, in parts of `size` over all processes.

    Every process has equally many, since sharded weights are gathered in every pass: where they cannot be shared
    evenly the last sample is there again. What is gathered of them is cut off after `total`.
    """
    own = -(-total // world_size())
    first, at_a_time = rank() * own, max(1, size // world_size())
    numbers = [min(number, total - 1) for number in range(first, first + own)]
    return [numbers[i : i + at_a_time] for i in range(0, own, at_a_time)]


def share(items: Sequence[Item]) -> list[Item]:
    """Return the items of this process: every n-th one, for a world size of n."""
    return list(items[rank() :: world_size()])


# ---- together ----


def gather(part: Tensor) -> Tensor:
    """Return the rows (B, ...) of all processes, by rank, from each one's `part` (b, ...). Waits for all."""
    return accelerate_gather(part.contiguous()) if world_size() > 1 else part


def total(*values: float) -> list[float]:
    """Return each of `values` summed over the processes. Waits for all."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=PartialState().device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def all_reduce(figures: Tensor) -> Tensor:
    """Sum `figures` (n,) over the processes, in place and on their device, and return them. Waits for all."""
    if world_size() > 1:
        torch.distributed.all_reduce(figures)
    return figures


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each of `tensors` by its mean over the processes, in place and without a copy. Waits for all."""
    for exchange in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
        exchange.wait()
    torch._foreach_div_(list(tensors), world_size())


def wait() -> None:
    """Wait for all processes."""
    total(0.0)


def broadcast(value: Item) -> Item:
    """Return rank 0's `value`, so that nothing depends on the last bits of a device. Waits for all."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


def gather_objects(value: Item) -> list[Item]:
    """Return the `value` of every process, by rank. Waits for all."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable[..., Item], *arguments: Any) -> Item:
    """Run `function` on rank 0 when all processes are here, then broadcast its result. Waits for all.

    What it writes is there for all processes afterwards. If it raises, rank 0 raises and the others exit without a
    message of their own.
    """
    wait()
    done = False
    result: Any = None
    try:
        if rank() == 0:
            result = function(*arguments)
        done = True
    finally:
        (succeeded,) = total(float(done))
    if succeeded < world_size():
        sys.exit(1)
    return broadcast(result)
