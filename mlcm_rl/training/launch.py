"""Running a recipe in the processes of a launch file: `mlcm run` again, under `accelerate launch`."""

import logging
import os
import reprlib
import signal
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from ..recipe.tree import nearest
from ..storage.untrusted import read_bytes
from . import progress

ALONE = ("NO", "MULTI_CPU")  # accelerate starts one process, whatever `num_processes` is
CHOICES = {
    "distributed_type": (*ALONE, "MULTI_GPU", "DEEPSPEED", "FSDP"),  # what `engines` can train under
    "compute_environment": ("LOCAL_MACHINE",),
    "mixed_precision": ("no", "fp16", "bf16", "fp8"),
}
RANGES = {  # a larger number is a slip, and accelerate would try: a million processes fill any memory
    "num_processes": (1, 100_000),
    "num_machines": (1, 100_000),
    "machine_rank": (0, 99_999),
    "main_process_port": (0, 65_535),
}
MAX_BYTES = 2**16  # of a launch file, whose reader takes a millisecond for ten values
SWITCHES = ("use_cpu", "debug", "same_network", "enable_cpu_affinity")
UNQUOTED = {"distributed_type": "NO", "mixed_precision": "no"}  # words that YAML 1.1 reads as false without quotes
MAY_BE_EMPTY = ("mixed_precision", "main_process_port", "gpu_ids")
OLD_KEYS = ("fp16", "dynamo_backend")  # which accelerate still reads
MEETING_SECONDS = 900  # that a machine waits for the others
LOST_PEER = 3  # exit code of a process that lost another one, which was killed


class LaunchError(Exception):
    """The processes cannot be started; the message, for the user, says what is missing."""


class Killed(Exception):
    """One of several processes was killed; the message, for the user, says which and how."""


@dataclass(frozen=True)
class Machine:
    """Which of several machines this one is, and where all of them meet; None leaves what the launch file says."""

    rank: int | None = None
    address: str | None = None  # of the first machine, as host:port


def run_under(launch: Path, arguments: list[str], machine: Machine | None = None) -> int:
    """Run `mlcm run` with `arguments` in the processes of the accelerate configuration `launch`.

    Of several machines each runs the same command, with a `machine` of its own.

    A single process replaces this one, so that signals reach it and its exit code is its own. For several, return the
    exit code of the first that failed, or 128 plus the number of the signal that ended them all.

    Raise LaunchError if the file is not such a configuration, or asks for DeepSpeed and it is not installed. Raise
    Killed if one of several processes was killed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a GPU and warns, here and below
    from accelerate.commands.launch import launch_command, launch_command_parser

    settings = read(launch) | _settings_of(machine or Machine())
    refuse_machines(launch, settings)
    if settings["distributed_type"] == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise LaunchError("DeepSpeed is not installed: pip install 'mlcm-rl[deepspeed]', or launch with fsdp2.yaml")
    if settings.get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `device: auto` then takes the CPU
    here = settings["num_processes"] // settings.get("num_machines", 1)
    threads = max(1, (os.cpu_count() or 1) // here)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.disable(logging.ERROR)  # torchrun's account of a failure: the process that failed has reported it
    options = ["--num_processes", str(settings["num_processes"])]
    if settings.get("mixed_precision") == "no":
        options += ["--mixed_precision", "no"]  # accelerate cannot read it without quotes
    if settings.get("num_machines", 1) > 1:
        options += ["--rdzv_conf", f"timeout={MEETING_SECONDS}"]
        progress.tell("machines", _meeting(settings))
        for key in ("machine_rank", "main_process_ip", "main_process_port"):
            options += [f"--{key}", str(settings[key])]
    command = ["--config_file", str(launch), *options, "--module", "mlcm_rl", "run", *arguments]
    parsed_arguments = launch_command_parser().parse_args(command)
    try:
        if settings["distributed_type"] in ALONE:
            _become(parsed_arguments)
        launch_command(parsed_arguments)
    except ChildFailedError as error:
        refuse_killed(error, settings["num_processes"])
        return exit_code(error)
    except SignalException as stop:
        return 128 + stop.sigval
    except (RendezvousError, DistError) as error:
        raise LaunchError(
            f"{launch}: the {settings['num_machines']} machines did not find each other: {error}. Does the command "
            "run on each, with the same --main-address and a --machine-rank of its own?"
        ) from error
    except ValueError as error:  # of accelerate, for keys that do not go together
        raise LaunchError(f"{launch}: {error}") from error
    return 0


def _settings_of(machine: Machine) -> dict[str, Any]:
    """Return the settings of a launch file that `machine` puts in their place. Raise LaunchError for an odd address."""
    settings: dict[str, Any] = {} if machine.rank is None else {"machine_rank": machine.rank}
    if machine.address is not None:
        host, _, port = machine.address.rpartition(":")
        if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
            raise LaunchError(f"--main-address: expected host:port, found {machine.address[:80]!r}")
        settings |= {"main_process_ip": host, "main_process_port": int(port)}
    return settings


def refuse_machines(launch: Path, settings: dict[str, Any]) -> None:
    """Raise LaunchError where the machines of `settings` could not find each other, or do not share evenly."""
    machines, rank = settings.get("num_machines", 1), settings.get("machine_rank", 0)
    if machines == 1 and (rank or "main_process_ip" in settings):
        raise LaunchError(
            f"{launch}: num_machines is 1, which leaves nothing to --machine-rank and --main-address: take "
            "recipes/launch/two_nodes.yaml, or set num_machines"
        )
    if machines > 1 and not (settings.get("main_process_ip") and settings.get("main_process_port")):
        raise LaunchError(
            f"{launch}: {machines} machines meet at an address of the first one: give every machine the same "
            "--main-address HOST:PORT, or set main_process_ip and main_process_port"
        )
    if rank >= machines:
        raise LaunchError(f"{launch}: machine_rank: expected a whole number from 0 to {machines - 1}, found {rank}")
    if settings["num_processes"] % machines:
        raise LaunchError(
            f"{launch}: num_processes: expected as many for each of {machines} machines, found "
            f"{settings['num_processes']} in all"
        )


def _meeting(settings: dict[str, Any]) -> str:
    """Return a line on where the machines of `settings` meet.

    Raise LaunchError if the address cannot be found from here, or, on the machine that it is of, is in use.
    """
    host, port = settings["main_process_ip"], settings["main_process_port"]
    try:
        family, kind, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LaunchError(f"--main-address: {host} cannot be found from this machine ({error.strerror})") from error
    rank = settings.get("machine_rank", 0)
    if rank == 0:
        with socket.socket(family, kind) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                place.bind(("", port))
            except OSError as error:
                raise LaunchError(
                    f"--main-address: port {port} is in use on this machine, by another run or by a second command "
                    "with --machine-rank 0: choose another port for all, or give every machine a rank of its own"
                ) from error
    return (
        f"{rank}, of {settings['num_machines']} from 0, waits for the others at {host}:{port}, up to "
        f"{MEETING_SECONDS // 60} minutes"
    )


def exit_code(error: ChildFailedError) -> int:
    """Return the exit code of the first process that failed by itself; those that lost it exit with LOST_PEER."""
    failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
    return next((failure.exitcode for failure in failures if failure.exitcode != LOST_PEER), LOST_PEER)


def refuse_killed(error: ChildFailedError, count: int) -> None:
    """Raise Killed if one of the `count` processes was ended by a signal other than the launcher's SIGTERM."""
    signals = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
    own = {rank: number for rank, number in signals.items() if number != signal.SIGTERM}
    for rank, number in own.items():
        raise Killed(
            f"process {rank} of {count} was ended by {signal.Signals(number).name}"
            + (" (the system does that where memory runs out)" if number == signal.SIGKILL else "")
            + ": the others were stopped. Finished stages and checkpoints are as they were, and the same command goes "
            "on from there"
        ) from error


