"""The card of an exported student: README.md in the hub's format. Its code runs beside the exported folder."""

import json
import re
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..equations.axis import NUM_SEGMENTS
from ..equations.segments import paper_times
from ..recipe.families import layout_of
from ..storage.files import public, read_json
from ..storage.untrusted import read_bytes
from . import students
from .base import Base
from .client_files import KOHYA_FILE
from .grids import SamplingGrid
from .lora_files import LORA_FILE
from .students import Student

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
PUBLISHED_WIDTHS = ((320, 640, 1280), (320, 640, 1280, 1280))  # of SDXL, and of SD 1.5 and 2.1: other tools read these
TEACHER_KEYS = ("license", "license_name", "license_link", "language")  # of metadata, copied from the teacher's card
MAX_METADATA = 10_000  # characters; longer text is not a licence or a list of languages
SAMPLERS = {"LCMScheduler": "lcm", "TCDScheduler": "euler"}  # ComfyUI's samplers that take the same steps
EXACT_STEPS = (1, 2, 4, 8)  # numbers of steps at which ComfyUI's schedule `simple` is our grid

NOTES_ON_STOCK = """\
- Say `num_inference_steps`, 1 to 8: at diffusers' default of 50 the scheduler raises ValueError ("original_steps x
  strength").
- Say `guidance_scale=0`: diffusers' default guides a second time, which takes twice as long and draws another
  picture."""
NOTES_ON_CLASS = """\
- Without `num_inference_steps` it draws in {steps}. It warns of a number that it did not learn, and raises ValueError
  above 8.
- `guidance_scale` and `negative_prompt` have no effect, as guidance is inside. It warns of them.
- Only the class in this folder (`pipeline.py`) tells the student where its jumps end. Its parts in a stock pipeline,
  and its `unet` over the teacher, raise ValueError ("needs the target time of each step", "class_labels
  should be provided"), and the `AutoPipeline` classes do not know it: for all of these use the folders steps-N."""
NOTES_ON_FLOW = """\
- Pass `sigmas`, as the code does: given `num_inference_steps` alone the scheduler goes through other times.
- On a GPU: `.to("cuda")`, and `torch_dtype=torch.bfloat16` in `from_pretrained` for half precision."""
GUIDED_TWICE = """\
- Say `{guidance}`: diffusers' default guides a second time, which takes twice as long and draws another
  picture."""
GIVEN_GUIDANCE = """\
- Say `{guidance}`: the scale is an input of the denoiser, and the student learned no other."""
NOTE_ON_SIZE = """\
- Pass `{size}`, as the code does: the student learned pictures of this size."""
NOTE_ON_MERGED = """\
- The student was trained as an adapter, which is merged into the weights here: `{pipeline}` loads no adapters."""
NOTES = """\
- Take the scheduler of this folder. `{scheduler}.from_config` of the teacher's goes through other times (LCM's own 4
  are 999, 759, 499, 259), and the picture is another one.
- On a GPU: `.to("cuda")`, and `torch_dtype=torch.float16` in `from_pretrained` for half precision. The files have no
  variants: leave `variant="fp16"` out."""
OTHER_TOOLS = """\
In ComfyUI, with the text encoders and the autoencoder of the teacher's checkpoint; cfg 1.0, scheduler `simple`. With
another scheduler or number of steps it goes through times that the student did not learn. `mlcm export --format
comfyui` writes a workflow for each number of steps, with its sigmas where they are not those of `simple`.

| file | folder of ComfyUI | node | sampler | steps |
|---|---|---|---|---|
{rows}

`{kohya}`, where there is one, is the adapter for Forge, A1111, sd-scripts and InvokeAI too. `{lora}` is for diffusers
alone: other tools apply it in part, or not at all."""
OF_TRANSFORMER = """\
`{lora}`, where there is one, is for ComfyUI too, in `models/loras`. It takes other times there unless the sigmas are
set: `mlcm export --format comfyui` writes a workflow for each number of steps that does."""
OF_X0 = """\
The student predicts x0 where its teacher predicts {kind}, and a file of weights does not say so. `mlcm export --format
comfyui` writes workflows that do, by the node `ModelSamplingDiscrete` set to `x0`; A1111, Forge and sd-scripts would
read it as {kind} and draw noise."""
NOTE_ON_LANGUAGES = """\
- The student was trained and measured with a text adapter for {languages}, which is not in this folder and which stock
  pipelines do not know: they take what it makes of a prompt as `prompt_embeds` (docs/text_adapter.md of `mlcm_rl`)."""
