"""Export a finished student as a folder that diffusers opens without this package, with a model card.

The folder is a complete pipeline with the student's weights merged into the denoiser. It also has:

- `pytorch_lora_weights.safetensors`: a LoRA student as an adapter, to load over its teacher with diffusers, if its
  pipeline loads adapters; a tuned one is one adapter too, and a LoRA of the teacher's own is in it.
  `kohya_lora_weights.safetensors` is the same adapter for ComfyUI and other tools;
- `pipeline.py`: for a student conditioned on its target time, which no stock pipeline samples;
- `steps-<N>/`: for stock pipelines at N steps, an adapter (in both files) or a denoiser each, and its scheduler. These
  are the snapshots of a training in phases, or a conditioned student with the target times of N steps merged in.
"""

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ..equations.segments import sampling_times
from ..equations.solver import time_before_noise
from ..storage import finite
from ..storage.files import forget_origin, remove_partial_of, replacing
from ..training.console import plain_console
from . import model_card, students, teacher_lora
from .base import Base
from .client_files import KOHYA_FILE, write_kohya
from .exported_pipeline import TargetTimePipeline
from .lora_files import LORA_FILE, Adapter, combined, write_lora
from .students import Student
from .text_parts import write_for_transformers_4

Part = TypeVar("Part")
STOCK_STEPS = (2, 3, 4, 6, 8)  # of the folders steps-N of a conditioned student without budgets
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)  # in which stock pipelines are run


@dataclass(frozen=True)
class Form:
    """In what form a student is written.

    `dtype` is that of its weights; by default adapters are float32, as trained, and whole denoisers are in the
    teacher's precision. With `merge` there are no adapters, but whole denoisers. `name` is the model's, by default that
    of the folder.
    """

    dtype: torch.dtype | None = None
    merge: bool = False
    name: str = ""

    @property
    def lora_dtype(self) -> torch.dtype:
        return self.dtype or torch.float32

    def denoiser_dtype(self, base: Base) -> torch.dtype:
        return self.dtype or base.dtype


AS_TRAINED = Form()


def export(
    student_folder: Path | str,
    base: Base,
    out: Path | str,
    card_table: str | None = None,
    snapshots: Mapping[int, Path] | None = None,
    gamma: float | None = None,
    languages: Sequence[str] = (),
    form: Form = AS_TRAINED,
) -> Path:
    """Write the student in `student_folder` to the new folder `out`, in one rename, and return `out`.

    `card_table` is Markdown for the card; `snapshots` are students to export with it, by the number of steps that each
    is for; `gamma` is that of the student's tuning, by default the one for its kind. Between 0 and 1 it is the `eta`
    that the card's code passes. `languages` are those of the measured prompts. Raise FileExistsError if `out` exists,
    ValueError if there are snapshots and the student or a snapshot is conditioned.
    """
    out, student, gamma, sources = begin(student_folder, base, out, snapshots, gamma)
    with replacing(out) as folder:
        _write_pipeline(base, student, gamma, folder, form)
        for num_steps, source in tracked(sources.items(), len(sources)):  # one is in memory at a time
            _write_snapshot(base, students.load_student(base, source), folder / f"steps-{num_steps}", form)
        counts = stock_steps(student)
        for num_steps in tracked(counts, len(counts)):
            _write_for_steps(base, student, num_steps, gamma, folder / f"steps-{num_steps}", form)
        forget_origin(folder)
        copy_licences(base, folder)
        card = model_card.card(base, student, form.name or out.name, gamma, card_table, folder, languages)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def begin(
    student_folder: Path | str, base: Base, out: Path | str, snapshots: Mapping[int, Path] | None, gamma: float | None
) -> tuple[Path, Student, float, dict[int, Path]]:
    """Return what an export to `out` needs: its path, free, the loaded student, its gamma, its snapshots in order.

    Raise as `export`.
    """
    out = Path(out)
    refuse_existing(out)
    student = students.load_student(base, student_folder)
    sources = checked_snapshots(student, snapshots)
    remove_partial_of(out)
    return out, student, student.default_gamma if gamma is None else gamma, sources


def tracked(parts: Iterable[Part], total: int) -> Iterable[Part]:
    """Yield `parts`, with a bar and an ETA on a terminal's standard error: each may be a whole denoiser."""
    return track(parts, "parts", total=total, console=plain_console(stderr=True), transient=True)


def checked_snapshots(student: Student, snapshots: Mapping[int, Path] | None) -> dict[int, Path]:
    """Return the snapshots in the order of their numbers of steps.

    Raise ValueError if there are any and one of them, or the student, is conditioned.
    """
    sources = dict(sorted((snapshots or {}).items()))
    if sources and (student.conditioned or any(students.describe(one)["conditioned"] for one in sources.values())):
        raise ValueError(
            f"{student.folder} and its snapshots: one is conditioned on its target time; export it without snapshots"
        )
    return sources


def copy_licences(base: Base, folder: Path) -> None:
    """Copy the teacher's licence files to `folder`."""
    for licence in sorted(Path(base.teacher.path).glob("LICENSE*")):
        if licence.is_file():  # not a folder LICENSES
            shutil.copy(licence, folder)


