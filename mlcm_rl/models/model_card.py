"""The card of an exported student: README.md, as the hub's pages read it. Its code runs where the folder lies."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..equations.segments import NUM_SEGMENTS, paper_times, sampling_times
from ..recipe.families import layout_of
from ..storage.files import public, read_json
from ..storage.untrusted import read_bytes
from . import students
from .base import Base
from .lora_files import KOHYA_FILE, LORA_FILE
from .students import Student

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
PUBLISHED_WIDTHS = ((320, 640, 1280), (320, 640, 1280, 1280))  # of SDXL, and of SD 1.5 and 2.1: what other tools know
MOST_STATED = 10_000  # characters of them; more is no licence and no list of languages
STATED = ("license", "license_name", "license_link", "language")  # taken over from the teacher's card
SAMPLERS = {"LCMScheduler": "lcm", "TCDScheduler": "euler"}  # ComfyUI's, that walk as these do
EXACT_STEPS = (1, 2, 4, 8)  # for which ComfyUI's schedule `simple` is our grid

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
  and its `unet` over the teacher, raise ValueError ("must be told the time that each step goes to", "class_labels
  should be provided"), and the `AutoPipeline` classes do not know it: for all of these use the folders steps-N."""
NOTES_ON_FLOW = """\
- Pass `sigmas`, as the code does: given `num_inference_steps` alone the scheduler goes through other times.
- Say `guidance_scale=0`: diffusers' default guides a second time, which takes twice as long and draws another
  picture.
- On a GPU: `.to("cuda")`, and `torch_dtype=torch.bfloat16` in `from_pretrained` for half precision."""
NOTES = """\
- Take the scheduler of this folder. `{scheduler}.from_config` of the teacher's goes through other times (LCM's own 4
  are 999, 759, 499, 259), and the picture is another one.
- On a GPU: `.to("cuda")`, and `torch_dtype=torch.float16` in `from_pretrained` for half precision. The files have no
  variants: leave `variant="fp16"` out."""
OTHER_TOOLS = """\
In ComfyUI, with the text encoders and the autoencoder of the teacher's checkpoint; cfg 1.0, scheduler `simple`. With
another scheduler or number of steps it goes through times that the student did not learn.

| file | folder of ComfyUI | node | sampler | steps |
|---|---|---|---|---|
{rows}

`{kohya}`, where there is one, is the adapter for Forge, A1111, sd-scripts and InvokeAI too. `{lora}` is for diffusers
alone: other tools apply it in part, or not at all."""


def card(
    base: Base,
    student: Student,
    name: str,
    gamma: float,
    table: str | None,
    folder: Path,
    languages: Sequence[str] = (),
) -> str:
    """Return the README.md of the export in `folder`, which is to be called `name`.

    What it is, code that runs, what goes wrong without it, other tools, grids, the `table` of measurements, licence.
    `languages` are the prompts', for the metadata of a teacher that says none.
    """
    stated = _stated(Path(base.teacher.path) / "README.md")
    if not any(line.startswith("language:") for line in stated):
        codes = [f"- {language}" for language in languages if re.fullmatch("[a-z]{2,3}", language)]
        stated += ["language:", *codes] if codes else []
    sections = [
        _front_matter(base, stated, folder),
        f"# {name}\n\nA student of `{public(base.teacher.path)}` for {_budgets(student)} steps, made by multistep "
        f"consistency distillation with `mlcm-rl` (guidance {base.teacher.guidance_scale:g} is inside: sample with "
        f"`guidance_scale=0`). {_kind(student)}",
        f"## Use\n\n{_usage(base, student, name, gamma)}\n\n{_notes(base, student, folder)}",
    ]
    if (folder / LORA_FILE).is_file():
        sections.append("Or the adapter alone, over its teacher:\n\n" + _part_usage(base, student, name, folder, gamma))
    if beside := sorted(folder.glob("steps-*"), key=_num_steps):
        sections.append(_beside_usage(base, student, name, beside, gamma))
    if tuple(getattr(base.denoiser.config, "block_out_channels", ())) in PUBLISHED_WIDTHS:
        sections.append("## ComfyUI and other tools\n\n" + _other_tools(student, folder, beside, gamma))
    sections.append("## Grids\n\n" + _grids(base, student))
    if table:
        sections.append("## Measured\n\n" + _under_a_heading(table))
    licence = next((line.partition(":")[2].strip() for line in stated if line.startswith("license:")), None)
    sections.append("## Licence\n\n" + (f"As its teacher's: {licence}." if licence else "That of its teacher."))
    return "\n\n".join(sections) + "\n"


