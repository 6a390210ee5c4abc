"""The card of an exported student: README.md, as the hub's pages read it."""

from pathlib import Path

from .adapters import LORA_FILE, Student
from .bases import Base
from .checkpoint import public
from .equations.segments import NUM_SEGMENTS, paper_times, sampling_times


def card(base: Base, student: Student, name: str, gamma: float, table: str | None, beside: list[int]) -> str:
    """Return README.md: what it is, code that runs, grids, measurements, licence.

    `beside` are the numbers of steps N that a folder `steps-N` is written for.
    """
    teacher = public(base.teacher.path)
    licence = _licence(Path(base.teacher.path))
    sections = [
        _front_matter(teacher, licence),
        f"# {name}\n\nA student of `{teacher}` for {_budgets(student)} steps, made by multistep consistency "
        f"distillation with `mlcm-rl` (guidance {base.teacher.guidance_scale:g} is inside: sample with "
        f"`guidance_scale=0`). {_kind(student)}",
        "## Use\n\n" + _usage(student, name, gamma),
    ]
    if not (student.conditioned or student.tuned) and (student.folder / LORA_FILE).is_file():
        sections.append("Or the adapter alone, over its teacher:\n\n" + _lora_usage(student, teacher, name))
    if beside:
        sections.append(_snapshot_usage(student, teacher, beside))
    sections.append("## Grids\n\n" + _grids(student))
    if table:
        sections.append("## Measured\n\n" + _under_a_heading(table))
    sections.append("## Licence\n\n" + (f"As its teacher's: {licence}." if licence else "That of its teacher."))
    return "\n\n".join(sections) + "\n"


def _under_a_heading(text: str) -> str:
    """`text` without the title that a report opens with: the card has its own."""
    title, _, rest = text.strip().partition("\n")
    return rest.strip() if title.startswith("# ") else text.strip()


def _front_matter(teacher: str, licence: str | None) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image", f"base_model: {teacher}"]
    if licence:
        lines.insert(0, f"license: {licence}")
    return "\n".join(["---", *lines, "---"])


def _budgets(student: Student) -> str:
    """The numbers of steps that it learned, in words: `2, 3, 4, 6 and 8`."""
    if not student.budgets:
        return f"1 to {NUM_SEGMENTS}"
    *others, last = map(str, student.budgets)
    return f"{', '.join(others)} and {last}" if others else last


def _kind(student: Student) -> str:
    tuned = " It was then tuned to preferences; both are in its weights." if student.tuned else ""
    return _distilled_kind(student) + tuned


def _distilled_kind(student: Student) -> str:
    if student.conditioned:
        return "It is told the time that each step ends at, so one student serves all of these numbers of steps."
    return f"Segments at the end of its training: {student.num_segments}."


def _usage(student: Student, name: str, gamma: float) -> str:
    eta = f", eta={gamma:g}" if 0.0 < gamma < 1.0 else ""
    trust = ", trust_remote_code=True" if student.conditioned else ""
    return f"""```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}"{trust})
seed = torch.Generator().manual_seed(0)
image = pipe("a red apple", num_inference_steps=4, guidance_scale=0{eta}, generator=seed).images[0]
image.save("sample.png")
```"""


def _lora_usage(student: Student, teacher: str, name: str) -> str:
    scheduler = "LCMScheduler" if student.default_gamma == 1.0 else "TCDScheduler"
    return f"""```python
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained("{teacher}")
pipe.load_lora_weights("{name}", weight_name="{LORA_FILE}")
pipe.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")
```"""


def _snapshot_usage(student: Student, teacher: str, steps: list[int]) -> str:
    listed = ", ".join(f"`steps-{num_steps}`" for num_steps in steps)
    what = (
        "For stock pipelines, without the class in this folder: the same student, to be sampled at that number of "
        "steps and no other"
        if student.conditioned
        else "Snapshots of its training for stock pipelines, each best at its own number of steps"
    )
    return (
        f"{what}: {listed}. Over the teacher `{teacher}`, load `{LORA_FILE}` of that folder (`load_lora_weights`) or "
        "its `unet`, and take its `scheduler`."
    )


def _grids(student: Student) -> str:
    """The times that N steps visit, and what to pass as `timesteps` for the paper's grid or the K segments' own."""
    num_segments = 1 if student.conditioned else student.num_segments
    rows = [
        "`num_inference_steps=N` visits the default grid; for another, pass its `timesteps` instead. A student of "
        "several segments is at its best on a grid that holds all their boundaries, where N allows it: its own.\n",
        "| steps | default | paper: `timesteps=` | own segments: `timesteps=` |",
        "|---|---|---|---|",
    ]
    for num_steps in student.budgets or range(1, NUM_SEGMENTS + 1):
        default = sampling_times(num_steps)
        cells = [default, paper_times(num_steps), sampling_times(num_steps, num_segments)]
        shown = [str(cell) if cell != default or i == 0 else "as default" for i, cell in enumerate(cells)]
        rows.append(f"| {num_steps} | {' | '.join(shown)} |")
    return "\n".join(rows)


def _licence(teacher: Path) -> str | None:
    """What the front matter of the teacher's card says, where there is one."""
    card = teacher / "README.md"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---") if card.is_file() else []
    lines = parts[1].splitlines() if len(parts) > 1 else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), None)
