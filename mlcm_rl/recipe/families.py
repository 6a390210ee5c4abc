"""The families of teachers by name: the components of their folders, and the class that loads them. No torch.

A family may come from another distribution too: its entry point in the group `mlcm_rl.families` is a `Layout`.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from ..equations.axis import NUM_TIMES

ENTRY_POINTS = "mlcm_rl.families"


@dataclass(frozen=True)
class Layout:
    """The components in model_index.json of one family, and its class `implementation`, as module:name.

    `text` are the required text encoders, component -> class; `optional` are those that a folder may lack. Each reads
    the tokens of the tokenizer with the same number.
    """

    implementation: str
    pipeline: str
    denoiser: str
    denoiser_class: str
    text: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    is_flow: bool = False  # the schedule is a rectified flow; else it is variance-preserving
    pooled_by: str = ""  # text encoder whose projection a UNet takes with six picture sizes; "" where it takes neither
    autoencoder: str = "AutoencoderKL"
    older_classes: dict[str, str] = field(default_factory=dict)  # component -> name of its class in older files
    own_library: str = ""  # the pipeline's folder in diffusers, where model_index.json names classes of its own by it
    packs: int = 1  # latents a side that the pipeline packs into one token of the denoiser
    patchifies: int = 1  # latents a side of the autoencoder that are one latent, of more channels, of the denoiser
    side: int = 0  # latents a side by default, where the denoiser's configuration has no sample_size
    takes_text_adapter: bool = False  # prompts become states of one number and at most a pooled vector: `adapt_text`
    embeds_guidance: bool = False  # the guidance scale is an input of the denoiser: a guided pass is one evaluation
    num_times: int = NUM_TIMES  # of a variance-preserving schedule
    extras: dict[str, str] = field(default_factory=dict)  # module that the family needs: extra of ours that has it
    loads_lora: bool = True  # diffusers' pipeline loads files of LoRAs
    languages: tuple[str, ...] = ()  # of prompts that its published models are made for; () where that is not known
    reads_chats: bool = False  # prompts are written into the chat template of the tokenizer
    # key in a file (component.key or model_index.key): value of a few-step model, model to name instead
    distilled: dict[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def required(self) -> list[str]:
        """The required components."""
        return [self.denoiser, "vae", "scheduler", *self.text, *map(tokenizer_of, self.text)]

    @property
    def possible(self) -> list[str]:
        """The components that are loaded if the folder has them."""
        return [*self.optional, *map(tokenizer_of, self.optional)]

    @property
    def classes(self) -> dict[str, str]:
        """The classes of the networks, by component."""
        return {self.denoiser: self.denoiser_class, "vae": self.autoencoder, **self.text, **self.optional}


LEVELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")  # keys with an entry a level, by autoencoder


@dataclass(frozen=True)
class Geometry:
    """The latents of a teacher: `channels` C, `side` H = W by default, a multiple of `multiple`.

    One latent covers `downscale` x `downscale` pixels.
    """

    channels: int
    side: int
    multiple: int
    downscale: int

    @property
    def pixels(self) -> int:
        """The number of pixels that a picture's side is a multiple of."""
        return self.multiple * self.downscale


