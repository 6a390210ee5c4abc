"""LoRA files of an export for other tools: kohya's sd-scripts and its readers, ComfyUI, PEFT.

Each adds the same to every weight at strength 1. Adapters come by pipeline component, with A (rank, in, ...) and B
(out, rank, ...); a rank may differ by module, as in PEFT's `rank_pattern`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..storage import finite
from ..storage.files import public, write_json
from ..storage.tensors import write_tensors
from .base import Base
from .client_keys import kohya_text_names
from .comfyui import nodes_of
from .lora_files import SAVED_FIELDS, Adapter

KOHYA_FILE = "kohya_lora_weights.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")  # the names that PEFT looks for
PEFT_PREFIX = "base_model.model."


def write_kohya(adapters: Mapping[str, Adapter], base: Base, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write adapters over `base` in the layout of kohya's sd-scripts, with an `alpha` for each layer.

    Forge, A1111 and InvokeAI read it, and for UNets ComfyUI. In float16 the update differs from the student's by 3e-4
    of its norm. Raise ValueError for a base without a `kohya_version`, and for factors that overflow in `dtype`.
    """
    version = base.kohya_version
    if version is None:
        raise ValueError(f"{file}: kohya's tools have no name for a teacher of family {base.family}")
    weights: dict[str, Tensor] = {}
    for part, (settings, tensors) in adapters.items():
        modules = sorted({module_of(key) for key in tensors})
        scale = settings.lora_alpha / settings.r
        if part == base.denoiser_part:
            layers = base.kohya_layers(modules)
        else:
            layers = {name: (one,) for one, name in kohya_text_names(modules, part, base.family).items()}
        for name, stack in layers.items():
            down, up = _stacked(base, tensors, stack)
            weights |= {f"{name}.lora_down.weight": down.to(dtype), f"{name}.lora_up.weight": up.to(dtype)}
            weights[f"{name}.alpha"] = torch.tensor(scale * len(down))
    finite.refuse_weights(weights, f"{file.name}")
    settings, _ = adapters[base.denoiser_part]
    header = {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),  # by which A1111 recognises SD 2
        "ss_network_module": base.kohya_module,
        "ss_network_dim": str(settings.r),
        "ss_network_alpha": str(settings.lora_alpha),
    }
    write_tensors(file, weights, header)


def module_of(key: str) -> str:
    """Return the module that an adapter's tensor belongs to."""
    return key.rpartition(".lora_")[0]


def _stacked(base: Base, tensors: Mapping[str, Tensor], stack: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the factors down (R, in, ...) and up (out, R, ...) of the layer that stacks the outputs of `stack`.

    Each module keeps its factors: its rows of `up` are zero outside its own columns. Modules without an adapter have
    zero rows.
    """
    if len(stack) == 1:
        return tensors[f"{stack[0]}.lora_A.weight"], tensors[f"{stack[0]}.lora_B.weight"]
    downs = [tensors[f"{one}.lora_A.weight"] for one in stack if f"{one}.lora_A.weight" in tensors]
    rows = [len(base.denoiser.get_submodule(one).weight) for one in stack]
    up = downs[0].new_zeros(sum(rows), sum(map(len, downs)))
    row = column = 0
    for one, count in zip(stack, rows, strict=True):
        if (own := tensors.get(f"{one}.lora_B.weight")) is not None:
            up[row : row + count, column : column + own.shape[1]] = own
            column += own.shape[1]
        row += count
    return torch.cat(downs), up


def write_comfyui(adapters: Mapping[str, Adapter], base: Base, file: Path, dtype: torch.dtype) -> None:
    """Write adapters over `base` as ComfyUI looks them up: in kohya's layout for UNets, else under diffusers' names.

    Those have no `alpha`, without which the scale is 1: it is inside B. Raise ValueError as `write_kohya` does.
    """
    nodes = nodes_of(base)
    if not nodes.reads_adapters:
        write_kohya(adapters, base, file, dtype)
        return
    weights: dict[str, Tensor] = {}
    for part, (settings, tensors) in adapters.items():
        for key, value in tensors.items():
            module = module_of(key)
            name = nodes.renamed.get(module, f"{part}.{module}")
            scale = settings.lora_alpha / settings.r if key.endswith("lora_B.weight") else 1.0
            weights[name + key.removeprefix(module)] = (scale * value).to(dtype)
    finite.refuse_weights(weights, file.name)
    write_tensors(file, weights)


def write_peft(adapters: Mapping[str, Adapter], base: Base, folder: Path, dtype: torch.dtype) -> None:
    """Write adapters over `base` for `PeftModel.from_pretrained`: the denoiser's in `folder`, others in one by name.

    The configuration has the fields that every version of PEFT reads.
    """
    for part, (settings, tensors) in adapters.items():
        modules = dict(base.pipeline.components[part].named_modules())
        names = {module_of(key): module_of(key) for key in tensors}
        # transformers 5 has no prefix in memory, which files have
        names = {one: one if one in modules else one.removeprefix("text_model.") for one in names}
        weights = {
            f"{PEFT_PREFIX}{names[module_of(key)]}{key.removeprefix(module_of(key))}": value.to(dtype)
            for key, value in tensors.items()
        }
        finite.refuse_weights(weights, part)
        own = {field: getattr(settings, field) for field in SAVED_FIELDS}
        fixed = {"peft_type": "LORA", "base_model_name_or_path": public(base.teacher.path), "inference_mode": True}
        place = folder if part == base.denoiser_part else folder / part
        place.mkdir(exist_ok=True)
        config, file = (place / name for name in PEFT_FILES)
        write_json(config, fixed | own | {"target_modules": sorted(names.values())})
        write_tensors(file, weights, {"format": "pt"})
