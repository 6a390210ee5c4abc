"""Clocks, peaks of memory, processes and tables of the benchmarks."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table


def now() -> float:
    """Return the seconds of a clock, when a GPU has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mb() -> float:
    """Return this process's peak: what torch allocated on a GPU, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_peak_mb()


def resident_peak_mb() -> float:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def output_of(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Return what `command` prints. Exit with its errors if it fails. `environment` is by default this process's."""
    child = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}:\n{child.stderr}")
    return child.stdout


def in_own_process(program: str, *options: str | int, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Return the JSON in the last line that `program` with `options` prints in a process of its own."""
    command = [sys.executable, program, *map(str, options)]
    figures: dict[str, float] = json.loads(output_of(command, environment).splitlines()[-1])
    return figures


def table_of_figures(title: str, corner: str, *heads: str) -> Table:
    """Return an empty table: what the rows are under `corner`, and figures under the other `heads`."""
    table = Table(corner, title=title, box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table