OF_LORA = """\
The teacher's LoRA, `{lora}`, is in every adapter and denoiser here: do not load it over them again. Only where a
denoiser is taken alone, and the LoRA changes the text encoders too, load it over those: strength_model 0, strength_clip
{weight:g}."""


def card(
    base: Base,
    student: Student,
    name: str,
    gamma: float,
    table: str | None,
    folder: Path,
    languages: Sequence[str] = (),
) -> str:
    """Return the README.md of the export in `folder`, for the model's `name`.

    It has metadata, a description, code, pitfalls, other tools, grids, the `table` of measurements and the licence.
    `languages`, of the prompts, go into the metadata if the teacher's card has none.
    """
    metadata = teacher_metadata(base, languages)
    guidance = f"sample with `{arguments(base.stock_guidance)}`"
    sections = [
        front_matter(base, metadata, "diffusers", ["lora"] if (folder / LORA_FILE).is_file() else []),
        introduction(base, student, name, guidance),
        f"## Use\n\n{_usage(base, student, name, gamma)}\n\n{_notes(base, student, folder)}",
    ]
    if (folder / LORA_FILE).is_file():
        place = "the teacher's checkpoint, with its LoRA inside" if base.teacher.lora else "its teacher"
        sections.append(f"Or the adapter alone, over {place}:\n\n" + _part_usage(base, student, name, folder, gamma))
    if step_folders := sorted(folder.glob("steps-*"), key=_num_steps):
        sections.append(_steps_usage(base, student, name, step_folders, gamma))
    widths = tuple(getattr(base.denoiser.config, "block_out_channels", ()))
    if base.predicts_otherwise(student.denoiser):
        if base.comfyui is not None:
            sections.append("## ComfyUI and other tools\n\n" + OF_X0.format(kind=base.prediction_type))
    elif base.kohya_version is not None and widths in PUBLISHED_WIDTHS:
        sections.append("## ComfyUI and other tools\n\n" + _other_tools(base, student, folder, step_folders, gamma))
    elif base.comfyui is not None and base.comfyui.reads_adapters:
        sections.append("## ComfyUI\n\n" + OF_TRANSFORMER.format(lora=LORA_FILE))
    sections.append("## Grids\n\n" + _grids(base, student))
    return joined([*sections, *ending(metadata, table)])


# ---- description ----


def joined(sections: list[str]) -> str:
    """Return the text of a card."""
    return "\n\n".join(sections) + "\n"


def introduction(base: Base, student: Student, name: str, guidance: str) -> str:
    """Return the title and what the student is; `guidance` says how to sample without."""
    return (
        f"# {name}\n\nA student of `{public(base.teacher.path)}`{_with_lora(base)} for {_budgets(student)} steps, "
        f"{_origin(student)} (guidance {base.teacher.guidance_scale:g} is inside: "
        f"{guidance}). {_kind(base, student)}"
    )


def ending(metadata: list[str], table: str | None) -> list[str]:
    """Return the sections on measurements and the licence."""
    licence = next((line.partition(":")[2].strip() for line in metadata if line.startswith("license:")), None)
    measured = ["## Measured\n\n" + _without_title(table)] if table else []
    return [*measured, "## Licence\n\n" + (f"As its teacher's: {licence}." if licence else "That of its teacher.")]


def teacher_metadata(base: Base, languages: Sequence[str] = ()) -> list[str]:
    """Return the lines on licence and language from the teacher's card, or with `languages` if it has none."""
    metadata = _teacher_metadata(Path(base.teacher.path) / "README.md")
    if not any(line.startswith("language:") for line in metadata):
        codes = [f"- {language}" for language in languages if re.fullmatch("[a-z]{2,3}", language)]
        metadata += ["language:", *codes] if codes else []
    return metadata


