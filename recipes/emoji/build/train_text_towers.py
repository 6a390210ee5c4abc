"""Train the bilingual tokenizer and the two CLIP text towers, by distilling multilingual-e5-small.

What the denoiser reads is what is trained: the penultimate hidden states of both towers (its context) and the text
embedding of the second (its pooled vector) must each say, to a linear head, which concept and which style is asked for.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from captions import LANGUAGES, captions_of, label_and_tags, split_of, teacher_concepts
from e5 import encode_texts
from mlcm_rl.training.loop import cpu_has_bfloat16
from sources import STYLES, Concept, cache_folder, list_concepts, whole_folder, write_text
from updates import Updates, say_every

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
STYLE_OR_NONE = (*STYLES, None)
Tower: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True)
class TowerSettings:
    """Sizes and schedule. A step sees `num_pairs` concepts, each by one English and one Chinese caption."""

    vocabulary: int = 4096
    max_length: int = 32
    num_steps: int = 1500
    num_pairs: int = 64
    learning_rate: float = 2e-3
    temperature: float = 0.05
    seed: int = 0


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_length: int) -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer in CLIP's layout: 256 bytes, 256 bytes that end a word, merges, bos, eos.

    Every byte is a token of its own, so no character of any script is ever unknown. Padding is eos.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    layout = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = layout.backend_tokenizer.normalizer
    learner.pre_tokenizer = layout.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    symbols = letters + [letter + "</w>" for letter in letters]
    tokens = list(dict.fromkeys(symbols + ["".join(pair) for pair in merges]))[: vocabulary - 2]
    known = set(tokens)
    merges = [pair for pair in merges if "".join(pair) in known]
    vocab = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_towers(tokenizer: CLIPTokenizer, seed: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Return two untrained towers whose bos, eos and pad are the tokenizer's.

    The pooled vector is read at the first eos: with a wrong id in the configuration it would be read at the first
    position, where every prompt looks the same.
    """
    torch.manual_seed(seed)
    shared = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "num_hidden_layers": 4,
        "hidden_act": "gelu",
        "initializer_factor": 1.0,
    }
    first = CLIPTextConfig(hidden_size=128, intermediate_size=512, num_attention_heads=4, projection_dim=128, **shared)
    second = CLIPTextConfig(hidden_size=192, intermediate_size=576, num_attention_heads=6, projection_dim=192, **shared)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