def refuse_existing(out: Path) -> None:
    """Raise FileExistsError if `out` exists: an export creates its folder."""
    if out.exists() or out.is_symlink():  # exists() is False for a broken link
        raise FileExistsError(f"{out} is there already; name a new folder to export to")


def _write_pipeline(base: Base, student: Student, gamma: float, folder: Path, form: Form) -> None:
    """Write the complete pipeline. A conditioned student's index names its own class, so that no stock one opens it."""
    pipeline = copy.copy(base.pipeline)  # base.pipeline keeps the teacher's denoiser and scheduler
    has_class = student.conditioned and base.has_target_time_pipeline
    dtype = form.denoiser_dtype(base)
    if student.conditioned and not has_class:
        denoiser = denoiser_for_steps(base, student, model_card.example_steps(student), gamma, dtype)
    else:
        denoiser = students.merged(student, dtype)
    if not base.stock_size:
        denoiser.register_to_config(sample_size=base.latent_shape[-1])  # the resolution it was distilled at
    if has_class:
        _require_class_labels(denoiser)
    setattr(pipeline, base.denoiser_part, denoiser)
    pipeline.scheduler = base.stock_scheduler(gamma, student.grid, base.prediction_of(student.denoiser))
    if "requires_safety_checker" in pipeline.config:  # it is not loaded, so it is not exported
        pipeline.register_to_config(requires_safety_checker=False)
    if "is_distilled" in pipeline.config:  # its pipeline guides no second time, whatever the scale
        pipeline.register_to_config(is_distilled=True)
    pipeline.save_pretrained(folder)
    write_for_transformers_4(pipeline, folder)
    for config in folder.glob("text_encoder*/config.json"):
        # transformers loads in the precision of config.json and diffusers in float32: float32 here gives the pipeline
        # of a half-precision teacher one precision
        _edit(config, dtype="float32")
    shutil.copy(student.folder / students.DESCRIPTION_FILE, folder)
    _edit(folder / students.DESCRIPTION_FILE, gamma=gamma)  # which TCD's scheduler does not say
    if has_class:
        (folder / "pipeline.py").write_text(_pipeline_code(student, gamma, type(pipeline).__name__), encoding="utf-8")
        _edit(folder / "model_index.json", _class_name=["pipeline", "TargetTimePipeline"])
    elif not student.conditioned and (lora := _adapter(base, student, form)):
        _write_adapter(base, student, lora, folder, form)


def _require_class_labels(denoiser: UNet2DConditionModel) -> None:
    """Add a class embedding of zeros to `denoiser`, which then needs `class_labels` and computes the same with them.

    Without them diffusers raises ValueError, and so does every tool that recognises models by their weights. Otherwise
    a pipeline that passes no target times would run this denoiser and silently sample other pictures.
    """
    first = denoiser.time_embedding.linear_1
    embedding = TimestepEmbedding(first.in_features, first.out_features).requires_grad_(False)
    for parameter in embedding.parameters():
        parameter.zero_()
    denoiser.class_embedding = embedding.to(first.weight.device, first.weight.dtype)
    denoiser.register_to_config(class_embed_type="timestep")


def _pipeline_code(student: Student, gamma: float, stock_class: str) -> str:
    """Return the code of TargetTimePipeline for this student, as a subclass of `stock_class`."""
    code, budgets = TargetTimePipeline.code, TargetTimePipeline.budgets
    code = code.replace("StableDiffusionXLPipeline", stock_class)
    code = code.replace(f"budgets = {budgets}", f"budgets = {student.budgets or budgets}")
    return code.replace("eta = 0.0", f"eta = {gamma if gamma < 1.0 else 0.0}")


def _edit(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | settings, indent=2) + "\n", encoding="utf-8")


def _write_snapshot(base: Base, student: Student, folder: Path, form: Form) -> None:
    """Write a snapshot's adapter or denoiser, and its scheduler."""
    prediction = base.prediction_of(student.denoiser)
    base.stock_scheduler(student.default_gamma, student.grid, prediction).save_pretrained(folder / "scheduler")
    if lora := _adapter(base, student, form):
        _write_adapter(base, student, lora, folder, form)
    else:
        students.merged(student, form.denoiser_dtype(base)).save_pretrained(folder / base.denoiser_part)


def _adapter(base: Base, student: Student, form: Form) -> Adapter | None:
    """Return the student as one adapter over its teacher.

    None for a student trained in full or to be merged, and where the stock pipeline loads no adapters.
    """
    return students.combined_lora(student) if base.loads_adapters and not form.merge else None


def adapters_with(base: Base, lora: Adapter) -> dict[str, Adapter]:
    """Return the adapters over the checkpoint `teacher.path`, by component: `lora`, with the teacher's own LoRA in it.

    One file serves for both.
    """
    adapters = teacher_lora.adapters(base.pipeline, base.teacher) if base.teacher.lora else {}
    own = [adapters[base.denoiser_part]] if base.denoiser_part in adapters else []
    return adapters | {base.denoiser_part: combined([*own, lora]) if own else lora}


