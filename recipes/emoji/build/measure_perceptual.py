"""How often distances of latents find the weaker of two distortions nearer: LPIPS, the teacher's features, L2.

    mlcm run recipes/emoji_perceptual.yaml
    python recipes/emoji/build/measure_perceptual.py runs/emoji_perceptual [--times 9,49,199]

The pairs are those of the card of the run's train_perceptual stage: of pictures, and of a kind of distortion, that it
did not learn from. The features are under the empty prompt, after the first block, the first two and the first three.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mlcm_rl.equations.consistency import squared_l2
from mlcm_rl.models import lpips, perceptual, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.pipeline.finished_runs import recipe_of
from mlcm_rl.recipe import TrainPerceptual
from mlcm_rl.stages.train_perceptual import TITLES, held_out_pairs, measured, pictures_of, split

BLOCKS = ([0], [0, 1], [0, 1, 2])
TOGETHER = 64  # latents in a pass of the teacher


def by_features(base: Base, a: Tensor, b: Tensor, time: int, blocks: list[int]) -> Tensor:
    """Return the distances (B,) of latents (B, C, H, W) by the teacher's `blocks` at `time`."""
    noise = base.noise(torch.Generator().manual_seed(0), 1)
    parts = zip(a.split(TOGETHER), b.split(TOGETHER), strict=True)
    return torch.cat(
        [
            perceptual.teacher_distance(base, *part, base.unconditional(len(part[0])), noise, time, blocks)
            for part in parts
        ]
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--times", default="9,49,199", help="of the noise, for features")
    arguments = parser.parse_args()
    folder = next(arguments.run.glob("*-train_perceptual")).resolve()
    recipe = recipe_of(folder)
    stage = next(one for one in recipe.stages if isinstance(one, TrainPerceptual))
    base = teachers.load(recipe.teacher, torch.device("cpu"))
    stores = {"trajectories": next(arguments.run.glob("*-trajectories")).resolve()}
    _, images = split(pictures_of(stage, recipe, base, stores), stage.held_out, recipe.seed)
    pairs = held_out_pairs(stage, base, images, recipe.seed)
    rows = {
        "L2": measured(squared_l2, pairs),
        "LPIPS": measured(lpips.load(folder, base.latent_shape[0], base.device), pairs),
    }
    for time in map(int, arguments.times.split(",")):
        for blocks in BLOCKS:
            by_blocks = partial(by_features, base, time=time, blocks=blocks)
            rows[f"features {blocks} at {time}"] = measured(by_blocks, pairs)
    table = Table("distance", *(TITLES[name] for name in rows["L2"]))
    for name, row in rows.items():
        table.add_row(name, *(f"{mean:.3f} +- {error:.3f}" for mean, error in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
