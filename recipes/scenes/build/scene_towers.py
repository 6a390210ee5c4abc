"""Train the scenes' tokenizer and two CLIP text towers, so that wordings and languages of one request agree.

The table of tokens is frozen: its rows are multilingual-e5's vectors of the tokens' own texts, so that a word that no
caption has lies near those it means the same as. What the denoiser reads is what is trained: the pooled vector says all
fields of a request to linear heads, and each of the last positions of the context, which are padding in every prompt
that is not cut, says one field.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import drawings  # noqa: F401  puts the emoji teacher's programs on the path
from captions import label_and_tags
from e5 import encode_texts
from mlcm_rl.data.scenes import BACKGROUNDS, RELATIONS, STYLES, Request
from mlcm_rl.training.loop import cpu_has_bfloat16
from scenes import LANGUAGES, MEASURED, draw_scene, read_concepts
from sources import cache_folder, list_concepts, write_text
from train_text_towers import save, tokenize, train_tokenizer
from updates import Updates, say_every
from wordings import BODIES, COLOUR_WORDS, COLOURED, STYLE_WORDS, STYLED, WORDINGS, Writer, plural

ARRANGEMENTS = ("single", "2", "3", "4", "beside", "above")
RELATION_SHARES = (0.1, 0.2, 0.35, 0.35)
FIRST_SHARES = (0.5, 0.3, 0.1, 0.1)  # of the first steps: one concept a prompt is learned before two
TEMPERATURE = 0.1  # of the cosines to the concepts
NOISE = 0.25  # of the tokens' vectors in training, in units of their standard deviation


@dataclass(frozen=True)
class TowerSettings:
    """Sizes and schedule. A step sees `num_pairs` requests, each worded in English and in Chinese."""

    vocabulary: int = 4096
    max_length: int = 36
    widths: tuple[int, int] = (128, 64)
    num_layers: tuple[int, int] = (4, 2)
    num_steps: int = 700
    num_first: int = 100
    num_pairs: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


class Fields:
    """A request as class indices: arrangement, first and second concept, style, background; the last of each is none.

    "none" is the second concept of a request with one, and a style or background that is left open.
    """

    def __init__(self, concepts: Sequence[str]) -> None:
        self.concepts = list(concepts)
        self.sizes = {
            "arrangement": len(ARRANGEMENTS),
            "first": len(concepts),
            "second": len(concepts) + 1,
            "style": len(STYLES) + 1,
            "background": len(BACKGROUNDS) + 1,
        }

    def of(self, request: Request) -> list[int]:
        """Return the index of each field."""
        first, *rest = (self.concepts.index(concept) for concept in request.concepts)
        return [
            ARRANGEMENTS.index(str(request.count) if request.relation == "count" else request.relation),
            first,
            rest[0] if rest else len(self.concepts),
            len(STYLES) if request.style is None else STYLES.index(request.style),
            len(BACKGROUNDS) if request.background is None else list(BACKGROUNDS).index(request.background),
        ]


def tokenizer_corpus(draw: random.Random) -> list[str]:
    """Return the texts that the tokenizer learns words from: those of the captions that are trained on, often, and all
    emoji's names and tags, seldom.

    A Chinese word stands alone and before random characters, for no space ends it in a sentence.
    """
    emoji, own = ({language: set[str]() for language in LANGUAGES} for _ in range(2))
    for drawn in list_concepts():
        for language in LANGUAGES:
            label, tags = label_and_tags(drawn, language)
            emoji[language] |= {label, *tags}
    for language in LANGUAGES:
        for concept in read_concepts():
            own[language] |= {*concept.names[language]}
        for choice in (*STYLE_WORDS[language].values(), *COLOUR_WORDS[language].values()):
            own[language] |= {*choice.trained}
        for choice in (*BODIES[language].values(), STYLED[language], COLOURED[language]):
            own[language] |= {part for frame in choice.trained for part in split_frame(frame)}
    measures = {number + c.measure for c in read_concepts() for number in ("一", "两", "三", "四")}
    own["zh"] |= {*measures, *(c.measure for c in read_concepts())}
    characters = sorted({letter for text in emoji["zh"] for letter in text if letter > "\u3400"})
    english = sorted(emoji["en"]) * 2 + [plural(name) for name in sorted(own["en"])] * 30 + sorted(own["en"]) * 60
    chinese = sorted(emoji["zh"]) * 2
    for word in sorted(own["zh"]):
        chinese += [word] * 30 + [word + draw.choice(characters) for _ in range(90)]
    return english + chinese


def split_frame(frame: str) -> list[str]:
    """Return the texts between the places of a frame."""
    for mark in "{}，：,:":
        frame = frame.replace(mark, "|")
    places = {"a", "b", "n", "name", "names", "body", "style", "colour"}
    return [part.strip() for part in frame.split("|") if part.strip() and part.strip() not in places]


def token_vectors(tokenizer: CLIPTokenizer, width: int) -> Tensor:
    """Return the table of tokens (V, width): e5's vector of each token's text, on its principal directions, of unit
    variance over all. A token that is a part of a character, and bos and eos, have small random rows."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [tokenizer.convert_tokens_to_string([token]).strip() for token in tokens]
    known = [i for i, text in enumerate(texts) if text and "\ufffd" not in text and not text.startswith("<|")]
    path = cache_folder() / f"scene_tokens_{sha256(json.dumps(tokens).encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():  # it costs a minute
        save_file({"vectors": encode_texts([texts[i] for i in known])}, path)
    vectors = load_file(path)["vectors"]
    vectors = vectors - vectors.mean(0)
    _, _, directions = torch.linalg.svd(vectors, full_matrices=False)
    projected = vectors @ directions[:width].T
    table = torch.randn(len(tokens), width, generator=torch.Generator().manual_seed(0)) * 0.3
    table[known] = projected / projected.std()
    return table