def _write_adapter(base: Base, student: Student, lora: Adapter, folder: Path, form: Form) -> None:
    """Write an adapter of `student` for diffusers, and in kohya's layout for tools that do not read diffusers'.

    Not in kohya's where the student predicts something else than its teacher, which such a file cannot say.
    """
    adapters = adapters_with(base, lora)
    write_lora(adapters, folder / LORA_FILE, form.lora_dtype)
    if base.predicts_otherwise(student.denoiser):
        return
    if base.comfyui is not None and not base.comfyui.reads_adapters:
        write_kohya(adapters, base, folder / KOHYA_FILE, form.lora_dtype)


def stock_steps(student: Student) -> list[int]:
    """Return the numbers of steps for which a conditioned student has folders steps-N; none for other students."""
    return list(student.budgets or STOCK_STEPS) if student.conditioned else []


def _write_for_steps(base: Base, student: Student, num_steps: int, gamma: float, folder: Path, form: Form) -> None:
    """Write a conditioned student for exactly N steps as a stock adapter or denoiser, which takes no target time."""
    prediction = base.prediction_of(student.denoiser)
    base.stock_scheduler(gamma, prediction_type=prediction).save_pretrained(folder / "scheduler")
    lora = _adapter(base, student, form)
    if lora and lora[0].r >= num_steps:
        _write_adapter(base, student, with_target_times(base, student, lora, num_steps, gamma), folder, form)
        return
    denoiser = denoiser_for_steps(base, student, num_steps, gamma, form.denoiser_dtype(base))
    denoiser.save_pretrained(folder / base.denoiser_part)


def with_target_times(base: Base, student: Student, lora: Adapter, num_steps: int, gamma: float) -> Adapter:
    """Return `lora` with the target times of N steps in one more module, whose rank is N if that is above its own."""
    up, down = target_time_update(base, student, num_steps, gamma)
    settings, tensors = copy.copy(lora[0]), dict(lora[1])
    layer, spare = f"{base.time_layer}.{base.time_input}", max(settings.r - num_steps, 0)
    settings.target_modules = {*settings.target_modules, layer}
    if num_steps > settings.r:
        settings.rank_pattern = settings.alpha_pattern = {layer: num_steps}
    tensors[f"{layer}.lora_A.weight"] = F.pad(down, (0, 0, 0, spare))
    tensors[f"{layer}.lora_B.weight"] = F.pad(up, (0, spare))
    return settings, tensors


def denoiser_for_steps(base: Base, student: Student, num_steps: int, gamma: float, dtype: torch.dtype) -> ModelMixin:
    """Return a conditioned student's denoiser for exactly N steps, without target time, in `dtype`."""
    up, down = target_time_update(base, student, num_steps, gamma)
    denoiser = students.merged(student, torch.float32)
    embedding = denoiser.get_submodule(base.time_layer)
    embedding.get_submodule(base.time_input).weight.data += up @ down
    embedding.cond_proj = None
    if "time_cond_proj_dim" in denoiser.config:
        denoiser.register_to_config(time_cond_proj_dim=None)
    nn.Module.to(denoiser, dtype)
    finite.refuse_weights(denoiser.state_dict(), f"the student for {num_steps} steps")
    return denoiser


@torch.no_grad()
def target_time_update(base: Base, student: Student, num_steps: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Return up (width, N) and down (N, D): up @ down merges the target times of N steps into the time embedding.

    Over N steps the target is a function of t, and the first layer L over t's sinusoids is linear: with e_i (D,) the
    sinusoids of the i-th time and p_i (D,) the projected ones of its target, L (e_i + p_i) = (L + up down) e_i for
    every i, where up holds the L p_i and down e_i is the i-th unit vector. This is exact, since the sinusoids of
    distinct times are linearly independent for N <= D. Stock pipelines that round times are run in one precision or
    another: down takes the sinusoids of the rounded times to the same vectors, by the pseudo-inverse over all of them.
    Raise ValueError if the N sinusoids are not independent.
    """
    times = torch.tensor(sampling_times(num_steps))
    targets = time_before_noise(torch.cat([times[1:], torch.zeros(1, dtype=times.dtype)]), gamma)
    embedding = student.denoiser.get_submodule(base.time_layer)
    layer = embedding.get_submodule(base.time_input)
    device = layer.weight.device
    exact, *rounded = (base.time_sinusoids(student.denoiser, times.to(device), one).double() for one in PRECISIONS)
    if torch.linalg.matrix_rank(exact) < num_steps:
        raise ValueError(f"{student.folder}: {exact.shape[1]} sinusoids of {num_steps} times are not independent")
    sinusoids = torch.cat([exact, *(one for one in rounded if not one.equal(exact))])  # (M N, D) of M precisions
    down = torch.linalg.pinv(sinusoids).unflatten(1, (-1, num_steps)).sum(1).T
    target_sinusoids = base.target_time_sinusoids(targets.to(device)).double()
    projected = target_sinusoids @ embedding.cond_proj.weight.double().T
    up = layer.weight.double() @ projected.T
    return up.float().contiguous(), down.float().contiguous()
