"""Sample exported folders with diffusers and nothing of ours: a program, `stock_samples.py JOBS.json [CODE.py ...]`.

A job is {"folder", "out", "prompts", "seed", "calls": [{"steps"} or {"timesteps"}, "eta"]} and optionally "lora" and
"unet" (parts to put over the folder's own), "scheduler" (whose to take instead), "trust" (run the folder's own
pipeline.py) and "again" (a folder to save the pipeline to, and to open it from).
Written to "out": the latents of each call by its number. Then each CODE.py is run where it lies, as a reader of a card
would run it.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file


def sample(job: dict) -> None:
    pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=job.get("trust", False))
    if "again" in job:
        pipe.save_pretrained(job["again"])
        pipe = DiffusionPipeline.from_pretrained(job["again"], trust_remote_code=job["trust"])
    pipe.set_progress_bar_config(disable=True)
    if "unet" in job:
        pipe.unet = UNet2DConditionModel.from_pretrained(job["unet"])
    if "lora" in job:
        pipe.load_lora_weights(job["lora"], weight_name="pytorch_lora_weights.safetensors")
    if "scheduler" in job:
        name = json.loads(Path(job["scheduler"], "scheduler_config.json").read_text())["_class_name"]
        pipe.scheduler = getattr(importlib.import_module("diffusers"), name).from_pretrained(job["scheduler"])
    latents = {}
    for i, call in enumerate(job["calls"]):
        times = {"timesteps": call["timesteps"]} if "timesteps" in call else {"num_inference_steps": call["steps"]}
        times |= {"eta": call["eta"]} if "eta" in call else {}
        generator = torch.Generator().manual_seed(job["seed"])
        found = pipe(job["prompts"], guidance_scale=0, generator=generator, output_type="latent", **times)
        latents[str(i)] = found.images.contiguous()
    save_file(latents, job["out"])


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        sample(job)
    for code in sys.argv[2:]:
        os.chdir(Path(code).parent)
        exec(compile(Path(code).read_text(), code, "exec"), {})
    if "mlcm_rl" in sys.modules:
        raise SystemExit("mlcm_rl was imported: an export must not need it")
