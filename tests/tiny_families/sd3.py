"""Stable Diffusion 3."""

from diffusers import DiffusionPipeline

import tiny
from mlcm_rl.models.conditioning import Conditioning
from tiny_families.case import Case


def encoded(stock: DiffusionPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    context, no_context, pooled, no_pooled = stock.encode_prompt(prompts, None, None, device="cpu")
    return {"context": context, "pooled": pooled}, {"context": no_context, "pooled": no_pooled}


CASE = Case(family="sd3", write=tiny.sd3, encoded=encoded, guidance={"guidance_scale": 5.0})
