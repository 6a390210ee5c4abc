"""LoRAs over tiny teachers in both layouts, and what stock diffusers makes of them."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from mlcm_rl.models.lora_files import LORA_FILE

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj"]  # in every denoiser
CONVOLUTIONS = ["conv1", "proj_in", "conv_in", "time_embedding.linear_1"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


def stock_of(folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder)


def write(folder: Path, out: Path, texts: tuple[str, ...] = ("text_encoder", "text_encoder_2"), seed: int = 0) -> Path:
    """Write a LoRA over the pipeline in `folder` by diffusers' own save: two ranks, alphas of their own, two towers."""
    stock = stock_of(folder)
    part = "unet" if "unet" in stock.components else "transformer"
    parts = [part, *(name for name in texts if name in stock.components)]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5}}
    layers, metadata = {}, {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name in parts:
            targets = TARGETS + CONVOLUTIONS * (name == "unet") if name == part else TEXT
            config = LoraConfig(target_modules=targets, **settings)
            network = stock.components[name]
            network.add_adapter(config)
            tiny.perturb([value for key, value in network.named_parameters() if "lora_" in key], seed, 0.3)
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
            metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    metadata = {
        key: {k: sorted(v) if isinstance(v, set) else v for k, v in value.items()} for key, value in metadata.items()
    }
    stock.save_lora_weights(out, **layers, **metadata)
    return out / LORA_FILE


def as_kohya(file: Path, out: Path, family: str, alpha_of_queries: float = 3.0) -> Path:
    """Write a LoRA file of diffusers' in kohya's layout, with alpha 3 beside each module but those of queries."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if family == "sdxl" else "lora_te"}
    prefixes["text_encoder_2"] = "lora_te2"
    tensors = {}
    for key, value in load_file(file).items():
        part, _, inside = key.partition(".")
        module, _, kind = inside.rpartition(".lora_")
        if part != "unet" and not module.startswith("text_model."):
            module = f"text_model.{module}"
        name = f"{prefixes[part]}_{module.replace('.', '_')}"
        tensors[f"{name}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"] = value
        tensors[f"{name}.alpha"] = torch.tensor(alpha_of_queries if module.endswith("to_q") else 3.0)
    save_file(tensors, out)
    return out


def metadata_of(file: Path) -> dict[str, str]:
    with file.open("rb") as content:
        return json.loads(content.read(int.from_bytes(content.read(8), "little")))["__metadata__"]


def fused_by_diffusers(folder: Path, file: Path, weight: float) -> dict[str, Tensor]:
    """The weights of the stock pipeline with the LoRA loaded and fused, by component and name."""
    stock = stock_of(folder)
    stock.load_lora_weights(file.parent, weight_name=file.name)
    parts = [name for name in stock._lora_loadable_modules if name in stock.components]
    stock.fuse_lora(parts, lora_scale=weight)
    stock.unload_lora_weights()
    return weights_of(stock, parts)


def weights_of(pipeline: DiffusionPipeline, parts: list[str]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part in parts for name, value in pipeline.components[part].state_dict().items()}


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
