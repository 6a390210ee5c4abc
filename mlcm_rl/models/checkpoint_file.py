"""A whole student in one file, in the layout of the original checkpoints of Stable Diffusion 1 and SDXL.

A1111, Forge, InvokeAI, sd-scripts and ComfyUI open it as a checkpoint. diffusers reads it by `from_single_file`.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from ..storage import finite
from ..storage.tensors import write_tensors
from .base import Base
from .client_keys import original_unet_names

AUTOENCODER = (  # regular expression of diffusers' names -> original ones; the numbers of `up` count backwards
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
OPEN_CLIP = {  # of a layer: diffusers' names -> original ones, but for queries, keys and values, which are one matrix
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
MARK_OF_V = "v_pred"  # an empty tensor by which tools know a checkpoint of SDXL's shape that predicts v


def write_checkpoint(denoiser: ModelMixin, base: Base, file: Path, dtype: torch.dtype | None = None) -> None:
    """Write `denoiser` with the text encoders and the autoencoder of `base` as one file.

    The text encoders have `dtype` too, if it is given; the autoencoder is float32, since SDXL's overflows in half
    precision. Raise ValueError for a base that has no such layout.
    """
    refuse(base)
    weights = {f"model.diffusion_model.{name}": value for name, value in _unet(denoiser).items()}
    weights |= {f"first_stage_model.{name}": value for name, value in _autoencoder(base.pipeline.vae).items()}
    for part, prefix in base.original_texts.items():
        state = {
            name.removeprefix("text_model."): one for name, one in base.pipeline.components[part].state_dict().items()
        }
        named = (
            _open_clip(state)
            if prefix.endswith(".model.")
            else {f"text_model.{name}": one for name, one in state.items()}
        )
        weights |= {f"{prefix}{name}": one.to(dtype or one.dtype) for name, one in named.items()}
    if base.prediction_type == "v_prediction":
        weights[MARK_OF_V] = torch.zeros(0)
    finite.refuse_weights(weights, file.name)
    write_tensors(file, weights)


def refuse(base: Base) -> None:
    """Raise ValueError for a base without the original layout, or without all of its text encoders."""
    missing = [part for part in base.original_texts if base.pipeline.components[part] is None]
    if missing or not base.original_texts:
        reason = f"this one has no {missing[0]}" if missing else f"not family {base.family} of this shape"
        raise ValueError(
            "one file of everything, as kohya's tools open it, is for Stable Diffusion 1 and SDXL with all of their "
            f"text encoders, and {reason}: export for comfyui or diffusers"
        )


def _unet(denoiser: ModelMixin) -> dict[str, Tensor]:
    state = denoiser.state_dict()
    names = original_unet_names(dict.fromkeys(key.rpartition(".")[0] for key in state), denoiser)
    return {
        f"{names[module]}.{kind}": state[f"{module}.{kind}"] for module, _, kind in (k.rpartition(".") for k in state)
    }


def _autoencoder(vae: Any) -> dict[str, Tensor]:
    """Return the autoencoder's weights by their original names. Its attention was written as convolutions."""
    last, weights = len(vae.config.block_out_channels) - 1, {}
    for name, value in vae.state_dict().items():
        for pattern, original in AUTOENCODER:
            name = re.sub(pattern, original, name)
        name = re.sub(r"\bup\.(\d)", lambda match: f"up.{last - int(match[1])}", name)
        weights[name] = value[:, :, None, None] if "mid.attn_1." in name and value.ndim == 2 else value
    return weights


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the second text encoder's weights by OpenCLIP's names."""
    weights = {original: state[name] for name, original in OPEN_CLIP_ENDS.items()}
    weights["text_projection"] = state["text_projection.weight"].T
    for name, value in state.items():
        if not (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            continue
        number, layer, kind = match.groups()
        place = f"transformer.resblocks.{number}"
        if layer in OPEN_CLIP:
            weights[f"{place}.{OPEN_CLIP[layer]}.{kind}"] = value
        elif layer == "self_attn.q_proj":
            stack = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            weights[f"{place}.attn.in_proj_{kind}"] = torch.cat(stack)
    return weights
