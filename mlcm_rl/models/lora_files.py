"""LoRA files and their key layouts: diffusers' (PEFT's names), and kohya's, which most other tools read.

An adapter is a pair: PEFT's configuration, with rank and alpha, and tensors `<module>.lora_A.weight` (rank, in, ...)
and `<module>.lora_B.weight` (out, rank, ...). It adds (alpha / rank) B A to the module's weight.
"""

import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from ..storage.files import CheckpointError
from ..storage.tensors import read_tensors, write_tensors
from ..storage.untrusted import parse_json

if TYPE_CHECKING:
    from .base import Base

Adapter = tuple[LoraConfig, dict[str, Tensor]]

LORA_FILE = "pytorch_lora_weights.safetensors"  # the first name that diffusers looks for in a folder
KOHYA_FILE = "kohya_lora_weights.safetensors"
PARTS = ("unet", "transformer")  # the pipeline components that adapters belong to
METADATA_KEY = "lora_adapter_metadata"  # diffusers' key for PEFT's configuration in a safetensors header
# Fields of PEFT's configuration that every reader accepts: PEFT refuses a field that is newer than itself, and
# diffusers 0.35 fails without the two patterns.
SAVED_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
# Fields of PEFT's configuration that describe an adapter's origin and do not change its result.
DESCRIPTIVE = ("peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode")
KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
# Stability AI's names of layers that diffusers names differently, inside a residual block and outside all blocks.
STABILITY_LAYERS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
STABILITY_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}


def combined(adapters: Sequence[Adapter]) -> Adapter:
    """Return one adapter that adds the sum of `adapters`: their factors are concatenated, with every scale inside B.

    Its alpha is its rank, so that a reader which ignores the configuration applies it correctly.
    """
    rank = sum(settings.r for settings, _ in adapters)
    tensors: dict[str, Tensor] = {}
    start = 0
    for settings, factors in adapters:
        for key, value in factors.items():
            is_down = key.endswith(".lora_A.weight")
            dim, scale = (0, 1.0) if is_down else (1, settings.lora_alpha / settings.r)
            shape = (*value.shape[:dim], rank, *value.shape[dim + 1 :])
            total = tensors.setdefault(key, value.new_zeros(shape))
            total.narrow(dim, start, settings.r).copy_(value * scale)
        start += settings.r
    modules = set().union(*(settings.target_modules for settings, _ in adapters))
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), tensors


def write_lora(adapters: Mapping[str, Adapter], file: Path) -> None:
    """Write adapters, by pipeline component, as `load_lora_weights` reads them, configurations in the header.

    The file is that of diffusers' own save, without its second header key and the fields that have their defaults.
    """
    fields: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    for part, (settings, tensors) in adapters.items():
        config = settings.to_dict() | {"target_modules": sorted(settings.target_modules)}
        fields |= {f"{part}.{key}": config[key] for key in SAVED_FIELDS}
        weights |= {f"{part}.{key}": value for key, value in tensors.items()}
    write_tensors(file, weights, {METADATA_KEY: json.dumps(fields, indent=2, sort_keys=True)})


def write_kohya(adapters: Mapping[str, Adapter], base: "Base", file: Path) -> None:
    """Write adapters over `base`, by pipeline component, in the layout of kohya's sd-scripts.

    ComfyUI, Forge, A1111 and InvokeAI read it. In float32: with float16 factors the update differs from the student's
    by 3e-4 of its norm. Raise ValueError for a base without a `kohya_version`.
    """
    version = base.kohya_version
    if version is None:
        raise ValueError(f"{file}: kohya's tools have no name for a teacher of family {base.family}")
    weights = {}
    for part, (adapter, tensors) in adapters.items():
        modules = {_module(key) for key in tensors}
        if part == base.denoiser_part:
            names = kohya_names(modules, base.denoiser, base.in_stability_blocks)
        else:
            names = kohya_text_names(modules, part, base.family)
        for key, value in tensors.items():
            module = _module(key)
            weights[f"{names[module]}.{KOHYA_PARTS[key.removeprefix(f'{module}.')]}"] = value
            weights[f"{names[module]}.alpha"] = torch.tensor(float(adapter.lora_alpha))
    settings, _ = adapters[base.denoiser_part]
    header = {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),  # by which A1111 recognises SD 2
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.r),
        "ss_network_alpha": str(settings.lora_alpha),
    }
    write_tensors(file, weights, header)


