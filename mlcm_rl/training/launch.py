"""A recipe in the processes of a launch file: `mlcm run` once more, under `accelerate launch`."""

import logging
import os
import reprlib
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..recipe.tree import nearest
from ..storage.untrusted import read_bytes

ALONE = ("NO", "MULTI_CPU")  # accelerate starts one process, whatever the number says
CHOICES = {
    "distributed_type": (*ALONE, "MULTI_GPU", "DEEPSPEED", "FSDP"),  # what `engines` can train under
    "compute_environment": ("LOCAL_MACHINE",),
    "mixed_precision": ("no", "fp16", "bf16", "fp8"),
}
RANGES = {  # a number above is a slip, and would be tried: a million processes fill a memory
    "num_processes": (1, 100_000),
    "num_machines": (1, 100_000),
    "machine_rank": (0, 99_999),
    "main_process_port": (0, 65_535),
}
MOST_BYTES = 2**16  # of a launch file, whose reader takes a millisecond for ten values
SWITCHES = ("use_cpu", "debug", "same_network", "enable_cpu_affinity")
UNQUOTED = {"distributed_type": "NO", "mixed_precision": "no"}  # what false was, before a reader of YAML 1.1
MAY_BE_EMPTY = ("mixed_precision", "main_process_port", "gpu_ids")
OLD_KEYS = ("fp16", "dynamo_backend")  # that accelerate still reads


LOST_PEER = 3  # the exit code where one of several processes was killed


class LaunchError(Exception):
    """The processes cannot be started; the message says what is missing, for people."""


class Killed(Exception):
    """One of several processes was killed; the message says which and how, for people."""