def build_tower(tokenizer: CLIPTokenizer, table: Tensor, settings: TowerSettings, number: int):
    """Return an untrained tower over the first columns of the frozen table; bos, eos and pad are the tokenizer's."""
    torch.manual_seed(settings.seed + number)
    width = settings.widths[number]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=settings.num_layers[number],
        num_attention_heads=width // 32,
        projection_dim=width,
        max_position_embeddings=settings.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
        initializer_factor=1.0,
    )
    tower = CLIPTextModelWithProjection(config)
    embeddings = tower.text_model.embeddings
    with torch.no_grad():
        embeddings.token_embedding.weight.copy_(table[:, :width])
        embeddings.position_embedding.weight.normal_(std=0.5)
    embeddings.token_embedding.weight.requires_grad_(False)
    return tower


def read_tower(tower: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the denoiser reads of token ids (B, L), the context (B, L, width) and the pooled vector, and the
    states a layer before the context."""
    output = tower(input_ids=ids, output_hidden_states=True)
    return output.hidden_states[-2].float(), output.text_embeds.float(), output.hidden_states[-3].float()


class ConceptHead(nn.Module):
    """Says which concept a state is of: cosines between its projection, at first itself, and the concepts' vectors.

    A head with weights of its own for each concept finds none in hundreds of steps: this one learns for all at once.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor) -> None:
        super().__init__()
        self.project = nn.Linear(prototypes.shape[1], prototypes.shape[1])
        with torch.no_grad():
            self.project.weight.copy_(torch.eye(prototypes.shape[1]))
        self.register_buffer("prototypes", prototypes)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits (..., K) of states (..., width)."""
        return F.normalize(self.project(states), dim=-1) @ self.prototypes.T / TEMPERATURE


class Heads(nn.Module):
    """Throw-away heads of one tower: each field from its own state, all fields from the pooled vector, and the concepts
    from any state."""

    def __init__(self, prototypes: Tensor, sizes: dict[str, int]) -> None:
        super().__init__()
        width = prototypes.shape[1]
        self.norm = nn.LayerNorm(width)

        def heads() -> nn.ModuleList:
            kinds = {"first": prototypes[:-1], "second": prototypes}
            return nn.ModuleList(
                ConceptHead(kinds[name]) if name in kinds else nn.Linear(width, size) for name, size in sizes.items()
            )

        self.own, self.pooled, self.present = heads(), heads(), ConceptHead(prototypes[:-1])
        self.mentioned = nn.ModuleList([ConceptHead(prototypes[:-1]), ConceptHead(prototypes)])
        self.swapped = nn.Linear(width, 2)

    def forward(self, context: Tensor, pooled: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for each field the logits from its own state of the context, and those from the pooled vector."""
        last, pooled = self.norm(context[:, -len(self.own) :]), self.norm(pooled)
        pairs = enumerate(zip(self.own, self.pooled, strict=True))
        return [(own(last[:, i]), pool(pooled)) for i, (own, pool) in pairs]

    def concepts_present(self, context: Tensor) -> Tensor:
        """Return log-shares (B, C) of the concepts in the prompt, each by the state that is most like it."""
        return (self.present(self.norm(context)).logsumexp(1)).log_softmax(-1)

    def order_loss(self, states: Tensor, mentioned: Tensor, swapped: Tensor) -> Tensor:
        """Return the loss of what has to be known before the concepts are put in their order, a scalar.

        A layer before the context, the two positions before those of the fields say which concept is `mentioned` (B, 2)
        first and second, and the positions of the two concepts say whether that is `swapped` (B,), -1 for one concept.
        Without this the towers know both concepts and toss a coin which is left.
        """
        normed, num_fields = self.norm(states), len(self.own)
        loss = torch.zeros(())
        for i, head in enumerate(self.mentioned):
            loss = loss + F.cross_entropy(head(normed[:, i - num_fields - 2]), mentioned[:, i])
            loss = loss + F.cross_entropy(self.swapped(normed[:, i - num_fields + 1]), swapped, ignore_index=-1)
        return loss


