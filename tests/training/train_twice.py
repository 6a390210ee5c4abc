"""What a launched test runs in every process: train, save, and go on from what was saved, under whatever engine.

train_twice.py TEACHER FOLDER KIND PARENTS SETTINGS      (the KIND of stage; folders of its PARENTS, SETTINGS: JSON)
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import runs
from mlcm_rl.models import teachers
from mlcm_rl.training import processes


def train(
    teacher: Path, folder: Path, kind: str, parents: dict[str, Path], num_steps: int, settings: dict[str, Any]
) -> None:
    """Train up to `num_steps`, from what is in `folder` if there is something; its checkpoints stay there."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings | {"num_steps": num_steps}
    stage = runs.distill(**settings) if kind == "distill" else runs.tuning(kind, **settings)
    run = import_module(f"mlcm_rl.stages.{kind}").run
    run(stage, runs.recipe(teacher, folder, [stage]), parents, folder)


if __name__ == "__main__":
    teacher, folder, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    parents = {name: Path(path) for name, path in json.loads(sys.argv[4]).items()}
    for num_steps in (1, 2):
        train(teacher, folder, kind, parents, num_steps, json.loads(sys.argv[5]))
    base = teachers.load(runs.recipe(teacher, folder, [runs.distill()]).teacher, "cpu")
    base.encode_prompts(["a cat"])  # under ZeRO-3 too the text encoders are whole
    processes.finish()
