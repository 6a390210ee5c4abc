"""Teachers. One file a family holds what is its own; `Base` is what the families share, thin over a diffusers pipeline.

    B batch   C latent channels   H, W latent size   L tokens   D context width   P pooled width

A `Conditioning` is what a prompt has become: "context" (B, L, D) and, in families that have one, "pooled" (B, P), all
float32 and batch first, so that it can be indexed, concatenated and stored.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checkpoint import read_json, read_shapes
from ..equations.prediction import x0_from_prediction
from ..equations.schedule import Schedule, scaled_linear_betas, vp_schedule
from ..equations.solver import guided
from ..recipe import Teacher

Conditioning = dict[str, Tensor]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ENCODED_TOGETHER = 32  # prompts, where all are encoded ahead
TARGET_TIME_WIDTH = 256  # sinusoids that a student conditioned on its target time is given

OTHER_PARTS = ("text_encoder", "tokenizer", "safety_checker", "image_encoder", "feature_extractor")

# The modules that the published TLCM adapter changes (its inference code; the list of LCM-LoRA).
LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


def load(teacher: Teacher, device: torch.device | str) -> "Base":
    """The teacher named in a recipe, frozen, on `device`.

    Raises FileNotFoundError for a missing folder or component, ValueError for another family than the recipe's, or for
    a schedule that cannot be distilled.
    """
    family: type[Base] = import_module(f"{__name__}.{teacher.family}").Family
    where = torch.device(device)
    return family(teacher, where, _load_pipeline(family.pipeline_class, teacher, getattr(torch, teacher.dtype), where))


def skeleton(teacher: Teacher) -> "Base":
    """The same on the meta device, denoiser and autoencoder without data and no text encoders, of a local folder.

    Read from its configuration files alone: what passes take can be tried on it. Raises as `load` does.
    """
    family: type[Base] = import_module(f"{__name__}.{teacher.family}").Family
    pipeline = _empty_pipeline(family.pipeline_class, teacher)
    for part, dtype in ((pipeline.unet, getattr(torch, teacher.dtype)), (pipeline.vae, torch.float32)):
        torch.nn.Module.to(part, dtype).requires_grad_(False).eval()  # diffusers' own `to` warns without reason
    return family(teacher, torch.device("meta"), pipeline)


def parts_with_weights(teacher: Teacher) -> list[str]:
    """The parts of the teacher in a local folder that are loaded and have weights, by name."""
    index = _pipeline_index(teacher)
    named = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    return [name for name in named if name in ("unet", "vae") or name.startswith("text_encoder")]


def shapes_from_configuration(teacher: Teacher, parts: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Shapes of the weights of `parts` by name, where there are configuration files and no weights yet.

    Raises as `load` does.
    """
    index, folder = _pipeline_index(teacher), Path(teacher.path)
    _check_components(teacher, {name: index[name] for name in parts})
    found = {}
    for name in parts:
        library, kind = index[name]
        with torch.device("meta"):
            if library == "diffusers":
                denoiser_or_autoencoder = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
                part = denoiser_or_autoencoder.from_config(denoiser_or_autoencoder.load_config(folder / name))
            else:
                text_encoder = getattr(transformers, kind)
                part = text_encoder(text_encoder.config_class.from_pretrained(folder / name, local_files_only=True))
        found[name] = {key: list(value.shape) for key, value in part.state_dict().items()}
    return found


