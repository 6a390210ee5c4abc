"""A LoRA of the teacher's own (`teacher.lora`): read as diffusers reads it, fused when the teacher is loaded.

A file is in diffusers' layout (`unet.<module>.lora_A.weight`) or in kohya's (`lora_unet_<module>.lora_down.weight`).
diffusers leaves tensors aside that it finds no module for, with a warning or without; here each is used or refused.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..recipe import Teacher
from ..recipe.student_sources import PEFT_CONFIG
from ..storage import finite
from ..storage.files import read_json
from ..storage.tensors import read_tensors
from ..storage.untrusted import first_few, in_a_line, parse_json
from .lora_files import METADATA_KEY, PARTS, Adapter

FACTOR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)\.weight")
BEFORE_FACTOR = r"\.lora(_A|_B|_down|_up)?\."  # after the name that an alpha shares with its factors
IS_DOWN = {"A": True, "down": True, "B": False, "up": False}
OLD_NAMES = {  # of diffusers' attention before PEFT, in a denoiser and in a text encoder
    "to_out": "to_out.0",
    "self_attn.to_q": "self_attn.q_proj",
    "self_attn.to_k": "self_attn.k_proj",
    "self_attn.to_v": "self_attn.v_proj",
    "self_attn.to_out": "self_attn.out_proj",
}
PEFT_PREFIX = "base_model.model."  # before the names of modules in PEFT's own files
CLIP = "text_model."  # before the names of CLIP's layers, but not in every version of transformers


@dataclass(frozen=True)
class Update:
    """What a LoRA adds to the weight W (out, in, ...) of one module: scale * up @ down.

    `down` is (r, in, ...) and `up` (out, r) or (out, r, 1, 1), both float32.
    """

    down: Tensor
    up: Tensor
    scale: float

    def total(self) -> Tensor:
        """Return the update in the shape of W, in float32."""
        return self.scale * (self.up.flatten(1) @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])


@torch.no_grad()
def fuse(pipeline: DiffusionPipeline, teacher: Teacher) -> None:
    """Add the teacher's LoRA to the weights of `pipeline`, in float32; each is rounded to its own precision once.

    Raise as `updates` does, and ValueError for a weight that overflows.
    """
    for part, of_modules in updates(pipeline, teacher).items():
        fused = {}
        for module, update in of_modules.items():
            weight = pipeline.components[part].get_submodule(module).weight
            weight.data = (weight.float() + update.total().to(weight.device)).to(weight.dtype)
            fused[f"{part}.{module}"] = weight
        if (bad := finite.first_nonfinite(fused)) is not None:
            raise ValueError(
                f"teacher.lora {teacher.lora}: {bad} is not made of finite numbers in {teacher.dtype} with it "
                f"added: lower teacher.lora_weight ({teacher.lora_weight:g}), or set teacher.dtype: float32"
            )


def updates(pipeline: DiffusionPipeline, teacher: Teacher) -> dict[str, dict[str, Update]]:
    """Return what the teacher's LoRA adds, `lora_weight` in every scale, by component and module of `pipeline`.

    Raise CheckpointError for a damaged file, ValueError for tensors that are not those of a plain LoRA over this
    pipeline.
    """
    where, over = f"teacher.lora {teacher.lora}", f"the teacher {teacher.path}"
    return read_updates(pipeline, Path(str(teacher.lora)), where, over, teacher.lora_weight)


def read_updates(
    pipeline: DiffusionPipeline, path: Path, where: str, over: str, weight: float = 1.0, alpha: float | None = None
) -> dict[str, dict[str, Update]]:
    """Return what the LoRA in the file `path` adds to `pipeline`, by component and module; every scale times `weight`.

    `alpha` is that of a file which holds none; without it a scale is 1, as diffusers has it, and a file with PEFT's own
    names, whose alpha is beside it, is refused. `where` and `over` name the file and the pipeline in errors, which are
    those of `updates`.
    """
    tensors, header = _in_part(pipeline, read_tensors(path)), _header(path, where)
    if tensors.is_bare:
        header = _configuration_beside(path, tensors.part) or header
        if alpha is None and f"{tensors.part}.lora_alpha" not in header and _needs_alpha(tensors.values):
            raise ValueError(
                f"{where}: its names are PEFT's, and the file holds no alpha: put adapter_config.json beside it, with "
                "lora_alpha as its authors train and load it (PEFT's default is 8); a start takes it as alpha: too"
            )
    return _updates(pipeline, tensors.values, header, where, over, weight, alpha)


def _updates(
    pipeline: DiffusionPipeline,
    tensors: dict[str, Tensor],
    header: Mapping[str, Any],
    where: str,
    over: str,
    weight: float,
    default_alpha: float | None,
) -> dict[str, dict[str, Update]]:
    if odd := sorted(name for name in tensors if not (FACTOR.fullmatch(name) or name.endswith(".alpha"))):
        raise ValueError(
            f"{where}: {len(odd)} tensors are not those of a plain LoRA, for example {odd[0]}; one of another kind "
            "(DoRA, LoHa, LoKr) has to be merged into the checkpoint that teacher.path names"
        )
    finite.refuse_of_others({name: value for name, value in tensors.items() if not name.endswith(".alpha")}, where)
    if empty := sorted(name for name, value in tensors.items() if not value.numel()):
        raise ValueError(f"{where}: {empty[0]} has the shape {list(tensors[empty[0]].shape)}, without a number in it")
    converted, alphas = _in_diffusers_names(pipeline, tensors, where)
    factors: dict[tuple[str, str], dict[bool, Tensor]] = {}
    scales: dict[tuple[str, str], float] = {}
    unknown = list[str]()
    for name, value in converted.items():
        part, module, is_down = _place(pipeline, name)
        if module is None:
            unknown.append(name)
            continue
        factors.setdefault((part, module), {})[is_down] = value.float()
        if is_down:
            alpha = alphas.pop(f"{re.split(BEFORE_FACTOR, name)[0]}.alpha", None)
            scales[part, module] = _scale(header, part, module, len(value), alpha, default_alpha, where)
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of {len(converted)} tensors belong to no module of {over}, "
            f"for example {first_few(unknown, 2)}: it was trained over another base, or is in a layout that diffusers "
            "does not read; diffusers' and kohya's are"
        )
    if len(factors) < sum(_is_down(name) for name in tensors) or alphas:
        raise ValueError(
            f"{where}: diffusers would leave some of its {len(tensors)} tensors aside; save it in one layout"
        )
    found: dict[str, dict[str, Update]] = {}
    for (part, module), both in factors.items():
        matrix = pipeline.components[part].get_submodule(module).weight
        update = _update(both, matrix, weight * scales.get((part, module), 1.0))
        if update is None:
            shapes = " and ".join(str(list(value.shape)) for value in both.values())
            raise ValueError(
                f"{where}: {part}.{module}: factors of {shapes} do not fit the weight of {list(matrix.shape)} of "
                f"{over}: the LoRA was trained over another base"
            )
        found.setdefault(part, {})[module] = update
    if not found:
        raise ValueError(f"{where}: it has no tensors")
    return found


def adapters(pipeline: DiffusionPipeline, teacher: Teacher) -> dict[str, Adapter]:
    """Return the teacher's LoRA as one adapter for each component that it changes, for files beside a student's.

    Each has the largest rank of its modules, with zeros beyond theirs, and its scales inside B (alpha = rank).
    """
    return {part: as_adapter(part, of_modules) for part, of_modules in updates(pipeline, teacher).items()}


def as_adapter(part: str, of_modules: Mapping[str, Update]) -> Adapter:
    """Return the updates of a component's modules as one adapter of the largest rank, its scales inside B."""
    rank = max(len(update.down) for update in of_modules.values())
    tensors = {}
    for module, update in of_modules.items():
        name, spare = _saved_name(part, module), rank - len(update.down)
        tensors[f"{name}.lora_A.weight"] = torch.cat(
            [update.down, update.down.new_zeros(spare, *update.down.shape[1:])]
        )
        ends = (0, 0) * (update.up.ndim - 2) + (0, spare)
        tensors[f"{name}.lora_B.weight"] = F.pad(update.scale * update.up, ends)
    modules = {name.rpartition(".lora_")[0].removeprefix(CLIP) for name in tensors}
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), tensors


