"""A finished student as a folder that diffusers opens without us, with a model card.

The folder is a whole pipeline with the student's weights folded in. Beside them:

- `pytorch_lora_weights.safetensors`: a LoRA student once more, to load over its teacher;
- `pipeline.py`: for a student conditioned on its target time, which no stock pipeline samples;
- `steps-<N>/`: for stock pipelines at N steps, an adapter or a denoiser each, and its scheduler: the snapshots of a
  training in phases, or what a conditioned student does when it is told the times of N steps.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, TCDScheduler
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from . import adapters, exported_pipeline, finite
from .adapters import LORA_FILE, Student
from .atomic import remove_partial_of, replacing
from .bases import TARGET_TIME_WIDTH, Base
from .checkpoint import forget_origin, public
from .equations.segments import NUM_SEGMENTS, paper_times, sampling_times
from .equations.solver import time_before_noise

STOCK_STEPS = (2, 3, 4, 6, 8)  # for which a conditioned student without budgets of its own is written
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


def export(
    student_folder: Path | str,
    base: Base,
    out: Path | str,
    card_table: str | None = None,
    snapshots: Mapping[int, Path] | None = None,
    gamma: float | None = None,
) -> Path:
    """Write the student in `student_folder` to the new folder `out`, in one rename; returns `out`.

    `card_table` is Markdown for the card; `snapshots` are students to ship beside it, by the number of steps that each
    is for (a conditioned student has its own); `gamma` is what the student was tuned under, by default what suits it.
    One between 0 and 1 is the `eta` that the card's code passes.
    Raises FileExistsError where `out` is taken, ValueError for a snapshot that is conditioned, or of a student that is.
    """
    out = Path(out)
    refuse_taken(out)
    student = adapters.load_student(base, student_folder)
    gamma = student.default_gamma if gamma is None else gamma
    beside = dict(sorted((snapshots or {}).items()))
    if beside and (student.conditioned or any(adapters.describe(source)["conditioned"] for source in beside.values())):
        raise ValueError(f"{student.folder} and its snapshots: one is conditioned on its target time, it serves alone")
    remove_partial_of(out)
    with replacing(out) as folder:
        _write_pipeline(base, student, gamma, folder)
        for num_steps, source in beside.items():  # one is in memory at a time
            _write_snapshot(base, adapters.load_student(base, source), folder / f"steps-{num_steps}")
        for num_steps in stock_steps(student):
            _write_told(base, student, num_steps, gamma, folder / f"steps-{num_steps}")
        forget_origin(folder)
        for licence in sorted(Path(base.teacher.path).glob("LICENSE*")):
            shutil.copy(licence, folder)
        card = _card(base, student, out.name, gamma, card_table, list(beside))
        (folder / "README.md").write_text(card)
    return out


def refuse_taken(out: Path) -> None:
    """Raise FileExistsError where something is at `out`: an export makes its folder."""
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a new folder to export to")


def stock_scheduler(base: Base, gamma: float) -> LCMScheduler | TCDScheduler:
    """diffusers' scheduler that walks our default grid: LCM's for gamma 1, else TCD's, whose `eta` is gamma.

    Pipelines pass it eta 0 unless they are told another. TCD's last step ends at index 0, not at x0. Raises ValueError
    where the teacher's number of times puts the milestones elsewhere than these schedulers can.
    """
    teacher = base.pipeline.scheduler.config
    settings = {key: teacher[key] for key in SCHEDULE_KEYS if key in teacher}
    scheduler = (LCMScheduler if gamma == 1.0 else TCDScheduler)(**settings, original_inference_steps=NUM_SEGMENTS)
    scheduler.set_timesteps(NUM_SEGMENTS)
    expected = sampling_times(NUM_SEGMENTS, num_times=base.schedule.num_times)
    if scheduler.timesteps.tolist() != expected:
        raise ValueError(
            f"a teacher of {base.schedule.num_times} times has milestones {expected}; "
            f"{type(scheduler).__name__} goes to {scheduler.timesteps.tolist()}: it cannot be exported for stock use"
        )
    return scheduler


def _write_pipeline(base: Base, student: Student, gamma: float, folder: Path) -> None:
    """The whole pipeline; a conditioned student's index names a class of its own: no stock one is to open it."""
    pipeline = copy.copy(base.pipeline)  # the teacher's keeps its own denoiser and scheduler
    pipeline.unet = adapters.merged(student, base.dtype)
    pipeline.unet.register_to_config(sample_size=base.latent_shape[-1])  # the resolution it was distilled at
    pipeline.scheduler = stock_scheduler(base, gamma)
    pipeline.save_pretrained(folder)
    for config in folder.glob("text_encoder*/config.json"):
        # transformers loads in the stated precision and diffusers in float32: stated so, a half teacher opens in one
        _edit(config, dtype="float32")
    shutil.copy(student.folder / adapters.DESCRIPTION_FILE, folder)
    lora = student.folder / LORA_FILE
    if student.conditioned:
        code = Path(exported_pipeline.__file__).read_text()
        (folder / "pipeline.py").write_text(code.replace("StableDiffusionXLPipeline", type(pipeline).__name__))
        _edit(folder / "model_index.json", _class_name=["pipeline", "TargetTimePipeline"])
    elif lora.is_file() and not student.tuned:
        shutil.copy(lora, folder)