def _teacher_metadata(teacher_card: Path) -> list[str]:
    """Return the lines on licence and language from the front matter of a teacher's card; an empty list without one."""
    if not teacher_card.is_file():
        return []
    lines = read_bytes(teacher_card).decode("utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return []
    metadata: list[str] = []
    is_copied = False
    for line in lines[1:]:
        if line.rstrip() in ("---", "..."):
            return metadata if _is_complete("\n".join(metadata)) else []
        if re.match(r"\w", line):  # a key; the lines of its value begin with a space or a dash
            is_copied = line.partition(":")[0] in TEACHER_KEYS
        metadata += [line.rstrip()] if is_copied else []
    return []  # never closed: the first line was a horizontal rule, not front matter


def _is_complete(metadata: str) -> bool:
    """Return whether these lines are a YAML mapping by themselves, without the lines that were not copied."""
    if len(metadata) > MAX_METADATA:
        return False
    try:
        return isinstance(YAML(typ="safe", pure=True).load(metadata), dict)
    except (ValueError, YAMLError, RecursionError):
        return False


def front_matter(base: Base, metadata: list[str], library: str, tags: list[str]) -> str:
    """Return the front matter. It names the teacher only if that is a model of the hub, since a local folder's name
    could be that of another model there. `library` may be empty."""
    lines = [*metadata, *([f"library_name: {library}"] if library else []), "pipeline_tag: text-to-image"]
    lines += [f"base_model: {base.teacher.path}"] if base.teacher.revision else []
    lines += ["tags:", *(f"- {tag}" for tag in (base.card_tag, "consistency-distillation", "few-step", *tags))]
    return "\n".join(["---", *lines, "---"])


def _with_lora(base: Base) -> str:
    """Return the teacher's LoRA in a phrase; empty without one."""
    lora = base.teacher.lora
    return f" with the LoRA `{Path(lora).name}` at weight {base.teacher.lora_weight:g}" if lora else ""


def _budgets(student: Student) -> str:
    """Return the numbers of steps that the student was trained for, in words: `2, 3, 4, 6 and 8`."""
    if not student.budgets:
        return f"1 to {NUM_SEGMENTS}"
    *first, last = map(str, student.budgets)
    return f"{', '.join(first)} and {last}" if first else last


def _origin(student: Student) -> str:
    """Return in a phrase how the student was made, or where it was taken from."""
    source = students.describe(student.folder).get("source")
    if isinstance(source, str):
        return f"taken from `{source}` with `mlcm-rl`, which did not distil it"
    return "made by multistep consistency distillation with `mlcm-rl`"


def _kind(base: Base, student: Student) -> str:
    distilled = (
        "It is told the time that each step ends at, so one student serves all of these numbers of steps."
        if student.conditioned
        else f"Segments at the end of its training: {student.num_segments}."
    )
    if base.predicts_otherwise(student.denoiser):
        distilled += (
            f" Its network predicts x0, where its teacher predicts {base.prediction_type}: a sampler that is not told "
            "(`prediction_type: sample` in diffusers, `x0` in ComfyUI) draws noise."
        )
    if (kind := students.describe(student.folder).get("quantise")) is not None:
        distilled += (
            f" It was trained and measured over the teacher's weights in {kind}; here it is over those of its files."
        )
    if not student.tuned:
        return distilled
    if students.describe(student.folder).get("tuned_steps") == 0:  # older folders lack the key
        return f"{distilled} Tuning it to preferences found nothing better: it is as it was distilled."
    return f"{distilled} It was then tuned to preferences; both are in its weights."


# ---- use ----


def _usage(base: Base, student: Student, name: str, gamma: float) -> str:
    trust = ", trust_remote_code=True" if student.conditioned and base.has_target_time_pipeline else ""
    return code(
        "from diffusers import DiffusionPipeline",
        [f"pipe = DiffusionPipeline.from_pretrained({quoted(name)}{trust}{absent(base)})"],
        call(base, student.grid, example_steps(student), gamma),
        "sample",
    )


def absent(base: Base) -> str:
    """Return the arguments that tell diffusers which optional components this teacher lacks."""
    optional, components = base.pipeline._optional_components, base.pipeline.components
    missing = [name for name in layout_of(base.family).possible if components.get(name, 0) is None]
    return "".join(f", {name}=None" for name in missing if name not in optional)


def _part_usage(base: Base, student: Student, name: str, part: Path, gamma: float) -> str:
    """Return code that loads the adapter or denoiser in `part`, the export or a steps-N in it, over the teacher."""
    inside, num_steps = (part.name, _num_steps(part)) if _num_steps(part) else ("", example_steps(student))
    revision = f', revision="{base.teacher.revision}"' if base.teacher.revision else ""
    teacher = f"{quoted(public(base.teacher.path))}{revision}{absent(base)}"
    setup = [f"pipe = DiffusionPipeline.from_pretrained({teacher})"]
    classes = ["DiffusionPipeline", scheduler(part)]
    if (part / LORA_FILE).is_file():
        subfolder = f'subfolder="{inside}", ' if inside else ""
        setup.append(f'pipe.load_lora_weights({quoted(name)}, {subfolder}weight_name="{LORA_FILE}")')
    else:
        network, at = base.denoiser_class.__name__, base.denoiser_part
        classes.append(network)
        if base.teacher.lora is not None:  # for the text encoders
            setup.append(f"pipe.load_lora_weights({quoted(public(base.teacher.lora))})")
            setup.append(f"pipe.fuse_lora(lora_scale={base.teacher.lora_weight})")
            setup.append("pipe.unload_lora_weights()")
        setup.append(f'pipe.{at} = {network}.from_pretrained({quoted(name)}, subfolder="{inside}/{at}")')
    place = f"{inside}/scheduler".removeprefix("/")
    setup.append(f'pipe.scheduler = {scheduler(part)}.from_pretrained({quoted(name)}, subfolder="{place}")')
    return code(
        f"from diffusers import {', '.join(classes)}",
        setup,
        call(base, student.grid, num_steps, gamma),
        inside or "adapter",
    )


def _steps_usage(base: Base, student: Student, name: str, folders: list[Path], gamma: float) -> str:
    """Return a description of the steps-N `folders`, with code for the first adapter and the first denoiser."""
    what = (
        f"For stock pipelines, image to image, inpainting and ControlNet too, {_instead(base)}: the same student, to "
        "be sampled at that number of steps and no other"
        if student.conditioned
        else "Snapshots of its training for stock pipelines, each best at its own number of steps"
    )
    adapters = [part for part in folders if (part / LORA_FILE).is_file()]
    denoisers = [part for part in folders if part not in adapters]
    kinds = [(kind, parts) for kind, parts in (("adapter", adapters), ("denoiser", denoisers)) if parts]
    listing = ", and ".join(f"the {kind} in {', '.join(f'`{part.name}`' for part in parts)}" for kind, parts in kinds)
    eta = gamma if student.conditioned else 0.0  # snapshots are not tuned
    code = [_part_usage(base, student, name, parts[0], eta) for _, parts in kinds]
    return f"{what}. Put {listing} over the teacher, with the scheduler beside it:\n\n" + "\n\n".join(code)


def _instead(base: Base) -> str:
    """Return in a phrase what the folders steps-N add to a conditioned student's own pipeline."""
    return "without the class in this folder" if base.has_target_time_pipeline else "at other numbers of steps"


def call(base: Base, grid: SamplingGrid, num_steps: int, gamma: float) -> str:
    values = base.stock_arguments(grid, num_steps) | base.stock_guidance | base.stock_size
    eta = {"eta": gamma} if 0.0 < gamma < 1.0 else {}
    return f'pipe(prompt="a red apple", {arguments(values | eta)}, generator=seed)'


def arguments(values: dict[str, Any]) -> str:
    """Return `values` as the arguments of a call in Python."""
    return ", ".join(f"{name}={f'{value:g}' if isinstance(value, float) else value}" for name, value in values.items())


def code(imports: str, setup: list[str], call: str, picture: str) -> str:
    """Return a block of Python that writes `picture`.png."""
    lines = [
        "import torch",
        imports,
        "",
        *setup,
        "seed = torch.Generator().manual_seed(0)",
        f"image = {call}.images[0]",
    ]
    return "\n".join(["```python", *lines, f'image.save("{picture}.png")', "```"])


def quoted(text: str) -> str:
    """Return `text` as a string literal of Python."""
    return json.dumps(text, ensure_ascii=False)


def example_steps(student: Student) -> int:
    """Return 4, or the nearest number of steps that the student was trained for."""
    return min(student.budgets or (4,), key=lambda budget: (abs(budget - 4), budget))


def _num_steps(folder: Path) -> int:
    """Return N for a folder steps-N, 0 for any other."""
    prefix, _, number = folder.name.partition("-")
    return int(number) if prefix == "steps" and number.isdecimal() else 0


def scheduler(folder: Path) -> str:
    """Return the class name of the scheduler in `folder`."""
    return read_json(folder / "scheduler" / "scheduler_config.json", _class_name=str)["_class_name"]


def _notes(base: Base, student: Student, folder: Path) -> str:
    """Return the pitfalls and their remedies as a list."""
    notes = [NOTES_ON_FLOW, GIVEN_GUIDANCE if layout_of(base.family).embeds_guidance else GUIDED_TWICE]
    if not layout_of(base.family).is_flow:
        has_class = student.conditioned and base.has_target_time_pipeline
        notes = [NOTES_ON_CLASS if has_class else NOTES_ON_STOCK, NOTES]
    if base.stock_size:
        notes.append(NOTE_ON_SIZE)
    if not base.loads_adapters and (student.folder / LORA_FILE).is_file():
        notes.append(NOTE_ON_MERGED)
    if base.pipeline.config.get("requires_safety_checker"):
        notes.append("- The teacher's safety checker is not in this folder: pictures are not filtered.")
    if base.adapted is not None:
        notes.append(NOTE_ON_LANGUAGES)
    return "\n".join(notes).format(
        scheduler=scheduler(folder),
        steps=example_steps(student),
        guidance=arguments(base.stock_guidance),
        size=arguments(base.stock_size),
        pipeline=base.pipeline_class.__name__,
        languages=" and ".join(base.adapted.languages) if base.adapted is not None else "",
    )


# ---- other tools ----


def _other_tools(base: Base, student: Student, folder: Path, step_folders: list[Path], gamma: float) -> str:
    """Return the table of files for ComfyUI: where each goes, and the sampler's settings."""
    if 0.0 < gamma < 1.0:
        return f"No sampler of other tools is known that puts noise back as `eta={gamma:g}` does: use diffusers."
    budgets = [steps for steps in EXACT_STEPS if steps in (student.budgets or EXACT_STEPS)]
    rows = [] if student.conditioned else [_row(folder, "", budgets)]
    rows += [
        _row(part, f"{part.name}/", [_num_steps(part)]) for part in step_folders if _num_steps(part) in EXACT_STEPS
    ]
    text = OTHER_TOOLS.format(rows="\n".join(rows), kohya=KOHYA_FILE, lora=LORA_FILE)
    if base.teacher.lora is None:
        return text
    return f"{text}\n\n{OF_LORA.format(lora=Path(base.teacher.lora).name, weight=base.teacher.lora_weight)}"


def _row(part: Path, prefix: str, steps: list[int]) -> str:
    file, place, node = UNET_FILE, "models/diffusion_models", "Load Diffusion Model"
    if (part / LORA_FILE).is_file():
        file, place, node = KOHYA_FILE, "models/loras", "Load LoRA over the teacher, strength 1.0"
    elif not (part / UNET_FILE).is_file():  # sharded, as too large for one file, which ComfyUI does not read
        file, place, node = "unet", "-", "in parts: `save_pretrained` it in half precision first"
    counts = ", ".join(map(str, steps))
    return f"| `{prefix}{file}` | `{place}` | {node} | `{SAMPLERS[scheduler(part)]}` | {counts} |"


# ---- grids and measurements ----


def _grids(base: Base, student: Student) -> str:
    """Return the table of arguments for which N steps visit the default grid, the paper's, or that of K segments."""
    key = "sigmas" if "sigmas" in base.stock_call([1]) else "timesteps"
    visits = "`num_inference_steps=N` visits the default grid; for another, pass its `timesteps` instead. "
    if key == "sigmas":
        visits = "Every grid is passed as `sigmas`, before the shift, which the scheduler adds. "
    elif key not in signature(base.pipeline_class.__call__).parameters:
        visits = "`num_inference_steps=N` visits the default grid; the others are for `mlcm sample` alone. "
    rows = [
        f"{visits}A student of several segments is at its best on a grid that holds all their boundaries, where N "
        "allows it: its own.\n",
        f"| steps | default | paper: `{key}=` | own segments: `{key}=` |",
        "|---|---|---|---|",
    ]
    for num_steps in student.budgets or range(1, NUM_SEGMENTS + 1):
        grids = [
            student.grid.by_steps.times(num_steps),
            paper_times(num_steps),
            student.grid.times(num_steps),
        ]
        network_time = base.schedule.network_time
        default, *_ = cells = [base.stock_call(times).get("sigmas", network_time[times].tolist()) for times in grids]
        texts = [str(cell) if cell != default or i == 0 else "as default" for i, cell in enumerate(cells)]
        rows.append(f"| {num_steps} | {' | '.join(texts)} |")
    return "\n".join(rows)


def _without_title(text: str) -> str:
    """Return a report's `text` without its title, since the card has its own."""
    title, _, rest = text.strip().partition("\n")
    return rest.strip() if title.startswith("# ") else text.strip()