class Base(ABC):
    """A frozen teacher: encode prompts, denoise, decode. Subclassed once a family."""

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_targets: ClassVar[list[str]] = LORA_TARGETS

    def __init__(self, teacher: Teacher, device: torch.device, pipeline: DiffusionPipeline):
        self.teacher, self.device, self.dtype = teacher, device, getattr(torch, teacher.dtype)
        self.pipeline = pipeline
        self.memory_format = MEMORY_FORMATS[teacher.memory_format]
        self._ahead: dict[str, Conditioning] | None = None  # (L, D) and (P,) a prompt, once text encoders are gone
        self.denoiser: UNet2DConditionModel = self.pipeline.unet
        self.vae = self.pipeline.vae
        scheduler = self.pipeline.scheduler.config
        self.prediction_type: str = scheduler["prediction_type"]
        self.schedule = schedule_of(scheduler).to(device)
        self.resolution, self.latent_shape = _sizes(self.pipeline, teacher)
        logging.getLogger(self.pipeline_class.__module__).setLevel(logging.ERROR)  # it warns of every long prompt

    # Prompts

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """What the family's stock pipeline makes of `prompts` (B of them), under no gradient.

        Once prompts have been encoded ahead, those alone are known.
        """
        if self._ahead is None:
            return self._encode(prompts)
        rows = [self._ahead[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]).to(self.device).float() for name in rows[0]}

    def encode_ahead(self, prompts: Iterable[str]) -> None:
        """Encode all `prompts` that will be asked for, each once, and let the text encoders leave memory.

        What became of them is kept on the CPU, in the teacher's precision, which is the text encoders' own.
        """
        texts, kept = list(dict.fromkeys(prompts)), {}
        for part in (texts[i : i + ENCODED_TOGETHER] for i in range(0, len(texts), ENCODED_TOGETHER)):
            encoded = {name: value.to("cpu", self.dtype) for name, value in self._encode(part).items()}
            kept |= {text: {name: value[i] for name, value in encoded.items()} for i, text in enumerate(part)}
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)
        self._ahead = kept

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """What the text encoders make of `prompts`."""

    @property
    def _tokenizers(self) -> list[Any]:
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith("tokenizer") and part is not None]

    @property
    def num_tokens(self) -> int:
        """How many tokens of a prompt are read, marks of start and end too."""
        return min(tokenizer.model_max_length for tokenizer in self._tokenizers)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt is, marks of start and end too; what is beyond `num_tokens` is never seen."""
        counts = [map(len, tokenizer(list(prompts))["input_ids"]) for tokenizer in self._tokenizers]
        return [max(each) for each in zip(*counts, strict=True)]

    def unconditional(self, batch_size: int) -> Conditioning:
        """What the stock pipeline guides away from, `batch_size` times."""
        return {name: value.repeat(batch_size, *[1] * (value.ndim - 1)) for name, value in self._dropped_prompt.items()}

    @property
    @abstractmethod
    def _dropped_prompt(self) -> Conditioning:
        """What the stock pipeline guides away from, once (1, ...)."""

    def _added_conditions(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """The denoiser's `added_cond_kwargs`, for families that have them."""
        return None

    # Denoising

    def forget_denoiser(self) -> None:
        """Let the teacher's denoiser go where no step will ask it; its configuration stays.

        What an adapter shares with it stays with the student, and an engine may then hold that in parts too.
        """
        for parameter in self.denoiser.parameters():
            parameter.data = parameter.data.new_empty(0)

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        """What `denoiser` says at (x_t (B, C, H, W), t (B,)): (B, C, H, W) float32, in its own prediction type.

        `s` (B,) is the time that a conditioned student is to jump to; the teacher takes none.
        """
        dtype = next(denoiser.parameters()).dtype
        target_time = None if s is None else get_timestep_embedding(s, TARGET_TIME_WIDTH).to(dtype)
        return denoiser(
            x_t.to(dtype),
            t,
            encoder_hidden_states=conditioning["context"].to(dtype),
            timestep_cond=target_time,
            added_cond_kwargs=self._added_conditions(conditioning, dtype),
            return_dict=False,
        )[0].float()

    def x0(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        """The clean latents (B, C, H, W) float32 that `denoiser` sees in x_t: f of the paper."""
        prediction = self.predict(denoiser, x_t, t, conditioning, s)
        return x0_from_prediction(prediction, x_t, t, self.schedule, self.prediction_type)

    @torch.no_grad()
    def guided_x0(
        self, x_t: Tensor, t: Tensor, conditional: Conditioning, unconditional: Conditioning, guidance_scale: float
    ) -> Tensor:
        """The teacher's x0 (B, C, H, W) under classifier-free guidance: both passes in one batch, or one at scale 1."""
        if guidance_scale == 1.0:
            return self.x0(self.denoiser, x_t, t, conditional)
        both = {name: torch.cat([unconditional[name], conditional[name]]) for name in conditional}
        without, given = self.predict(self.denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        prediction = guided(given, without, guidance_scale)
        return x0_from_prediction(prediction, x_t, t, self.schedule, self.prediction_type)

    # Pictures

    def decode(self, latents: Tensor, small: torch.nn.Module | None = None) -> Tensor:
        """Pictures (B, 3, H', W') float32 in [0, 1] of clean latents (B, C, H, W), differentiable where grad is on.

        By a `small` decoder where one is given, which reads latents as the denoiser has them.
        """
        scale, mean = self._latent_scale
        decoded = self.vae.decode(latents.float() * scale + mean) if small is None else small.decode(latents.float())
        return (decoded.sample / 2 + 0.5).clamp(0, 1)

    def use_tiles(self, size: int, recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)) -> None:
        """Let the autoencoder work in tiles of `size` pixels a side from now on: less memory, and seams are blended.

        They overlap by a quarter. A tile is computed again in the backward pass, by `recompute`: all tiles kept would
        be more than the whole picture. Raises ValueError for a size that is no whole number of quarters.
        """
        quarter = 4 * self.pipeline.vae_scale_factor
        if size % quarter:
            raise ValueError(
                f"autoencoder_tiles: {size} is not a multiple of {quarter}: tiles of {self.teacher.path} overlap by a "
                "quarter, which must be whole latents"
            )
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = size, 4 * size // quarter
        self.vae.decoder.forward = partial(recompute, self.vae.decoder.forward)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, H, W) of pictures (B, 3, H', W') in [0, 1]: the posterior's mean, or drawn by `generator`."""
        posterior = self.vae.encode(images.float() * 2 - 1).latent_dist
        scale, mean = self._latent_scale
        return ((posterior.mode() if generator is None else posterior.sample(generator)) - mean) / scale

    @cached_property
    def _latent_scale(self) -> tuple[Tensor, Tensor]:
        """Scale and mean (1, C or 1, 1, 1): what the autoencoder decodes is scale z + mean."""
        settings = self.vae.config
        std, mean = settings.latents_std or [1.0], settings.latents_mean or [0.0]
        shape = {"dtype": torch.float32, "device": self.device}
        scale = torch.tensor(std, **shape) / settings.scaling_factor
        return scale.reshape(1, -1, 1, 1), torch.tensor(mean, **shape).reshape(1, -1, 1, 1)

    def noise(self, generator: torch.Generator | Sequence[torch.Generator], batch_size: int) -> Tensor:
        """Standard normal (B, C, H, W) float32, drawn on the CPU so that it is the same whatever the device.

        One generator draws for the whole batch; with a list, each sample has its own and does not depend on the others.
        """
        if isinstance(generator, torch.Generator):
            return torch.randn(batch_size, *self.latent_shape, generator=generator).to(self.device)
        if len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}")
        return torch.stack([torch.randn(*self.latent_shape, generator=one) for one in generator]).to(self.device)


