"""What the reward models with published checkpoints share: a network from tensors, pictures and prompts made ready.

Networks are transformers' own classes, frozen, in the data type asked for. Pictures are made ready in float32 or
better, by tensor operations that gradients pass: what PIL does to 8-bit pictures, without its rounding to 8 bits.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding, BertTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, red first; all models here took them over
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def opened(
    folder: str, config: type[PreTrainedConfig], tokenizer: type[PreTrainedTokenizerBase]
) -> tuple[Any, dict[str, Tensor], PreTrainedTokenizerBase]:
    """Config, tensors and tokenizer of a folder laid out as transformers saves it; nothing is looked up elsewhere."""
    return (
        config.from_pretrained(folder, local_files_only=True),
        load_file(Path(folder) / "model.safetensors"),
        tokenizer.from_pretrained(folder, local_files_only=True),
    )


def network(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    **settings: object,
) -> Any:
    """A frozen network of `kind` that holds `tensors`, all of them and nothing else.

    Raises ValueError that names what is missing or left over: transformers itself would fill in random weights.
    """
    model, found = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True, **settings
    )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[fault]:
            raise ValueError(f"{kind.__name__}: {fault.replace('_', ' ')} {', '.join(sorted(map(str, found[fault])))}")
    return model.to(device).eval().requires_grad_(False)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `tensors` whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def wide(values: Tensor) -> Tensor:
    """`values` in float32, or in double where they are double."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def ready(images: Tensor, model: PreTrainedModel) -> Tensor:
    """`images` where `model` is, in float32 or better: they are resized before they take the model's data type."""
    return images.to(model.device, torch.promote_types(model.dtype, torch.float32))


def covered(images: Tensor, size: int, rounding: Callable[[float], int] = math.floor) -> Tensor:
    """`images` (B, 3, H, W) scaled until the shorter side is `size`, the centre cut out: (B, 3, size, size).

    The longer side is rounded down, as transformers and torchvision do. Where an odd number of rows or columns is cut
    off they part: transformers starts at the floor of the half, torchvision at Python's `round` of it.
    """
    shorter = min(images.shape[-2:])
    sides = [size * side // shorter for side in images.shape[-2:]]
    top, left = (rounding((side - size) / 2) for side in sides)
    return resized(images, sides)[..., top : top + size, left : left + size]


def resized(images: Tensor, sides: list[int]) -> Tensor:
    """`images` (B, 3, H, W) in [0, 1] at `sides` (height, width) by PIL's bicubic filter, which widens as it shrinks.

    Rows first, then columns, and after each what overshoots is cut off, as in PIL, which keeps both in 8 bits.
    """
    height, width = sides
    rows = F.interpolate(images, (images.shape[2], width), mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(rows, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def normalised(images: Tensor) -> Tensor:
    """`images` (B, 3, H, W) in [0, 1], less the mean, over the deviation of their channels."""
    mean, deviation = (images.new_tensor(values).reshape(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


def tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int, device: torch.device) -> BatchEncoding:
    """`prompts` as they are, cut and padded to `length` tokens: B x L, so that no prompt depends on its neighbours."""
    encoded = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return encoded.to(device)


def bert_tokenizer(vocabulary: Path) -> BertTokenizer:
    """A lower-casing WordPiece tokenizer over a `vocab.txt`, one token a line."""
    lines = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # some tokens are line separators
    return BertTokenizer({token: index for index, token in enumerate(lines)})


class Head:
    """Five linear layers to one number, with nothing between them: the published networks have only dropout there.

    The layers are the `tensors` named `prefix` and 0, 2, 4, 6, 7; kept in float32 or better.
    """

    def __init__(self, prefix: str, tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype):
        kept = torch.promote_types(dtype, torch.float32)
        self.layers = [
            tuple(tensors[f"{prefix}{index}.{part}"].to(device, kept) for part in ("weight", "bias"))
            for index in (0, 2, 4, 6, 7)
        ]

    def __call__(self, features: Tensor) -> Tensor:
        """One number (B,) for each of `features` (B, D)."""
        for weight, bias in self.layers:
            features = F.linear(features, weight, bias)
        return features.squeeze(1)
