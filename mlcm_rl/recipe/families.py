"""The families of teachers by name: the components of their folders, and the class that loads them. No torch.

A family may come from another distribution too: its entry point in the group `mlcm_rl.families` is a `Layout`.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

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
        return {self.denoiser: self.denoiser_class, "vae": "AutoencoderKL", **self.text, **self.optional}


def tokenizer_of(text_encoder: str) -> str:
    """Return the tokenizer component of a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


FAMILIES = {
    "sdxl": Layout(
        implementation="mlcm_rl.models.families.sdxl:Family",
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        text={"text_encoder_2": "CLIPTextModelWithProjection"},
        optional={"text_encoder": "CLIPTextModel"},
        pooled_by="text_encoder_2",
    ),
    "sd": Layout(
        implementation="mlcm_rl.models.families.sd:Family",
        pipeline="StableDiffusionPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        text={"text_encoder": "CLIPTextModel"},
    ),
    "sd3": Layout(
        implementation="mlcm_rl.models.families.sd3:Family",
        pipeline="StableDiffusion3Pipeline",
        denoiser="transformer",
        denoiser_class="SD3Transformer2DModel",
        text={"text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection"},
        optional={"text_encoder_3": "T5EncoderModel"},
        is_flow=True,
    ),
}


def names() -> list[str]:
    """Return the families that a recipe may name: ours, then those of other distributions."""
    return [*FAMILIES, *sorted(_others())]


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
