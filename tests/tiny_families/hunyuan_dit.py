"""Hunyuan-DiT 1.2."""

from functools import partial
from pathlib import Path

from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
)
from transformers import BertConfig, BertModel, BertTokenizer, T5EncoderModel

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from tiny_families.case import Case

BERT_WIDTH, T5_WIDTH = 28, 40  # the second is that of a pooling attention with eight heads


def write(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a HunyuanDiTPipeline at 64 x 64 pixels, whose positions are made for a factor of 8; returns `folder`."""
    words = bert_tokenizer()
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "hidden_size": 24,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "num_layers": 4,
        "mlp_ratio": 2.0,
        "cross_attention_dim": BERT_WIDTH,
        "cross_attention_dim_t5": T5_WIDTH,
        "pooled_projection_dim": 20,
        "use_style_cond_and_image_meta_size": False,
    }
    with tiny._seeded(seed):
        pipeline = HunyuanDiTPipeline(
            vae=tiny._autoencoder(4, scaling_factor=0.13025, widths=(8, 12, 16, 20)),
            text_encoder=BertModel(
                BertConfig(
                    vocab_size=len(words),
                    hidden_size=BERT_WIDTH,
                    intermediate_size=2 * BERT_WIDTH,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=80,
                )
            ),
            tokenizer=words,
            transformer=HunyuanDiT2DModel(**settings | changes),
            scheduler=DDPMScheduler(
                beta_start=0.00085,
                beta_end=0.018,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                clip_sample=False,
                steps_offset=1,
                timestep_spacing="leading",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=T5EncoderModel(tiny._t5_config(T5_WIDTH, tiny.CHINESE)),
            tokenizer_2=tiny.t5_tokenizer(tiny.CHINESE),
        )
    return tiny._save(pipeline, Path(folder))


def bert_tokenizer() -> BertTokenizer:
    """A BERT tokenizer whose words are characters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,." + tiny.CHINESE
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=77)


def encoded(stock: DiffusionPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    config = stock.transformer.config
    conditioning, unconditional = {}, {}
    for index, (name, length) in enumerate((("", config.text_len), ("t5_", config.text_len_t5))):
        context, no_context, mask, no_mask = stock.encode_prompt(
            prompts, device="cpu", max_sequence_length=length, text_encoder_index=index
        )
        conditioning |= {f"{name}context": context, f"{name}mask": mask.float()}
        unconditional |= {f"{name}context": no_context, f"{name}mask": no_mask.float()}
    return conditioning, unconditional


def schedules(base: Base, stock: DiffusionPipeline, times: list[int]) -> dict:
    """Set the solver of first order, which is DDIM, at `times`: the pipeline passes a number of steps alone."""
    scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, solver_order=1)
    set_times = partial(scheduler.set_timesteps, timesteps=times)
    scheduler.set_timesteps = lambda num_inference_steps, device: set_times(device=device)
    stock.scheduler = scheduler
    return {"num_inference_steps": len(times)}


CASE = Case(
    family="hunyuan_dit",
    write=write,
    encoded=encoded,
    guidance={"guidance_scale": 5.0},
    prompts=("红苹果, 3d", "熊" * 300),
    schedules=schedules,
    loads_lora=False,
)
