"""MPS: CLIP-H whose picture tokens look at the words that matter (Zhang et al., CVPR 2024)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPTokenizer

from mlcm_rl.rewards import GivenFile, Weights

from ._clip import CLIP_MERGES, VIT_H_14, Clip, published_tokenizer
from ._published import covered, normalised, opened, ready, under, wide

OVERALL = (  # the condition that the authors give for the overall preference
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)

MPS_OVERALL = Weights(
    "mps_overall",
    GivenFile("MPS_overall_checkpoint.pth", "the model link in the README of github.com/Kwai-Kolors/MPS"),
    sha256=None,
    licence="not stated",
    convert="reward_models.mps:convert",
)


class _Inert:
    """Stands for every class and function that a pickled module names: it takes what it is given and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def convert(path: Path) -> dict[str, Tensor]:
    """The tensors of the published checkpoint, which is a whole pickled module.

    None of the code it names is imported or run: each name is answered by a class of our own that does nothing, and
    the tensors are collected from what is left.
    """
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [(type("Inert", (_Inert,), {}), name) for name in named]
    with torch.serialization.safe_globals(stand_ins):
        module = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("model."): value for name, value in _tensors(module, "")}


def _tensors(module: _Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` of the pickled module would hold."""
    state = vars(module)
    for name, value in (state["_parameters"] | state["_buffers"]).items():
        if value is not None and name not in state["_non_persistent_buffers_set"]:
            yield prefix + name, value
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")


class _CrossModel:
    """The published head: in each layer the picture's tokens look at the prompt's, then at each other.

    Both attentions have many queries but one key and one value, and a gated feed-forward network beside them.
    """

    LOOK_AT_TEXT = frozenset(f"{name}.weight" for name in ("norm", "to_q", "to_kv", "to_out", "ff.0", "ff.2")) | {
        "norm.bias"
    }
    LOOK_AROUND = frozenset(f"{name}.weight" for name in ("norm", "fused_attn_ff_proj", "attn_out", "ff_out.1")) | {
        "norm.bias",
        "rotary_emb.inv_freq",
    }

    def __init__(self, tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype):
        here = {name: value.to(device, dtype) for name, value in tensors.items()}
        num_layers = 1 + max(int(name.split(".")[1]) for name in here)
        self.layers = [[under(f"layers.{layer}.{part}.fn.", here) for part in (0, 1)] for layer in range(num_layers)]
        for to_text, around in self.layers:
            wrong = (to_text.keys() ^ self.LOOK_AT_TEXT) | (around.keys() ^ self.LOOK_AROUND)
            if wrong:
                raise ValueError(f"mps: the head's layers lack or should not have {', '.join(sorted(wrong))}")

    def __call__(self, image: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        """New tokens (B, T, D) of `image` (B, T, D) after `text` (B, L, D), of which `kept` (B, L) bool is seen."""
        for to_text, around in self.layers:
            image = image + self._look_at_text(to_text, image, text, kept)
            image = image + self._look_around(around, image)
        return image

    def _look_at_text(self, layer: dict[str, Tensor], image: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        x = _norm(layer, image)
        key, value = F.linear(text, layer["to_kv.weight"]).chunk(2, dim=-1)
        query = F.linear(x, layer["to_q.weight"]).unflatten(2, (-1, key.shape[2]))
        attended = _attention(query, key, value, kept[:, None, None])
        fed = F.linear(_gated(F.linear(x, layer["ff.0.weight"])), layer["ff.2.weight"])
        return F.linear(attended, layer["to_out.weight"]) + fed

    def _look_around(self, layer: dict[str, Tensor], image: Tensor) -> Tensor:
        x = _norm(layer, image)
        frequencies = layer["rotary_emb.inv_freq"]
        width = 2 * len(frequencies)
        sizes = [layer["attn_out.weight"].shape[1], width, width, 2 * layer["ff_out.1.weight"].shape[1]]
        query, key, value, fed = F.linear(x, layer["fused_attn_ff_proj.weight"]).split(sizes, dim=-1)
        query = _rotated(query.unflatten(2, (-1, width)), frequencies)
        key = _rotated(key[:, :, None], frequencies).squeeze(2)
        attended = F.linear(_attention(query, key, value, None), layer["attn_out.weight"])
        return attended + F.linear(_gated(fed), layer["ff_out.1.weight"])


def _norm(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer["norm.weight"], layer["norm.bias"])


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _attention(query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None) -> Tensor:
    """(B, T, heads D) of `query` (B, T, heads, D) over one `key` and `value` (B, L, D) that all heads share."""
    shape = (-1, query.shape[2], -1, -1)
    shared = (x[:, None].expand(shape) for x in (key, value))
    return F.scaled_dot_product_attention(query.transpose(1, 2), *shared, attn_mask=kept).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, frequencies: Tensor) -> Tensor:
    """`x` (B, T, heads, D), each pair of its halves turned by its position times a frequency (rotary embedding)."""
    angles = torch.outer(torch.arange(x.shape[1], device=x.device), wide(frequencies))[:, None]  # (T, 1, D / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Mps:
    """exp(logit scale) cos of the prompt and of the picture after it looked at the words that fit the condition.

    A word is seen whose best inner product with a word of `condition` is above `threshold` times the best of its
    prompt. From the cache, or from `folder` in transformers' layout: a CLIP's config.json and tokenizer files, and a
    model.safetensors that holds the CLIP and the head's `cross_model.` tensors.
    """

    differentiable = True
    needs_prompt = True
    languages = ("en",)
    weights: ClassVar[tuple[Weights, ...]] = (MPS_OVERALL, CLIP_MERGES)

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        condition: str = OVERALL,
        threshold: float = 0.3,
        folder: str | None = None,
    ):
        if folder is not None:
            config, tensors, tokenizer = opened(folder, CLIPConfig, CLIPTokenizer)
        else:
            config, tensors, tokenizer = CLIPConfig(**VIT_H_14), load_file(MPS_OVERALL.path()), published_tokenizer()
        of_clip = {name: value for name, value in tensors.items() if not name.startswith("cross_model.")}
        self.clip = Clip(config, of_clip, tokenizer, device, dtype)
        self.cross_model = _CrossModel(under("cross_model.", tensors), device, dtype)
        self.threshold = threshold
        self.condition = self.text([condition])[0][0]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score (B,) float32 of `images` (B, 3, H, W) in [0, 1] for `prompts`."""
        pixels = normalised(covered(ready(images, self.clip.model), self.clip.size))
        words, whole = self.text(prompts)
        looked = wide(self.cross_model(self.image_tokens(pixels), words, self.seen(words))[:, 0])
        return (self.clip.logit_scale * F.cosine_similarity(whole, looked)).float()

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Projected tokens (B, T, D) of `pixels` (B, 3, size, size), as they leave the last layer, not normalised."""
        model = self.clip.model
        tokens: Tensor = model.visual_projection(model.vision_model(pixels.to(model.dtype)).last_hidden_state)
        return tokens

    @torch.no_grad()
    def text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Projected tokens (B, L, D) of `prompts`, padding included, and their features (B, D) at the end token."""
        model = self.clip.model
        read = model.get_text_features(self.clip.token_ids(prompts))
        return model.text_projection(read.last_hidden_state), wide(read.pooler_output)

    def seen(self, words: Tensor) -> Tensor:
        """Which of a prompt's `words` (B, L, D) fit the condition, (B, L) bool."""
        fit = wide(words @ self.condition.T).amax(2)
        # The official code divides by the best of the batch; by the best of the prompt no score depends on another's.
        return fit / fit.amax(1, keepdim=True) > self.threshold
