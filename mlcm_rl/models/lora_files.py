"""LoRA files in diffusers' layout, with PEFT's names. Those of other tools are in `client_files`.

An adapter is a pair: PEFT's configuration, with rank and alpha, and tensors `<module>.lora_A.weight` (rank, in, ...)
and `<module>.lora_B.weight` (out, rank, ...). It adds (alpha / rank) B A to the module's weight.
"""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from ..recipe import student_sources
from ..storage.files import CheckpointError
from ..storage.tensors import read_tensors, write_tensors
from ..storage.untrusted import parse_json

Adapter = tuple[LoraConfig, dict[str, Tensor]]

LORA_FILE = student_sources.LORA_FILE
PARTS = ("unet", "transformer")  # the pipeline components that adapters belong to
METADATA_KEY = "lora_adapter_metadata"  # diffusers' key for PEFT's configuration in a safetensors header
# Fields of PEFT's configuration that every reader accepts: PEFT refuses a field that is newer than itself, and
# diffusers 0.35 fails without the two patterns.
SAVED_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
# Fields of PEFT's configuration that describe an adapter's origin and do not change its result.
DESCRIPTIVE = ("peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode")


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


def write_lora(adapters: Mapping[str, Adapter], file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write adapters, by pipeline component, as `load_lora_weights` reads them, configurations in the header.

    The file is that of diffusers' own save, without its second header key and the fields that have their defaults.
    """
    fields: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    for part, (settings, tensors) in adapters.items():
        config = settings.to_dict() | {"target_modules": sorted(settings.target_modules)}
        fields |= {f"{part}.{key}": config[key] for key in SAVED_FIELDS}
        weights |= {f"{part}.{key}": value.to(dtype) for key, value in tensors.items()}
    write_tensors(file, weights, {METADATA_KEY: json.dumps(fields, indent=2, sort_keys=True)})


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
