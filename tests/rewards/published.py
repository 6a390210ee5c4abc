"""Tiny checkpoints in the published layouts, and their networks once more in plain torch, to compare with."""

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
from types import ModuleType

import numpy
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mlcm_rl.rewards.weights import Weights, fetch

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SHOWN = {byte: chr(byte) for byte in PRINTABLE}  # how CLIP's vocabulary writes a byte
SHOWN |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in SHOWN)}
MERGES = ["r e", "re d</w>", "f o", "o x</w>", "fo x</w>"]
NUM_TOKENS = 512 + len(MERGES) + 2
VISION = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
CONFIG = {  # no two widths alike, so that none is taken for another
    "projection_dim": 20,
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": NUM_TOKENS,
        "projection_dim": 20,
        "bos_token_id": NUM_TOKENS - 2,
        "eos_token_id": NUM_TOKENS - 1,
    },
    "vision_config": VISION | {"projection_dim": 20},
}


def clip_config(activation: str) -> dict:
    return CONFIG | {part: CONFIG[part] | {"hidden_act": activation} for part in ("text_config", "vision_config")}


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """PIL pictures of (width, height): coarse noise made smooth, and a sharp red square that overshoots."""
    pictures = []
    for index, (width, height) in enumerate(sizes):
        noise = numpy.random.RandomState(seed + index).randint(0, 256, (height // 8, width // 8, 3)).astype("uint8")
        picture = Image.fromarray(noise).resize((width, height), Image.BICUBIC)
        picture.paste((255, 0, 0), (width // 3, height // 3, width // 2, height // 2))
        pictures.append(picture)
    return pictures


def as_tensor(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1], double."""
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].double() / 255


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Double values for every name: large enough that a wrong filter, activation or mask shows in the features."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.double)
        if len(shape) == 1 and name.endswith("weight"):
            tensors[name] = 1 + 0.2 * values
        elif len(shape) < 2:
            tensors[name] = 0.2 * values
        else:
            tensors[name] = values * (0.5 if "embedding" in name else 1.5 / values[0].numel() ** 0.5)
    return tensors


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def cached(monkeypatch, weights: Weights, file: Path) -> Weights:
    """`weights`, but fetched from `file` as by a user who brings the real ones; the cache lies beside it."""
    monkeypatch.setenv("MLCM_RL_CACHE", str(file.parent / "cache"))
    tiny = dataclasses.replace(weights, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    fetch(tiny, local_copy=file)
    return tiny


def replace_weights(monkeypatch, module: ModuleType, constant: str, file: Path) -> None:
    """Let `module`.`constant` be weights that were fetched from `file`."""
    monkeypatch.setattr(module, constant, cached(monkeypatch, getattr(module, constant), file))


def merges_file(folder: Path) -> Path:
    """A file in the form of OpenAI's bpe_simple_vocab_16e6.txt.gz."""
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["a title", *MERGES, ""]).encode()))
    return path


def clip_folder(folder: Path, tensors: dict[str, Tensor], config: dict) -> Path:
    """A folder as transformers saves a CLIP."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    symbols = [SHOWN[byte] for byte in sorted(SHOWN, key=lambda byte: ord(SHOWN[byte]))]
    merges = [merge.replace(" ", "") for merge in MERGES]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merges, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


# ---- the networks once more, from their papers' definitions ----


def linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", torch.zeros(()))


def norm(tensors: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def activated(x: Tensor, activation: str) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else F.gelu(x)


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, hidden: Tensor | None = None) -> Tensor:
    """(B, T, D) head by head; `hidden` (T, L) or (B, 1, L) bool is not looked at."""
    heads = []
    for q, k, v in zip(*(x.chunk(num_heads, dim=-1) for x in (query, key, value)), strict=True):
        fit = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        heads.append((fit if hidden is None else fit.masked_fill(hidden, -torch.inf)).softmax(-1) @ v)
    return torch.cat(heads, -1)


def pre_norm_layers(
    tensors: dict[str, Tensor], tower: str, x: Tensor, num_heads: int, activation: str, hidden: Tensor | None = None
) -> Tensor:
    """The layers of a CLIP tower under transformers' names."""
    layer = 0
    while f"{tower}.encoder.layers.{layer}.layer_norm1.weight" in tensors:
        name = f"{tower}.encoder.layers.{layer}"
        y = norm(tensors, f"{name}.layer_norm1", x, 1e-5)
        qkv = (linear(tensors, f"{name}.self_attn.{part}_proj", y) for part in "qkv")
        x = x + linear(tensors, f"{name}.self_attn.out_proj", attention(*qkv, num_heads, hidden))
        y = activated(linear(tensors, f"{name}.mlp.fc1", norm(tensors, f"{name}.layer_norm2", x, 1e-5)), activation)
        x = x + linear(tensors, f"{name}.mlp.fc2", y)
        layer += 1
    return x


def vision_tokens(tensors: dict[str, Tensor], pixels: Tensor, num_heads: int, activation: str) -> Tensor:
    """(B, T, D) of the last layer, not normalised."""
    patches = tensors["vision_model.embeddings.patch_embedding.weight"]
    x = F.conv2d(pixels, patches, stride=patches.shape[-1]).flatten(2).transpose(1, 2)
    tokens = tensors["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([tokens, x], 1) + tensors["vision_model.embeddings.position_embedding.weight"]
    x = norm(tensors, "vision_model.pre_layrnorm", x, 1e-5)
    return pre_norm_layers(tensors, "vision_model", x, num_heads, activation)


def image_features(tensors: dict[str, Tensor], pixels: Tensor, num_heads: int, activation: str) -> Tensor:
    first = vision_tokens(tensors, pixels, num_heads, activation)[:, 0]
    return linear(tensors, "visual_projection", norm(tensors, "vision_model.post_layernorm", first, 1e-5))


def text_tokens(tensors: dict[str, Tensor], ids: Tensor, num_heads: int, activation: str) -> Tensor:
    """(B, L, D) after the last norm, not projected."""
    x = tensors["text_model.embeddings.token_embedding.weight"][ids]
    x = x + tensors["text_model.embeddings.position_embedding.weight"][: ids.shape[1]]
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    x = pre_norm_layers(tensors, "text_model", x, num_heads, activation, later)
    return norm(tensors, "text_model.final_layer_norm", x, 1e-5)


def text_features(tensors: dict[str, Tensor], ids: Tensor, num_heads: int, activation: str) -> Tensor:
    """At the end token, which has the highest number."""
    last = text_tokens(tensors, ids, num_heads, activation)[torch.arange(len(ids)), ids.argmax(1)]
    return linear(tensors, "text_projection", last)


def token_ids(prompts: list[str], length: int = 77, padding: int = NUM_TOKENS - 1) -> Tensor:
    """OpenAI's tokenizer for prompts of lower-case words: merges in their order, cut after 75 tokens."""
    numbers = {SHOWN[byte]: index for index, byte in enumerate(sorted(SHOWN, key=lambda byte: ord(SHOWN[byte])))}
    numbers |= {f"{symbol}</w>": 256 + index for symbol, index in list(numbers.items())}
    numbers |= {merge.replace(" ", ""): 512 + index for index, merge in enumerate(MERGES)}
    rows = []
    for prompt in prompts:
        row = []
        for word in prompt.split():
            *parts, last = (SHOWN[byte] for byte in word.encode())
            parts.append(f"{last}</w>")
            for merge in MERGES:
                left, right = merge.split(" ")
                at = 0
                while at < len(parts) - 1:
                    if parts[at : at + 2] == [left, right]:
                        parts[at : at + 2] = [left + right]
                    at += 1
            row += [numbers[part] for part in parts]
        row = [NUM_TOKENS - 2, *row[: length - 2], NUM_TOKENS - 1]
        rows.append(row + [padding] * (length - len(row)))
    return torch.tensor(rows)
