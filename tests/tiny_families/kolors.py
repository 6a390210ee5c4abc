"""A tiny Kolors: SDXL's UNet with the prompt's states projected, ChatGLM's tokenizer over a SentencePiece model."""

import io
from pathlib import Path

import sentencepiece
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from tiny_families.case import Case

TEXTS = ["a red apple on a table", "a small blue house by the sea", "红苹果在桌子上", "一座蓝色的小房子", "熊猫"]
WIDTH = 40  # of the text encoder
BETAS = {"beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear", "num_train_timesteps": 1100}


def kolors(folder: Path | str, seed: int = 0) -> Path:
    """Write a KolorsPipeline at 16 x 16 pixels; returns `folder`."""
    with tiny._seeded(seed):
        words = tokenizer(Path(folder) / "tokenizer" / "tokenizer.model")
        pipeline = KolorsPipeline(
            vae=tiny._autoencoder(4, scaling_factor=0.13025),
            text_encoder=text_encoder(words.vocab_size),
            tokenizer=words,
            unet=UNet2DConditionModel(
                **tiny._unet_settings(4, context_width=18),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=6,
                projection_class_embeddings_input_dim=WIDTH + 6 * 6,
                encoder_hid_dim=WIDTH,
                encoder_hid_dim_type="text_proj",
            ),
            scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tokenizer(file: Path) -> ChatGLMTokenizer:
    """ChatGLM's tokenizer, whose pieces are learned from a few texts and written to `file`; the rest are bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.parent.mkdir(parents=True)
    file.write_bytes(model.getvalue())
    return ChatGLMTokenizer(vocab_file=str(file))


def text_encoder(vocabulary: int) -> ChatGLMModel:
    """A ChatGLM of two layers. The class leaves its weights as memory was, so that all are drawn here."""
    settings = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=vocabulary + 5,
        hidden_size=WIDTH,
        ffn_hidden_size=52,
        kv_channels=12,
        num_attention_heads=4,
        seq_length=512,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        bias_dropout_fusion=False,
        original_rope=True,
    )
    model = ChatGLMModel(settings, empty_init=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name
            parameter.normal_(mean=float(is_scale), std=0.1)
    return model


def encoded(stock: DiffusionPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    context, no_context, pooled, no_pooled = stock.encode_prompt(prompts, device="cpu")
    return {"context": context, "pooled": pooled}, {"context": no_context, "pooled": no_pooled}


def at_times(base: Base, stock: DiffusionPipeline, times: list[int]) -> dict:
    """Euler's steps of the stock scheduler are DDIM's; it takes any times."""
    return {"timesteps": base.schedule.network_time[times].tolist()}


CASE = Case(
    family="kolors",
    write=kolors,
    encoded=encoded,
    guidance={"guidance_scale": 5.0},
    prompts=("红苹果在桌子上", "熊猫" * 200),
    schedules=at_times,
)