def small_decoder(folder: str, base: Base) -> AutoencoderTiny:
    """The AutoencoderTiny (TAESD's layout) in `folder`, frozen, on the device of `base`, whose latents it reads.

    On the meta device it has no data.

    Raises FileNotFoundError where it is not there, ValueError for another model or one made for other latents.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"small_decoder: no {path}; give a folder with an AutoencoderTiny in diffusers format")
    if (kind := read_json(path).get("_class_name")) != "AutoencoderTiny":
        raise ValueError(f"small_decoder: {path} is of a {kind}, and an AutoencoderTiny is needed")
    with torch.device("meta"):
        skeleton = AutoencoderTiny.from_config(AutoencoderTiny.load_config(folder))
    settings = skeleton.config
    has = {
        "latent channels": settings.latent_channels,
        "pixels a latent": settings.upsampling_scaling_factor ** (len(settings.decoder_block_out_channels) - 1),
        "scaling_factor": settings.scaling_factor,
        "shift_factor": settings.shift_factor,
    }
    needs = dict(zip(has, (base.latent_shape[0], base.pipeline.vae_scale_factor, 1.0, 0.0), strict=True))
    for name, value in needs.items():
        if has[name] != value:
            raise ValueError(
                f"small_decoder: {path} has {name} {has[name]}, and the denoiser of {base.teacher.path} makes latents "
                f"that need {value}; take the one that was made for this teacher"
            )
    if base.device.type == "meta":
        return skeleton.requires_grad_(False).eval()
    for path in sorted(Path(folder).glob("*.safetensors")):
        read_shapes(path)  # a damaged file is told by its name
    small = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return small.to(base.device).requires_grad_(False).eval()


def schedule_of(scheduler: dict[str, Any]) -> Schedule:
    """The noise schedule (T,) that a diffusers scheduler's configuration describes.

    Raises ValueError for one without betas (rectified flow has no family yet) or of a form not known here, and for zero
    terminal SNR with epsilon prediction: at alpha = 0 the noise says nothing about x0.
    """
    form, num_times = scheduler.get("beta_schedule"), scheduler["num_train_timesteps"]
    start, end = scheduler.get("beta_start"), scheduler.get("beta_end")
    if scheduler.get("trained_betas") is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    elif form == "scaled_linear":
        betas = scaled_linear_betas(num_times, start, end)
    elif form == "linear":
        betas = torch.linspace(start, end, num_times, dtype=torch.float64)
    else:
        raise ValueError(f"scheduler: beta_schedule {form!r} is not supported (scaled_linear, linear, trained_betas)")
    if scheduler.get("rescale_betas_zero_snr"):
        if scheduler["prediction_type"] == "epsilon":
            raise ValueError(
                "scheduler: rescale_betas_zero_snr with prediction_type epsilon leaves no signal at the last time, "
                "so its x0 is 0 / 0; use a v_prediction teacher or switch the rescaling off"
            )
        betas = rescale_zero_terminal_snr(betas)
    return vp_schedule(betas)


def _load_pipeline(
    pipeline_class: type[DiffusionPipeline], teacher: Teacher, dtype: torch.dtype, device: torch.device
) -> DiffusionPipeline:
    """The frozen pipeline on `device`; its autoencoder in float32, since half precision overflows in SDXL's."""
    index = _pipeline_index(teacher)
    if index.get("_class_name") != pipeline_class.__name__:
        raise ValueError(
            f"teacher {teacher.path}: its model_index.json is of a {index.get('_class_name')}, "
            f"and family {teacher.family} loads {pipeline_class.__name__}; set teacher.family to match"
        )
    unused = {name: None for name in ("safety_checker", "image_encoder", "feature_extractor") if name in index}
    _check_components(teacher, {name: value for name, value in index.items() if name not in unused})
    precision = {"default": dtype, "vae": torch.float32}
    pipeline = _local_first(pipeline_class.from_pretrained, teacher, dtype=precision, use_safetensors=True, **unused)
    pipeline = pipeline.to(device)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    for part in (pipeline.unet, pipeline.vae):
        torch.nn.Module.to(part, memory_format=MEMORY_FORMATS[teacher.memory_format])
    return pipeline


