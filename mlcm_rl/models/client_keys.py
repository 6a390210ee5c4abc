"""Names of a denoiser's layers in other tools' LoRA files, by diffusers' names.

kohya's sd-scripts, and most tools after it, call a layer `lora_unet_<name>`, where <name> is that of the original
checkpoint with underscores for dots (in Stable Diffusion 1 and 2 that of diffusers). An original layer may be several
of diffusers', stacked along the outputs: the queries, keys and values of Stable Diffusion 3 and of FLUX.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffusers import ModelMixin

# Stability AI's names of layers that diffusers names differently, inside a residual block and outside all blocks.
STABILITY_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
STABILITY_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
QUERIES_KEYS_VALUES = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QUERIES_KEYS_VALUES = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
Stacks = Mapping[str, tuple[str, ...]]  # an original layer's name -> the layers of diffusers that it stacks


@dataclass(frozen=True)
class OriginalLayers:
    """The layers of an original transformer as stacks of diffusers'.

    `blocks` are, by the name of a list of blocks in diffusers, its original name and the layers of each block; `others`
    are the layers outside all blocks.
    """

    blocks: Mapping[str, tuple[str, Stacks]]
    others: Stacks

    def of(self, denoiser: ModelMixin) -> dict[str, tuple[str, ...]]:
        """Return the original layers of `denoiser` by name. Layers that it lacks are in no stack."""
        known = dict(denoiser.named_modules())
        named = dict(self.others)
        for name, (original, layers) in self.blocks.items():
            for i in range(len(denoiser.get_submodule(name))):
                named |= {
                    f"{original}.{i}.{layer}": tuple(f"{name}.{i}.{one}" for one in stack)
                    for layer, stack in layers.items()
                }
        return {layer: stack for layer, stack in named.items() if all(one in known for one in stack)}

    def kohya_layers(self, denoiser: ModelMixin, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return kohya's names of the layers of `denoiser` that `modules` are in, with the stack of each.

        Raise ValueError for a module that is in none.
        """
        wanted = set(modules)
        layers = {layer: stack for layer, stack in self.of(denoiser).items() if wanted.intersection(stack)}
        if unknown := sorted(wanted.difference(*layers.values())):
            raise ValueError(f"{unknown[0]} has no name in the original checkpoint that other tools look up")
        return {kohya_name(layer): stack for layer, stack in layers.items()}


MMDIT = OriginalLayers(  # Stable Diffusion 3
    blocks={
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block.attn.qkv": QUERIES_KEYS_VALUES,
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.attn.qkv": ADDED_QUERIES_KEYS_VALUES,
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
            },
        )
    },
    others={"t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",)},
)
FLUX = OriginalLayers(  # FLUX.1
    blocks={
        "transformer_blocks": (
            "double_blocks",
            {
                "img_attn.qkv": QUERIES_KEYS_VALUES,
                "img_attn.proj": ("attn.to_out.0",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_attn.qkv": ADDED_QUERIES_KEYS_VALUES,
                "txt_attn.proj": ("attn.to_add_out",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "linear1": (*QUERIES_KEYS_VALUES, "proj_mlp"),
                "linear2": ("proj_out",),
            },
        ),
    },
    others={
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "final_layer.linear": ("proj_out",),
    },
)


def kohya_name(layer: str) -> str:
    """Return the name of a denoiser's layer in kohya's files, by its name in the original checkpoint."""
    return f"lora_unet_{layer.replace('.', '_')}"


def kohya_names(modules: Iterable[str], denoiser: ModelMixin, in_stability_blocks: bool) -> dict[str, str]:
    """Return the names of `modules` of the UNet `denoiser` in kohya's layout, by their own names.

    With `in_stability_blocks` the blocks have Stability AI's names, which readers expect for SDXL. Raise ValueError for
    a module that has no such name.
    """
    modules = list(modules)
    names = original_unet_names(modules, denoiser) if in_stability_blocks else dict(zip(modules, modules, strict=True))
    return {module: kohya_name(name) for module, name in names.items()}


def original_unet_names(modules: Iterable[str], denoiser: ModelMixin) -> dict[str, str]:
    """Return the names of `modules` of the UNet `denoiser` in Stability AI's checkpoints, by their own names."""
    places = _stability_blocks(denoiser)
    return {module: _stability_name(module, places) for module in modules}


def kohya_text_names(modules: Iterable[str], part: str, family: str) -> dict[str, str]:
    """Return the names of `modules` of the text encoder `part` in kohya's layout, by their own names.

    The one text encoder of Stable Diffusion 1 and 2 has no number.
    """
    prefix = "lora_te2" if part == "text_encoder_2" else "lora_te" if family == "sd" else "lora_te1"
    return {module: f"{prefix}_{module.replace('.', '_')}" for module in modules}


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
