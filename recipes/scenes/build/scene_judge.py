"""Train the judge of scenes, whose network and questions are `mlcm_rl/evaluation/scene_judge.py`.

    python recipes/scenes/build/scene_judge.py      train it, measure it on real held-out scenes, write `judge/`

A linear head over a frozen MobileNetV2 reads one cell at a time. Nothing else in this project trains it or trains
against it. A cell that shows something else, a mixture of two drawings, or a smear, is "unknown": such a picture is
wrong whatever was asked.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from drawings import DRAWING, MARGIN, Drawings, load_drawings, render_transparent
from mlcm_rl.data.scenes import BACKGROUNDS, CELL, NUM_CELLS, RELATIONS, STYLES, Reading, answers, cells_of
from mlcm_rl.evaluation.judge import BLOCKS, TAPPED_WIDTH
from mlcm_rl.evaluation.scene_judge import KIND, SceneJudge
from mobilenet import trunk_weights
from scenes import SUBJECT, Object, Scene, draw_scene, read_concepts
from sources import cache_folder, read_drawings, write_text
from updates import Updates, say_every

JUDGE = SUBJECT / "judge"
NUM_OTHERS = 240  # emoji of no concept, which show the judge what is unknown
MAX_SHIFT = 2  # pixels, in training


def save(judge: SceneJudge, folder: Path) -> None:
    """Write `config.json` and `judge.safetensors`, half precision; the judge then has the rounded weights."""
    rounded = {name: weight.half().contiguous() for name, weight in judge.encoder.state_dict().items()}
    judge.encoder.load_state_dict({name: weight.float() for name, weight in rounded.items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(rounded, folder / "judge.safetensors")
    write_text(
        folder / "config.json", json.dumps({"kind": KIND, "concepts": judge.concepts, "styles": list(STYLES)}) + "\n"
    )


def on_background(drawing: np.ndarray, background: Sequence[int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Return one cell (3, CELL, CELL) in [0, 1] with a drawing (DRAWING, DRAWING, 4), moved by `shift` pixels."""
    cell = np.empty((CELL, CELL, 3), np.float32)
    cell[:] = background
    top, left = (MARGIN + s for s in shift)
    alpha = drawing[..., 3:].astype(np.float32) / 255
    part = cell[top : top + DRAWING, left : left + DRAWING]
    part[:] = drawing[..., :3] * alpha + part * (1 - alpha)
    return torch.from_numpy(cell).permute(2, 0, 1) / 255