def _empty_pipeline(pipeline_class: type[DiffusionPipeline], teacher: Teacher) -> DiffusionPipeline:
    """The pipeline of a local folder with a denoiser and an autoencoder without data, and nothing else."""
    folder, index = Path(teacher.path), _pipeline_index(teacher)
    _check_components(teacher, {name: value for name, value in index.items() if not name.startswith(OTHER_PARTS)})
    with torch.device("meta"):
        parts = {
            name: kind.from_config(kind.load_config(folder / name))
            for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
        }
    others = {name: None for name in index if name.startswith(OTHER_PARTS)}
    return pipeline_class.from_pretrained(folder, local_files_only=True, **parts, **others)


def _local_first(read: Callable[..., Any], teacher: Teacher, **settings: Any) -> Any:
    """`read` of the teacher's files on this machine; the hub is asked only for a pinned revision that is not here."""
    try:
        return read(teacher.path, revision=teacher.revision, local_files_only=True, **settings)
    except OSError:
        if teacher.revision is None:
            raise
    return read(teacher.path, revision=teacher.revision, **settings)


def _pipeline_index(teacher: Teacher) -> dict[str, Any]:
    """What model_index.json says, from the folder or from the hub at the pinned revision."""
    folder = Path(teacher.path)
    if teacher.revision is None and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"teacher {teacher.path}: no model_index.json in {folder.resolve()}; "
            "give a folder in diffusers format, or a hub name with a pinned revision"
        )
    return dict(_local_first(DiffusionPipeline.load_config, teacher))


