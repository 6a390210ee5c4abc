"""Seconds to open a store of trajectories and to draw a batch from it, against its size; bytes of a trajectory.

    python tests/benchmarks/store.py [--sizes 1000 10000 100000]        (or: make benchmark)

The store holds small random trajectories (1 x 2 x 2, two states) in shards of 64, so that what is measured is the
number of trajectories. Each size is opened in a process of its own, twice: the second time its checksums are
remembered. Steps are timed once every file has been read from: a file that is new costs its checksum. Bytes are
counted from shapes.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measuring import in_own_process
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from training_step import TEACHER

from mlcm_rl.data.store_writer import Writer
from mlcm_rl.data.training_points import StoredStates
from mlcm_rl.data.trajectory_store import Provenance, Store
from mlcm_rl.models import teachers
from mlcm_rl.recipe import Distill

SHARD_SIZE, BATCH_SIZE, NUM_PROMPTS, TOKENS, WIDTH = 64, 32, 1000, 4, 8
SHAPES = {  # family: latent, numbers that a prompt becomes, their type
    "emoji, 64 px": ((8, 8, 8), 32 * 320 + 192, "float32"),
    "SDXL, 1024 px": ((4, 128, 128), 77 * 2048 + 1280, "float16"),
    "FLUX.1, 1024 px": ((16, 128, 128), 512 * 4096 + 768, "float16"),
}


def write(folder: Path, size: int) -> None:
    """Write a store of `size` trajectories."""
    provenance = Provenance(
        teacher_hash="",
        scheduler={},
        prediction_type="epsilon",
        solver="ddim",
        grid=[999, 0],
        guidance_scale=1.0,
        prompts_hash="",
        num_trajectories=size,
        num_held_out=0,
        seed=0,
        dtype="float16",
        maths=1,
        times=[999, 0],
    )
    writer = Writer(folder, provenance, NUM_PROMPTS, SHARD_SIZE, SHARD_SIZE)
    for rows in writer.claimed("prompts"):
        writer.write_prompts(rows, {"context": torch.randn(len(rows), TOKENS, WIDTH)}, torch.float16)
    writer.gather("prompts")
    for rows in writer.claimed("shards"):
        writer.write(rows, torch.randn(len(rows), 2, 1, 2, 2), torch.randn(len(rows), 1, 2, 2))
    writer.finish()


def measure(folder: Path) -> dict[str, float]:
    """Return seconds to open the store in `folder`, and the median of a draw of a batch and of its states.

    The embedded teacher only says which device they go to: a store does not know it.
    """
    base = teachers.load(TEACHER, "cpu")
    started = time.perf_counter()
    store = Store(folder)
    opened = time.perf_counter() - started
    source = StoredStates(Distill(num_segments=[1], num_steps=1, batch_size=BATCH_SIZE), base, store, seed=0)
    steps = []
    for step in range(41):
        if step == 1:
            for first in range(0, store.num_trajectories, SHARD_SIZE):
                store.x0(torch.tensor([first]))
        started = time.perf_counter()
        source.realise(source.draw(step, 1, "next", torch.Generator().manual_seed(step)))
        steps.append(time.perf_counter() - started)
    return {"open": opened, "first": steps[0], "step": statistics.median(steps[21:])}


def bytes_of(latent: tuple[int, ...], prompt: int, dtype: str, num_states: int, prompts_a_trajectory: float) -> float:
    """Return the bytes of a trajectory: its states, x0, and its share of the prompts."""
    return {"float32": 4, "float16": 2}[dtype] * ((num_states + 1) * math.prod(latent) + prompts_a_trajectory * prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    console = Console()
    with tempfile.TemporaryDirectory() as place:
        environment = os.environ | {"MLCM_RL_CHECKSUMS": f"{place}/checksums"}
        table = Table("trajectories", "", "open, s", "first step, ms", "step, ms", "to the first row", box=SIMPLE_HEAD)
        first = None
        for size in arguments.sizes:
            write(Path(place, str(size)), size)
            for what in ("first start", "next start"):
                figures = in_own_process(__file__, "--measure", f"{place}/{size}", environment=environment)
                first = first or figures["step"]
                cells = (f"{figures['open']:.3f}", f"{1e3 * figures['first']:.1f}", f"{1e3 * figures['step']:.2f}")
                table.add_row(f"{size:,}", what, *cells, f"{figures['step'] / first:.2f}")
    console.print(table)
    table = Table("bytes a trajectory", "all 49 states, a prompt each", "9 states", "and 4 a prompt", box=SIMPLE_HEAD)
    for name, (latent, prompt, dtype) in SHAPES.items():
        before = bytes_of(latent, prompt, dtype, 49, 1)
        after = [bytes_of(latent, prompt, dtype, 9, share) for share in (1, 0.25)]
        fewer = [f"{one / 1e6:.3f} MB ({before / one:.1f} times less)" for one in after]
        table.add_row(name, f"{before / 1e6:.3f} MB", *fewer)
    console.print(table)


if __name__ == "__main__":
    main()