@dataclass(frozen=True)
class _InPart:
    """A file's tensors under names that begin with a component; `is_bare` if the file's own did not, as PEFT's."""

    values: dict[str, Tensor]
    part: str
    is_bare: bool


def _in_part(pipeline: DiffusionPipeline, tensors: dict[str, Tensor]) -> _InPart:
    """Return `tensors` with the denoiser's name before the names of its own modules."""
    part = next((name for name in PARTS if name in pipeline.components), PARTS[0])
    children = dict(pipeline.components[part].named_children())
    inside = {name: name.removeprefix(PEFT_PREFIX) for name in tensors}
    is_bare = bool(tensors) and all(name.partition(".")[0] in children for name in inside.values())
    return _InPart(
        {f"{part}.{inside[name]}": value for name, value in tensors.items()} if is_bare else tensors, part, is_bare
    )


def _needs_alpha(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are PEFT's, without an alpha; diffusers' of before have none, and a scale of 1."""
    return any(".lora_A." in name for name in tensors) and not any(name.endswith(".alpha") for name in tensors)


def _configuration_beside(path: Path, part: str) -> dict[str, Any]:
    """Return PEFT's configuration in the folder of the file `path`, as a header has it; empty without one."""
    file = path.with_name(PEFT_CONFIG)
    return {f"{part}.{key}": value for key, value in read_json(file).items()} if file.is_file() else {}


def _in_diffusers_names(
    pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return `tensors` under diffusers' names, which begin with the component's, and the alphas beside them.

    diffusers forgets FLUX's unless it is asked for them, and leaves those of most other families among the tensors.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        raise ValueError(
            f"{where}: diffusers loads no LoRA into a {type(pipeline).__name__}: merge it into the checkpoint"
        )
    read = type(pipeline).lora_state_dict
    settings: dict[str, Any] = {"unet_config": pipeline.unet.config} if "unet" in pipeline.components else {}
    settings |= {"return_alphas": True} if "return_alphas" in signature(read).parameters else {}
    try:
        converted = read(dict(tensors), **settings)
    except Exception as error:  # of diffusers, for names that it does not know
        raise ValueError(f"{where}: diffusers does not read it: {in_a_line(error)}") from error
    named, known = converted if isinstance(converted, tuple) else (converted, None)
    alphas = dict(known or {}) | {name: value for name, value in named.items() if name.endswith(".alpha")}
    numbers: dict[str, Any] = {name: torch.as_tensor(value).squeeze().tolist() for name, value in alphas.items()}
    return {name: value for name, value in named.items() if name not in alphas}, numbers


def _is_down(name: str) -> bool:
    match = FACTOR.fullmatch(name)
    return match is not None and IS_DOWN[match[2]]


def _place(pipeline: DiffusionPipeline, name: str) -> tuple[str, str | None, bool]:
    """Return component, module and whether it is the down-projection, of a tensor; None for an unknown module."""
    part, _, inside = name.partition(".")
    network, match = pipeline.components.get(part), FACTOR.fullmatch(inside)
    if match is None or not isinstance(network, nn.Module):
        return part, None, False
    module = match[1].replace(".processor", "")
    if match[0][match.end(1)] == "_":  # to_q_lora.down
        old = next((one for one in reversed(OLD_NAMES) if module.endswith(f".{one}")), "")
        module = module.removesuffix(old) + OLD_NAMES.get(old, "")
    modules = dict(network.named_modules())
    known = (one for one in (module, module.removeprefix(CLIP), f"{CLIP}{module}") if one in modules)
    module = next((one for one in known if isinstance(getattr(modules[one], "weight", None), Tensor)), None)
    return part, module, IS_DOWN[match[2]]


def _update(factors: Mapping[bool, Tensor], weight: Tensor, scale: float) -> Update | None:
    """Return the update of `weight` by its two factors; None if they do not fit it."""
    if len(factors) < 2 or weight.ndim < 2 or any(one.ndim < 2 for one in factors.values()):
        return None
    down, up = factors[True], factors[False]
    rank, values = len(down), weight[0].numel()
    if up.flatten(1).shape != (len(weight), rank) or down.flatten(1).shape != (rank, values):
        return None
    kernel = [1] * (weight.ndim - 2)
    return Update(down.reshape(rank, *weight.shape[1:]), up.reshape(len(weight), rank, *kernel), scale)


def _header(path: Path, where: str) -> dict[str, Any]:
    """Return PEFT's configurations in the file's header, `<component>.<field>`; empty without them."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    try:
        return dict(parse_json(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: its header holds no configuration of PEFT's: {error}") from error


def _scale(
    header: Mapping[str, Any], part: str, module: str, rank: int, alpha: Any, default: float | None, where: str
) -> float:
    """Return alpha / rank of a module: by kohya's `alpha`, else by the header, else by `default`, else 1.

    With `use_rslora` it is alpha / sqrt(rank), as PEFT has it.
    """
    if alpha is None:
        alpha = header.get(f"{part}.lora_alpha", rank if default is None else default)
        patterns = header.get(f"{part}.alpha_pattern") or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            suffix = pattern.removeprefix("^")
            if not re.fullmatch(r"[\w.]+", suffix):
                raise ValueError(f"{where}: its header has an alpha_pattern that is no name: {json.dumps(pattern)}")
            if module == suffix or module.endswith(f".{suffix}"):
                alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{where}: the alpha of {part}.{module} is no number: {json.dumps(alpha)}")
    return alpha / (math.sqrt(rank) if header.get(f"{part}.use_rslora") is True else rank)


def _saved_name(part: str, module: str) -> str:
    """Return the name of a module in files: CLIP's layers with the prefix that every version of diffusers knows."""
    is_bare = part.startswith("text_encoder") and module.startswith("encoder.layers.")
    return f"{CLIP}{module}" if is_bare else module
