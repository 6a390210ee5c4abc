"""The card of an export for other tools: which file goes where, and how each tool samples it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipe.families import layout_of
from ..storage.files import public
from . import comfyui, model_card
from .base import Base
from .comfyui import SAMPLERS
from .grids import SamplingGrid
from .model_card import OF_LORA, PUBLISHED_WIDTHS, example_steps
from .students import Student

GUIDANCE = {"comfyui": "cfg 1.0", "kohya": "CFG scale 1"}
COMFYUI = """\
Copy the folder `{place}` into ComfyUI's `models`, then drop a file of `workflows` onto its window: nodes, sampler,
steps and sigmas are set. Choose your own files in the loaders, above all the checkpoint of the teacher. Strength is
1.0.

| workflow | `models/{place}` | steps | sampler | schedule |
|---|---|---|---|---|
{rows}

With another sampler, schedule or number of steps it goes through times that the student did not learn, and with
another cfg than 1.0 it is guided twice."""
MANUAL = (
    "Where the schedule is a list of sigmas, it is in the node `ManualSigmas`, which ComfyUI 0.3.64 does not have yet."
)
OF_SIZES = "The prompt's node has the size of the picture, {side} pixels, which is a condition of this model."
OF_FLUX = (
    "ComfyUI pads prompts to 256 tokens and diffusers to 512, which FLUX attends to: the pictures differ a little. "
    "Keep the guidance of the node `FluxGuidance`: the student learned no other."
)
WITHOUT_T5 = (
    "This teacher has no T5. diffusers has 256 tokens of zeros in its place, as the student learned, and ComfyUI none: "
    "the pictures differ."
)
OTHER_SHAPE = (
    "ComfyUI tells models by the shapes of their weights, and has none of this one's: it is for a model of the same "
    "structure in a published size."
)
OF_ADAPTER = (
    "The student was trained and measured with a text adapter for {languages}, which this tool does not have: prompts "
    "in those languages are for diffusers."
)
KOHYA = """\
{what}

| file | steps | sampler | schedule type |
|---|---|---|---|
{rows}

CFG scale 1. With another sampler, schedule or number of steps it goes through times that the student did not learn."""
LORA = (
    "The layout is that of kohya's sd-scripts, with an `alpha` for each layer: A1111, Forge, InvokeAI and others read "
    "it. Strength is 1: `<lora:{stem}:1>` in a prompt of A1111 or Forge."
)
CHECKPOINT = (
    "Each file is a whole checkpoint, with text encoders and autoencoder, in the original layout: A1111, Forge, "
    "InvokeAI, sd-scripts and ComfyUI open it as one."
)
NO_SAMPLER = "No sampler of these tools is known that puts noise back as `eta={gamma:g}` does: use diffusers."
INEXACT = (
    "The schedule `Simple` has the student's times at 1, 2, 4 and 8 steps. For the other numbers use ComfyUI's "
    "workflows (`mlcm export --format comfyui`) or diffusers."
)
OUTSIDE_BLOCKS = (
    "sd-scripts itself applies a LoRA inside the network's blocks alone: it leaves {layers} out, and draws something "
    "else. The other tools do not."
)
PEFT = """\
The adapters are PEFT's, `adapter_config.json` and `adapter_model.safetensors`, over the teacher's denoiser:

{code}
"""


@dataclass(frozen=True)
class Row:
    """A file of the export: `suffix` of its name, its numbers of steps, gamma, and grid.

    `outside` are the layers outside the denoiser's blocks that its adapter changes.
    """

    suffix: str
    steps: tuple[int, ...]
    gamma: float
    grid: SamplingGrid
    outside: tuple[str, ...] = ()


def card(
    client: str,
    base: Base,
    student: Student,
    name: str,
    rows: Sequence[Row],
    is_lora: bool,
    table: str | None,
    folder: Path,
    languages: Sequence[str] = (),
) -> str:
    """Return the README.md of the export of model `name` for `client` in `folder`, whose files are `rows`.

    They are LoRAs, or whole students. `table` is the measurements'; `languages`, of the prompts, go into the metadata
    if the teacher's card has none.
    """
    metadata = model_card.teacher_metadata(base, languages)
    tags = [client, *(["lora"] if is_lora else [])]
    guidance = GUIDANCE.get(client, f"`{model_card.arguments(base.stock_guidance)}`")
    sections = [
        model_card.front_matter(base, metadata, "peft" if client == "peft" else "", tags),
        model_card.introduction(base, student, name, f"sample with {guidance}"),
    ]
    stem = name.rpartition("/")[2]
    if client == "comfyui":
        sections += _for_comfyui(base, stem, rows, is_lora)
    elif client == "kohya":
        sections += _for_kohya(base, stem, rows, is_lora)
    else:
        sections += _for_peft(base, student, name, rows, folder)
    if client != "peft" and base.adapted is not None:
        sections.append(OF_ADAPTER.format(languages=" and ".join(base.adapted.languages)))
    if base.teacher.lora is not None:
        sections.append(OF_LORA.format(lora=Path(base.teacher.lora).name, weight=base.teacher.lora_weight))
    return model_card.joined([*sections, *model_card.ending(metadata, table)])


def comfyui_folder(is_lora: bool) -> str:
    """Return the folder in ComfyUI's `models` for a LoRA, or for a denoiser."""
    return "loras" if is_lora else "diffusion_models"


