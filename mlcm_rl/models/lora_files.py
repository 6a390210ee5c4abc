"""LoRA files and their key layouts: diffusers' (PEFT's names), and kohya's, which most other tools read.

An adapter is a pair: PEFT's configuration, which says rank and alpha, and tensors `<module>.lora_A.weight` (rank, in,
...) and `<module>.lora_B.weight` (out, rank, ...). A module's weight gains (alpha / rank) B A.
"""

import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from ..storage.files import CheckpointError
from ..storage.tensors import read_tensors, write_tensors
from ..storage.untrusted import parse_json
from .base import Base

Adapter = tuple[LoraConfig, dict[str, Tensor]]

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for, before any other file of a folder
KOHYA_FILE = "kohya_lora_weights.safetensors"
PARTS = ("unet", "transformer")  # of pipelines, that adapters are of
METADATA_KEY = "lora_adapter_metadata"  # diffusers' key for PEFT's configuration in a safetensors header
# Of PEFT's configuration what every reader takes: PEFT refuses a field that is newer than itself, and diffusers 0.35
# fails without the two patterns.
STATED = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
# Of PEFT's configuration what says where an adapter came from, and changes nothing.
DESCRIPTIVE = ("peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode")
KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
# What is called otherwise in Stability AI's UNet, inside a residual block and outside all blocks.
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
    """Return one adapter that adds what all of `adapters` add: their ranks side by side, and every scale inside B.

    Its alpha is its rank, so that a reader which loses the configuration applies it as it is.
    """
    rank = sum(settings.r for settings, _ in adapters)
    tensors: dict[str, Tensor] = {}
    start = 0
    for settings, factors in adapters:
        for key, value in factors.items():
            is_down = key.endswith(".lora_A.weight")
            dim, scale = (0, 1.0) if is_down else (1, settings.lora_alpha / settings.r)
            shape = (*value.shape[:dim], rank, *value.shape[dim + 1 :])
            whole = tensors.setdefault(key, value.new_zeros(shape))
            whole.narrow(dim, start, settings.r).copy_(value * scale)
        start += settings.r
    modules = set().union(*(settings.target_modules for settings, _ in adapters))
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), tensors


def write_lora(settings: LoraConfig, tensors: dict[str, Tensor], file: Path, part: str) -> None:
    """Write an adapter of the pipeline's component `part` as `load_lora_weights` reads it, configuration in the header.

    As diffusers' own save does, less its second header key and the fields that are at their defaults.
    """
    everything = settings.to_dict() | {"target_modules": sorted(settings.target_modules)}
    stated = {f"{part}.{key}": everything[key] for key in STATED}
    named = {f"{part}.{key}": value for key, value in tensors.items()}
    write_tensors(file, named, {METADATA_KEY: json.dumps(stated, indent=2, sort_keys=True)})


def write_kohya(settings: LoraConfig, tensors: dict[str, Tensor], base: Base, file: Path) -> None:
    """Write an adapter over `base` as kohya's sd-scripts does: ComfyUI, Forge, A1111 and InvokeAI read that.

    In float32: with float16 factors the update is 3e-4 of its norm away from the student's. Raise ValueError where
    kohya's tools know no model of that shape.
    """
    version = base.kohya_version
    if version is None:
        raise ValueError(f"{file}: kohya's tools know no model of the shape of family {base.family}")
    names = kohya_names({_module(key) for key in tensors}, base.denoiser, base.in_stability_blocks)
    named = {}
    for key, value in tensors.items():
        module = _module(key)
        named[f"{names[module]}.{KOHYA_PARTS[key.removeprefix(f'{module}.')]}"] = value
        named[f"{names[module]}.alpha"] = torch.tensor(float(settings.lora_alpha))
    header = {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),  # what A1111 tells SD 2 by
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.r),
        "ss_network_alpha": str(settings.lora_alpha),
    }
    write_tensors(file, named, header)


def kohya_names(modules: Iterable[str], denoiser: ModelMixin, in_stability_blocks: bool) -> dict[str, str]:
    """Return what kohya's layout calls `modules` of `denoiser`, by their own names.

    `in_stability_blocks` says where its readers know the blocks by Stability AI's names, as they do for SDXL. Raises
    ValueError for a module that has none.
    """
    places = _stability_blocks(denoiser) if in_stability_blocks else {}
    named = {module: _stability_name(module, places) if places else module for module in modules}
    return {module: f"lora_unet_{name.replace('.', '_')}" for module, name in named.items()}


def _module(key: str) -> str:
    """The module that a tensor of an adapter belongs to."""
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
    raise ValueError(f"{module} has no name among Stability AI's blocks: no adapter over it can be written for kohya's")


def _stability_blocks(denoiser: ModelMixin) -> dict[str, str]:
    """Stability AI's names of diffusers' blocks: `down_blocks.1.attentions.0` is `input_blocks.4.1` of SDXL.

    They count residual blocks and what halves or doubles the size through all levels, and the first convolution is
    number 0.
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
        if block.upsamplers:  # in the last of its level, after what else is there
            last = 2 if hasattr(block, "attentions") else 1
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{last}.conv"
    return places


def read_lora(path: Path) -> Adapter:
    """Configuration and tensors of a LoRA file as `save_student` and diffusers write it.

    Raises CheckpointError for a file that is damaged, or whose header asks for what its tensors are not.
    """
    tensors = {_in_part(key): value for key, value in read_tensors(path).items()}
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(METADATA_KEY, "")
    try:
        stated = {_in_part(key): value for key, value in dict(parse_json(header)).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header holds no configuration of PEFT's: {error}") from error
    settings = _settings_in(stated, path)
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith(".lora_A.weight") and value.ndim}
    if ranks != {settings.r}:
        raise CheckpointError(f"{path}: r is {settings.r}, its tensors have rank {', '.join(map(str, sorted(ranks)))}")
    return settings, tensors


def _in_part(key: str) -> str:
    """Return the name inside the component that an adapter is of."""
    part, _, inside = key.partition(".")
    return inside if part in PARTS else key


def _settings_in(stated: dict[str, Any], path: Path) -> LoraConfig:
    """Rank, alpha and modules of a configuration; with anything else that is set, PEFT would import modules by name,
    fetch weights or match regular expressions: it is refused."""
    rank, alpha, modules = (stated.get(key) for key in ("r", "lora_alpha", "target_modules"))
    usual = LoraConfig().to_dict() | {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    odd = sorted(key for key, value in stated.items() if key not in DESCRIPTIVE and value != usual.get(key))
    if odd:
        raise CheckpointError(f"{path}: its header sets {', '.join(odd)}; read are r, lora_alpha and target_modules")
    if type(rank) is not int or (type(alpha) is not int and type(alpha) is not float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: r and lora_alpha must be numbers, are {rank!r} and {alpha!r}")
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise CheckpointError(f"{path}: target_modules must be a list of names, is {reprlib.repr(modules)}")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