def _become(parsed_arguments: Any) -> None:
    """Replace this process by the single one that accelerate would start and wait for. Does not return.

    accelerate's launcher leaves its child behind when a signal ends it, and prints a traceback when the child fails.
    """
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    filled, _, _ = launch._validate_launch_command(parsed_arguments)
    command, environment = prepare_simple_launcher_cmd_env(filled)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)


def read(launch: Path) -> dict[str, Any]:
    """Return the settings of the configuration file `launch`, `num_processes` always among them.

    Raise LaunchError, with the key and the expected value, for what accelerate or this package cannot start.
    """
    from accelerate.commands.config.config_args import ClusterConfig

    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 1)  # as accelerate reads it: no without quotes is false
    try:
        settings = reader.load(_text(launch))
    except RecursionError as error:
        raise LaunchError(f"{launch} is nested too deeply to be a configuration") from error
    except (YAMLError, ValueError) as error:  # such as an impossible date
        raise LaunchError(f"{launch} is not YAML: {error}") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise LaunchError(
            f"{launch} is not an accelerate configuration (no distributed_type): take one of recipes/launch"
        )
    settings |= {key: word for key, word in UNQUOTED.items() if settings.get(key) is False}
    if settings["distributed_type"] == "NO":
        settings.setdefault("num_processes", 1)
    known_keys = (*ClusterConfig.__dataclass_fields__, *OLD_KEYS)
    for key, value in ({"distributed_type": None, "num_processes": None} | settings).items():
        if key not in known_keys:
            near = nearest(str(key), known_keys)
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
    """Return the text of the file `launch`. Raise LaunchError if it is not a file, too long, or not UTF-8."""
    try:
        return read_bytes(launch, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LaunchError(f"{launch} is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise LaunchError(f"{launch}: {error.strerror}") from error
    except ValueError as error:
        raise LaunchError(str(error)) from error


def _expected(key: str, value: object) -> str | None:
    """Return what the value of a known `key` should be, in words; None if `value` is right."""
    if value is None and (key in MAY_BE_EMPTY or key.endswith("_config")):
        return None
    if key in CHOICES:
        words = ", ".join(CHOICES[key])
        fits, expected = value in CHOICES[key], f"one of {words}" if len(CHOICES[key]) > 1 else words
    elif key in RANGES:
        least, most = RANGES[key]
        fits = type(value) is int and least <= value <= most  # not isinstance: True would be an int
        expected = f"a whole number from {least} to {most:,}"
    elif key in SWITCHES:
        fits, expected = isinstance(value, bool), "true or false"
    elif key == "gpu_ids":
        fits, expected = isinstance(value, str), 'numbers in quotes, such as "0,1"'
    else:
        fits, expected = isinstance(value, dict) or not key.endswith("_config"), "settings with names"
    return None if fits else expected
