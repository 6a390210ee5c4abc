"""Train the judge: drawings of one concept in different styles together, all others apart.

A linear head over a frozen MobileNetV2, trained on all concepts but the held-out ones, on which it is validated. It
shares no weights with the teacher or the rewards.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from captions import teacher_concepts
from mlcm_rl.evaluation.judge import BLOCKS, Judge, PictureEncoder
from mobilenet import trunk_weights
from sources import EMOJI, STYLES, Pictures, load_pictures, write_notice, write_text
from updates import Updates, say_every


@dataclass(frozen=True)
class JudgeSettings:
    """Sizes and schedule. A step sees `num_concepts` concepts, each in two styles."""

    feature_width: int = 128
    num_steps: int = 800
    num_concepts: int = 200
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    temperature: float = 0.07
    seed: int = 0


def contrast(features: Tensor, proxies: Tensor, concepts: Tensor, temperature: float) -> Tensor:
    """Return the loss, a scalar: one style against the other among the batch, and both against learned proxies.

    `features` (2C, D) are C pictures in one style, then the same concepts in another; `concepts` (C,) index the
    proxies (K, D).
    """
    first, second = features.chunk(2)
    same = torch.arange(len(first))
    scores = first @ second.T / temperature
    loss = F.cross_entropy(scores, same) / 2 + F.cross_entropy(scores.T, same) / 2
    against_proxies = features @ F.normalize(proxies, dim=-1).T / temperature
    return loss + F.cross_entropy(against_proxies, concepts.repeat(2), label_smoothing=0.1)


def train(
    head: nn.Linear,
    tapped: Tensor,
    rows: Sequence[Sequence[int]],
    settings: JudgeSettings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the head in place on `tapped` (N, W), what the trunk reads off N pictures.

    `rows` lists, per concept, its pictures in two styles or more. What is tapped is standardised while training; the
    finished head takes it as it is. `on_step(step, loss)` counts from 1.
    """
    draw, generator = random.Random(settings.seed), torch.Generator().manual_seed(settings.seed)
    mean, scale = tapped.mean(0), tapped.std(0) + 1e-3
    standard = (tapped - mean) / scale
    proxies = nn.Parameter(torch.randn(len(rows), settings.feature_width, generator=generator))
    updates = Updates([*head.parameters(), proxies], settings.learning_rate, settings.num_steps, settings.weight_decay)
    for step in range(1, settings.num_steps + 1):
        concepts = draw.sample(range(len(rows)), settings.num_concepts)
        pairs = [draw.sample(rows[concept], 2) for concept in concepts]
        batch = standard[[pair[side] for side in range(2) for pair in pairs]]
        kept = torch.rand(batch.shape, generator=generator) >= settings.dropout
        features = F.normalize(head(batch * kept / (1 - settings.dropout)), dim=-1)
        loss = contrast(features, proxies, torch.tensor(concepts), settings.temperature)
        updates.take(loss)
        on_step(step, loss.item())
    with torch.no_grad():
        head.weight.div_(scale)
        head.bias.sub_(head.weight @ mean)


@torch.no_grad()
def tap(encoder: PictureEncoder, pixels: np.ndarray | Tensor, batch_size: int = 64) -> Tensor:
    """Return what the head reads, (N, W), of uint8 pictures (N, H, W, 3)."""
    images = torch.as_tensor(np.array(pixels)).permute(0, 3, 1, 2)
    return torch.cat([encoder.tapped(part.float() / 255) for part in images.split(batch_size)])


@torch.no_grad()
def encode(encoder: PictureEncoder, pixels: np.ndarray | Tensor) -> Tensor:
    """Return unit features (N, D) of uint8 pictures (N, H, W, 3)."""
    return F.normalize(encoder.head(tap(encoder, pixels)), dim=-1)


def cross_style_recall(features: Tensor, queries: slice, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Return R@k of one style's drawing among prototypes made of the other styles.

    `features` (K, S, D): all K concepts are candidates, those in `queries` are asked for. A tie counts as a miss.
    """
    ranks = []
    for style in range(features.shape[1]):
        others = torch.cat([features[:, :style], features[:, style + 1 :]], dim=1)
        scores = features[queries, style] @ F.normalize(others.mean(1), dim=-1).T
        own = scores.gather(1, torch.arange(len(features))[queries, None])
        ranks.append((scores >= own).sum(1) - 1)
    rank = torch.cat(ranks)
    return {f"R@{k}": round((rank < k).float().mean().item(), 4) for k in ks}


def validate(encoder: PictureEncoder, pictures: Pictures) -> dict[str, object]:
    """Return cross-style recall of held-out and teacher concepts, and the chance of being right."""
    rows = pictures.rows_by_concept(min_styles=2)
    teacher, held_out = ([c.codepoint for c in part] for part in teacher_concepts())
    everything = [*held_out, *teacher]
    pixels = pictures.pixels[[row for codepoint in everything for row in rows[codepoint]]]
    features = encode(encoder, pixels).unflatten(0, (len(everything), len(STYLES)))
    count = len(held_out)
    return {
        "held-out concepts, candidates: held-out": cross_style_recall(features[:count], slice(None)),
        "held-out concepts, candidates: held-out and teacher": cross_style_recall(features, slice(count)),
        "teacher concepts, candidates: held-out and teacher": cross_style_recall(features, slice(count, None)),
        "candidates": [count, len(everything)],
    }


def save(encoder: PictureEncoder, settings: JudgeSettings, pictures: Pictures, folder: Path) -> Judge:
    """Write weights (half precision), configuration and the teacher concepts' references; return the judge.

    The references are the features of the rounded weights, so that a loaded judge agrees with them.
    """
    rounded = {name: weight.half().contiguous() for name, weight in encoder.state_dict().items()}
    encoder.load_state_dict({name: weight.float() for name, weight in rounded.items()})
    rows = pictures.rows_by_concept(min_styles=2)
    concepts = [concept.codepoint for concept in teacher_concepts()[0]]
    features = encode(encoder, pictures.pixels[[row for concept in concepts for row in rows[concept]]])
    references = features.unflatten(0, (len(concepts), len(STYLES))).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(rounded, folder / "judge.safetensors")
    save_file({"references": references}, folder / "references.safetensors")
    config = {
        "feature_width": settings.feature_width,
        "styles": list(STYLES),
        "concepts": concepts,
    }
    write_text(folder / "config.json", json.dumps(config) + "\n")
    write_notice(folder)
    return Judge(encoder, references, concepts, list(STYLES))


def main() -> None:
    """Train, and write `judge/`, with `training.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=EMOJI / "judge")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings, pictures, started = JudgeSettings(), load_pictures(64), time.time()
    torch.manual_seed(settings.seed)
    encoder = PictureEncoder(settings.feature_width).requires_grad_(False)
    encoder.load_state_dict(trunk_weights(len(BLOCKS)), strict=False)
    tapped = tap(encoder, pictures.pixels)
    print(f"{len(tapped)} pictures through the trunk in {time.time() - started:.0f} s", flush=True)
    held_out = {concept.codepoint for concept in teacher_concepts()[1]}
    rows = [found for codepoint, found in pictures.rows_by_concept(min_styles=2).items() if codepoint not in held_out]
    train(encoder.head.requires_grad_(True), tapped, rows, settings, say_every(100, settings.num_steps))
    save(encoder, settings, pictures, arguments.folder)
    minutes = round((time.time() - started) / 60, 1)
    recall = validate(encoder, pictures)
    report = {"minutes": minutes, "concepts": len(rows), "settings": asdict(settings), "cross_style_recall": recall}
    print(report, flush=True)
    write_text(arguments.folder / "training.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