# What it is


def _stated(teacher_card: Path) -> list[str]:
    """Return the lines on licence and language in the front matter of a teacher's card; none where it has none."""
    if not teacher_card.is_file():
        return []
    lines = read_bytes(teacher_card).decode("utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return []
    stated: list[str] = []
    keeps = False
    for line in lines[1:]:
        if line.rstrip() in ("---", "..."):
            return stated if _is_whole("\n".join(stated)) else []
        if re.match(r"\w", line):  # a key; what hangs below it begins with a space or a dash
            keeps = line.partition(":")[0] in STATED
        stated += [line.rstrip()] if keeps else []
    return []  # never closed: a rule across the page, and no front matter


def _is_whole(stated: str) -> bool:
    """Whether these lines of YAML stand by themselves: none goes on in a line that was left out, or refers to one."""
    if len(stated) > MOST_STATED:
        return False
    try:
        return isinstance(YAML(typ="safe", pure=True).load(stated), dict)
    except (ValueError, YAMLError, RecursionError):
        return False


def _front_matter(base: Base, stated: list[str], folder: Path) -> str:
    """Return the metadata. The teacher is in it where it is a model of the hub: a folder's name would name another."""
    lines = [*stated, "library_name: diffusers", "pipeline_tag: text-to-image"]
    lines += [f"base_model: {base.teacher.path}"] if base.teacher.revision else []
    lora = ["lora"] if (folder / LORA_FILE).is_file() else []
    lines += ["tags:", *(f"- {tag}" for tag in (base.card_tag, "consistency-distillation", "few-step", *lora))]
    return "\n".join(["---", *lines, "---"])


def _budgets(student: Student) -> str:
    """The numbers of steps that it learned, in words: `2, 3, 4, 6 and 8`."""
    if not student.budgets:
        return f"1 to {NUM_SEGMENTS}"
    *others, last = map(str, student.budgets)
    return f"{', '.join(others)} and {last}" if others else last


def _kind(student: Student) -> str:
    distilled = (
        "It is told the time that each step ends at, so one student serves all of these numbers of steps."
        if student.conditioned
        else f"Segments at the end of its training: {student.num_segments}."
    )
    if not student.tuned:
        return distilled
    if students.describe(student.folder).get("tuned_steps") == 0:  # older folders do not say
        return f"{distilled} Tuning it to preferences found nothing better: it is as it was distilled."
    return f"{distilled} It was then tuned to preferences; both are in its weights."


# How it is used


def _usage(base: Base, student: Student, name: str, gamma: float) -> str:
    trust = ", trust_remote_code=True" if student.conditioned and base.has_target_time_pipeline else ""
    return _code(
        "from diffusers import DiffusionPipeline",
        [f"pipe = DiffusionPipeline.from_pretrained({_quoted(name)}{trust}{_absent(base)})"],
        _call(base, shown_steps(student), gamma),
        "sample",
    )


def _absent(base: Base) -> str:
    """Return what diffusers must be told of components that a teacher of its family may have, and this one has not."""
    optional, components = base.pipeline._optional_components, base.pipeline.components
    missing = [name for name in layout_of(base.family).possible if components.get(name, 0) is None]
    return "".join(f", {name}=None" for name in missing if name not in optional)


def _part_usage(base: Base, student: Student, name: str, part: Path, gamma: float) -> str:
    """Return code that puts the adapter or denoiser in `part`, the export or a steps-N in it, over the teacher."""
    inside, num_steps = (part.name, _num_steps(part)) if _num_steps(part) else ("", shown_steps(student))
    revision = f', revision="{base.teacher.revision}"' if base.teacher.revision else ""
    teacher = f"{_quoted(public(base.teacher.path))}{revision}{_absent(base)}"
    setup = [f"pipe = DiffusionPipeline.from_pretrained({teacher})"]
    classes = ["DiffusionPipeline", _scheduler(part)]
    if (part / LORA_FILE).is_file():
        subfolder = f'subfolder="{inside}", ' if inside else ""
        setup.append(f'pipe.load_lora_weights({_quoted(name)}, {subfolder}weight_name="{LORA_FILE}")')
    else:
        network, at = base.denoiser_class.__name__, base.denoiser_part
        classes.append(network)
        setup.append(f'pipe.{at} = {network}.from_pretrained({_quoted(name)}, subfolder="{inside}/{at}")')
    place = f"{inside}/scheduler".removeprefix("/")
    setup.append(f'pipe.scheduler = {_scheduler(part)}.from_pretrained({_quoted(name)}, subfolder="{place}")')
    return _code(
        f"from diffusers import {', '.join(classes)}", setup, _call(base, num_steps, gamma), inside or "adapter"
    )


def _beside_usage(base: Base, student: Student, name: str, beside: list[Path], gamma: float) -> str:
    """Return what the folders `beside` are, and code for the first with an adapter and the first with a denoiser."""
    what = (
        f"For stock pipelines, image to image, inpainting and ControlNet too, {_instead(base)}: the same student, to "
        "be sampled at that number of steps and no other"
        if student.conditioned
        else "Snapshots of its training for stock pipelines, each best at its own number of steps"
    )
    adapters_in = [part for part in beside if (part / LORA_FILE).is_file()]
    denoisers_in = [part for part in beside if part not in adapters_in]
    kinds = [(kind, parts) for kind, parts in (("adapter", adapters_in), ("denoiser", denoisers_in)) if parts]
    listed = ", and ".join(f"the {kind} in {', '.join(f'`{part.name}`' for part in parts)}" for kind, parts in kinds)
    eta = gamma if student.conditioned else 0.0  # snapshots are not tuned
    code = [_part_usage(base, student, name, parts[0], eta) for _, parts in kinds]
    return f"{what}. Put {listed} over the teacher, with the scheduler beside it:\n\n" + "\n\n".join(code)


def _instead(base: Base) -> str:
    """Return what the folders steps-N of a conditioned student stand beside."""
    return "without the class in this folder" if base.has_target_time_pipeline else "at other numbers of steps"


def _call(base: Base, num_steps: int, gamma: float) -> str:
    told = "".join(f", {name}={value}" for name, value in base.stock_call(sampling_times(num_steps)).items())
    eta = f", eta={gamma:g}" if 0.0 < gamma < 1.0 else ""
    return f'pipe("a red apple"{told}, guidance_scale=0{eta}, generator=seed)'


def _code(imports: str, setup: list[str], call: str, picture: str) -> str:
    """Return a block of Python that leaves `picture`.png."""
    lines = [
        "import torch",
        imports,
        "",
        *setup,
        "seed = torch.Generator().manual_seed(0)",
        f"image = {call}.images[0]",
    ]
    return "\n".join(["```python", *lines, f'image.save("{picture}.png")', "```"])


def _quoted(text: str) -> str:
    """Return `text` as a string of Python, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def shown_steps(student: Student) -> int:
    """4, or the nearest number of steps that it learned."""
    return min(student.budgets or (4,), key=lambda budget: (abs(budget - 4), budget))


def _num_steps(folder: Path) -> int:
    """N of a folder steps-N; 0 of another."""
    prefix, _, number = folder.name.partition("-")
    return int(number) if prefix == "steps" and number.isdecimal() else 0


def _scheduler(folder: Path) -> str:
    """The class of the scheduler in `folder`."""
    return read_json(folder / "scheduler" / "scheduler_config.json", _class_name=str)["_class_name"]


def _notes(base: Base, student: Student, folder: Path) -> str:
    """Return what goes wrong, and what to do, as a list."""
    if not base.has_target_time_pipeline:
        return NOTES_ON_FLOW
    notes = [NOTES_ON_CLASS if student.conditioned else NOTES_ON_STOCK, NOTES]
    if base.pipeline.config.get("requires_safety_checker"):
        notes.append("- The teacher's safety checker is not in this folder: pictures are not filtered.")
    return "\n".join(notes).format(scheduler=_scheduler(folder), steps=shown_steps(student))


# Other tools


def _other_tools(student: Student, folder: Path, beside: list[Path], gamma: float) -> str:
    """Return which file goes where, and the sampler's settings."""
    if 0.0 < gamma < 1.0:
        return f"No sampler of other tools is known that puts noise back as `eta={gamma:g}` does: use diffusers."
    learned = [steps for steps in EXACT_STEPS if steps in (student.budgets or EXACT_STEPS)]
    rows = [] if student.conditioned else [_row(folder, "", learned)]
    rows += [_row(part, f"{part.name}/", [_num_steps(part)]) for part in beside if _num_steps(part) in EXACT_STEPS]
    return OTHER_TOOLS.format(rows="\n".join(rows), kohya=KOHYA_FILE, lora=LORA_FILE)


def _row(part: Path, prefix: str, steps: list[int]) -> str:
    file, place, node = UNET_FILE, "models/diffusion_models", "Load Diffusion Model"
    if (part / LORA_FILE).is_file():
        file, place, node = KOHYA_FILE, "models/loras", "Load LoRA over the teacher, strength 1.0"
    elif not (part / UNET_FILE).is_file():  # too large for one file: in parts, which ComfyUI does not read
        file, place, node = "unet", "-", "in parts: `save_pretrained` it in half precision first"
    counts = ", ".join(map(str, steps))
    return f"| `{prefix}{file}` | `{place}` | {node} | `{SAMPLERS[_scheduler(part)]}` | {counts} |"


# Grids and measurements


def _grids(base: Base, student: Student) -> str:
    """What to pass so that N steps visit the default grid, the paper's, or the K segments' own."""
    num_segments = 1 if student.conditioned else student.num_segments
    key = "sigmas" if "sigmas" in base.stock_call([1]) else "timesteps"
    visits = "`num_inference_steps=N` visits the default grid; for another, pass its `timesteps` instead. "
    if key == "sigmas":
        visits = "Every grid is passed as `sigmas`, before the shift, which the scheduler adds. "
    rows = [
        f"{visits}A student of several segments is at its best on a grid that holds all their boundaries, where N "
        "allows it: its own.\n",
        f"| steps | default | paper: `{key}=` | own segments: `{key}=` |",
        "|---|---|---|---|",
    ]
    for num_steps in student.budgets or range(1, NUM_SEGMENTS + 1):
        grids = [sampling_times(num_steps), paper_times(num_steps), sampling_times(num_steps, num_segments)]
        default, *_ = cells = [base.stock_call(times).get("sigmas", times) for times in grids]
        shown = [str(cell) if cell != default or i == 0 else "as default" for i, cell in enumerate(cells)]
        rows.append(f"| {num_steps} | {' | '.join(shown)} |")
    return "\n".join(rows)


def _under_a_heading(text: str) -> str:
    """`text` without the title that a report opens with: the card has its own."""
    title, _, rest = text.strip().partition("\n")
    return rest.strip() if title.startswith("# ") else text.strip()