def geometry(layout: Layout, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Return the geometry of a teacher from the configurations of its denoiser and its autoencoder.

    Raise LookupError where one lacks the key that the family's sizes are in.
    """
    levels = vae[next((key for key in LEVELS if key in vae), LEVELS[0])]
    if "block_out_channels" in denoiser:  # a UNet halves one time less than it has blocks
        multiple = 2 ** (len(denoiser["block_out_channels"]) - 1)
    else:
        patch = denoiser["patch_size"] if "patch_size" in denoiser else denoiser["all_patch_size"][0]
        multiple = layout.packs if layout.packs > 1 else patch
    return Geometry(
        channels=denoiser["in_channels"] // layout.packs**2,
        side=denoiser.get("sample_size") or layout.side,
        multiple=multiple,
        downscale=layout.patchifies * 2 ** (len(levels) - 1),
    )


def tokenizer_of(text_encoder: str) -> str:
    """Return the tokenizer component of a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


FAMILIES = {
    "sdxl": Layout(
        implementation="mlcm_rl.models.families.sdxl:Family",
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        languages=("en",),
        text={"text_encoder_2": "CLIPTextModelWithProjection"},
        optional={"text_encoder": "CLIPTextModel"},
        pooled_by="text_encoder_2",
        takes_text_adapter=True,
    ),
    "sd": Layout(
        implementation="mlcm_rl.models.families.sd:Family",
        pipeline="StableDiffusionPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        languages=("en",),
        text={"text_encoder": "CLIPTextModel"},
        takes_text_adapter=True,
    ),
    "kolors": Layout(
        implementation="mlcm_rl.models.families.kolors:Family",
        pipeline="KolorsPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        languages=("en", "zh"),
        text={"text_encoder": "ChatGLMModel"},
        pooled_by="text_encoder",
        own_library="kolors",
        num_times=1100,
        extras={"sentencepiece": "kolors"},
        takes_text_adapter=True,
    ),
    "sd3": Layout(
        implementation="mlcm_rl.models.families.sd3:Family",
        pipeline="StableDiffusion3Pipeline",
        denoiser="transformer",
        denoiser_class="SD3Transformer2DModel",
        languages=("en",),
        text={"text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection"},
        optional={"text_encoder_3": "T5EncoderModel"},
        is_flow=True,
        takes_text_adapter=True,
    ),
    "flux": Layout(
        implementation="mlcm_rl.models.families.flux:Family",
        pipeline="FluxPipeline",
        denoiser="transformer",
        denoiser_class="FluxTransformer2DModel",
        languages=("en",),
        text={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        is_flow=True,
        packs=2,
        side=128,
        embeds_guidance=True,
        distilled={"transformer.guidance_embeds": (False, "FLUX.1-dev")},
        takes_text_adapter=True,
    ),
    "flux2_klein": Layout(
        implementation="mlcm_rl.models.families.flux2_klein:Family",
        pipeline="Flux2KleinPipeline",
        denoiser="transformer",
        denoiser_class="Flux2Transformer2DModel",
        languages=("en",),
        text={"text_encoder": "Qwen3ForCausalLM"},
        autoencoder="AutoencoderKLFlux2",
        is_flow=True,
        patchifies=2,
        side=64,
        reads_chats=True,
        distilled={"model_index.is_distilled": (True, "FLUX.2-klein-base")},
        takes_text_adapter=True,
    ),
    "hunyuan_dit": Layout(
        implementation="mlcm_rl.models.families.hunyuan_dit:Family",
        pipeline="HunyuanDiTPipeline",
        denoiser="transformer",
        denoiser_class="HunyuanDiT2DModel",
        languages=("en", "zh"),
        text={"text_encoder": "BertModel", "text_encoder_2": "T5EncoderModel"},
        loads_lora=False,
    ),
    "pixart_sigma": Layout(
        implementation="mlcm_rl.models.families.pixart_sigma:Family",
        pipeline="PixArtSigmaPipeline",
        denoiser="transformer",
        denoiser_class="PixArtTransformer2DModel",
        languages=("en",),
        older_classes={"transformer": "Transformer2DModel"},
        loads_lora=False,
        text={"text_encoder": "T5EncoderModel"},
    ),
    "sana": Layout(
        implementation="mlcm_rl.models.families.sana:Family",
        pipeline="SanaPipeline",
        denoiser="transformer",
        denoiser_class="SanaTransformer2DModel",
        languages=("en",),
        text={"text_encoder": "Gemma2Model"},
        autoencoder="AutoencoderDC",
        is_flow=True,
        distilled={"transformer.guidance_embeds": (True, "Sana or SANA1.5")},
    ),
    "z_image": Layout(
        implementation="mlcm_rl.models.families.z_image:Family",
        pipeline="ZImagePipeline",
        denoiser="transformer",
        denoiser_class="ZImageTransformer2DModel",
        languages=("en", "zh"),
        text={"text_encoder": "Qwen3Model"},
        is_flow=True,
        reads_chats=True,
        side=128,
        distilled={"scheduler.shift": (3.0, "Z-Image, of shift 6")},  # Z-Image-Turbo's; all other files agree
    ),
    "qwen_image": Layout(
        implementation="mlcm_rl.models.families.qwen_image:Family",
        pipeline="QwenImagePipeline",
        denoiser="transformer",
        denoiser_class="QwenImageTransformer2DModel",
        languages=("en", "zh"),
        text={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        is_flow=True,
        autoencoder="AutoencoderKLQwenImage",
        packs=2,
        side=128,
        distilled={"transformer.guidance_embeds": (True, "Qwen-Image")},
    ),
}


def names() -> list[str]:
    """Return the families that a recipe may name: ours, then those of other distributions."""
    return [*FAMILIES, *sorted(_others())]


def of_denoiser(denoiser_class: str) -> list[str]:
    """Return the families whose denoisers are of this class; another distribution's that is broken is none."""
    found = []
    for name in names():
        with suppress(ValueError):
            found += [name] * (layout_of(name).denoiser_class == denoiser_class)
    return found


def adaptable() -> list[str]:
    """Return the families whose teachers can have a text adapter; another distribution's that is broken is none."""
    able = []
    for name in names():
        with suppress(ValueError):
            if layout_of(name).takes_text_adapter:
                able.append(name)
    return able


@cache
def layout_of(family: str) -> Layout:
    """Return the layout of a family.

    Raise LookupError if it is unknown, ValueError if its entry point is no layout or names a module that is not there.
    """
    if family in FAMILIES:
        return FAMILIES[family]
    point = _others().get(family)
    if point is None:
        raise LookupError(f"no family is called {family}; known are {', '.join(names())}")
    try:
        layout = point.load()
    except Exception as error:  # of another's code
        raise ValueError(f"{origin(family)} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(layout, Layout):
        raise ValueError(f"{origin(family)} is not a mlcm_rl.recipe.families.Layout")
    module, colon, name = layout.implementation.partition(":")
    if not (colon and name and _is_module(module)):
        raise ValueError(f"{origin(family)}: implementation {layout.implementation} names no class as module:name")
    return layout


def absent_extras(family: str) -> list[str]:
    """Return what to install before models of `family` can be loaded, a line for each module that is missing."""
    return [
        f"{family} needs {module}, which is not installed: pip install 'mlcm-rl[{extra}]'"
        for module, extra in layout_of(family).extras.items()
        if find_spec(module) is None
    ]


def origin(family: str) -> str:
    """Return where a family comes from, for messages: its entry point, or this file."""
    point = _others().get(family)
    return f"the entry point {point.name} = {point.value} of {ENTRY_POINTS}" if point else f"family {family}"


def family_of(pipeline: str) -> str | None:
    """Return the family that loads models of diffusers' class `pipeline`; None without one."""
    for name in names():
        with suppress(ValueError):  # another distribution's that is broken
            if layout_of(name).pipeline == pipeline:
                return name
    return None


def _is_module(name: str) -> bool:
    """Return whether there is a module `name`, without importing it; the packages that it is in are imported."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _others() -> dict[str, EntryPoint]:
    """Return the entry points of other distributions' families; they cannot replace one of ours."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in FAMILIES}
