"""What is installed here and what this machine has, as `mlcm doctor` prints it.

A finding is a fact with a state: "ok"; "note" for what is slow or missing and may be wanted; "bad" for what stops every
run. Notes and bad findings say what to do. Nothing is written and nothing is fetched.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from .. import __version__, rewards
from ..cost.units import in_words
from ..recipe import reward_package
from ..rewards.weights import weights_folder
from ..training import machine
from ..training.devices import device_of
from ..training.loop import cpu_has_bfloat16

DISTRIBUTION = "mlcm-rl"
FOR_PEOPLE = {  # what an extra is for
    "docs": "the documentation site and the notebooks",
    "deepspeed": "ZeRO: students and optimisers split over several GPUs",
    "emoji": "rebuilding the emoji and scenes teachers",
    "fuzz": "fuzzing, for developers",
    "hanzi": "the recipes of written Chinese characters",
    "kolors": "Kolors' tokenizer",
    "label": "judging pairs of pictures by hand in a browser",
    "onnx": "the rewards ocr and safety",
    "quantised": "a frozen teacher in int8 or nf4",
    "trackio": "the tracker trackio",
    "wandb": "the tracker wandb",
    "dev": "the tests",
}
LITTLE_MEMORY = 4 * 2**30  # bytes; the demo's peak is below 1 GB, an SD 1.5 student's on a CPU above this
LITTLE_DISK = 10 * 2**30  # bytes; a store of SDXL's trajectories is twice that

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One fact of this machine: `topic` is its group, `advice` what to do, empty where nothing is to do."""

    topic: str
    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def findings() -> Iterator[Finding]:
    """Yield every finding, topic by topic."""
    yield from _versions()
    yield from _system()
    yield from _devices()
    yield from _memory_and_disk()
    yield from _extras()
    yield from _rewards()


# ---- what is installed ----


