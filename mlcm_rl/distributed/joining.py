"""Whether this process is one of several of a run, by what has been set in its environment."""

import os

import torch

# What torchrun sets for every process, and what joining takes, whoever sets it.
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What others set for a process that they start as one of several: how many there are, or which one it is. (Not
# SLURM_NTASKS: Slurm sets that for a script that starts the processes too.)
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PLACES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched() -> bool:
    """Return whether a launcher started this process as one of several (or as one that could have been)."""
    if torch.distributed.is_torchelastic_launched():
        return True
    return _number("WORLD_SIZE") > 1 and all(name in os.environ for name in RENDEZVOUS)


def refuse_strangers() -> None:
    """Raise ValueError where this process was started as one of several and cannot find the others: each would take
    itself for the only one and do all of the work."""
    if launched():
        return
    named = [f"{name}={os.environ[name]}" for name in COUNTS if _number(name) > 1]
    named += [f"{name}={os.environ[name]}" for name in PLACES if _number(name) > 0]
    if named:
        missing = [name for name in RENDEZVOUS if name not in os.environ] or ["a WORLD_SIZE over 1"]
        raise ValueError(
            f"{named[0]} says that this is one of several processes, and {', '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not set, without which they do not find each other: start them "
            "with `torchrun -m mlcm_rl run ...` or `mlcm run --launch FILE`, or set what is missing in each. For a "
            f"process on its own, unset {named[0].partition('=')[0]} (under srun: --ntasks=1)"
        )


def _number(name: str) -> int:
    """Return the number in a variable of the environment, 0 where it is not set or is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
