"""Ask ComfyUI's own code what it makes of LoRA files: a program, `comfyui_lora.py COMFYUI JOBS.json`.

A job is {"lora", "unet", "settings", "updates", "out"}: a file; a denoiser's configuration, diffusers'; ComfyUI's own
settings of it, null where ComfyUI finds them out, as it does for shapes that it knows; whether to compute what is added
to each weight. Written to "<out>.json": the weights that the file changes, by diffusers' names, and what was logged of
keys left aside; to "<out>.safetensors": what is added. A job with "transformer", the configuration of one of diffusers'
in place of "unet", has the weights by ComfyUI's own names: its code converts the network and tells which it is.
"""

import json
import logging
import sys
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

sys.path.insert(0, sys.argv[1])
arguments, sys.argv[1:] = sys.argv[2:], ["--cpu"]
# Only video models import it, and the registry's is of another build than torch's for CPUs.
sys.modules["torchvision"] = MagicMock()

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402


def patches_of(job: dict, known: dict) -> tuple[dict, list[str]]:
    """What ComfyUI makes of the file, by weight, and what it logs."""
    lora = comfy.lora_convert.convert_lora(load_file(job["lora"]))
    said: list[str] = []
    log = logging.Handler()
    log.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(log)
    patches = comfy.lora.load_lora(lora, known)
    logging.getLogger().removeHandler(log)
    return patches, said


def apply_to_transformer(job: dict) -> None:
    with torch.device("meta"):
        network = getattr(diffusers, job["transformer"]["_class_name"]).from_config(job["transformer"])
    weights = comfy.model_detection.convert_diffusers_mmdit(network.state_dict(), "")
    model_config = comfy.model_detection.model_config_from_unet(weights, "")
    model = model_config.get_model({}, device="meta")
    patches, said = patches_of(job, comfy.lora.model_lora_keys_unet(model, {}))
    places = [[key, None] if isinstance(key, str) else list(key[:2]) for key in patches]
    answer = {"places": sorted(places, key=str), "left_aside": said, "kind": type(model).__name__}
    Path(job["out"] + ".json").write_text(json.dumps(answer))


def apply(job: dict) -> None:
    if "transformer" in job:
        apply_to_transformer(job)
        return
    with torch.device("meta"):
        weights = UNet2DConditionModel.from_config(job["unet"]).state_dict()
    if job["settings"]:
        model_config = comfy.supported_models.SDXL(job["settings"])
    else:
        model_config = comfy.model_detection.model_config_from_diffusers_unet(weights)
    model = model_config.get_model({}, device="meta")
    known = comfy.lora.model_lora_keys_unet(model, {})
    patches, said = patches_of(job, known)
    names = {
        f"diffusion_model.{own}": name for name, own in comfy.utils.unet_to_diffusers(model_config.unet_config).items()
    }
    changed = {names[key]: (key, patch) for key, patch in patches.items()}
    Path(job["out"] + ".json").write_text(json.dumps({"changed": sorted(changed), "left_aside": said}))
    if job["updates"]:
        updates = {}
        for name, (key, patch) in changed.items():
            zeros = torch.zeros(weights[name].shape)
            updates[name] = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], zeros, key)
        save_file(updates, job["out"] + ".safetensors")


if __name__ == "__main__":
    for job in json.loads(Path(arguments[0]).read_text()):
        apply(job)
