"""A finished student as a folder that diffusers opens without us, with a model card.

The folder is a whole pipeline with the student's weights folded in. Beside them:

- `pytorch_lora_weights.safetensors`: a LoRA student once more, to load over its teacher with diffusers; a tuned one
  is one adapter too. `kohya_lora_weights.safetensors` is the same for ComfyUI and other tools;
- `pipeline.py`: for a student conditioned on its target time, which no stock pipeline samples;
- `steps-<N>/`: for stock pipelines at N steps, an adapter (in both files) or a denoiser each, and its scheduler: the
  snapshots of a training in phases, or what a conditioned student does when it is told the times of N steps.
"""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, TCDScheduler, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from ..equations.segments import NUM_SEGMENTS, sampling_times
from ..equations.solver import time_before_noise
from ..storage import finite
from ..storage.files import forget_origin, remove_partial_of, replacing
from . import model_card, students
from .base import TARGET_TIME_WIDTH, Base
from .exported_pipeline import TargetTimePipeline
from .lora_files import KOHYA_FILE, LORA_FILE, Adapter, write_kohya, write_lora
from .students import Student
from .text_parts import write_for_transformers_4

STOCK_STEPS = (2, 3, 4, 6, 8)  # for which a conditioned student without budgets of its own is written
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "steps_offset",  # of no effect here; Stable Diffusion's pipelines warn where it is not 1
)


def export(
    student_folder: Path | str,
    base: Base,
    out: Path | str,
    card_table: str | None = None,
    snapshots: Mapping[int, Path] | None = None,
    gamma: float | None = None,
    languages: Sequence[str] = (),
) -> Path:
    """Write the student in `student_folder` to the new folder `out`, in one rename; returns `out`.

    `card_table` is Markdown for the card; `snapshots` are students to ship beside it, by the number of steps that each
    is for (a conditioned student has its own); `gamma` is what the student was tuned under, by default what suits it.
    One between 0 and 1 is the `eta` that the card's code passes. `languages` are those that it was measured in.
    Raises FileExistsError where `out` is taken, ValueError for a snapshot that is conditioned, or of a student that is.
    """
    out = Path(out)
    refuse_taken(out)
    student = students.load_student(base, student_folder)
    gamma = student.default_gamma if gamma is None else gamma
    beside = dict(sorted((snapshots or {}).items()))
    if beside and (student.conditioned or any(students.describe(source)["conditioned"] for source in beside.values())):
        raise ValueError(f"{student.folder} and its snapshots: one is conditioned on its target time, it serves alone")
    remove_partial_of(out)
    with replacing(out) as folder:
        _write_pipeline(base, student, gamma, folder)
        for num_steps, source in beside.items():  # one is in memory at a time
            _write_snapshot(base, students.load_student(base, source), folder / f"steps-{num_steps}")
        for num_steps in stock_steps(student):
            _write_told(base, student, num_steps, gamma, folder / f"steps-{num_steps}")
        forget_origin(folder)
        for licence in sorted(Path(base.teacher.path).glob("LICENSE*")):
            if licence.is_file():  # and no folder LICENSES
                shutil.copy(licence, folder)
        card = model_card.card(base, student, out.name, gamma, card_table, folder, languages)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def refuse_taken(out: Path) -> None:
    """Raise FileExistsError where something is at `out`: an export makes its folder."""
    if out.exists() or out.is_symlink():  # a link that leads nowhere is something too
        raise FileExistsError(f"{out} is there already; name a new folder to export to")


def stock_scheduler(base: Base, gamma: float) -> LCMScheduler | TCDScheduler:
    """diffusers' scheduler that walks our default grid: LCM's for gamma 1, else TCD's, whose `eta` is gamma.

    Pipelines pass it eta 0 unless they are told another. TCD's last step ends at index 0, not at x0. Raises ValueError
    where the teacher's settings make these schedulers go elsewhere than to the milestones.
    """
    teacher = base.pipeline.scheduler.config
    settings = {key: teacher[key] for key in SCHEDULE_KEYS if key in teacher}
    scheduler = (LCMScheduler if gamma == 1.0 else TCDScheduler)(**settings, original_inference_steps=NUM_SEGMENTS)
    scheduler.set_timesteps(NUM_SEGMENTS)
    expected = sampling_times(NUM_SEGMENTS)
    if scheduler.timesteps.tolist() != expected:
        raise ValueError(
            f"milestones are {expected}; with the teacher's settings {type(scheduler).__name__} goes to "
            f"{scheduler.timesteps.tolist()}: it cannot be exported for stock use"
        )
    return scheduler


