"""Train `emoji_alignment`: a bilingual text tower, distilled from multilingual-e5-small, and contrastive heads.

Pictures are the views of `train_rewards.py`, without the held-out concepts; texts are captions in English and
Chinese, never of the test split. The tower learns e5's meaning of every concept's captions, the held-out ones too (as
a text encoder knows words whose pictures it never saw), so that what is measured on held-out concepts is whether the
heads carry over. Run `train_rewards.py` first: it writes the picture features.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captions import LANGUAGES, captions_of, split_of, teacher_concepts
from reward_models import emoji_alignment
from reward_models._dual_encoder import DualEncoder, rows_of
from reward_models._efficientnet_lite import shipped_features
from sources import MEASURED, STYLES, Concept, list_concepts, load_pictures, write_text
from train_rewards import features_of, load_views, save
from train_text_towers import STYLE_OR_NONE, concept_targets, first_of_split
from updates import Updates, say_every

MAX_SCALE = 50.0  # of a cosine, as CLIP bounds its own: the contrast would sharpen without end on what it has seen
Rows = list[int]


@dataclass(frozen=True)
class AlignmentSettings:
    """Schedule. A step sees `num_concepts` concepts, each by one picture, one English and one Chinese caption."""

    num_steps: int = 1200
    num_concepts: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    seed: int = 0


class Captions:
    """Captions by concept and language as rows of the tower's table, those of the test split left out."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.rows: dict[tuple[int, str], list[Rows]] = {
            (index, language): [
                rows_of(caption)
                for style in STYLE_OR_NONE
                for caption in captions_of(concept, style, language)
                if split_of(caption) != "test"
            ]
            for index, concept in enumerate(concepts)
            for language in LANGUAGES
        }

    def draw(self, concepts: Sequence[int], chance: random.Random) -> list[Rows]:
        """Return a caption of every concept in each language: all English ones, then all Chinese ones."""
        return [chance.choice(self.rows[index, language]) for language in LANGUAGES for index in concepts]


