"""Train the network of the reward `scene_match`, and measure it: `reward_models/scene_match.safetensors`.

    python recipes/scenes/build/train_scene_match.py            train, write, measure
    python recipes/scenes/build/train_scene_match.py --steps 0  measure the shipped one only

Cells of all concepts are painted afresh at every step: moved, resized, softened, with noise; a quarter comes from
scenes that the autoencoder rebuilt. Cells of two drawings, or of a smear, are "unknown". It shares neither weights nor
architecture with the judge, and sees no sample of any teacher.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from drawings import Drawings, load_drawings
from measure_scenes import Sampler
from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.data.scenes import BACKGROUNDS, CELL, NUM_CELLS, STYLES, Reading, answers, cells_of, palette, read_code
from mlcm_rl.evaluation.scene_judge import UNKNOWN, load
from mlcm_rl.training.loop import cpu_has_bfloat16
from reward_models._scene_reader import SceneReader, log_match
from reward_models.scene_count import SceneCount
from reward_models.scene_match import SHIPPED, SceneMatch
from scene_judge import JUDGE, paint_all, read_in_parts, real_scenes
from scenes import MEASURED, SUBJECT, Object, Scene, read_concepts
from sources import write_text
from train_denoiser import SHIFT, Encoder
from updates import Updates, say_every

BATCH, REBUILT = 192, 64  # cells of a step that are painted, and that the autoencoder rebuilt
NUM_REBUILT = 600  # pictures
SHARES = (0.65, 0.1, 0.25)  # of painted cells: drawings, empty ones, unknown ones
MAX_SHIFT, MAX_SCALE = 3 / 32, 0.06  # of a cell's half side; of a drawing's size
SMOOTHING = 0.05  # of the labels: it bounds the logits, and keeps a gradient where the network is sure


class Painter:
    """Paints batches of cells; every draw comes from its generator."""

    def __init__(self, drawings: Drawings, seed: int) -> None:
        padded = [[np.pad(one, ((2, 2), (2, 2), (0, 0))) for one in of_concept] for of_concept in drawings.pixels]
        pixels = torch.from_numpy(np.asarray(padded)).permute(0, 1, 4, 2, 3).float() / 255  # (C, S, 4, CELL, CELL)
        self.colours = torch.cat([pixels[:, :, :3] * pixels[:, :, 3:], pixels[:, :, 3:]], 2)  # weighed by transparency
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return uniform numbers of a shape."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def integers(self, high: int, count: int) -> Tensor:
        """Return integers below `high`, (count,)."""
        return torch.randint(high, (count,), generator=self.generator)

    def moved(self, concepts: Tensor, styles: Tensor, shift: float = MAX_SHIFT) -> Tensor:
        """Return drawings (M, 4, CELL, CELL), moved and resized."""
        count = len(concepts)
        places = torch.zeros(count, 2, 3)
        places[:, 0, 0] = places[:, 1, 1] = self.uniform(1 - MAX_SCALE, 1 + MAX_SCALE, count)
        places[:, :, 2] = self.uniform(-shift, shift, count, 2)
        chosen = self.colours[concepts, styles]
        return F.grid_sample(
            chosen, F.affine_grid(places, list(chosen.shape), align_corners=False), align_corners=False
        )

    def paint(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return cells (count, 3, CELL, CELL), kinds (count,) and styles (count,); the style of no object is -1."""
        num_concepts = len(self.colours)
        kinds, styles = self.integers(num_concepts, count), self.integers(len(STYLES), count)
        layers = self.moved(kinds, styles)
        sort = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=self.generator)
        layers[sort == 1] = 0
        unknown = (sort == 2).nonzero().flatten()
        layers[unknown] = self.spoilt(layers[unknown])
        back = palette()[self.integers(len(BACKGROUNDS), count)] + self.uniform(-0.03, 0.03, count, 3)
        cells = layers[:, :3] + back[:, :, None, None] * (1 - layers[:, 3:])
        kinds, styles = torch.where(sort == 0, kinds, num_concepts - 1 + sort), torch.where(sort == 0, styles, -1)
        return self.noisy(cells), kinds, styles

    def spoilt(self, layers: Tensor) -> Tensor:
        """Return what is no drawing: mixtures and halves of two, far-off ones, smears."""
        count = len(layers)
        others = self.moved(self.integers(len(self.colours), count), self.integers(len(STYLES), count))
        share = self.uniform(0.35, 0.65, count, 1, 1, 1)
        mixed = share * layers + (1 - share) * others
        halved = torch.cat([layers[..., : CELL // 2], others[..., CELL // 2 :]], 3)
        halved = torch.where(self.uniform(0, 1, count, 1, 1, 1) < 0.5, halved, halved.transpose(2, 3))
        far = torch.stack(
            [
                one.roll(int(step), int(axis))
                for one, step, axis in zip(
                    layers, CELL // 4 + self.integers(CELL // 2, count), 1 + self.integers(2, count), strict=True
                )
            ]
        )
        small = F.interpolate(layers, int(self.integers(4, 1)) + 4, mode="bilinear", antialias=True)
        smeared = F.interpolate(small, CELL, mode="bilinear")
        return torch.stack([mixed, halved, far, smeared])[self.integers(4, count), torch.arange(count)]

    def noisy(self, cells: Tensor) -> Tensor:
        """Return cells of which a part is softened, all with a little noise, in [0, 1]."""
        side = int(self.integers(CELL // 2, 1)) + CELL // 2
        soft = F.interpolate(F.interpolate(cells, side, mode="bilinear", antialias=True), CELL, mode="bilinear")
        is_soft = self.uniform(0, 1, len(cells), 1, 1, 1) < 0.5
        noise = torch.randn(cells.shape, generator=self.generator) * self.uniform(0, 0.05, len(cells), 1, 1, 1)
        return (torch.where(is_soft, soft, cells) + noise).clamp(0, 1)


@torch.no_grad()
def rebuilt_cells(drawings: Drawings, concepts: Sequence[str], vae: AutoencoderKL) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells, kinds and styles of scenes of up to four drawings; the latents have noise of up to 0.2."""
    draw, noise = random.Random("scene_match"), torch.Generator().manual_seed(0)
    cells, kinds, styles = [], [], []
    for number in range(NUM_REBUILT):
        filled = [cell for cell in range(NUM_CELLS) if draw.random() < 0.85]
        objects = tuple(Object(*draw.choice(list(drawings.places)), cell) for cell in filled)
        picture = paint_all(drawings, [Scene("count", objects, draw.choice(list(BACKGROUNDS)))])
        latents = vae.encode(picture * 2 - 1).latent_dist.mean
        latents = latents + 0.1 * (number % 3) * torch.randn(latents.shape, generator=noise) / vae.config.scaling_factor
        cells.append(cells_of(vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
        labels = {o.cell: (concepts.index(o.concept), STYLES.index(o.style)) for o in objects}
        kinds += [labels.get(cell, (len(concepts), -1))[0] for cell in range(NUM_CELLS)]
        styles += [labels.get(cell, (len(concepts), -1))[1] for cell in range(NUM_CELLS)]
    return torch.cat(cells), torch.tensor(kinds), torch.tensor(styles)


def train(drawings: Drawings, concepts: Sequence[str], vae: AutoencoderKL, num_steps: int) -> SceneReader:
    """Return a reader trained for `num_steps` steps."""
    torch.manual_seed(0)
    reader, painter = SceneReader(len(concepts)).train(), Painter(drawings, 0)
    rebuilt = rebuilt_cells(drawings, concepts, vae)
    print("scenes are rebuilt", flush=True)
    updates, say = (
        Updates(reader.parameters(), 3e-3, num_steps, weight_decay=0.05, max_norm=1.0),
        say_every(50, num_steps),
    )
    for step in range(1, num_steps + 1):
        painted, rows = painter.paint(BATCH), painter.integers(len(rebuilt[0]), REBUILT)
        chosen = (painter.noisy(rebuilt[0][rows]), rebuilt[1][rows], rebuilt[2][rows])
        cells, kinds, styles = (torch.cat(both) for both in zip(painted, chosen, strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            log_kinds, log_styles = reader(cells)
        loss = F.cross_entropy(log_kinds, kinds, label_smoothing=SMOOTHING)
        loss = loss + F.cross_entropy(log_styles, styles, ignore_index=-1, label_smoothing=SMOOTHING)
        updates.take(loss)
        say(step, loss.item())
    return reader.eval()


def write(reader: SceneReader, concepts: Sequence[str]) -> None:
    """Write the weights in half precision, with the concepts in the file's metadata."""
    weights = {name: value.detach().half().contiguous() for name, value in reader.state_dict().items()}
    save_file(weights, SHIPPED, {"concepts": json.dumps(list(concepts))})


@torch.no_grad()
def measure(drawings: Drawings, concepts: Sequence[str], vae: AutoencoderKL, count: int) -> dict[str, Any]:
    """Return accuracies on real scenes of held-out combinations, painted and rebuilt.

    "cells": the likeliest kind and style of every cell is right; "preferred": the own request is likelier than the next
    scene's of the same relation; "count": `scene_count` counts right; scores are means with the deviation.
    """
    scenes, match = real_scenes(concepts, count, "scene_match's test"), SceneMatch("cpu", torch.float32)
    requests = [scene.request(True, True) for scene in scenes]
    pictures, generator = paint_all(drawings, scenes), torch.Generator().manual_seed(0)
    report: dict[str, Any] = {}
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in pictures.split(25)])
    noise = torch.randn(latents.shape, generator=generator) / vae.config.scaling_factor
    views = {"painted": pictures}
    for name, scale in (("rebuilt", 0.0), ("rebuilt with noise 0.1", 0.1)):
        parts = (latents + scale * noise).split(25)
        views[name] = torch.cat([vae.decode(part).sample for part in parts]).div(2).add(0.5).clamp(0, 1)
    counter = SceneCount("cpu", torch.float32)
    for name, images in views.items():
        read = read_all(match, images)
        own = log_match(*read, requests, concepts)
        other = log_match(*read, requests[4:] + requests[:4], concepts)  # relations go round
        right = [r.cells == s.reading().cells for r, s in zip(likeliest(read, concepts), scenes, strict=True)]
        counted = counter.count(images) == torch.tensor([request.count for request in requests])
        report[name] = {
            "cells": round(sum(right) / len(right), 4),
            "preferred": round((own > other).float().mean().item(), 4),
            "own": [round(own.mean().item(), 2), round(own.std().item(), 2)],
            "other": [round(other.mean().item(), 2), round(other.std().item(), 2)],
            "count": round(counted.float().mean().item(), 4),
        }
    return report


def read_all(match: SceneMatch, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reward's network reads of many pictures, as `SceneReader.read`."""
    kinds, styles, backgrounds = zip(*(match.reader.read(part) for part in images.split(25)), strict=True)
    return torch.cat(kinds), torch.cat(styles), torch.cat(backgrounds)


def likeliest(read: Sequence[Tensor], concepts: Sequence[str]) -> list[Reading]:
    """Return the likeliest reading of each picture, cell by cell."""
    kinds, styles, backgrounds = (part.argmax(-1).tolist() for part in read)
    readings = []
    for of_kinds, of_styles, background in zip(kinds, styles, backgrounds, strict=True):
        seen = zip(of_kinds, of_styles, strict=True)
        cells = [None if k == len(concepts) else ((*concepts, None, UNKNOWN)[k], STYLES[s]) for k, s in seen]
        readings.append(Reading(tuple(cells), list(BACKGROUNDS)[background]))
    return readings


@torch.no_grad()
def compare_with_judge(vae: AutoencoderKL, concepts: Sequence[str], count: int) -> dict[str, Any]:
    """Return how reward and judge agree on the teacher's samples of the first test prompts, at 25 guided steps.

    Shares of pictures that both, or only one, see as asked; "log_p" of those that the judge calls right and wrong, and
    the share of pairs of one of each in which the right one has the higher score.
    """
    denoiser = SD3Transformer2DModel.from_pretrained(SUBJECT / "teacher" / "transformer", torch_dtype=torch.float32)
    prompts = read_prompts(SUBJECT / "prompts" / "test.jsonl")[:count]
    images = Sampler(denoiser, vae, Encoder(SUBJECT / "teacher")).draw([p.prompt for p in prompts], 25, 3.0, SHIFT)
    requests, match = [read_code(str(p.concept)) for p in prompts], SceneMatch("cpu", torch.float32)
    judged = [answers(*pair)["all"] for pair in zip(requests, read_in_parts(load(JUDGE), images), strict=True)]
    read = read_all(match, images)
    ours = [answers(*pair)["all"] for pair in zip(requests, likeliest(read, concepts), strict=True)]
    pairs, scores = list(zip(judged, ours, strict=True)), log_match(*read, requests, concepts)
    right = torch.tensor(judged)
    above = scores[right][:, None] > scores[~right]
    counter = SceneCount("cpu", torch.float32).count(images)
    counted = [answers(*pair)["count"] for pair in zip(requests, read_in_parts(load(JUDGE), images), strict=True)]
    ours_counted = (counter == torch.tensor([request.count for request in requests])).tolist()
    return {
        "samples": count,
        "both right": round(pairs.count((True, True)) / count, 4),
        "both wrong": round(pairs.count((False, False)) / count, 4),
        "only the judge": round(pairs.count((True, False)) / count, 4),
        "only the reward": round(pairs.count((False, True)) / count, 4),
        "log_p right": [round(scores[right].mean().item(), 2), round(scores[right].std().item(), 2)],
        "log_p wrong": [round(scores[~right].mean().item(), 2), round(scores[~right].std().item(), 2)],
        "right above wrong": round(above.float().mean().item(), 4),
        "count as the judge": round(sum(a == b for a, b in zip(counted, ours_counted, strict=True)) / count, 4),
    }


def main() -> None:
    """Train, write, measure; the figures go to `measured/scene_match.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--samples", type=int, default=96, help="of the teacher")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    drawings = load_drawings()
    concepts = [concept.codepoint for concept in read_concepts()]
    vae = AutoencoderKL.from_pretrained(SUBJECT / "teacher" / "vae", torch_dtype=torch.float32).eval()
    if arguments.steps:
        write(train(drawings, concepts, vae, arguments.steps), concepts)
    report = {"scenes": arguments.scenes, **measure(drawings, concepts, vae, arguments.scenes)}
    report["teacher's samples"] = compare_with_judge(vae, concepts, arguments.samples)
    print(json.dumps(report, indent=1))
    write_text(MEASURED / "scene_match.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