def _write_pipeline(base: Base, student: Student, gamma: float, folder: Path) -> None:
    """The whole pipeline; a conditioned student's index names a class of its own: no stock one is to open it."""
    pipeline = copy.copy(base.pipeline)  # the teacher's keeps its own denoiser and scheduler
    pipeline.unet = students.merged(student, base.dtype)
    pipeline.unet.register_to_config(sample_size=base.latent_shape[-1])  # the resolution it was distilled at
    pipeline.scheduler = stock_scheduler(base, gamma)
    if student.conditioned:
        _refuse_untold(pipeline.unet)
    if "requires_safety_checker" in pipeline.config:  # it is not loaded, so it is not exported
        pipeline.register_to_config(requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    write_for_transformers_4(pipeline, folder)
    for config in folder.glob("text_encoder*/config.json"):
        # transformers loads in the stated precision and diffusers in float32: stated so, a half teacher opens in one
        _edit(config, dtype="float32")
    shutil.copy(student.folder / students.DESCRIPTION_FILE, folder)
    if student.conditioned:
        (folder / "pipeline.py").write_text(_pipeline_code(student, gamma, type(pipeline).__name__), encoding="utf-8")
        _edit(folder / "model_index.json", _class_name=["pipeline", "TargetTimePipeline"])
    elif lora := students.as_one_lora(student):
        _write_adapter(base, lora, folder)


def _refuse_untold(denoiser: UNet2DConditionModel) -> None:
    """Give `denoiser` an embedding of classes that is all zeros: with `class_labels` it computes what it did before.

    Without, diffusers raises ValueError. So does every tool that tells models by their weights: none knows one like it.
    A pipeline that does not say where its jumps end would otherwise run this one, and draw something else in silence.
    """
    first = denoiser.time_embedding.linear_1
    embedding = TimestepEmbedding(first.in_features, first.out_features).requires_grad_(False)
    for parameter in embedding.parameters():
        parameter.zero_()
    denoiser.class_embedding = embedding.to(first.weight.device, first.weight.dtype)
    denoiser.register_to_config(class_embed_type="timestep")


def _pipeline_code(student: Student, gamma: float, stock_class: str) -> str:
    """Return the code of the pipeline that tells a conditioned student its target times, as a subclass of its own."""
    code, learned = TargetTimePipeline.code, TargetTimePipeline.budgets
    code = code.replace("StableDiffusionXLPipeline", stock_class)
    code = code.replace(f"budgets = {learned}", f"budgets = {student.budgets or learned}")
    return code.replace("eta = 0.0", f"eta = {gamma if gamma < 1.0 else 0.0}")


def _edit(file: Path, **settings: Any) -> None:
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(known | settings, indent=2) + "\n", encoding="utf-8")


def _write_snapshot(base: Base, student: Student, folder: Path) -> None:
    """Adapter or denoiser, and the scheduler to sample it with."""
    stock_scheduler(base, student.default_gamma).save_pretrained(folder / "scheduler")
    if lora := students.as_one_lora(student):
        _write_adapter(base, lora, folder)
    else:
        students.merged(student, base.dtype).save_pretrained(folder / "unet")


def _write_adapter(base: Base, lora: Adapter, folder: Path) -> None:
    """For diffusers, and for the tools that read kohya's layout."""
    write_lora(*lora, folder / LORA_FILE)
    write_kohya(*lora, base, folder / KOHYA_FILE)


def stock_steps(student: Student) -> list[int]:
    """The numbers of steps at which a conditioned student is written for stock pipelines too; none for others."""
    return list(student.budgets or STOCK_STEPS) if student.conditioned else []


def _write_told(base: Base, student: Student, num_steps: int, gamma: float, folder: Path) -> None:
    """A conditioned student for N steps alone, as one that is told nothing: a stock denoiser or adapter of its own."""
    stock_scheduler(base, gamma).save_pretrained(folder / "scheduler")
    up, down = told_update(student, num_steps, gamma)
    lora = students.as_one_lora(student)
    if lora and lora[0].r >= num_steps:
        settings, tensors = lora
        layer, spare = "time_embedding.linear_1", settings.r - num_steps
        settings.target_modules = {*settings.target_modules, layer}
        tensors[f"{layer}.lora_A.weight"] = F.pad(down, (0, 0, 0, spare))
        tensors[f"{layer}.lora_B.weight"] = F.pad(up, (0, spare))
        _write_adapter(base, lora, folder)
        return
    denoiser = students.merged(student, torch.float32)
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