def _for_comfyui(base: Base, stem: str, rows: Sequence[Row], is_lora: bool) -> list[str]:
    """Return the sections on ComfyUI."""
    lines, has_sigmas = [], False
    for row in rows:
        for steps in row.steps:
            times = row.grid.times(steps)
            simple = comfyui.is_simple(base, times)
            has_sigmas |= not simple
            schedule = (
                f"`{comfyui.SIMPLE}`" if simple else ", ".join(f"{s:.4g}" for s in comfyui.sigmas_of(base, times))
            )
            file = f"`{stem}{row.suffix}.safetensors`"
            lines.append(f"| `{stem}-{steps}-steps.json` | {file} | {steps} | `{SAMPLERS[row.gamma]}` | {schedule} |")
    notes = [MANUAL] if has_sigmas else []
    nodes = comfyui.nodes_of(base)
    if nodes.knows_sizes:
        notes.append(OF_SIZES.format(side=base.resolution))
    if layout_of(base.family).embeds_guidance:
        notes.append(OF_FLUX)
    if base.pipeline.components.get("text_encoder_3", 0) is None:
        notes.append(WITHOUT_T5)
    widths = tuple(getattr(base.denoiser.config, "block_out_channels", PUBLISHED_WIDTHS[0]))
    if widths not in PUBLISHED_WIDTHS:
        notes.append(OTHER_SHAPE)
    table = COMFYUI.format(place=comfyui_folder(is_lora), rows="\n".join(lines))
    return ["## ComfyUI", table, *notes]


def _for_kohya(base: Base, stem: str, rows: Sequence[Row], is_lora: bool) -> list[str]:
    """Return the sections on A1111, Forge and sd-scripts."""
    lines, is_inexact = [], False
    for row in rows:
        exact = [n for n in row.steps if comfyui.is_multiple(row.grid.times(n))]
        is_inexact |= len(exact) < len(row.steps)
        sampler = {"lcm": "LCM", "euler": "Euler"}.get(SAMPLERS.get(row.gamma, ""), "-")
        counts = ", ".join(map(str, exact)) or f"{row.steps[0]}, but not so: see below"
        lines.append(f"| `{stem}{row.suffix}.safetensors` | {counts} | {sampler} | Simple |")
    notes = [INEXACT] if is_inexact else []
    notes += [NO_SAMPLER.format(gamma=row.gamma) for row in rows[:1] if row.gamma not in SAMPLERS]
    if rows[0].outside:
        layers = " and ".join(f"`{layer}`" for layer in rows[0].outside)
        notes.append(OUTSIDE_BLOCKS.format(layers=layers))
    what = LORA.format(stem=f"{stem}{rows[0].suffix}") if is_lora else CHECKPOINT
    return ["## Files", KOHYA.format(what=what, rows="\n".join(lines)), *notes]


def _for_peft(base: Base, student: Student, name: str, rows: Sequence[Row], folder: Path) -> list[str]:
    """Return the sections on PEFT, with code for the first adapter."""
    row, part = rows[0], base.denoiser_part
    inside = f"steps-{row.steps[0]}" if row.suffix else ""
    scheduler = model_card.scheduler(folder / inside)
    revision = f', revision="{base.teacher.revision}"' if base.teacher.revision else ""
    teacher = f"{model_card.quoted(public(base.teacher.path))}{revision}{model_card.absent(base)}"
    subfolder = f', subfolder="{inside}"' if inside else ""
    place = f"{inside}/scheduler".removeprefix("/")
    quoted = model_card.quoted(name)
    setup = [
        f"pipe = DiffusionPipeline.from_pretrained({teacher})",
        f"adapted = PeftModel.from_pretrained(pipe.{part}, {quoted}{subfolder})",
        f"pipe.{part} = adapted.merge_and_unload()",
        f'pipe.scheduler = {scheduler}.from_pretrained({quoted}, subfolder="{place}")',
    ]
    imports = f"from diffusers import DiffusionPipeline, {scheduler}\nfrom peft import PeftModel"
    num_steps = row.steps[0] if row.suffix else example_steps(student)
    code = model_card.code(imports, setup, model_card.call(base, row.grid, num_steps, row.gamma), inside or "sample")
    sections = ["## Use", PEFT.format(code=code).rstrip()]
    if len(rows) > 1:
        others = ", ".join(f"`steps-{row.steps[0]}`" for row in rows if row.suffix)
        sections.append(f"Each adapter of {others} is for its own number of steps and no other, with its scheduler.")
    return sections
