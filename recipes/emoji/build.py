"""Rebuild the embedded teacher, its judge and the emoji rewards from their sources; what was done before is skipped.

A finished step leaves a file in `done/` of the cache; delete it, or pass `--again STEP`, to run the step once more.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sources import HERE, cache_folder, write_text

ROOT = HERE.parents[1]
RECIPE = "recipes/emoji_teacher.yaml"

# name -> the command's arguments after the interpreter, run from the checkout
STEPS: dict[str, tuple[str, ...]] = {
    "pictures": ("recipes/emoji/sources.py",),
    "autoencoder": ("recipes/emoji/train_autoencoder.py",),
    "captions": ("recipes/emoji/captions.py",),
    "text_towers": ("recipes/emoji/train_text_towers.py",),
    "judge": ("recipes/emoji/train_judge.py",),
    "assemble": ("recipes/emoji/assemble_teacher.py", "--fresh-denoiser"),
    "reconstructions": ("recipes/emoji/measure_reconstructions.py",),
    "rewards": ("recipes/emoji/train_rewards.py",),
    "alignment": ("recipes/emoji/train_alignment.py",),
    "denoiser": ("-m", "mlcm_rl", "run", RECIPE),
    "teacher": ("recipes/emoji/assemble_teacher.py", "--from-run", "runs/emoji_teacher"),
}
THREADED = ("autoencoder", "text_towers", "judge", "rewards", "alignment")  # steps that take `--threads`


def command_of(step: str, threads: int) -> list[str]:
    """Return the full command line of a step."""
    arguments = [*STEPS[step], "--threads", str(threads)] if step in THREADED else list(STEPS[step])
    return [sys.executable, *arguments]


def run_steps(steps: Sequence[str], again: Sequence[str], threads: int, done: Path) -> None:
    """Run the steps whose file in `done` is missing, or that are named in `again`; raises on the first that fails."""
    for step in steps:
        stamp = done / step
        if stamp.exists() and step not in again:
            print(f"{step}: done before", flush=True)
            continue
        command = command_of(step, threads)
        print(f"{step}: {' '.join(command[1:])}", flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        write_text(stamp, "")


def main() -> None:
    """Run every step, or the ones named with `--only`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--again", nargs="+", choices=STEPS, default=[], metavar="STEP")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of the trainings")
    arguments = parser.parse_args()
    run_steps(arguments.only, arguments.again, arguments.threads, cache_folder() / "done")


if __name__ == "__main__":
    main()