def training_cells(drawings: Drawings, concepts: Sequence[str], rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells (N, 3, CELL, CELL), classes (N,) and styles (N,); the style of no object is -1.

    Every round has every drawing as it is, on the next background, and moved or softened, on a random one; empty cells,
    other emoji, mixtures and smears.
    """
    draw, noise = random.Random("judge"), torch.Generator().manual_seed(0)
    sources = [read_drawings(style) for style in STYLES]
    strangers = sorted(set.intersection(*(set(s) for s in sources)) - {*concepts})
    others = [render_transparent(draw.choice(sources)[c], DRAWING) for c in draw.sample(strangers, NUM_OTHERS)]
    cells, classes, styles = [], [], []

    palette = list(BACKGROUNDS.values())

    def colour() -> tuple[int, ...]:
        return draw.choice(palette)

    def shift() -> tuple[int, int]:
        return draw.randint(-MAX_SHIFT, MAX_SHIFT), draw.randint(-MAX_SHIFT, MAX_SHIFT)

    def add(cell: Tensor, kind: int, style: int = -1) -> None:
        cells.append((cell + 0.03 * draw.random() * torch.randn(cell.shape, generator=noise)).clamp(0, 1))
        classes.append(kind)
        styles.append(style)

    def soften(cell: Tensor, factor: float) -> Tensor:
        small = F.interpolate(cell[None], scale_factor=factor, mode="bilinear", antialias=True)
        return F.interpolate(small, CELL, mode="bilinear")[0]

    empty, unknown, pixels = len(concepts), len(concepts) + 1, drawings.pixels.reshape(-1, DRAWING, DRAWING, 4)
    for number in range(rounds):
        for (concept, style), (i, j) in drawings.places.items():
            label = concepts.index(concept), STYLES.index(style)
            add(on_background(drawings.pixels[i, j], palette[(i + j + number) % len(palette)]), *label)
            cell = on_background(drawings.pixels[i, j], colour(), shift())
            add(soften(cell, 0.7) if draw.random() < 0.4 else cell, *label)
        for _ in range(len(others) // 4):
            add(on_background(np.zeros((DRAWING, DRAWING, 4), np.uint8), colour()), empty)
        for other in others[number % 2 :: 2]:
            add(on_background(other, colour(), shift()), unknown)
        for _ in range(len(others) // 2):
            back, (one, two) = colour(), (pixels[draw.randrange(len(pixels))] for _ in range(2))
            share = draw.uniform(0.35, 0.65)
            mixed = share * on_background(one, back) + (1 - share) * on_background(two, back)
            smeared = soften(on_background(one, back), draw.uniform(0.06, 0.12))
            add(mixed if draw.random() < 0.6 else smeared, unknown)
    return torch.stack(cells), torch.tensor(classes), torch.tensor(styles)


@torch.no_grad()
def rebuilt_cells(
    drawings: Drawings, concepts: Sequence[str], vae: AutoencoderKL, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells, classes and styles of every drawing as the autoencoder rebuilds it, `rounds` times: beside others,
    on random backgrounds, with and without a little noise of the latents. Samples look like that, drawings do not."""
    draw, noise = random.Random("rebuilt"), torch.Generator().manual_seed(0)
    cells, classes, styles = [], [], []
    for number in range(rounds):
        places = draw.sample(list(drawings.places), len(drawings.places))
        groups = [places[i : i + NUM_CELLS] for i in range(0, len(places), NUM_CELLS)]
        for group in groups:
            objects = tuple(Object(*place, cell) for cell, place in enumerate(group))
            picture = paint_all(drawings, [Scene("count", objects, draw.choice(list(BACKGROUNDS)))])
            latents = vae.encode(picture * 2 - 1).latent_dist.mean
            latents = latents + 0.1 * (number % 2) * torch.randn(latents.shape, generator=noise)
            cells.append(cells_of(vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)[: len(group)])
            classes += [concepts.index(concept) for concept, _ in group]
            styles += [STYLES.index(style) for _, style in group]
    return torch.cat(cells), torch.tensor(classes), torch.tensor(styles)


def train_head(judge: SceneJudge, tapped: Tensor, classes: Tensor, styles: Tensor, num_steps: int = 2000) -> None:
    """Train the head in place on what the trunk reads of cells, (N, TAPPED_WIDTH), standardised while training."""
    generator, head = torch.Generator().manual_seed(0), judge.encoder.head
    mean, scale = tapped.mean(0), tapped.std(0) + 1e-3
    standard, say = (tapped - mean) / scale, say_every(100, num_steps)
    head.requires_grad_(True)
    updates = Updates(head.parameters(), 2e-3, num_steps, weight_decay=0.02)
    for step in range(1, num_steps + 1):
        rows = torch.randint(len(standard), (512,), generator=generator)
        kept = torch.rand((512, TAPPED_WIDTH), generator=generator) >= 0.1
        logits = head(standard[rows] * kept / 0.9)
        concept, style = logits.split([len(judge.concepts) + 2, len(STYLES)], dim=1)
        loss = F.cross_entropy(concept, classes[rows]) + F.cross_entropy(style, styles[rows], ignore_index=-1)
        updates.take(loss)
        say(step, loss.item())
    head.requires_grad_(False)
    head.weight.div_(scale)
    head.bias.sub_(head.weight @ mean)


def real_scenes(concepts: Sequence[str], count: int, seed: str) -> list[Scene]:
    """Return random scenes of all relations, of held-out combinations where a relation has such."""
    draw = random.Random(seed)
    relations = [RELATIONS[i % len(RELATIONS)] for i in range(count)]
    return [draw_scene(draw, concepts, relation, relation != "single") for relation in relations]


def accuracy(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    """Return the share of pictures that are as everything of their scene asks, by relation and over all."""
    rows: dict[str, list[dict[str, bool]]] = defaultdict(list)
    for scene, reading in zip(scenes, readings, strict=True):
        result = answers(scene.request(True, True), reading) | {"cells": reading.cells == scene.reading().cells}
        rows[scene.relation].append(result)
        rows["over all"].append(result)
    return {k: {n: round(sum(r[n] for r in part) / len(part), 4) for n in part[0]} for k, part in rows.items()}


def paint_all(drawings: Drawings, scenes: Sequence[Scene]) -> Tensor:
    """Return pictures of scenes, (N, 3, 128, 128) in [0, 1]."""
    return torch.from_numpy(np.stack([drawings.paint(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255


def read_in_parts(judge: SceneJudge, images: Tensor, batch_size: int = 32) -> list[Reading]:
    """Return the readings of many pictures."""
    return [reading for part in images.split(batch_size) for reading in judge.read(part)]


def main() -> None:
    """Train, measure, and write `judge/` with `training.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started, drawings = time.time(), load_drawings()
    concepts = [concept.codepoint for concept in read_concepts()]
    judge = SceneJudge(concepts)
    judge.encoder.load_state_dict(trunk_weights(len(BLOCKS)), strict=False)
    vae = AutoencoderKL.from_pretrained(cache_folder() / "scene_autoencoder").eval()
    parts = training_cells(drawings, concepts, arguments.rounds), rebuilt_cells(drawings, concepts, vae, 6)
    cells, classes, styles = (torch.cat(both) for both in zip(*parts, strict=True))
    with torch.no_grad():
        tapped = torch.cat([judge.encoder.tapped(part) for part in cells.split(64)])
    print(f"{len(cells)} cells through the trunk, {time.time() - started:.0f} s", flush=True)
    train_head(judge, tapped, classes, styles)
    save(judge, JUDGE)
    scenes = real_scenes(concepts, 1000, "judge's test")
    report: dict[str, Any] = {
        "minutes": round((time.time() - started) / 60, 1),
        "cells": len(cells),
        "scenes": len(scenes),
    }
    report |= {"real scenes": accuracy(scenes, read_in_parts(judge, paint_all(drawings, scenes)))}
    print(json.dumps(report), flush=True)
    write_text(JUDGE / "training.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
