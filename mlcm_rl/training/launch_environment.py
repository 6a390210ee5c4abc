"""Whether this process is one of several of a run, by the variables of its environment."""

import os

import torch

# Set by torchrun for every process; needed to join, whoever sets them.
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set by other launchers for one of several processes: the world size, and the rank. (Not SLURM_NTASKS: Slurm sets that
# for a script that starts the processes too.)
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
MAX_PROCESSES = 1_000_000  # far above any real number


def launched() -> bool:
    """Return whether a launcher started this process as one of several (or as one that could have been)."""
    is_one_of_them = number("WORLD_SIZE") > 1 or torch.distributed.is_torchelastic_launched()
    return is_one_of_them and not _missing()


def refuse_strangers() -> None:
    """Raise ValueError if this process was started as one of several and cannot find the others.

    Each of them would else take itself for the only one and do all of the work.
    """
    if launched():
        _refuse_odd()
        return
    settings = [f"{name}={os.environ[name]}" for name in COUNTS if number(name) > 1]
    settings += [f"{name}={os.environ[name]}" for name in RANKS if number(name) > 0]
    if settings:
        missing = _missing() or ["a WORLD_SIZE over 1"]
        raise ValueError(
            f"{settings[0]} means that this is one of several processes, and {', '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not set, without which they do not find each other: start them "
            "with `torchrun -m mlcm_rl run ...` or `mlcm run --launch FILE`, or set what is missing in each. For a "
            f"process on its own, unset {settings[0].partition('=')[0]} (under srun: --ntasks=1)"
        )


def _missing() -> list[str]:
    """Return the variables of RENDEZVOUS that are not set or empty."""
    return [name for name in RENDEZVOUS if not os.environ.get(name)]


def _refuse_odd() -> None:
    """Raise ValueError if a variable of RENDEZVOUS is not a number, or out of its range."""
    count = max(1, number("WORLD_SIZE"))
    limits = {
        "WORLD_SIZE": (1, MAX_PROCESSES),
        "RANK": (0, count - 1),
        "LOCAL_RANK": (0, count - 1),
        "MASTER_PORT": (1, 65_535),
    }
    for name, (least, most) in limits.items():
        text = os.environ[name]
        if not _is_number(text) or not least <= int(text) <= most:
            raise ValueError(f"{name}: expected a whole number from {least} to {most}, found {text[:40]!r}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def number(name: str) -> int:
    """Return the number in a variable of the environment; 0 if it is not set or not a number."""
    text = os.environ.get(name, "")
    return int(text) if _is_number(text) else 0