def kohya_names(modules: Iterable[str], denoiser: ModelMixin, in_stability_blocks: bool) -> dict[str, str]:
    """Return the names of `modules` of `denoiser` in kohya's layout, by their own names.

    With `in_stability_blocks` the blocks have Stability AI's names, which readers expect for SDXL. Raise ValueError for
    a module that has no such name.
    """
    places = _stability_blocks(denoiser) if in_stability_blocks else {}
    names = {module: _stability_name(module, places) if places else module for module in modules}
    return {module: f"lora_unet_{name.replace('.', '_')}" for module, name in names.items()}


def kohya_text_names(modules: Iterable[str], part: str, family: str) -> dict[str, str]:
    """Return the names of `modules` of the text encoder `part` in kohya's layout, by their own names."""
    prefix = "lora_te2" if part == "text_encoder_2" else "lora_te1" if family == "sdxl" else "lora_te"
    return {module: f"{prefix}_{module.replace('.', '_')}" for module in modules}


def _module(key: str) -> str:
    """Return the module that an adapter's tensor belongs to."""
    return key.rpartition(".lora_")[0]


def _stability_name(module: str, places: dict[str, str]) -> str:
    if module in STABILITY_ENDS:
        return STABILITY_ENDS[module]
    for block, place in places.items():
        if module == block:
            return place
        if module.startswith(f"{block}."):
            inside = module.removeprefix(f"{block}.")
            return f"{place}.{STABILITY_LAYERS.get(inside, inside)}"
    raise ValueError(f"{module} has no name among Stability AI's blocks: an adapter over it has no kohya layout")


def _stability_blocks(denoiser: ModelMixin) -> dict[str, str]:
    """Return Stability AI's names of diffusers' blocks: `down_blocks.1.attentions.0` is `input_blocks.4.1` of SDXL.

    Residual blocks and downsamplers are numbered through all levels, from the first convolution, which is number 0.
    """
    places = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places["mid_block.resnets.1"] = "middle_block.2"
    number = 1
    for i, block in enumerate(denoiser.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(denoiser.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:  # part of the last block of its level, after the others
            last = 2 if hasattr(block, "attentions") else 1
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{last}.conv"
    return places


def read_lora(path: Path) -> Adapter:
    """Read configuration and tensors of a LoRA file written by `save_student` or diffusers.

    Raise CheckpointError for a file that is damaged, or whose header does not match its tensors.
    """
    tensors = {_in_part(key): value for key, value in read_tensors(path).items()}
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(METADATA_KEY, "")
    try:
        fields = {_in_part(key): value for key, value in dict(parse_json(header)).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header holds no configuration of PEFT's: {error}") from error
    settings = _settings_in(fields, path)
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith(".lora_A.weight") and value.ndim}
    if ranks != {settings.r}:
        raise CheckpointError(f"{path}: r is {settings.r}, its tensors have rank {', '.join(map(str, sorted(ranks)))}")
    return settings, tensors


def _in_part(key: str) -> str:
    """Return `key` without the name of the pipeline component in front of it."""
    part, _, inside = key.partition(".")
    return inside if part in PARTS else key


def _settings_in(fields: dict[str, Any], path: Path) -> LoraConfig:
    """Return rank, alpha and modules of a configuration.

    Raise CheckpointError if any other field is set: PEFT could import modules by name, fetch weights or match regular
    expressions for it.
    """
    rank, alpha, modules = (fields.get(key) for key in ("r", "lora_alpha", "target_modules"))
    defaults = LoraConfig().to_dict() | {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    refused = sorted(key for key, value in fields.items() if key not in DESCRIPTIVE and value != defaults.get(key))
    if refused:
        raise CheckpointError(
            f"{path}: its header sets {', '.join(refused)}; only r, lora_alpha and target_modules may be set"
        )
    if type(rank) is not int or (type(alpha) is not int and type(alpha) is not float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: r and lora_alpha must be numbers, are {rank!r} and {alpha!r}")
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise CheckpointError(f"{path}: target_modules must be a list of names, is {reprlib.repr(modules)}")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
