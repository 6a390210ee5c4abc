"""The families of teachers by name: what a folder of each holds, and where the class is that loads it. No torch.

A family may come from another distribution too: its entry point in the group `mlcm_rl.families` names a `Layout`.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points

ENTRY_POINTS = "mlcm_rl.families"


@dataclass(frozen=True)
class Layout:
    """What model_index.json names in a folder of one family, and the class `implementation`, as module:name.

    `text` are the text encoders that must be there, by component, with their classes; `optional` those that may be.
    Each reads what the tokenizer of the same number makes.
    """

    implementation: str
    pipeline: str
    denoiser: str
    denoiser_class: str
    text: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    is_flow: bool = False  # its schedule is a rectified flow's, else it preserves variance

    @property
    def required(self) -> list[str]:
        """The components that must be there."""
        return [self.denoiser, "vae", "scheduler", *self.text, *map(tokenizer_of, self.text)]

    @property
    def possible(self) -> list[str]:
        """The components that are loaded where they are there."""
        return [*self.optional, *map(tokenizer_of, self.optional)]

    @property
    def classes(self) -> dict[str, str]:
        """Classes of the networks, by component."""
        return {self.denoiser: self.denoiser_class, "vae": "AutoencoderKL", **self.text, **self.optional}


def tokenizer_of(text_encoder: str) -> str:
    """Return the component whose tokens a text encoder reads."""
    return text_encoder.replace("text_encoder", "tokenizer")


FAMILIES = {
    "sdxl": Layout(
        implementation="mlcm_rl.models.families.sdxl:Family",
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        text={"text_encoder_2": "CLIPTextModelWithProjection"},
        optional={"text_encoder": "CLIPTextModel"},
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
    """Return the layout of a family. Raise LookupError for an unknown one, TypeError where an entry point is none."""
    if family in FAMILIES:
        return FAMILIES[family]
    point = _others().get(family)
    if point is None:
        raise LookupError(f"no family is called {family}; known are {', '.join(names())}")
    found = point.load()
    if not isinstance(found, Layout):
        raise TypeError(f"family {family}: the entry point {point.value} is no mlcm_rl.recipe.families.Layout")
    return found


def family_of(pipeline: str) -> str | None:
    """Return the family that loads models of the class `pipeline` in diffusers; None where there is none."""
    return next((name for name in names() if layout_of(name).pipeline == pipeline), None)


def _others() -> dict[str, EntryPoint]:
    """Return the entry points of other distributions' families; a name of ours stays ours."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in FAMILIES}