def _edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings, indent=2) + "\n")


def _write_snapshot(base: Base, student: Student, folder: Path) -> None:
    """Adapter or denoiser, and the scheduler to sample it with."""
    stock_scheduler(base, student.default_gamma).save_pretrained(folder / "scheduler")
    lora = student.folder / LORA_FILE
    if lora.is_file():
        shutil.copy(lora, folder)
    else:
        adapters.merged(student, base.dtype).save_pretrained(folder / "unet")


def stock_steps(student: Student) -> list[int]:
    """The numbers of steps at which a conditioned student is written for stock pipelines too; none for others."""
    return list(student.budgets or STOCK_STEPS) if student.conditioned else []


def _write_told(base: Base, student: Student, num_steps: int, gamma: float, folder: Path) -> None:
    """A conditioned student for N steps alone, as one that is told nothing: a stock denoiser or adapter of its own."""
    stock_scheduler(base, gamma).save_pretrained(folder / "scheduler")
    up, down = told_update(student, num_steps, gamma)
    lora = student.folder / LORA_FILE
    settings, tensors = adapters.read_lora(lora) if lora.is_file() and not student.tuned else (None, {})
    if settings and settings.r >= num_steps:
        layer, spare = "time_embedding.linear_1", settings.r - num_steps
        settings.target_modules = {*settings.target_modules, layer}
        tensors[f"{layer}.lora_A.weight"] = F.pad(down, (0, 0, 0, spare))
        tensors[f"{layer}.lora_B.weight"] = F.pad(up, (0, spare)) * (settings.r / settings.lora_alpha)
        adapters.write_lora(settings, tensors, folder / LORA_FILE)
        return
    denoiser = adapters.merged(student, torch.float32)
    denoiser.time_embedding.linear_1.weight.data += up @ down
    denoiser.time_embedding.cond_proj = None
    denoiser.register_to_config(time_cond_proj_dim=None)
    nn.Module.to(denoiser, base.dtype)
    finite.refuse_weights(denoiser.state_dict(), f"the student for {num_steps} steps")
    denoiser.save_pretrained(folder / "unet")


@torch.no_grad()
def told_update(student: Student, num_steps: int, gamma: float) -> tuple[Tensor, Tensor]:
    """up (width, N) and down (N, D): what the first layer over t's sinusoids gains where the target times are known.

    Over N steps the target is a function of t, and the layer L is linear: with e_i (D,) the sinusoids of the i-th time
    and p_i (D,) the projected ones of its target, L (e_i + p_i) = (L + up down) e_i for every i, where up holds the
    L p_i and down is the pseudo-inverse of e. Exact, as the sinusoids of distinct times are independent while N <= D.
    Raises ValueError where they are not.
    """
    times = torch.tensor(sampling_times(num_steps))
    targets = time_before_noise(torch.cat([times[1:], torch.zeros(1, dtype=times.dtype)]), gamma)
    embedding = student.denoiser.time_embedding
    device = embedding.linear_1.weight.device
    seen = student.denoiser.time_proj(times.to(device)).double()
    if torch.linalg.matrix_rank(seen) < num_steps:
        raise ValueError(f"{student.folder}: {seen.shape[1]} sinusoids do not tell {num_steps} times apart")
    told = get_timestep_embedding(targets.to(device), TARGET_TIME_WIDTH).double()
    projected = told @ embedding.cond_proj.weight.double().T
    up = embedding.linear_1.weight.double() @ projected.T
    return up.float().contiguous(), torch.linalg.pinv(seen).T.float().contiguous()


# The card


def _card(base: Base, student: Student, name: str, gamma: float, table: str | None, snapshots: list[int]) -> str:
    """README.md: what it is, code that runs, grids, measurements, licence."""
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
    if beside := snapshots or stock_steps(student):
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
    lines = card.read_text().split("---")[1].splitlines() if card.is_file() and "---" in card.read_text() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), None)
