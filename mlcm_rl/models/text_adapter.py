"""Text adapters: a small network that makes a denoiser's conditioning of another text encoder's states.

The way of PEA-Diffusion (arXiv 2311.17086): the denoiser stays as it is, so that every student of it, and every adapter
over it, serves the new language too. Stage `adapt_text` trains one.

    L' states of the new encoder, of width H   L tokens of the denoiser's context, of width D   P pooled width
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..equations.adaptation import spread
from ..recipe.adapt_text import MAX_LAYERS, MAX_WIDTH, Languages
from ..recipe.languages import guess_language
from ..recipe.takes import TextNetwork
from ..storage import finite
from ..storage.files import CheckpointError, read_json, replacing, write_json
from ..storage.tensors import load_weights, read_tensors, write_tensors
from .conditioning import CONTEXT, Conditioning, concatenated
from .text_encoder import TextEncoder, copy_files, states_width

POOLED = "pooled"
HEAD_WIDTH = 64  # of attention, or the largest smaller number that divides the width
EXPANSION = 4  # of a block's hidden layer
SMALLEST = 1e-3  # deviation of a feature of the states, as a share of that of them all
FORMAT = 1  # of the files
DESCRIPTION, WEIGHTS, ENCODER = "text_adapter.json", "text_adapter.safetensors", "encoder"


@dataclass(frozen=True)
class Sizes:
    """The sizes of an adapter: `states` H, `width` and `num_layers` of its blocks, and what it makes.

    `context` is (L, D), `pooled` P, or 0 for a denoiser that takes no pooled vector.
    """

    states: int
    width: Annotated[int, Field(gt=0, le=MAX_WIDTH)]
    num_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    context: tuple[int, int]
    pooled: int

    @classmethod
    def for_conditioning(cls, shapes: Mapping[str, Sequence[int]], states: int, width: int, num_layers: int) -> "Sizes":
        """Return the sizes for a conditioning of these `shapes`, without the batch: (L, D), and (P,) if it has one.

        Raise ValueError for a conditioning with more, which an adapter does not make.
        """
        if more := sorted(set(shapes) - {CONTEXT, POOLED}):
            raise ValueError(f"an adapter makes a context and a pooled vector; the teacher needs {', '.join(more)} too")
        length, depth = shapes[CONTEXT]
        return cls(states, width, num_layers, (length, depth), sum(shapes.get(POOLED, ())))


def sizes_of(network: TextNetwork, shapes: Mapping[str, Sequence[int]]) -> Sizes:
    """Return the sizes of the adapter that a stage trains, for a conditioning of these `shapes` of one prompt.

    Raise ValueError for a conditioning that an adapter does not make, or an encoder of unknown width.
    """
    return Sizes.for_conditioning(shapes, states_width(Path(network.encoder)), network.width, network.num_layers)


class TextAdapter(nn.Module):
    """Learned queries, one for each of the L tokens and one for the pooled vector, attend to the encoder's states.

    Positions of two encoders do not correspond: hence queries, where PEA-Diffusion projects each state by itself. An
    output is the mean over the teacher's own encodings plus a deviation from it in units of theirs, and the last layer
    is zero at first: training starts at the mean.
    """

    context_mean: Tensor
    context_deviation: Tensor
    states_mean: Tensor
    states_deviation: Tensor

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        (length, depth), width = sizes.context, sizes.width
        self.project = nn.Linear(sizes.states, width)
        self.summary = nn.Linear(sizes.states, width)
        self.register_buffer("states_mean", torch.zeros(sizes.states))
        self.register_buffer("states_deviation", torch.ones(sizes.states))
        self.queries = nn.Parameter(torch.randn(length + (sizes.pooled > 0), width) * width**-0.5)
        heads = width // next(size for size in range(HEAD_WIDTH, 0, -1) if width % size == 0)
        block = nn.TransformerDecoderLayer(
            width, heads, EXPANSION * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerDecoder(block, sizes.num_layers, nn.LayerNorm(width))
        self.to_context = _zero(nn.Linear(width, depth))
        self.register_buffer("context_mean", torch.zeros(length, depth))
        self.register_buffer("context_deviation", torch.ones(length))
        if sizes.pooled:
            self.to_pooled = _zero(nn.Linear(width, sizes.pooled))
            self.register_buffer("pooled_mean", torch.zeros(sizes.pooled))
            self.register_buffer("pooled_deviation", torch.ones(()))

    def measure(self, states: Sequence[Tensor], conditioning: Conditioning) -> None:
        """Set the means and deviations of the new encoder's `states` (L', H) of some prompts, and of the outputs.

        Those of the outputs are those of the teacher's own encodings (B, ...). The states of one encoder are much alike
        from prompt to prompt, and what differs would be a small part of the input.
        """
        tokens = torch.cat(list(states))
        self.states_mean.copy_(tokens.mean(0))
        self.states_deviation.copy_(tokens.std(0).clamp(min=SMALLEST * float(tokens.std())))
        for name, values in conditioning.items():
            mean, deviation = spread(values if name == CONTEXT else values[:, None])
            for kind, value in (("mean", mean), ("deviation", deviation)):
                buffer = self.get_buffer(f"{name}_{kind}")
                buffer.copy_(value.reshape(buffer.shape))

    def forward(self, states: Tensor, lengths: Tensor) -> Conditioning:
        """Return the conditioning (B, L, D) and (B, P) of B prompts' states (B, L', H), `lengths` (B,) of each."""
        padding = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
        normed = (states - self.states_mean) / self.states_deviation
        memory = self.project(normed)
        mean = normed.masked_fill(padding[..., None], 0.0).sum(1) / lengths[:, None]
        queries = self.queries + self.summary(mean)[:, None]
        seen = self.blocks(queries, memory, memory_key_padding_mask=padding)
        length = self.sizes.context[0]
        context = self.to_context(seen[:, :length]).float()
        made = {CONTEXT: self.context_mean + self.context_deviation[:, None] * context}
        if self.sizes.pooled:
            pooled = self.to_pooled(seen[:, length]).float()
            made[POOLED] = self.get_buffer("pooled_mean") + self.get_buffer("pooled_deviation") * pooled
        return made


def _zero(layer: nn.Linear) -> nn.Linear:
    """Return `layer` with its weights and its bias at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def stacked_states(states: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the states (L', H) of several prompts as one batch (B, L', H), padded with zeros, and lengths (B,)."""
    lengths = torch.tensor([len(one) for one in states], device=device)
    return pad_sequence(list(states), batch_first=True).to(device), lengths


@dataclass(frozen=True)
class AdaptedEncoder:
    """A text encoder with its adapter, which encodes the prompts in its `languages`."""

    encoder: TextEncoder
    adapter: TextAdapter
    languages: Sequence[str]

    def reads(self, prompt: str) -> bool:
        """Return whether `prompt` is in one of the languages, by its script."""
        return guess_language(prompt) in self.languages

    @torch.no_grad()
    def encode(self, prompts: Iterable[str]) -> Conditioning:
        """Return the conditioning (B, ...) float32 of B `prompts`, each by itself: no other changes its last bits.

        Raise what `finite.refuse_encoded` raises, for an encoder or an adapter whose weights are not finite.
        """
        texts, rows = list(prompts), []
        for text in texts:
            rows.append(self.adapter(*stacked_states([self.encoder.encode(text)], self.encoder.device)))
            finite.refuse_encoded(rows[-1], [text], torch.float32)
        return concatenated(rows)


# ---- files ----


def save(adapter: nn.Module, description: dict[str, Any], encoder: Path, folder: Path) -> None:
    """Write `adapter`, its `description` and a copy of the encoder in the folder `encoder` to `folder`."""
    with replacing(folder) as temporary:
        copy_files(encoder, temporary / ENCODER)
        write_tensors(temporary / WEIGHTS, adapter.state_dict())
        write_json(temporary / DESCRIPTION, {"format": FORMAT, **description})


def describe(sizes: Sizes, languages: Sequence[str], num_tokens: int, family: str, teacher: str) -> dict[str, Any]:
    """Return what the files of an adapter say of it; `teacher` is the hash of the teacher that it was trained for."""
    return {
        "family": family,
        "languages": list(languages),
        "num_tokens": num_tokens,
        "sizes": asdict(sizes),
        "teacher_hash": teacher,
    }


def load(
    folder: Path, family: str, shapes: Mapping[str, Sequence[int]], num_tokens: int, device: torch.device
) -> AdaptedEncoder:
    """Load the text adapter in `folder`, frozen, for a teacher of this `family` with a conditioning of these `shapes`.

    Raise CheckpointError for a missing or damaged file, ValueError for an adapter of another kind of teacher.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        inside = folder / path.stem
        nearest = f"; name {inside}" if (inside / DESCRIPTION).is_file() else ", as an adapt_text stage leaves it"
        raise CheckpointError(f"the folder {folder} holds no text adapter ({DESCRIPTION}){nearest}")
    record = read_json(path, format=int, family=str, languages=list, num_tokens=int, sizes=dict)
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in format {record['format']}, this version reads {FORMAT}")
    try:
        sizes = TypeAdapter(Sizes).validate_python(record["sizes"])
        languages = TypeAdapter(Languages).validate_python(record["languages"])
    except ValidationError as error:
        fault = error.errors()[0]
        key = " ".join(map(str, fault["loc"]))
        raise CheckpointError(f"{path} is damaged: sizes or languages: {key}: {fault['msg']}") from error
    needed = Sizes.for_conditioning(shapes, sizes.states, sizes.width, sizes.num_layers)
    if record["family"] != family or sizes != needed:
        raise ValueError(
            f"teacher.text_adapter {folder}: it makes {_words(sizes)} for a {record['family']} teacher, and this "
            f"{family} teacher takes {_words(needed)}; take the one that was trained for it"
        )
    with torch.device("meta"):
        adapter = TextAdapter(sizes)
    weights = read_tensors(folder / WEIGHTS)
    if odd := [name for name, value in weights.items() if value.dtype != torch.float32]:
        raise CheckpointError(f"{folder / WEIGHTS}: {odd[0]} is {weights[odd[0]].dtype}, not torch.float32")
    load_weights(adapter, weights, folder / WEIGHTS)
    encoder = TextEncoder(folder / ENCODER, min(num_tokens, record["num_tokens"]), device)
    if (width := states_width(folder / ENCODER)) != sizes.states:
        raise CheckpointError(
            f"{folder / ENCODER}: an encoder of states of width {width}, and {path} is of one of {sizes.states}"
        )
    return AdaptedEncoder(encoder, adapter.to(device).requires_grad_(False).eval(), tuple(languages))


def _words(sizes: Sizes) -> str:
    pooled = f" and a pooled vector of {sizes.pooled}" if sizes.pooled else " and no pooled vector"
    return f"{sizes.context[0]} states of width {sizes.context[1]}{pooled}"


def num_weights(sizes: Sizes) -> int:
    """Return the number of trained weights of an adapter."""
    with torch.device("meta"):
        return sum(math.prod(value.shape) for value in TextAdapter(sizes).parameters())