def contrast(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric cross entropy of matching unit vectors (K, D), row to column and back: a scalar."""
    logits, same = scale * rows @ columns.T, torch.arange(len(rows))
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def train(
    encoder: DualEncoder,
    features: Tensor,
    pictured: Sequence[int],
    captions: Captions,
    targets: Tensor,
    settings: AlignmentSettings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the encoder in place. `on_step(step, loss)` counts from 1.

    `features` (V, K, S, D) are V views of K concepts in S styles, `pictured` those concepts' indices among all whose
    `captions` and e5 `targets` (N, E) are given. The finished picture head takes features as they are.
    """
    chance, generator = random.Random(settings.seed), torch.Generator().manual_seed(settings.seed)
    mean = features.mean((0, 1, 2))
    deviation = (features - mean).square().mean().sqrt()
    views = ((features - mean) / deviation).permute(1, 0, 2, 3).flatten(1, 2)  # (K, V S, D)
    updates = Updates(encoder.parameters(), settings.learning_rate, settings.num_steps, settings.weight_decay)
    for step in range(1, settings.num_steps + 1):
        shown = chance.sample(range(len(pictured)), settings.num_concepts)
        view = torch.randint(views.shape[1], (len(shown),), generator=generator)
        batch = views[torch.tensor(shown), view]
        kept = torch.rand(batch.shape, generator=generator) >= settings.dropout
        pictures = encoder.picture_vectors(batch * kept / (1 - settings.dropout))
        english, chinese = encoder.text_vectors(captions.draw([pictured[i] for i in shown], chance)).chunk(2)
        loss = contrast(pictures, english, encoder.scale) + contrast(pictures, chinese, encoder.scale)
        read = chance.sample(range(len(targets)), settings.num_concepts)
        meant = encoder.tower(captions.draw(read, chance))
        loss = loss + e5_loss(meant, targets[read].repeat(2, 1))
        updates.take(loss)
        with torch.no_grad():
            encoder.log_scale.clamp_(max=torch.tensor(MAX_SCALE).log())
        on_step(step, loss.item())
    with torch.no_grad():
        first = encoder.picture_head[0]
        assert isinstance(first, nn.Linear)
        first.weight.div_(deviation)
        first.bias.sub_(first.weight @ mean)


def e5_loss(meant: Tensor, wanted: Tensor) -> Tensor:
    """Return the distillation loss of unit vectors (2K, E), English then Chinese: cosine, and contrast by language."""
    scale = torch.tensor(20.0)
    sides = zip(meant.chunk(2), wanted.chunk(2), strict=True)
    return (1 - (meant * wanted).sum(-1)).mean() + sum(contrast(mine, e5, scale) for mine, e5 in sides) / 2


@torch.no_grad()
def retrieval(
    encoder: DualEncoder, features: Tensor, asked: Sequence[Concept], others: Sequence[Concept]
) -> dict[str, dict[str, float]]:
    """Return R@1 and R@5, per language, of pictures (K, S, D) of `asked` among the names of `asked` and `others`.

    A name is the concept's first unstyled caption of the test split (its plain name where that split has none).
    A tie counts as a miss.
    """
    pictures = encoder.picture_vectors(features)  # (K, S, D)
    report = {}
    for language in LANGUAGES:
        names = [first_of_split(captions_of(concept, None, language)) for concept in (*asked, *others)]
        texts = encoder.text_vectors([rows_of(name) for name in names])
        scores = pictures @ texts.T  # (K, S, N)
        own = scores[torch.arange(len(asked)), :, torch.arange(len(asked))][..., None]
        rank = (scores >= own).sum(-1) - 1
        report[language] = {f"R@{k}": round((rank < k).float().mean().item(), 3) for k in (1, 5)}
    return report


def main() -> None:
    """Train, write the encoder beside its reward model, and what was measured to `measured/alignment.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=AlignmentSettings.num_steps)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings, started = AlignmentSettings(num_steps=arguments.steps), time.time()
    concepts, read = list_concepts(), shipped_features()
    parts = {name: torch.stack([features_of(read, x) for x in found]) for name, found in load_views(0, 4).items()}
    print(f"picture features, {time.time() - started:.0f} s", flush=True)
    places = {concept.codepoint: place for place, concept in enumerate(concepts)}
    teacher, held_out = teacher_concepts()
    unseen = {concept.codepoint for concept in held_out}
    drawn = list(load_pictures(64).rows_by_concept(len(STYLES)))
    pictured = [places[codepoint] for codepoint in drawn if codepoint not in unseen]
    held_out = [concepts[places[codepoint]] for codepoint in drawn if codepoint in unseen]
    torch.manual_seed(settings.seed)
    encoder = DualEncoder(read.width)

    say = say_every(100, settings.num_steps)
    train(encoder, parts["training"], pictured, Captions(concepts), concept_targets(concepts), settings, say)
    rounded = {name: value.half() for name, value in encoder.state_dict().items()}
    encoder.load_state_dict({name: value.float() for name, value in rounded.items()})
    save(rounded, emoji_alignment.SHIPPED)
    mine = [
        place for place, index in enumerate(pictured) if concepts[index].codepoint in {c.codepoint for c in teacher}
    ]
    shown = [concepts[pictured[place]] for place in mine]
    report: dict[str, object] = {"settings": asdict(settings), "scale": round(encoder.scale.item(), 1)}
    groups: dict[str, tuple[str, list[int] | slice, list[Concept], list[Concept]]] = {
        "seen concepts, candidates: seen": ("training", mine, shown, []),
        "held-out concepts, candidates: held-out": ("held_out", slice(None), held_out, []),
        "held-out concepts, candidates: held-out and seen": ("held_out", slice(None), held_out, shown),
    }
    for view in (0, 1):
        report["reconstructions" if view else "drawings"] = {
            name: retrieval(encoder, parts[part][view][rows], asked, others)
            for name, (part, rows, asked, others) in groups.items()
        }
    report["candidates"] = [len(shown), len(held_out)]
    report["bytes"] = emoji_alignment.SHIPPED.stat().st_size
    print(json.dumps(report, indent=1), f"{time.time() - started:.0f} s", flush=True)
    write_text(MEASURED / "alignment.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
