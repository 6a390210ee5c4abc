"""Rebuild the embedded teacher, its judge and the emoji rewards from their sources; what was done before is skipped.

A finished step leaves a file in `done/` of the cache; delete it, or pass `--again STEP`, to run the step once more.
With `--openmoji` everything has OpenMoji as a fourth style, and its licence: weights trained so are share-alike. They
take the place of the shipped ones in this checkout; steps done with the other choice of styles are done once more.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sources import EMOJI, OPENMOJI_KEY, OPENMOJI_NOTICE, WITH_OPENMOJI, cache_folder, write_text

ROOT = EMOJI.parents[1]
RECIPE = "recipes/emoji_teacher.yaml"

# name -> the command's arguments after the interpreter, run from the checkout
STEPS: dict[str, tuple[str, ...]] = {
    "pictures": ("recipes/emoji/build/sources.py",),
    "autoencoder": ("recipes/emoji/build/train_autoencoder.py",),
    "captions": ("recipes/emoji/build/captions.py",),
    "text_towers": ("recipes/emoji/build/train_text_towers.py",),
    "judge": ("recipes/emoji/build/train_judge.py",),
    "assemble": ("recipes/emoji/build/assemble_teacher.py", "--fresh-denoiser"),
    "reconstructions": ("recipes/emoji/build/measure_reconstructions.py",),
    "rewards": ("recipes/emoji/build/train_rewards.py",),
    "alignment": ("recipes/emoji/build/train_alignment.py",),
    "denoiser": ("-m", "mlcm_rl", "run", RECIPE),
    "teacher": ("recipes/emoji/build/assemble_teacher.py", "--from-run", "runs/emoji_teacher"),
    "samples": ("recipes/emoji/build/measure_teacher.py", "--prompts", "256"),
    "wordings": ("recipes/emoji/build/measure_wordings.py",),
}
THREADED = ("autoencoder", "text_towers", "judge", "rewards", "alignment")  # steps that take `--threads`


def command_of(step: str, threads: int) -> list[str]:
    """Return the full command line of a step."""
    arguments = [*STEPS[step], "--threads", str(threads)] if step in THREADED else list(STEPS[step])
    return [sys.executable, *arguments]


def run_steps(
    steps: Sequence[str], again: Sequence[str], threads: int, done: Path, with_openmoji: bool = False
) -> None:
    """Run the steps that `done` does not say were run so, or that are named in `again`; raises on the first that fails.

    A step's file in `done` holds which styles it was run with: empty for the shipped ones, "openmoji" with that too.
    """
    key = "openmoji" if with_openmoji else ""
    environment = os.environ | {OPENMOJI_KEY: "1" if with_openmoji else "0"}
    for step in steps:
        stamp = done / step
        if stamp.exists() and stamp.read_text(encoding="utf-8") == key and step not in again:
            print(f"{step}: done before", flush=True)
            continue
        command = command_of(step, threads)
        print(f"{step}: {' '.join(command[1:])}", flush=True)
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
        write_text(stamp, key)


def main() -> None:
    """Run every step, or the ones named with `--only`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--again", nargs="+", choices=STEPS, default=[], metavar="STEP")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of the trainings")
    parser.add_argument(
        "--openmoji", action="store_true", default=WITH_OPENMOJI, help="OpenMoji as a fourth style (CC BY-SA 4.0)"
    )
    arguments = parser.parse_args()
    if arguments.openmoji:
        print(OPENMOJI_NOTICE, flush=True)
    run_steps(arguments.only, arguments.again, arguments.threads, cache_folder() / "done", arguments.openmoji)


if __name__ == "__main__":
    main()
