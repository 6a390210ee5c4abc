"""Train the judge from scratch: drawings of one concept in different styles together, all others apart.

Its concepts are all but the held-out ones, on which it is validated. It shares no weights with teacher or rewards.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, so that no installation is needed

from captions import teacher_concepts
from mlcm_rl.judge import Judge, PictureEncoder
from sources import HERE, STYLES, Pictures, load_pictures, progress_line, write_text


@dataclass(frozen=True)
class JudgeSettings:
    """Sizes and schedule. A step sees `num_concepts` concepts, each in two styles."""

    widths: tuple[int, ...] = (32, 64, 128, 256)
    feature_width: int = 128
    num_steps: int = 1000
    num_concepts: int = 80
    learning_rate: float = 2e-3
    temperature: float = 0.07
    seed: int = 0


def group_by_concept(pictures: Pictures) -> dict[str, list[int]]:
    """Return codepoint -> rows of its pictures, in the order of STYLES, for concepts drawn in two styles or more."""
    rows: dict[str, dict[str, int]] = {}
    for row, (codepoint, style) in enumerate(zip(pictures.codepoints, pictures.styles, strict=True)):
        rows.setdefault(codepoint, {})[style] = row
    return {c: [found[s] for s in STYLES if s in found] for c, found in rows.items() if len(found) > 1}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, H, W) in [0, 1] that are turned, scaled, moved, recoloured, blurred and noisy at random.

    Colour changes stay small, since colour tells many concepts apart; blur and noise are what a generator adds.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.25, 0.25), uniform(0.85, 1.25)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    moved = uniform(-0.12, 0.12, 2)
    rows = torch.stack([cosine, -sine, moved[:, 0], sine, cosine, moved[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # what comes in from outside is white
    images = (images - 0.5) * uniform(0.8, 1.2, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, uniform(0, 1, 1, 1, 1))
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return (images + noise).clamp(0, 1)


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
    encoder: PictureEncoder,
    pixels: Tensor,
    rows: Sequence[Sequence[int]],
    settings: JudgeSettings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the encoder in place, in bfloat16 autocast, on `pixels` uint8 (N, H, W, 3).

    `rows` lists, per concept, its pictures in two styles or more. `on_step(step, loss)` counts from 1.
    """
    draw, generator = random.Random(settings.seed), torch.Generator().manual_seed(settings.seed)
    proxies = nn.Parameter(torch.randn(len(rows), settings.feature_width, generator=generator))
    parameters = [*encoder.parameters(), proxies]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_steps, pct_start=0.1
    )
    for step in range(1, settings.num_steps + 1):
        concepts = draw.sample(range(len(rows)), settings.num_concepts)
        pairs = [draw.sample(rows[concept], 2) for concept in concepts]
        batch = pixels[[pair[side] for side in range(2) for pair in pairs]]
        images = augment(batch.permute(0, 3, 1, 2).float() / 255, generator)
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(images)
        loss = contrast(features, proxies, torch.tensor(concepts), settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, loss.item())


@torch.no_grad()
def encode(encoder: PictureEncoder, pixels: np.ndarray | Tensor, batch_size: int = 128) -> Tensor:
    """Return unit features (N, D) of uint8 pictures (N, H, W, 3)."""
    images = torch.as_tensor(np.array(pixels)).permute(0, 3, 1, 2)
    return torch.cat([encoder(part.float() / 255) for part in images.split(batch_size)])


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
    rows = group_by_concept(pictures)
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
    rows = group_by_concept(pictures)
    concepts = [concept.codepoint for concept in teacher_concepts()[0]]
    features = encode(encoder, pictures.pixels[[row for concept in concepts for row in rows[concept]]])
    references = features.unflatten(0, (len(concepts), len(STYLES))).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(rounded, folder / "judge.safetensors")
    save_file({"references": references}, folder / "references.safetensors")
    config = {
        "widths": list(settings.widths),
        "feature_width": settings.feature_width,
        "styles": list(STYLES),
        "concepts": concepts,
    }
    write_text(folder / "config.json", json.dumps(config) + "\n")
    return Judge(encoder, references, concepts, list(STYLES))


def main() -> None:
    """Train with progress lines; write `judge/` beside this file, with `training.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=JudgeSettings.num_steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=HERE / "judge")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = JudgeSettings(num_steps=arguments.steps)
    pictures, started = load_pictures(64), time.time()
    held_out = {concept.codepoint for concept in teacher_concepts()[1]}
    rows = [found for codepoint, found in group_by_concept(pictures).items() if codepoint not in held_out]
    torch.manual_seed(settings.seed)
    encoder = PictureEncoder(settings.widths, settings.feature_width)
    print(f"{len(rows)} concepts, {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters", flush=True)

    def on_step(step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}")
        if step % 25 == 0:
            print(progress_line(step, settings.num_steps, loss, time.time() - started), flush=True)
        if step % 500 == 0:
            print(validate(encoder, pictures), flush=True)

    train(encoder, torch.from_numpy(np.array(pictures.pixels)), rows, settings, on_step)
    save(encoder, settings, pictures, arguments.folder)
    report = {
        "minutes": round((time.time() - started) / 60, 1),
        "concepts": len(rows),
        "settings": asdict(settings),
        "cross_style_recall": validate(encoder, pictures),
    }
    print(report, flush=True)
    write_text(arguments.folder / "training.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
