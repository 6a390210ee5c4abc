"""Pipelines as single files in Stability AI's layout: the inverse of what diffusers does when it reads one."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from mlcm_rl.models.client_keys import _stability_blocks

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
ENDS |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
ENDS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
VAE = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
JOINT = {  # of a block of SD3: of the picture's side, then of the prompt's
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
QKV = {
    "attn": ("x_block.attn", ("to_q", "to_k", "to_v")),
    "attn.add": ("context_block.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "attn2": ("x_block.attn2", ("to_q", "to_k", "to_v")),
}


def write(stock: DiffusionPipeline, file: Path, with_texts: bool = True) -> dict[str, Tensor]:
    """Write a pipeline of SD, SDXL or SD3 as one file; returns its tensors. SD3's may be without text encoders."""
    tensors = vae(stock)
    if "transformer" in stock.components:
        tensors |= transformer(stock) | (texts_of_sd3(stock) if with_texts else {})
    else:
        tensors |= unet(stock) | texts(stock)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file)
    return tensors


def unet(stock: DiffusionPipeline) -> dict[str, Tensor]:
    places, tensors = _stability_blocks(stock.unet), {}
    for name, value in stock.unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        other = ENDS.get(module)
        for block, place in places.items():
            if module == block or module.startswith(f"{block}."):
                inside = module.removeprefix(block).removeprefix(".")
                other = ".".join(filter(None, (place, RESNET.get(inside, inside))))
        tensors[f"model.diffusion_model.{other}.{kind}"] = value
    return tensors


def vae(stock: DiffusionPipeline) -> dict[str, Tensor]:
    last, tensors = len(stock.vae.config.block_out_channels) - 1, {}
    for name, value in stock.vae.state_dict().items():
        for old, new in VAE:
            name = re.sub(old, new, name)
        name = re.sub(r"up\.(\d)", lambda match: f"up.{last - int(match[1])}", name)
        is_linear = "mid.attn_1" in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if is_linear else value
    return tensors


def texts(stock: DiffusionPipeline) -> dict[str, Tensor]:
    is_xl = "text_encoder_2" in stock.components
    prefix = "conditioner.embedders.0." if is_xl else "cond_stage_model."
    first = stock.text_encoder.state_dict().items()
    tensors = {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": value for name, value in first}
    return tensors | open_clip(stock.text_encoder_2.state_dict()) if is_xl else tensors


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    tensors = {"text_projection": state["text_projection.weight"].T}
    tensors |= {new: state[old] for old, new in ends.items()}
    for name, value in state.items():
        if not (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            continue
        block = f"transformer.resblocks.{match[1]}"
        if match[2] in OPEN_CLIP:
            tensors[f"{block}.{OPEN_CLIP[match[2]]}.{match[3]}"] = value
        elif match[2] == "self_attn.q_proj":
            rows = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            tensors[f"{block}.attn.in_proj_{match[3]}"] = torch.cat(rows)
    return {f"conditioner.embedders.1.model.{name}": value for name, value in tensors.items()}


def texts_of_sd3(stock: DiffusionPipeline) -> dict[str, Tensor]:
    """CLIP's alone; of the first one diffusers takes the projection for the identity."""
    tensors = {}
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        for key, value in stock.components[part].state_dict().items():
            tensors[f"text_encoders.{name}.transformer.{key}"] = value
    return tensors


def transformer(stock: DiffusionPipeline) -> dict[str, Tensor]:
    state = stock.transformer.state_dict()
    last, tensors = stock.transformer.config.num_layers - 1, {"pos_embed": state["pos_embed.pos_embed"]}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        swapped = torch.cat(value.chunk(2)[::-1]) if value.ndim and len(value) % 2 == 0 else value
        if module in SD3_ENDS:
            tensors[f"{SD3_ENDS[module]}.{kind}"] = swapped if module == "norm_out.linear" else value
        elif match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
            block = f"joint_blocks.{match[1]}"
            if match[2] in JOINT:
                is_last = match[2] == "norm1_context.linear" and int(match[1]) == last
                tensors[f"{block}.{JOINT[match[2]]}.{kind}"] = swapped if is_last else value
            for attention, (place, projections) in QKV.items():
                part = attention.partition(".")[0]
                if match[2] == f"{part}.{projections[0]}":
                    rows = [state[name.replace(projections[0], one)] for one in projections]
                    tensors[f"{block}.{place}.qkv.{kind}"] = torch.cat(rows)
    return {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