class Heads(nn.Module):
    """Throw-away linear heads of one tower: concept (to e5's width) and style, for context and pooled vector."""

    def __init__(self, width: int, pooled_width: int, target_width: int) -> None:
        super().__init__()
        widths = {"context": width, "pooled": pooled_width}
        self.norm = nn.ModuleDict({name: nn.LayerNorm(size) for name, size in widths.items()})
        self.concept = nn.ModuleDict({name: nn.Linear(size, target_width) for name, size in widths.items()})
        self.style = nn.ModuleDict({name: nn.Linear(size, len(STYLE_OR_NONE)) for name, size in widths.items()})

    def forward(self, name: str, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit concept vectors (B, D) and logits (B, S) of the styles and none of vectors (B, width)."""
        normed = self.norm[name](vectors)
        return F.normalize(self.concept[name](normed), dim=-1), self.style[name](normed)


def read_tower(tower: Tower, ids: Tensor) -> dict[str, Tensor]:
    """Return what SDXL's pipeline reads, one vector a prompt, from token ids (B, L).

    "context" is the mean of the penultimate hidden states from eos to the end of the padding (these positions see
    the whole prompt), "pooled" the vector at eos; both are (B, width).
    """
    output = tower(input_ids=ids, output_hidden_states=True)
    after = (ids == tower.config.eos_token_id).float()[..., None]
    context = (output.hidden_states[-2] * after).sum(1) / after.sum(1)
    pooled = output.text_embeds if isinstance(tower, CLIPTextModelWithProjection) else output.pooler_output
    return {"context": context, "pooled": pooled}


def towers_loss(
    towers: Sequence[Tower], heads: Sequence[Heads], ids: Tensor, targets: Tensor, styles: Tensor, temperature: float
) -> Tensor:
    """Return the distillation loss, a scalar.

    `ids` (2P, L) holds P English captions, then P Chinese ones of the same concepts; `targets` (P, D) are the
    concepts' unit vectors; `styles` (2P,). Terms: cosine to the target, contrast of captions with targets,
    contrast of English with Chinese, cross entropy of the style.
    """
    loss, pairs = torch.zeros(()), len(targets)
    same = torch.arange(pairs)
    for tower, head in zip(towers, heads, strict=True):
        for name, vectors in read_tower(tower, ids).items():
            concept, style = head(name, vectors.float())
            english, chinese = concept.split(pairs)
            for side in (english, chinese):
                scores = side @ targets.T / temperature
                loss = loss + (1 - (side * targets).sum(-1)).mean() + F.cross_entropy(scores, same) / 2
            scores = english @ chinese.T / temperature
            loss = loss + (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 4
            loss = loss + F.cross_entropy(style, styles)
    return loss


def concept_targets(concepts: Sequence[Concept]) -> Tensor:
    """Return a unit vector per concept, (K, 384): e5's mean over the name and the name with tags in both languages,
    less the mean over all concepts (e5's vectors lie in a narrow cone). Kept in the cache: it costs two minutes."""
    path = cache_folder() / "e5_targets.safetensors"
    if path.exists():
        return load_file(path)["targets"]
    texts = []
    for concept in concepts:
        for language in LANGUAGES:
            label, tags = label_and_tags(concept, language)
            texts += [label, ", ".join((label, *tags))]
    vectors = encode_texts(texts).unflatten(0, (len(concepts), -1)).mean(1)
    targets = F.normalize(vectors - vectors.mean(0), dim=-1)
    save_file({"targets": targets}, path)
    return targets


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Return token ids (B, L), padded to the tokenizer's length as SDXL's pipeline pads."""
    batch = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids


class CaptionBatches:
    """Draws captions of random concepts in random styles; captions of the test split are never drawn."""

    def __init__(self, concepts: Sequence[Concept], tokenizer: CLIPTokenizer, num_pairs: int, seed: int) -> None:
        self.tokenizer, self.num_pairs, self.random = tokenizer, num_pairs, random.Random(seed)
        self.captions = {
            (index, language, style): [c for c in captions_of(concept, style, language) if split_of(c) != "test"]
            for index, concept in enumerate(concepts)
            for language in LANGUAGES
            for style in STYLE_OR_NONE
        }
        self.count = len(concepts)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (2P, L), concept indices (P,) and style indices (2P,)."""
        chosen = self.random.sample(range(self.count), self.num_pairs)
        texts, styles = [], []
        for language in LANGUAGES:
            for index in chosen:
                options = [s for s in range(len(STYLE_OR_NONE)) if self.captions[index, language, STYLE_OR_NONE[s]]]
                styles.append(self.random.choice(options))
                texts.append(self.random.choice(self.captions[index, language, STYLE_OR_NONE[styles[-1]]]))
        return tokenize(self.tokenizer, texts), torch.tensor(chosen), torch.tensor(styles)


def train(
    towers: Sequence[Tower],
    batches: CaptionBatches,
    targets: Tensor,
    settings: TowerSettings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Sequence[Heads]:
    """Train the towers in place, in bfloat16 where the CPU has it; return their heads.

    `on_step(step, loss)` counts from 1.
    """
    torch.manual_seed(settings.seed)
    heads = [Heads(tower.config.hidden_size, tower.config.projection_dim, targets.shape[1]) for tower in towers]
    parameters = [p for module in (*towers, *heads) for p in module.parameters()]
    updates = Updates(
        parameters, settings.learning_rate, settings.num_steps, weight_decay=0.02, betas=(0.9, 0.98), max_norm=1.0
    )
    for step in range(1, settings.num_steps + 1):
        ids, concepts, styles = batches.draw()
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            loss = towers_loss(towers, heads, ids, targets[concepts], styles, settings.temperature)
        updates.take(loss)
        on_step(step, loss.item())
    return heads


@torch.no_grad()
def read_in_parts(tower: Tower, ids: Tensor, batch_size: int = 128) -> dict[str, Tensor]:
    """Return `read_tower` of many prompts, in batches."""
    parts = [read_tower(tower, part) for part in ids.split(batch_size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def measure(
    towers: Sequence[Tower], heads: Sequence[Heads], tokenizer: CLIPTokenizer, concepts: Sequence[Concept]
) -> dict[str, float]:
    """Return R@1 between the languages and the accuracy of the style, on captions of the test split.

    Retrieval uses the towers' own vectors (no head): centred cosine among one caption per concept, same style on
    both sides, all of `concepts` as candidates, averaged over the styles.
    """
    report: dict[str, list[float]] = {}
    for style_index, style in enumerate(STYLES):
        texts = [first_of_split(captions_of(c, style, language)) for language in LANGUAGES for c in concepts]
        ids = tokenize(tokenizer, texts)
        for number, (tower, head) in enumerate(zip(towers, heads, strict=True), 1):
            for name, vectors in read_in_parts(tower, ids).items():
                english, chinese = (F.normalize(v - v.mean(0), dim=-1) for v in vectors.split(len(concepts)))
                scores, truth = chinese @ english.T, torch.arange(len(concepts))
                found = head(name, vectors)[1].argmax(-1)
                key = f"tower_{number}_{name}"
                report.setdefault(f"{key}_zh_to_en", []).append((scores.argmax(1) == truth).float().mean().item())
                report.setdefault(f"{key}_en_to_zh", []).append((scores.argmax(0) == truth).float().mean().item())
                report.setdefault(f"{key}_style", []).append((found == style_index).float().mean().item())
    return {key: round(sum(values) / len(values), 4) for key, values in report.items()}


def first_of_split(captions: Sequence[str], split: str = "test") -> str:
    """Return the first caption of a split, or the first of all where the split has none."""
    return next((caption for caption in captions if split_of(caption) == split), captions[0])


def save(tokenizer: CLIPTokenizer, towers: Sequence[Tower], folder: Path) -> None:
    """Write tokenizer and towers so that the folder appears whole."""
    with whole_folder(folder) as partial:
        save_tokenizer(tokenizer, partial / "tokenizer")
        for tower, name in zip(towers, ("text_encoder", "text_encoder_2"), strict=True):
            tower.save_pretrained(partial / name)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer with the two files of CLIP's own form, `vocab.json` and `merges.txt`."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")


def all_captions(concepts: Sequence[Concept]) -> list[str]:
    """Return every caption of every concept in both languages, with and without style."""
    return [
        c for concept in concepts for lang in LANGUAGES for s in STYLE_OR_NONE for c in captions_of(concept, s, lang)
    ]


def main() -> None:
    """Train with progress lines; the result goes to `text_towers/` in the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=TowerSettings.num_steps)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = TowerSettings(num_steps=arguments.steps)
    concepts, started = list_concepts(), time.time()
    captions = all_captions(concepts)
    tokenizer = train_tokenizer(captions, settings.vocabulary, settings.max_length)
    lengths = sorted(len(ids) for ids in tokenizer(captions).input_ids)
    shares = {share: lengths[int(share * (len(lengths) - 1))] for share in (0.5, 0.95, 0.99, 0.999, 1)}
    print(f"{len(captions)} captions, token lengths {shares}, {time.time() - started:.0f} s", flush=True)
    targets = concept_targets(concepts)
    print(f"e5 targets {tuple(targets.shape)}, {time.time() - started:.0f} s", flush=True)
    towers = build_towers(tokenizer, settings.seed)
    say = say_every(25, settings.num_steps)

    def on_step(step: int, loss: float) -> None:
        say(step, loss)
        if step % 500 == 0:
            save(tokenizer, towers, cache_folder() / "text_towers")

    batches = CaptionBatches(concepts, tokenizer, settings.num_pairs, settings.seed)
    heads = train(towers, batches, targets, settings, on_step)
    save(tokenizer, towers, cache_folder() / "text_towers")
    teacher, held_out = teacher_concepts()
    report: dict[str, object] = {"minutes": round((time.time() - started) / 60, 1), "token_lengths": shares}
    for name, part in (("teacher", teacher), ("held_out", held_out), ("all", concepts)):
        report[name] = measure(towers, heads, tokenizer, part)
        print(name, len(part), report[name], flush=True)
    write_text(cache_folder() / "text_towers" / "training.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
