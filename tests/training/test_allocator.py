"""The allocator on the CPU: results are the same bits, and a platform without glibc goes on as it was."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlcm_rl.training import allocator

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib, resource, sys
import torch
from mlcm_rl.training.allocator import keep_freed_memory

changed = keep_freed_memory() if sys.argv[1] == "changed" else False
torch.set_num_threads(1)
x = torch.randn(1280, 8, 32, 32, generator=torch.Generator().manual_seed(0))  # 40 MiB, as every result below
weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(1))


def step():
    return torch.nn.functional.silu(torch.nn.functional.conv2d(x, weight, padding=1)).exp().log1p()


for _ in range(3):  # the heap grows to its size
    y = step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    y = step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(changed, faults, hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""


def measured(which: str, **environment: str) -> tuple[bool, int, str]:
    """Return whether the allocator was changed, the page faults of twelve steps, and the hash of the result."""
    settings = {name: value for name, value in os.environ.items() if name not in allocator.OWN_SETTINGS}
    settings |= {"PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", PROGRAM, which]
    words = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout.split()
    return words[0] == "True", int(words[1]), words[2]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
@pytest.mark.slow
def test_freed_memory_is_used_again_and_the_bits_are_the_same():
    usual, changed = measured("usual"), measured("changed")
    assert (usual[0], changed[0]) == (False, True)
    assert changed[1] < usual[1] / 10
    assert changed[2] == usual[2]
    assert measured("changed", MALLOC_TRIM_THRESHOLD_="131072")[0] is False  # the user's own settings


@pytest.fixture
def of_nobody(monkeypatch):
    for name in (*allocator.OWN_SETTINGS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def test_both_settings_are_made_or_none(of_nobody, monkeypatch):
    calls = []

    def library(answer: int) -> SimpleNamespace:
        return SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda *call: calls.append(call) or answer)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: library(1))
    assert allocator.keep_freed_memory()
    assert calls == [(-3, 2**30), (-1, 2**31 - 1)]
    calls.clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library(0))  # a glibc that refuses so large a threshold
    assert not allocator.keep_freed_memory()
    assert calls == [(-3, 2**30)]


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_stay(of_nobody, monkeypatch, name):
    monkeypatch.setenv(name, "glibc.malloc.mmap_threshold=131072")
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(of_nobody, monkeypatch):
    def none(name: None) -> SimpleNamespace:
        raise TypeError("a name is needed")  # as on Windows

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # as musl and macOS
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=1 / 2))  # of other numbers
    assert not allocator.keep_freed_memory()
