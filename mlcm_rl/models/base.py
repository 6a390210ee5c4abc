"""Teachers: `Base` is what all families share, a thin layer over a diffusers pipeline; each family has its own file.

    B batch   C latent channels   H, W latent size   L tokens   D context width   P pooled width

A `Conditioning` is a batch of encoded prompts: "context" (B, L, D) and, in families that have one, "pooled" (B, P)
(`conditioning`). Latents and predictions are float32.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ..equations.axis import NUM_TIMES
from ..equations.prediction import x0_from_prediction
from ..equations.schedule import Schedule
from ..equations.solver import guided
from ..recipe import Teacher
from ..recipe.families import geometry, layout_of
from ..storage import finite
from ..training import autocast
from .autoencoder import RECOMPUTE, Autoencoder
from .client_keys import kohya_name
from .comfyui import Nodes
from .conditioning import LENGTHS, Conditioning, concatenated, in_dtype, on_device, rows_of, stacked
from .files import MEMORY_FORMATS
from .grids import USUAL, SamplingGrid
from .text_adapter import AdaptedEncoder

ENCODED_TOGETHER = 32  # prompts, where all are encoded ahead
TARGET_TIME_WIDTH = 256  # sinusoids of the target time, for a student conditioned on it
OWN_PREDICTION = "own_prediction"  # attribute of a student's denoiser: the type of its prediction


class TargetTimeProjection(nn.Linear):
    """Projects the sinusoids of the target time to the width of those of t, which they are added to.

    Its weights are float32; its output has the precision of its input.
    """

    def forward(self, sinusoids: Tensor) -> Tensor:
        return super().forward(sinusoids.to(self.weight.dtype)).to(sinusoids.dtype)


def precision_of(denoiser: nn.Module) -> torch.dtype:
    """Return the precision of a denoiser's own weights, in which it is given its inputs.

    Adapters and the target time's projection are float32 beside them, and stand first where integers are no parameters.
    """
    added = ("lora_A", "lora_B", "cond_proj")
    return next(value.dtype for name, value in denoiser.named_parameters() if not any(part in name for part in added))


class Base(ABC):
    """A frozen teacher: encodes prompts, denoises, decodes. Each family is one subclass.

    A subclass defines how prompts are encoded and which conditioning guidance moves away from; how the denoiser is
    called (`predict`); where the target time enters; which modules an adapter changes; the noise schedule; and how
    stock diffusers samples a finished student. Other code knows a family only by what stands in files: the names of its
    weights (`client_keys`, `single_file`).
    """

    family: ClassVar[str]  # its name in recipes, and in mlcm_rl/recipe/families.py
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_class: ClassVar[type[ModelMixin]]
    denoiser_part: ClassVar[str]  # the pipeline's component that denoises
    lora_targets: ClassVar[Sequence[str]]
    card_tag: ClassVar[str]  # on the card of an exported student
    autoencoder_class: ClassVar[type[Autoencoder]] = Autoencoder
    has_target_time_pipeline: ClassVar[bool] = False  # `exported_pipeline` can sample its conditioned students
    comfyui: ClassVar[Nodes | None] = None  # what ComfyUI has for this family
    kohya_module: ClassVar[str] = "networks.lora"  # of sd-scripts, that trains adapters of this family
    time_layer: ClassVar[str]  # the denoiser's embedding of times, whose input the target time is added to
    time_input: ClassVar[str] = "linear_1"  # the linear layer in it that takes the sinusoids

    def __init__(self, teacher: Teacher, device: torch.device, pipeline: DiffusionPipeline):
        self.teacher, self.device, self.dtype = teacher, device, getattr(torch, teacher.dtype)
        self.pipeline = pipeline
        self.memory_format = MEMORY_FORMATS[teacher.memory_format]
        self.adapted: AdaptedEncoder | None = None  # encodes prompts in other languages: teacher.text_adapter
        self._ahead: dict[str, Conditioning] | None = None  # (L, D) and (P,) by prompt, once the text encoders are gone
        self._dropped: Conditioning | None = None  # what guidance moves away from, once they are
        self.denoiser: ModelMixin = self.simplify(getattr(pipeline, self.denoiser_part))
        self._refuse_distilled()
        self.geometry = geometry(layout_of(self.family), self.denoiser.config, pipeline.vae.config)
        self.autoencoder = self.autoencoder_class(pipeline.vae, self.geometry.downscale, teacher.path, device)
        self.resolution, self.latent_shape = self._sizes()
        self.prediction_type, schedule = self._schedule()
        self.schedule = schedule.to(device)
        if self.schedule.num_times != NUM_TIMES:
            raise ValueError(
                f"teacher {teacher.path}: its scheduler has {self.schedule.num_times} times; segments and samplers "
                f"are defined on {NUM_TIMES}, so only a teacher with {NUM_TIMES} times can be distilled"
            )
        logging.getLogger(self.pipeline_class.__module__).setLevel(logging.ERROR)  # it warns of every long prompt

    # ---- the family ----

    @classmethod
    def adapted_modules(cls, config: Mapping[str, Any]) -> Sequence[str]:
        """Return the ends of the names of the modules that an adapter changes in a denoiser of this `config`."""
        return cls.lora_targets

    @property
    def kohya_version(self) -> str | None:
        """Return kohya's `ss_base_model_version` for models of this shape; None where it has none."""
        return None

    @property
    def original_texts(self) -> dict[str, str]:
        """Return the text encoders' places in an original checkpoint of one file; none where it has no such layout."""
        return {}

    def kohya_layers(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return kohya's names of the layers that `modules` of the denoiser are in, with what each stacks.

        Raise ValueError for a module that has none. Here the names are diffusers' own.
        """
        return {kohya_name(module): (module,) for module in modules}

    def _refuse_distilled(self) -> None:
        """Raise ValueError for a value that only few-step models of this family have.

        A local folder's is found when the recipe is read (`recipe.teacher_check`), a hub model's here.
        """
        for path, (value, original) in layout_of(self.family).distilled.items():
            part, key = path.split(".")
            config = (self.pipeline if part == "model_index" else getattr(self.pipeline, part)).config
            if config.get(key) == value:
                raise ValueError(
                    f"teacher {self.teacher.path}: {path} is {value}, as of a model that is distilled to a few steps "
                    f"already; name the model that it was made from, {original}"
                )

    def _sizes(self) -> tuple[int, tuple[int, int, int]]:
        """Return the pixels per side and the latents' (C, H, W).

        Raise ValueError if the channels of denoiser and autoencoder differ, or for a resolution that does not fit.
        """
        path, geometry, channels = self.teacher.path, self.geometry, self.autoencoder.latent_channels
        if (geometry.channels, self._predicted_channels) != (channels, channels):
            raise ValueError(
                f"teacher {path}: the denoiser maps {geometry.channels} channels to {self._predicted_channels} and the "
                f"autoencoder has {channels}; only plain text-to-image teachers can be distilled"
            )
        resolution = self.teacher.resolution or geometry.side * geometry.downscale
        if resolution % geometry.pixels:
            raise ValueError(f"teacher.resolution {resolution} is not a multiple of {geometry.pixels}, as {path} needs")
        side = resolution // geometry.downscale
        return resolution, (channels, side, side)

    @property
    def _predicted_channels(self) -> int:
        """Return the channels of a prediction, C."""
        return self.denoiser.config.out_channels

    @abstractmethod
    def _schedule(self) -> tuple[str, Schedule]:
        """Return the prediction type (a key of `equations.prediction`) and the noise schedule (T,).

        Raise ValueError for a schedule that cannot be distilled.
        """

    @abstractmethod
    def schedule_record(self) -> dict[str, Any]:
        """Return the parameters of the schedule as JSON, to be recorded with stored trajectories."""

    @abstractmethod
    def stock_scheduler(
        self, gamma: float, grid: SamplingGrid = USUAL, prediction_type: str | None = None
    ) -> SchedulerMixin:
        """Return the diffusers scheduler that visits `grid` under `gamma`, for an export, as `stock_arguments` ask.

        It is for a network of this `prediction_type`, by default the teacher's.
        """

    def stock_call(self, times: list[int]) -> dict[str, Any]:
        """Return the arguments with which a stock pipeline with that scheduler visits `times` of its grid."""
        return {"num_inference_steps": len(times)}

    def stock_arguments(self, grid: SamplingGrid, num_steps: int) -> dict[str, Any]:
        """Return the arguments with which a stock pipeline with the scheduler of `grid` visits its times.

        Times of no named grid are passed themselves.
        """
        times = grid.by_steps.times(num_steps)
        settings = self.stock_call(times)
        if isinstance(grid.name, str) or "sigmas" in settings:
            return settings
        others = {name: value for name, value in settings.items() if name != "num_inference_steps"}
        return {"timesteps": self.schedule.network_time[times].tolist(), **others}

    @property
    def stock_guidance(self) -> dict[str, float]:
        """Return the arguments with which a stock pipeline samples a student: one pass a step, without guidance."""
        return {"guidance_scale": 0.0}

    @property
    def loads_adapters(self) -> bool:
        """Return whether the family's stock pipeline can load an adapter over the teacher."""
        return hasattr(self.pipeline_class, "load_lora_weights")

    @property
    def stock_size(self) -> dict[str, int]:
        """Return the arguments for this resolution; none where the denoiser's configuration has it.

        Pipelines that would replace it by one of the few of their training are told not to.
        """
        size = {"height": self.resolution, "width": self.resolution}
        if "use_resolution_binning" in signature(self.pipeline_class.__call__).parameters:
            return {**size, "use_resolution_binning": False}
        return {} if "sample_size" in self.denoiser.config else size

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> ModelMixin:
        """Return a new denoiser of this `config` on torch's default device.

        With `condition` it has a projection of the target time.
        """
        denoiser = self.simplify(self.denoiser_class.from_config(config))
        return self.with_target_time(denoiser) if condition else denoiser

    def simplify(self, denoiser: ModelMixin) -> ModelMixin:
        """Return `denoiser`, changed in place to compute the same up to rounding with less work; here as it is."""
        return denoiser

    def with_target_time(self, denoiser: ModelMixin) -> ModelMixin:
        """Add a projection of the target time's sinusoids to `denoiser`, in place, and return it."""
        embedding = denoiser.get_submodule(self.time_layer)
        width = embedding.get_submodule(self.time_input).in_features
        embedding.cond_proj = TargetTimeProjection(TARGET_TIME_WIDTH, width, bias=False)
        return denoiser

    @abstractmethod
    def time_sinusoids(self, denoiser: ModelMixin, t: Tensor, precision: torch.dtype) -> Tensor:
        """Return the sinusoids (B, D) of the times t (B,) that `denoiser` passes to its `time_layer`.

        They are of times that the stock pipeline rounds, where it does, in this `precision`.
        """

    def target_time_sinusoids(self, s: Tensor) -> Tensor:
        """Return the sinusoids (B, TARGET_TIME_WIDTH) of the target times s (B,), which a student projects."""
        return get_timestep_embedding(s, TARGET_TIME_WIDTH)

    def empty_conditioning(self, count: int, num_tokens: int) -> Conditioning:
        """Return an uninitialised `Conditioning` of `count` prompts of `num_tokens` tokens, on this device."""
        shapes = self.conditioning_shapes(self.denoiser.config, num_tokens)
        dtypes = {LENGTHS: torch.int64}
        return {
            name: torch.empty(count, *shape, dtype=dtypes.get(name), device=self.device)
            for name, shape in shapes.items()
        }

    @staticmethod
    @abstractmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the conditioning of one prompt of `num_tokens` tokens, for a denoiser's `config`."""

    # ---- prompts ----

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Encode B `prompts` as the family's stock pipeline does, without gradient, or through `teacher.text_adapter`.

        After `encode_ahead`, only the prompts encoded then can be looked up: KeyError for any other.
        """
        with autocast.own(self.device):
            if self._ahead is None:
                return self._encode_by_language(prompts)
            rows = stacked([self._ahead[prompt] for prompt in prompts])
            return in_dtype(on_device(rows, self.device), torch.float32)

    def encode_ahead(self, prompts: Iterable[str]) -> None:
        """Encode each of `prompts` once, keep the results, and free the text encoders.

        The results stay on the CPU, in the teacher's precision, which is that of the text encoders. `unconditional`
        works as before.
        """
        self._dropped = self._dropped_prompt
        texts = list(dict.fromkeys(prompts))
        ahead: dict[str, Conditioning] = {}
        for part in (texts[i : i + ENCODED_TOGETHER] for i in range(0, len(texts), ENCODED_TOGETHER)):
            encoded = in_dtype(on_device(self._encode_by_language(part), torch.device("cpu")), self.dtype)
            finite.refuse_encoded(encoded, part, self.dtype)
            ahead |= zip(part, rows_of(encoded), strict=True)
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)
        self.adapted = None
        self._ahead = ahead

    def _encode_by_language(self, prompts: list[str]) -> Conditioning:
        """Encode `prompts`: those in the languages of the text adapter through it, all others by the text encoders."""
        adapted = self.adapted
        places = [i for i, prompt in enumerate(prompts) if adapted is not None and adapted.reads(prompt)]
        if adapted is None or not places:
            return self._encode(prompts)
        rows = dict(zip(places, rows_of(adapted.encode(prompts[i] for i in places)), strict=True))
        if others := [i for i in range(len(prompts)) if i not in rows]:
            rows |= zip(others, rows_of(self._encode([prompts[i] for i in others])), strict=True)
        return stacked([rows[i] for i in range(len(prompts))])

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Encode `prompts` by the text encoders."""

    @property
    def _tokenizers(self) -> list[Any]:
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith("tokenizer") and part is not None]

    @property
    def num_tokens(self) -> int:
        """Return the largest number of tokens of a prompt that is encoded, start and end marks included."""
        return min(tokenizer.model_max_length for tokenizer in self._tokenizers)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the tokens of each prompt, start and end marks included; those beyond `num_tokens` are cut off."""
        counts = [map(len, tokenizer(list(prompts))["input_ids"]) for tokenizer in self._tokenizers]
        own, adapted = [max(each) for each in zip(*counts, strict=True)], self.adapted
        if adapted is None:
            return own
        pairs = zip(prompts, own, strict=True)
        return [adapted.encoder.count_tokens(text) if adapted.reads(text) else count for text, count in pairs]

    def unconditional(self, batch_size: int) -> Conditioning:
        """Return the conditioning that guidance moves away from, `batch_size` times."""
        with autocast.own(self.device):
            conditioning = self._dropped_prompt if self._dropped is None else self._dropped
        return {name: value.repeat(batch_size, *[1] * (value.ndim - 1)) for name, value in conditioning.items()}

    @cached_property
    def _dropped_prompt(self) -> Conditioning:
        """Return the conditioning (1, ...) that the stock pipeline's guidance moves away from: the empty prompt's."""
        return self._encode([""])

    # ---- denoising ----

    def same_prompts(self, denoiser: torch.nn.Module) -> AbstractContextManager[None]:
        """Return a block in which every pass of `denoiser` has the same prompts and weights, and no gradient.

        A family computes there once what depends on nothing else; results are the same bits. This one computes nothing.
        """
        return nullcontext()

    def checkpoint_blocks(self, denoiser: ModelMixin, recompute: Callable[..., Any] = RECOMPUTE) -> None:
        """Let `denoiser` compute its blocks again in the backward pass, by `recompute`: the same gradients."""
        denoiser.enable_gradient_checkpointing(recompute)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Return the blocks of `denoiser` that the picture goes through, in their order."""
        lists = [part for part in denoiser.children() if isinstance(part, nn.ModuleList)]
        return [block for part in lists for block in part]

    def picture_of(self, output: Any) -> Tensor:
        """Return the features of the picture (B, D, ...) in the `output` of one of the `blocks`: channels second.

        A block that computes text beside it returns (text, picture), of tokens (B, L, D).
        """
        return (output if isinstance(output, Tensor) else output[-1]).transpose(1, 2)

    def forget_denoiser(self) -> None:
        """Free the weights of the teacher's denoiser where no step needs it; its configuration stays.

        Weights that a LoRA student shares stay with the student, so that an engine may shard them too.
        """
        for parameter in self.denoiser.parameters():
            parameter.data = parameter.data.new_empty(0)

    @abstractmethod
    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        """Return the prediction (B, C, H, W) float32 of `denoiser` at x_t (B, C, H, W), t (B,), of its own type.

        `s` (B,) is the target time of a conditioned student's jump; the teacher takes none.
        """

    def prediction_of(self, denoiser: torch.nn.Module) -> str:
        """Return the type of what `denoiser` predicts, a key of `equations.prediction`: its own, else the teacher's."""
        return getattr(denoiser, OWN_PREDICTION, self.prediction_type)

    def predicts_otherwise(self, denoiser: torch.nn.Module) -> bool:
        """Return whether a student's `denoiser` predicts something else than its teacher."""
        return self.prediction_of(denoiser) != self.prediction_type

    @property
    def student_predictions(self) -> tuple[str, ...]:
        """Return what students may predict: the teacher's type, and others that stock schedulers of the family know."""
        return (self.prediction_type,)

    def x0(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        """Return the clean latents (B, C, H, W) float32 that `denoiser` predicts from x_t: f of the paper."""
        prediction = self.predict(denoiser, x_t, t, conditioning, s)
        return x0_from_prediction(prediction, x_t, t, self.schedule, self.prediction_of(denoiser))

    @torch.no_grad()
    def guided_x0(
        self, x_t: Tensor, t: Tensor, conditional: Conditioning, unconditional: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Return the teacher's x0 (B, C, H, W) under classifier-free guidance, in its own precision under autocast too.

        Both passes are one batch; at scale 1 the conditional pass is all there is.
        """
        with autocast.own(self.device):
            if guidance_scale == 1.0:
                return self.x0(self.denoiser, x_t, t, conditional)
            both = concatenated([unconditional, conditional])
            predictions = self.predict(self.denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            without, with_prompt = predictions.chunk(2)
            prediction = self._guided(with_prompt, without, guidance_scale)
        return x0_from_prediction(prediction, x_t, t, self.schedule, self.prediction_type)

    def _guided(self, with_prompt: Tensor, without: Tensor, guidance_scale: float) -> Tensor:
        """Return the guided prediction (B, C, H, W) of two predictions, as the family's stock pipeline computes it."""
        return guided(with_prompt, without, guidance_scale)

    def noise(self, generator: torch.Generator | Sequence[torch.Generator], batch_size: int) -> Tensor:
        """Return standard normal noise (B, C, H, W) float32, drawn on the CPU so that no device changes it.

        One generator draws for the whole batch; with a list, each sample has its own and does not depend on the others.
        """
        if isinstance(generator, torch.Generator):
            drawn = torch.randn(batch_size, *self.latent_shape, generator=generator)
            return drawn.to(self.device, non_blocking=True)
        if len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}")
        drawn = torch.stack([torch.randn(*self.latent_shape, generator=own) for own in generator])
        return drawn.to(self.device, non_blocking=True)