def run_under(launch: Path, arguments: list[str]) -> int:
    """`mlcm run` with `arguments` in the processes that the accelerate configuration `launch` describes.

    One process takes the place of this one: signals reach it, and its exit code is its own. Of several, returns the
    exit code: of the first that failed, or 128 and the number of the signal that ended them all.

    Raises LaunchError for a file that is no such configuration, and for DeepSpeed where it is not installed; Killed
    where one process of several was.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for one and warn, here and below
    from accelerate.commands.launch import launch_command, launch_command_parser

    settings = read(launch)
    if settings["distributed_type"] == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise LaunchError("DeepSpeed is not installed: pip install 'mlcm-rl[deepspeed]', or launch with fsdp2.yaml")
    if settings.get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `device: auto` then takes the CPU
    threads = max(1, (os.cpu_count() or 1) // settings["num_processes"])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.disable(logging.ERROR)  # torchrun's account of a failure: the process that failed has said why
    said = ["--num_processes", str(settings["num_processes"])]
    if settings.get("mixed_precision") == "no":
        said += ["--mixed_precision", "no"]  # accelerate cannot read it without quotes
    command = ["--config_file", str(launch), *said, "--module", "mlcm_rl", "run", *arguments]
    asked = launch_command_parser().parse_args(command)
    try:
        if settings["distributed_type"] in ALONE:
            _become(asked)
        launch_command(asked)
    except ChildFailedError as error:
        refuse_killed(error, settings["num_processes"])
        return exit_code(error)
    except SignalException as stop:
        return 128 + stop.sigval
    except ValueError as error:  # of accelerate, for keys that do not go together
        raise LaunchError(f"{launch}: {error}") from error
    return 0


def exit_code(error: ChildFailedError) -> int:
    """Return the exit code of the first process that failed of itself; those that lost it say LOST."""
    failures = sorted(error.failures.values(), key=lambda one: one.timestamp)
    return next((one.exitcode for one in failures if one.exitcode != LOST_PEER), LOST_PEER)


def refuse_killed(error: ChildFailedError, count: int) -> None:
    """Raise Killed where one of the `count` processes that failed was ended by a signal of its own; the launcher ends
    the others by SIGTERM."""
    signals = {rank: -one.exitcode for rank, one in error.failures.items() if one.exitcode < 0}
    own = {rank: number for rank, number in signals.items() if number != signal.SIGTERM}
    for rank, number in own.items():
        raise Killed(
            f"process {rank} of {count} was ended by {signal.Signals(number).name}"
            + (" (the system does that where memory runs out)" if number == signal.SIGKILL else "")
            + ": the others were stopped. Finished stages and checkpoints are as they were, and the same command goes "
            "on from there"
        ) from error


def _become(asked: Any) -> None:
    """Let the one process that accelerate would start and wait for take the place of this one. Does not return.

    Its launcher dies of a signal and leaves its child behind, and ends in a traceback where the child fails.
    """
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    filled, _, _ = launch._validate_launch_command(asked)
    command, environment = prepare_simple_launcher_cmd_env(filled)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)


def read(launch: Path) -> dict[str, Any]:
    """What the configuration file `launch` says, `num_processes` always among it.

    Raises LaunchError, with the key and what it should be, for what accelerate or this package cannot start.
    """
    from accelerate.commands.config.config_args import ClusterConfig

    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 1)  # as accelerate reads it: no without quotes is false
    try:
        settings = reader.load(_text(launch))
    except RecursionError as error:
        raise LaunchError(f"{launch} is nested too deeply to be a configuration") from error
    except (YAMLError, ValueError) as error:  # a date that is none, say
        raise LaunchError(f"{launch} is not YAML: {error}") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise LaunchError(f"{launch} is no accelerate configuration (no distributed_type): take one of recipes/launch")
    settings |= {key: word for key, word in UNQUOTED.items() if settings.get(key) is False}
    if settings["distributed_type"] == "NO":
        settings.setdefault("num_processes", 1)
    known = (*ClusterConfig.__dataclass_fields__, *OLD_KEYS)
    for key, value in ({"distributed_type": None, "num_processes": None} | settings).items():
        if key not in known:
            near = nearest(str(key), known)
            raise LaunchError(f"{launch}: {key}: unknown key" + (f"; did you mean {near}?" if near else ""))
        if (expected := _expected(key, value)) is not None:
            raise LaunchError(f"{launch}: {key}: expected {expected}, found {reprlib.repr(value)}")
    if settings["distributed_type"] in ALONE and (settings["num_processes"], settings.get("num_machines", 1)) != (1, 1):
        raise LaunchError(
            f"{launch}: num_processes: expected 1 on one machine with distributed_type {settings['distributed_type']}; "
            "several processes are MULTI_GPU, on the CPU too (recipes/launch/cpu2.yaml)"
        )
    return settings


def _text(launch: Path) -> str:
    """Return what stands in the file `launch`. Raise LaunchError where it is no file, too long, or not UTF-8."""
    try:
        return read_bytes(launch, MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LaunchError(f"{launch} is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise LaunchError(f"{launch}: {error.strerror}") from error
    except ValueError as error:
        raise LaunchError(str(error)) from error


def _expected(key: str, value: object) -> str | None:
    """What the value of a known `key` should be, in words; None where `value` may stand there."""
    if value is None and (key in MAY_BE_EMPTY or key.endswith("_config")):
        return None
    if key in CHOICES:
        words = ", ".join(CHOICES[key])
        fits, expected = value in CHOICES[key], f"one of {words}" if len(CHOICES[key]) > 1 else words
    elif key in RANGES:
        least, most = RANGES[key]
        fits = type(value) is int and least <= value <= most  # True is no number here
        expected = f"a whole number from {least} to {most:,}"
    elif key in SWITCHES:
        fits, expected = isinstance(value, bool), "true or false"
    elif key == "gpu_ids":
        fits, expected = isinstance(value, str), 'numbers in quotes, such as "0,1"'
    else:
        fits, expected = isinstance(value, dict) or not key.endswith("_config"), "settings with names"
    return None if fits else expected
