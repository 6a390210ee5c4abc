"""Put autoencoder, text towers and denoiser together as a stock `StableDiffusionXLPipeline` in half precision."""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sources import EMOJI, cache_folder, write_notice
from train_text_towers import save_tokenizer

MAX_SHARD_SIZE = "14MB"  # no file above 15 MB enters the tree
MAX_FILE_BYTES, MAX_TOTAL_BYTES = 15_000_000, 30_000_000


def build_scheduler() -> DDIMScheduler:
    """Return the teacher's noise schedule: scaled-linear, 1,000 times, epsilon, as SDXL's."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def build_denoiser(latent_channels: int, context_width: int, pooled_width: int, seed: int = 0) -> UNet2DConditionModel:
    """Return an untrained denoiser of 8 x 8 latents in SDXL's shape, about 8.7 million parameters."""
    torch.manual_seed(seed)
    time_width = 32
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(112, 160),
        layers_per_block=1,
        attention_head_dim=(4, 5),  # read by diffusers as the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
        cross_attention_dim=context_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=pooled_width + 6 * time_width,
    )


def build_pipeline(autoencoder: Path, text_towers: Path, denoiser: Path | None) -> StableDiffusionXLPipeline:
    """Return the pipeline in float32 from the trained folders; without a `denoiser` folder it is a random one."""
    first = CLIPTextModel.from_pretrained(text_towers / "text_encoder", dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(text_towers / "text_encoder_2", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(autoencoder)
    context_width = first.config.hidden_size + second.config.hidden_size
    fresh = build_denoiser(vae.config.latent_channels, context_width, second.config.projection_dim)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(text_towers / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(text_towers / "tokenizer"),
        unet=fresh if denoiser is None else UNet2DConditionModel.from_pretrained(denoiser),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def write_teacher(pipeline: StableDiffusionXLPipeline, folder: Path) -> int:
    """Write the pipeline's parts into `folder`, each so that it appears whole; return the bytes of all weights.

    Other files of the folder (card, pictures) stay. Raises ValueError, and writes nothing, when a file or the whole
    would be too large for the tree.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(getattr(pipeline, name), partial / name)
    tidy_configurations(partial)
    sizes = {path: path.stat().st_size for path in partial.rglob("*") if path.is_file()}
    if max(sizes.values()) > MAX_FILE_BYTES or sum(sizes.values()) > MAX_TOTAL_BYTES:
        raise ValueError(f"{partial} holds {sum(sizes.values())} bytes, its largest file {max(sizes.values())}")
    folder.mkdir(parents=True, exist_ok=True)
    for part in partial.iterdir():
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.rename(target)
    partial.rmdir()
    return sum(sizes.values())


def tidy_configurations(folder: Path) -> None:
    """Drop `_name_or_path`, a folder of the machine that trained, and let the text towers compute in float32.

    transformers loads a model in the type that its configuration names, diffusers in float32: with the type of the
    stored weights here, `from_pretrained` would mix half-precision towers with a float32 denoiser.
    """
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        tidied = {key: value for key, value in content.items() if key != "_name_or_path"}
        if "dtype" in tidied:
            tidied["dtype"] = "float32"
        if tidied != content:
            path.write_text(json.dumps(tidied, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Assemble `teacher/` from the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--from-run", type=Path, help="a finished run of recipes/emoji_teacher.yaml: take its denoiser")
    origin.add_argument("--fresh-denoiser", action="store_true", help="a random denoiser; else teacher/unet is kept")
    arguments = parser.parse_args()
    folder, cache = EMOJI / "teacher", cache_folder()
    denoiser = None if arguments.fresh_denoiser else folder / "unet"
    if arguments.from_run:
        denoiser = arguments.from_run / "00-train_teacher" / "teacher" / "unet"
    pipeline = build_pipeline(cache / "autoencoder", cache / "text_towers", denoiser)
    print(f"{write_teacher(pipeline, folder) / 1e6:.1f} MB, denoiser: {denoiser or 'random'}")
    write_notice(folder)


if __name__ == "__main__":
    main()
