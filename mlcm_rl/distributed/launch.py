"""A recipe in several processes: `mlcm run` once more, under `accelerate launch` with a file of recipes/launch."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


class LaunchError(Exception):
    """The processes cannot be started; the message says what is missing, for people."""


def run_under(launch: Path, arguments: list[str]) -> int:
    """`mlcm run` with `arguments` in the processes that the accelerate configuration `launch` describes.

    Returns the exit code: of the first process that failed, or 128 and the number of the signal that ended them all.

    Raises LaunchError for a file that is no such configuration, and for DeepSpeed where it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for one and warn, here and below
    from accelerate.commands.launch import launch_command, launch_command_parser

    settings = read(launch)
    if settings.get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise LaunchError("DeepSpeed is not installed: pip install 'mlcm-rl[deepspeed]', or launch with fsdp2.yaml")
    if settings.get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `device: auto` then takes the CPU
    processes = int(settings.get("num_processes", 1))
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.disable(logging.ERROR)  # torchrun's account of a failure: the process that failed has said why
    command = ["--config_file", str(launch), "--module", "mlcm_rl", "run", *arguments]
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def read(launch: Path) -> dict:
    """What the configuration file `launch` says."""
    try:
        settings = YAML(typ="safe").load(launch.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise LaunchError(f"{launch} is not YAML: {error}") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise LaunchError(f"{launch} is no accelerate configuration (no distributed_type): take one of recipes/launch")
    return settings