def _check_components(teacher: Teacher, index: dict[str, Any]) -> None:
    """Raise ValueError for a part that neither diffusers nor transformers defines: its module would be imported.

    Raises FileNotFoundError for the parts that a local folder's index names and the folder lacks, ValueError for
    weights that are listed outside it.
    """
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value[:1] != [None]}
    for name, value in parts.items():
        library, kind = [*map(str, value), "", ""][:2]
        if library not in ("diffusers", "transformers") or re.match("Auto[A-Z]", kind):  # those run a folder's code
            raise ValueError(f"teacher {teacher.path}: {name} is a {library}.{kind}; only known classes are loaded")
    folder = Path(teacher.path)
    missing = [name for name in parts if not (folder / name).is_dir()]
    if folder.is_dir() and missing:
        raise FileNotFoundError(f"teacher {folder}: model_index.json names {', '.join(missing)}, not in the folder")
    for path in sorted(folder.glob("*/*.safetensors")):
        read_shapes(path)  # a damaged file is told by its name, before anything is built
    for path in sorted(folder.glob("*/*.index.json")):
        shards = read_json(path, weight_map=dict)["weight_map"].values()
        if climbing := [name for name in shards if not isinstance(name, str) or Path(name).name != name]:
            raise ValueError(f"{path}: {climbing[0]!r} is not a file beside it")


def _sizes(pipeline: DiffusionPipeline, teacher: Teacher) -> tuple[int, tuple[int, int, int]]:
    """Pixels a side, and the latents' (C, H, W). Raises ValueError where denoiser and autoencoder do not fit."""
    unet, factor = pipeline.unet.config, pipeline.vae_scale_factor
    channels = pipeline.vae.config.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise ValueError(
            f"teacher {teacher.path}: the denoiser maps {unet.in_channels} channels to {unet.out_channels} and the "
            f"autoencoder has {channels}; only plain text-to-image teachers can be distilled"
        )
    if unet.time_cond_proj_dim is not None:
        raise ValueError(
            f"teacher {teacher.path}: the denoiser has time_cond_proj_dim {unet.time_cond_proj_dim}, an embedding of "
            "the guidance scale: it is distilled already; name the model that it was made from"
        )
    resolution = teacher.resolution or unet.sample_size * factor
    smallest = factor * 2 ** (len(unet.block_out_channels) - 1)
    if resolution % smallest:
        raise ValueError(f"teacher.resolution {resolution} is not a multiple of {smallest}, as {teacher.path} needs")
    return resolution, (channels, resolution // factor, resolution // factor)