def concept_prototypes(tokenizer: CLIPTokenizer, table: Tensor) -> Tensor:
    """Return a unit vector (C + 1, width) a concept, the mean of its trained names' tokens; the last is of none."""
    means = []
    for concept in read_concepts():
        names = [name for language in LANGUAGES for name in concept.names[language]]
        means.append(torch.stack([table[tokenizer(name).input_ids[1:-1]].mean(0) for name in names]).mean(0))
    vectors = torch.stack(means)
    vectors = torch.cat([vectors - vectors.mean(0), torch.randn(1, table.shape[1])])
    return F.normalize(vectors, dim=-1)


def towers_loss(
    towers: Sequence[CLIPTextModelWithProjection], heads: Sequence[Heads], ids: Tensor, fields: Tensor, swapped: Tensor
) -> Tensor:
    """Return the loss, a scalar: cross entropy of every field, and one less the cosine between the two languages.

    `ids` (2P, L) hold P English prompts, then P Chinese ones of the same requests; `fields` (P, F); `swapped` (2P,) is
    1 for prompts that name the second concept first.
    """
    loss, both = torch.zeros(()), fields.repeat(2, 1)
    order = torch.where(swapped[:, None] == 1, both[:, [2, 1]], both[:, [1, 2]])
    alone = both[:, 2] == heads[0].present.prototypes.shape[0]
    for tower, head in zip(towers, heads, strict=True):
        context, pooled, before = read_tower(tower, ids)
        if tower.config.num_hidden_layers > 2:  # a layer before the context is the second or a later one
            loss = loss + head.order_loss(before, order, swapped.masked_fill(alone, -1))
        for i, logits in enumerate(head(context, pooled)):
            loss = loss + sum(F.cross_entropy(part, both[:, i]) for part in logits)
        num_concepts = len(head.present.prototypes)
        shares = F.one_hot(both[:, 1:3], num_concepts + 1)[..., :-1].float().sum(1)
        loss = loss - (shares * head.concepts_present(context)).sum(-1).mean()
        states = torch.cat([context[:, -len(head.own) :], pooled[:, None]], 1)
        english, chinese = (states - states.mean(0)).chunk(2)
        loss = loss + (1 - F.cosine_similarity(english, chinese, dim=-1)).mean()
    return loss


class Requests:
    """Draws requests that no test has, and words them."""

    def __init__(self, concepts: Sequence[str], seed: int) -> None:
        self.concepts, self.draw = list(concepts), random.Random(seed)
        self.writer, self.fields = Writer(read_concepts()), Fields(concepts)

    def some(self, count: int, held_out: bool = False, shares: Sequence[float] = RELATION_SHARES) -> list[Request]:
        """Return random requests; held-out combinations have more than one object."""
        shares = (0.0, *shares[1:]) if held_out else shares
        scenes = [
            draw_scene(self.draw, self.concepts, relation, held_out)
            for relation in self.draw.choices(RELATIONS, shares, k=count)
        ]
        return [scene.request(self.draw.random() < 0.6, self.draw.random() < 0.6) for scene in scenes]

    def prompts(self, requests: Sequence[Request], wording: str = "trained") -> tuple[list[str], Tensor]:
        """Return one prompt of each request in English, then one of each in Chinese, and which are swapped (2P,)."""
        pairs = [self.writer.write_in_order(r, lang, wording, self.draw) for lang in LANGUAGES for r in requests]
        return [text for text, _ in pairs], torch.tensor([int(swapped) for _, swapped in pairs])


