"""Tiny teachers with random weights, written to disk in the layout that the real ones are published in.

No two parts share a width on purpose, so that a width written into the code as a number fails here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CHINESE = "红苹果在桌子上一座蓝色的小房熊猫"  # characters that tokenizers for Chinese know
START, END = "<|startoftext|>", "<|endoftext|>"
NUM_TOKENS = 24
LATENT_SIZE = 8
DOWNSCALE = 2  # pixels a latent: two autoencoder levels
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: 256 bytes, each also as the end of a word, and two special tokens."""
    symbols = sorted(ByteLevel.alphabet())
    words = [START, END, *symbols, *(f"{symbol}</w>" for symbol in symbols)]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=NUM_TOKENS)


def sdxl(
    folder: Path | str,
    prediction_type: str = "epsilon",
    latent_channels: int = 4,
    seed: int = 0,
    num_towers: int = 2,
    force_zeros_for_empty_prompt: bool = True,
) -> Path:
    """Write a StableDiffusionXLPipeline of 0.3 M parameters at 16 x 16 pixels; returns `folder`.

    With one tower it is the second, as in SDXL's refiner.
    """
    with _seeded(seed):
        first = CLIPTextModel(_text_config(width=24, layers=3)) if num_towers == 2 else None
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(latent_channels, scaling_factor=0.13025),
            text_encoder=first,
            text_encoder_2=CLIPTextModelWithProjection(_text_config(width=32, layers=2, projection_dim=20)),
            tokenizer=tokenizer() if first else None,
            tokenizer_2=tokenizer(),
            unet=UNet2DConditionModel(
                **_unet_settings(latent_channels, context_width=32 + 24 * (num_towers - 1)),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=6,
                projection_class_embeddings_input_dim=20 + 6 * 6,
            ),
            scheduler=EulerDiscreteScheduler(**BETAS, prediction_type=prediction_type, steps_offset=1),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    return _save(pipeline, Path(folder))


def sd(folder: Path | str, prediction_type: str = "epsilon", latent_channels: int = 4, seed: int = 0) -> Path:
    """Write a StableDiffusionPipeline of 0.3 M parameters: as SD 1.5 (epsilon, convolutional projections, PNDM) or,
    for `v_prediction`, as SD 2.1 (linear projections, DDIM); returns `folder`.
    """
    as_2_1 = prediction_type == "v_prediction"
    scheduler = DDIMScheduler if as_2_1 else PNDMScheduler
    with _seeded(seed):
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(latent_channels, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(_text_config(width=40, layers=2)),
            tokenizer=tokenizer(),
            unet=UNet2DConditionModel(
                **_unet_settings(latent_channels, context_width=40), use_linear_projection=as_2_1
            ),
            scheduler=scheduler(
                **BETAS,
                **({"clip_sample": False} if as_2_1 else {"skip_prk_steps": True}),
                prediction_type=prediction_type,
                steps_offset=1,
                set_alpha_to_one=False,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _save(pipeline, Path(folder))


def sd3(folder: Path | str, with_t5: bool = True, seed: int = 0) -> Path:
    """Write a StableDiffusion3Pipeline at 16 x 16 pixels, as SD 3.5 medium (normed queries and keys, a block with two
    attentions), with T5 or without it; returns `folder`."""
    with _seeded(seed):
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=LATENT_SIZE,
                patch_size=2,
                in_channels=6,
                out_channels=6,
                num_layers=3,
                attention_head_dim=8,
                num_attention_heads=3,
                joint_attention_dim=56,
                caption_projection_dim=24,
                pooled_projection_dim=20 + 12,
                pos_embed_max_size=6,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(6, scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(_text_config(width=24, layers=3, projection_dim=20)),
            tokenizer=tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(width=28, layers=2, projection_dim=12)),
            tokenizer_2=tokenizer(),
            text_encoder_3=T5EncoderModel(_t5_config(width=56)) if with_t5 else None,
            tokenizer_3=t5_tokenizer() if with_t5 else None,
        )
    return _save(pipeline, Path(folder))


def t5_tokenizer(more: str = "") -> T5TokenizerFast:
    """A T5 tokenizer whose words are letters, and the characters `more`."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,." + more]
    return T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0, model_max_length=512
    )


def _t5_config(width: int, more: str = "") -> T5Config:
    return T5Config(
        vocab_size=len(t5_tokenizer(more)),
        d_model=width,
        d_kv=10,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )


def small_decoder(folder: Path | str, stages: int = 2, seed: int = 0, **changes: float) -> str:
    """Write an AutoencoderTiny as small as the teachers' autoencoders, in TAESD's layout; returns `folder`."""
    widths, blocks = {"block_out_channels": (6,) * stages}, {"blocks": (1,) * stages}
    settings = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in widths.items()}
    settings |= {f"num_{part}_{name}": value for part in ("encoder", "decoder") for name, value in blocks.items()}
    with _seeded(seed):
        small = AutoencoderTiny(**settings, **changes)
        torch.nn.init.constant_(small.decoder.layers[-1].bias, 0.5)  # mid-grey: few pixels are cut off
        small.save_pretrained(folder)
    return str(folder)


def _save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    """Save with the tokenizers as vocab.json and merges.txt, as the real ones are published."""
    pipeline.save_pretrained(folder)
    for file in folder.glob("tokenizer*/tokenizer.json"):
        if json.loads(file.read_text())["model"]["type"] != "BPE":
            continue  # T5's are published so
        file.with_name("vocab.json").write_text(json.dumps(tokenizer().get_vocab()))
        file.with_name("merges.txt").write_text("#version: 0.2\n")
        file.unlink()
    return folder


def _autoencoder(
    latent_channels: int, scaling_factor: float, widths: tuple[int, ...] = (8, 12), **settings: float
) -> AutoencoderKL:
    return AutoencoderKL(
        **settings,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=LATENT_SIZE * DOWNSCALE,
        scaling_factor=scaling_factor,
    )


def _text_config(width: int, layers: int, projection_dim: int = 16) -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=NUM_TOKENS,
        projection_dim=projection_dim,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def _unet_settings(latent_channels: int, context_width: int) -> dict:
    return {
        "sample_size": LATENT_SIZE,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (12, 28),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": context_width,
    }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights from `seed`, the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def perturb(parameters: list[torch.nn.Parameter], seed: int = 0, scale: float = 0.05) -> None:
    """Add normal noise to `parameters` in place: a stand-in for training where it only matters that weights moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
