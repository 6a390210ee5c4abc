"""What a launched test runs in every process: train, save, and go on from what was saved, under whatever engine.

train_twice.py TEACHER STORE FOLDER SETTINGS          (SETTINGS of the distill stage, as JSON)
"""

import json
import sys
from pathlib import Path

import runs
from mlcm_rl import bases, distributed
from mlcm_rl.stages import distill


def train(teacher: Path, store: Path, folder: Path, num_steps: int, settings: dict) -> None:
    """Distil up to `num_steps`, from what is in `folder` if there is something; its checkpoints stay there."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = runs.distill(num_steps=num_steps, **settings)
    distill.run(stage, runs.recipe(teacher, folder, [stage]), {"trajectories": store}, folder)


if __name__ == "__main__":
    teacher, store, folder = map(Path, sys.argv[1:4])
    for num_steps in (2, 3):
        train(teacher, store, folder, num_steps, json.loads(sys.argv[4]))
    base = bases.load(runs.recipe(teacher, folder, [runs.distill()]).teacher, "cpu")
    base.encode_prompts(["a cat"])  # under ZeRO-3 too the text encoders are whole
    distributed.finish()