def _requirements() -> list[Requirement]:
    """Return the requirements of the installed distribution, those of extras with their marker; [] in a bare clone."""
    try:
        return [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return []


def _extra_of(requirement: Requirement) -> str | None:
    """Return the extra that asks for `requirement`; None if every installation does."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    extras = [extra for extra in FOR_PEOPLE if requirement.marker.evaluate({"extra": extra})]
    return extras[0] if extras else None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "mlcm_rl", __version__)
    yield Finding("versions", "Python", platform.python_version())
    needed = [requirement for requirement in _requirements() if _extra_of(requirement) is None]
    if not needed:
        advice = "pip install -e . in the clone"
        yield Finding("versions", DISTRIBUTION, "not installed as a distribution", "note", advice)
    for requirement in needed:
        here = _installed(requirement.name)
        if here is None:
            yield Finding("versions", requirement.name, "missing", "bad", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(here, prereleases=True):
            advice = f"mlcm_rl needs {requirement}: pip install '{requirement}'"
            yield Finding("versions", requirement.name, here, "bad", advice)
        else:
            yield Finding("versions", requirement.name, here)


def _extras() -> Iterator[Finding]:
    by_extra: dict[str, list[Requirement]] = {}
    for requirement in _requirements():
        if extra := _extra_of(requirement):
            by_extra.setdefault(extra, []).append(requirement)
    for extra, wanted in sorted(by_extra.items()):
        missing = [r.name for r in wanted if not r.specifier.contains(_installed(r.name) or "0", prereleases=True)]
        purpose = FOR_PEOPLE[extra]
        if missing:
            install = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield Finding("extras", extra, f"not here ({purpose})", "note", f"if you want it: {install}")
        else:
            yield Finding("extras", extra, f"here ({purpose})")
    if _installed("deepspeed") and not (shutil.which("c++") or shutil.which("g++")):
        advice = "ZeRO with the optimiser on the CPU compiles it: install a C++ compiler, or use launch/zero2.yaml"
        yield Finding("extras", "C++ compiler", "none", "note", advice)


def _rewards() -> Iterator[Finding]:
    ready: list[str] = []
    to_fetch: list[str] = []
    for name in reward_package.names():
        try:
            weights = rewards.weights_of(rewards.class_of(name))
        except rewards.RewardError as error:
            yield Finding("rewards", name, "cannot be used", "note", str(error))
            continue
        (ready if all(one.is_present() for one in weights) else to_fetch).append(name)
    yield Finding("rewards", "ready", ", ".join(ready) or "none")
    if to_fetch:
        yield Finding("rewards", "weights to fetch", ", ".join(to_fetch), "note", "mlcm rewards fetch NAME")


# ---- what the machine has ----


def _system() -> Iterator[Finding]:
    name = f"{platform.system()} {platform.release()}, {platform.machine()}"
    advice = machine.unlike_linux()
    yield Finding("machine", "system", name, "note" if advice else "ok", advice or "")
    cores, quota = machine.cores(), machine.container_cores()
    usable = min(cores, quota) if quota else float(cores)
    limit = f", of which this container may use {quota:g}" if quota and quota < cores else ""
    threads = torch.get_num_threads()
    if threads > usable + 0.5:
        advice = f"threads wait for one another: export OMP_NUM_THREADS={max(1, int(usable))}"
        yield Finding("machine", "CPU", f"{cores} cores{limit}, {threads} threads", "note", advice)
    else:
        yield Finding("machine", "CPU", f"{cores} cores{limit}, {threads} threads")
    instructions = torch.backends.cpu.get_cpu_capability()
    if cpu_has_bfloat16():
        yield Finding("machine", "arithmetic", f"{instructions}, bfloat16")
    else:
        advice = "precision: bf16 is emulated on this CPU, many times slower: leave it at no for runs on the CPU"
        yield Finding("machine", "arithmetic", f"{instructions}, no bfloat16", "note", advice)


def _devices() -> Iterator[Finding]:
    build = f"torch for {_build()}"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
        value = f"{torch.cuda.get_device_name(index)}, {in_words(free)} of {in_words(total)} free, {build}"
        advice = "" if bfloat16 else "it has no bfloat16: leave precision: no"
        yield Finding("devices", f"GPU {index}", value, "ok" if bfloat16 else "note", advice)
    kind = device_of("auto").type
    if kind == "mps":
        advice = "one process, float32; deepspeed and bitsandbytes do not work on it"
        yield Finding("devices", "GPU", f"Apple's, by MPS, {build}", "note", advice)
    if kind == "cpu":
        driver = any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/kfd"))
        if driver and not (torch.version.cuda or torch.version.hip):
            advice = "a GPU's driver is here, and this torch cannot use it: install a build of torch for it"
        elif driver:
            advice = "a GPU's driver is here, and torch finds no GPU: is it hidden (CUDA_VISIBLE_DEVICES), or too old?"
        else:
            advice = "the emoji recipes take minutes; Stable Diffusion and larger need a GPU to train"
        yield Finding("devices", "GPU", f"none, {build}", "note", advice)


def _build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU"


def _memory_and_disk() -> Iterator[Finding]:
    memory, total = psutil.virtual_memory(), machine.memory()
    value = f"{in_words(total)}{' in this container' if total < memory.total else ''}"
    if total < LITTLE_MEMORY:
        yield Finding("memory and disk", "memory", value, "note", "enough for the emoji recipes, and for little else")
    else:
        yield Finding("memory and disk", "memory", f"{value}, {in_words(min(memory.available, total))} free")
    yield _folder("runs", Path("runs"), "runs are written in the folder that you call mlcm in")
    yield _folder("rewards' weights", weights_folder(), "MLCM_RL_CACHE names another folder")
    yield _folder("teachers from the hub", Path(HF_HUB_CACHE), "HF_HOME names another folder")


def _folder(name: str, folder: Path, advice: str) -> Finding:
    """Return the free space where `folder` is or would be, and whether it can be written."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    value = f"{folder.absolute()}, {in_words(free)} free"
    if not os.access(place, os.W_OK):
        return Finding("memory and disk", name, f"{value}, not writable", "note", advice)
    if free < LITTLE_DISK:
        return Finding("memory and disk", name, value, "note", f"a run on SDXL writes 20 GB and more; {advice}")
    return Finding("memory and disk", name, value)
