"""Whether this process is one of several of a run, by what has been set in its environment."""

import os

import torch

# What torchrun sets for every process, and what joining takes, whoever sets it.
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What others set for a process that they start as one of several: how many there are, or which one it is. (Not
# SLURM_NTASKS: Slurm sets that for a script that starts the processes too.)
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PLACES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
MOST = 1_000_000  # processes: far above any


def launched() -> bool:
    """Return whether a launcher started this process as one of several (or as one that could have been)."""
    is_one_of_them = number("WORLD_SIZE") > 1 or torch.distributed.is_torchelastic_launched()
    return is_one_of_them and not _missing()


def refuse_strangers() -> None:
    """Raise ValueError where this process was started as one of several and cannot find the others: each would take
    itself for the only one and do all of the work."""
    if launched():
        _refuse_odd()
        return
    named = [f"{name}={os.environ[name]}" for name in COUNTS if number(name) > 1]
    named += [f"{name}={os.environ[name]}" for name in PLACES if number(name) > 0]
    if named:
        missing = _missing() or ["a WORLD_SIZE over 1"]
        raise ValueError(
            f"{named[0]} says that this is one of several processes, and {', '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not set, without which they do not find each other: start them "
            "with `torchrun -m mlcm_rl run ...` or `mlcm run --launch FILE`, or set what is missing in each. For a "
            f"process on its own, unset {named[0].partition('=')[0]} (under srun: --ntasks=1)"
        )


def _missing() -> list[str]:
    """Return what joining takes and is not set, or is empty."""
    return [name for name in RENDEZVOUS if not os.environ.get(name)]


def _refuse_odd() -> None:
    """Raise ValueError where what joining takes is no number, or one that cannot be."""
    count = max(1, number("WORLD_SIZE"))
    limits = {"WORLD_SIZE": (1, MOST), "RANK": (0, count - 1), "LOCAL_RANK": (0, count - 1), "MASTER_PORT": (1, 65_535)}
    for name, (least, most) in limits.items():
        text = os.environ[name]
        if not _is_number(text) or not least <= int(text) <= most:
            raise ValueError(f"{name}: expected a whole number from {least} to {most}, found {text[:40]!r}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def number(name: str) -> int:
    """Return the number in a variable of the environment, 0 where it is not set or is none."""
    text = os.environ.get(name, "")
    return int(text) if _is_number(text) else 0