@torch.no_grad()
def measure(towers, heads: Sequence[Heads], tokenizer: CLIPTokenizer, requests: Requests, count: int = 300):
    """Return the share of prompts of held-out combinations whose fields are all read right, and of each field, by
    wording and language: the logits of both towers, from states and pooled vectors, summed."""
    report = {}
    for wording in WORDINGS:
        asked = requests.some(count, held_out=True)
        ids = tokenize(tokenizer, requests.prompts(asked, wording)[0])
        wanted = torch.tensor([requests.fields.of(r) for r in asked])
        both = [[sum(pair) for pair in read(t, h, ids)] for t, h in zip(towers, heads, strict=True)]
        totals = [sum(parts) for parts in zip(*both, strict=True)]
        seen = torch.stack([total.argmax(-1) for total in totals], 1)
        for language, part in zip(LANGUAGES, seen.chunk(2), strict=True):
            right = part == wanted
            shares = dict(zip(requests.fields.sizes, right.float().mean(0).tolist(), strict=True))
            report[f"{wording} {language}"] = {"all": right.all(1).float().mean().item()} | shares
    return {key: {name: round(value, 3) for name, value in row.items()} for key, row in report.items()}


def read(tower, head: Heads, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the heads' logits of token ids (B, L)."""
    return head(*read_tower(tower, ids)[:2])


def main() -> None:
    """Train with progress lines; tokenizer and towers go to `scene_towers/` in the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=TowerSettings.num_steps)
    parser.add_argument("--first", type=int, default=TowerSettings.num_first, help="steps mostly of one concept")
    parser.add_argument("--learning-rate", type=float, default=TowerSettings.learning_rate)
    parser.add_argument("--start", help="folder of towers in the cache to go on from")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings, started = (
        TowerSettings(num_steps=arguments.steps, num_first=arguments.first, learning_rate=arguments.learning_rate),
        time.time(),
    )
    requests = Requests([concept.codepoint for concept in read_concepts()], settings.seed)
    tokenizer = train_tokenizer(tokenizer_corpus(random.Random(0)), settings.vocabulary, settings.max_length)
    for wording in WORDINGS:
        lengths = sorted(len(ids) for ids in tokenizer(requests.prompts(requests.some(500), wording)[0]).input_ids)
        print(f"{wording}: tokens {[lengths[int(s * (len(lengths) - 1))] for s in (0.5, 0.95, 0.99, 1)]}", flush=True)
    table = token_vectors(tokenizer, max(settings.widths))
    print(f"table {tuple(table.shape)}, {time.time() - started:.0f} s", flush=True)
    towers = [build_tower(tokenizer, table, settings, number) for number in range(2)]
    prototypes = [concept_prototypes(tokenizer, table[:, :width]) for width in settings.widths]
    heads = [Heads(vectors, requests.fields.sizes) for vectors in prototypes]
    if arguments.start:
        for tower, name in zip(towers, ("text_encoder", "text_encoder_2"), strict=True):
            tower.load_state_dict(load_file(cache_folder() / arguments.start / name / "model.safetensors"))
    parameters = [p for module in (*towers, *heads) for p in module.parameters() if p.requires_grad]
    for tower in towers:
        tower.text_model.embeddings.token_embedding.register_forward_hook(
            lambda module, arguments, output: output + NOISE * torch.randn_like(output) * module.training
        )
    updates = Updates(
        parameters, settings.learning_rate, settings.num_steps, weight_decay=0.02, betas=(0.9, 0.98), max_norm=1.0
    )
    say = say_every(25, settings.num_steps)
    for step in range(1, settings.num_steps + 1):
        asked = requests.some(
            settings.num_pairs, shares=FIRST_SHARES if step <= settings.num_first else RELATION_SHARES
        )
        prompts, swapped = requests.prompts(asked)
        ids = tokenize(tokenizer, prompts)
        fields = torch.tensor([requests.fields.of(request) for request in asked])
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            loss = towers_loss(towers, heads, ids, fields, swapped)
        updates.take(loss)
        say(step, loss.item())
        if step % 200 == 0 or step == settings.num_steps:
            for module in (*towers, *heads):
                module.eval()
            report = measure(towers, heads, tokenizer, requests)
            print(json.dumps(report), flush=True)
            save(tokenizer, towers, cache_folder() / "scene_towers")
            for module in (*towers, *heads):
                module.train()
    minutes = round((time.time() - started) / 60, 1)
    write_text(MEASURED / "towers.json", json.dumps({"minutes": minutes} | report, indent=1) + "\n")


if __name__ == "__main__":
    main()
