"""Export a finished student for other tools: ComfyUI, kohya's sd-scripts and its readers, PEFT.

One file is for one number of steps if the student is conditioned on its target time, since no tool passes that: the
target times of N steps are merged in. Other students are one file for every number, and one for each snapshot.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import ModelMixin

from ..storage.files import remove_partial_of, replacing, write_json
from ..storage.tensors import write_tensors
from ..training.progress import tell
from . import checkpoint_file, client_card, comfyui, students
from .base import Base
from .checkpoint_file import write_checkpoint
from .client_card import Row
from .client_files import module_of, write_comfyui, write_kohya, write_peft
from .export import (
    AS_TRAINED,
    STOCK_STEPS,
    Form,
    adapters_with,
    begin,
    copy_licences,
    denoiser_for_steps,
    export,
    refuse_existing,
    stock_steps,
    tracked,
    with_target_times,
)
from .grids import SamplingGrid
from .lora_files import Adapter
from .students import Student

CLIENTS = ("comfyui", "kohya", "peft")
ALL = "all"


@dataclass(frozen=True)
class Part:
    """A student as one file: `suffix` of its name, the numbers of steps that it is for, and how it is sampled.

    It is adapters over the teacher by component, or if there are none a denoiser, which is made in a precision.
    `prediction_type` is what its network predicts.
    """

    suffix: str
    steps: tuple[int, ...]
    grid: SamplingGrid
    gamma: float
    prediction_type: str
    adapters: dict[str, Adapter] | None
    denoiser: Callable[[torch.dtype], ModelMixin]


def export_for(
    client: str,
    student_folder: Path | str,
    base: Base,
    out: Path | str,
    card_table: str | None = None,
    snapshots: Mapping[int, Path] | None = None,
    gamma: float | None = None,
    languages: Sequence[str] = (),
    form: Form = AS_TRAINED,
) -> Path:
    """Write the student in `student_folder` for a `client` to the new folder `out`, in one rename, and return `out`.

    Arguments and errors are those of `export.export`. Raise ValueError too for what the client does not read: a family,
    a gamma, whole weights.
    """
    out, student, gamma, sources = begin(student_folder, base, out, snapshots, gamma)
    refuse(client, student, base, gamma, form)
    name = form.name or out.name
    with replacing(out) as folder:
        folder.mkdir()
        rows = []
        total = len(stock_steps(student)) or 1 + len(sources)
        for part in tracked(parts(base, student, sources, gamma, form), total):  # one is in memory at a time
            WRITE[client](base, part, folder, name.rpartition("/")[2], form)
            rows.append(Row(part.suffix, part.steps, part.gamma, part.grid, _outside_blocks(base, part)))
        copy_licences(base, folder)
        is_lora = not _is_merged(student, form)
        card = client_card.card(client, base, student, name, rows, is_lora, card_table, folder, languages)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def refuse(client: str, student: Student, base: Base, gamma: float, form: Form) -> None:
    """Raise ValueError for a student that `client` does not read, with what to export instead."""
    merged = _is_merged(student, form)
    if client == "comfyui":
        comfyui.refuse(base, gamma)
        if merged and not comfyui.nodes_of(base).reads_denoisers:
            raise ValueError(
                f"ComfyUI does not read whole denoisers of family {base.family} in diffusers' layout: "
                + ("leave --merge out" if form.merge else "export for diffusers")
            )
        return
    if client == "kohya" and merged:
        checkpoint_file.refuse(base)
        _refuse_own_prediction(base, student)
        return
    if merged:
        why = "--merge leaves none" if form.merge else "this student was trained in full, without one"
        raise ValueError(f"{client} is for adapters, and {why}: export for comfyui or diffusers")
    if client == "kohya" and base.kohya_version is None:
        raise ValueError(
            f"kohya's tools have no names for the layers of family {base.family}: export for "
            + ("comfyui, diffusers or peft" if base.comfyui else "diffusers or peft")
        )
    if client == "kohya":
        _refuse_own_prediction(base, student)


def _refuse_own_prediction(base: Base, student: Student) -> None:
    """Raise ValueError for a student that predicts something else than its teacher, for tools that cannot be told."""
    if base.predicts_otherwise(student.denoiser):
        raise ValueError(
            "this student predicts x0 and its teacher does not, which no file of kohya's tools can say: they would "
            f"read its output as {base.prediction_type}. Export for "
            + ("comfyui, whose workflow says it, diffusers or peft" if base.comfyui else "diffusers or peft")
        )


def _is_merged(student: Student, form: Form) -> bool:
    """Return whether the student is written whole."""
    return form.merge or students.combined_lora(student) is None


def parts(base: Base, student: Student, snapshots: Mapping[int, Path], gamma: float, form: Form) -> Iterator[Part]:
    """Yield the files of a student: one, then its snapshots; or one for each number of steps."""
    if student.conditioned:
        for num_steps in stock_steps(student):
            yield _for_steps(base, student, num_steps, gamma, form)
        return
    others = tuple(steps for steps in STOCK_STEPS if steps not in snapshots)
    yield _whole(base, student, "", student.budgets or others, gamma, form)
    for num_steps, source in snapshots.items():
        snapshot = students.load_student(base, source)
        yield _whole(base, snapshot, f"-{num_steps}-steps", (num_steps,), snapshot.default_gamma, form)


def _whole(base: Base, student: Student, suffix: str, steps: tuple[int, ...], gamma: float, form: Form) -> Part:
    lora = None if form.merge else students.combined_lora(student)
    return Part(
        suffix=suffix,
        steps=steps,
        grid=student.grid,
        gamma=gamma,
        prediction_type=base.prediction_of(student.denoiser),
        adapters=None if lora is None else adapters_with(base, lora),
        denoiser=lambda dtype: students.merged(student, dtype),
    )


def _for_steps(base: Base, student: Student, num_steps: int, gamma: float, form: Form) -> Part:
    adapters = _whole(base, student, "", (), gamma, form).adapters
    if adapters is not None:
        lora = adapters[base.denoiser_part]
        adapters[base.denoiser_part] = with_target_times(base, student, lora, num_steps, gamma)
    return Part(
        suffix=f"-{num_steps}-steps",
        steps=(num_steps,),
        grid=student.grid,
        gamma=gamma,
        prediction_type=base.prediction_of(student.denoiser),
        adapters=adapters,
        denoiser=lambda dtype: denoiser_for_steps(base, student, num_steps, gamma, dtype),
    )


def _outside_blocks(base: Base, part: Part) -> tuple[str, ...]:
    """Return the layers of a part's adapter that are in no block of the denoiser."""
    _, tensors = part.adapters[base.denoiser_part] if part.adapters else (None, {})
    return tuple(sorted({module_of(key) for key in tensors if "block" not in key}))


# ---- clients ----


def _write_comfyui(base: Base, part: Part, folder: Path, name: str, form: Form) -> None:
    """Write a part to the folder of its kind, named as in ComfyUI's `models`, and a workflow a number of steps."""
    file = f"{name}{part.suffix}.safetensors"
    place = folder / client_card.comfyui_folder(part.adapters is not None)
    place.mkdir(exist_ok=True)
    if part.adapters is not None:
        write_comfyui(part.adapters, base, place / file, form.lora_dtype)
    else:
        write_tensors(place / file, part.denoiser(form.denoiser_dtype(base)).state_dict())
    (folder / "workflows").mkdir(exist_ok=True)
    for steps in part.steps:
        is_lora = part.adapters is not None
        graph = comfyui.workflow(base, file, is_lora, steps, part.grid, part.gamma, part.prediction_type)
        write_json(folder / "workflows" / f"{name}-{steps}-steps.json", graph)


def _write_kohya(base: Base, part: Part, folder: Path, name: str, form: Form) -> None:
    file = folder / f"{name}{part.suffix}.safetensors"
    if part.adapters is not None:
        write_kohya(part.adapters, base, file, form.lora_dtype)
    else:
        write_checkpoint(part.denoiser(form.denoiser_dtype(base)), base, file, form.dtype)


def _write_peft(base: Base, part: Part, folder: Path, name: str, form: Form) -> None:
    """Write a part and the scheduler that samples it."""
    assert part.adapters is not None
    place = folder / f"steps-{part.steps[0]}" if part.suffix else folder
    place.mkdir(exist_ok=True)
    write_peft(part.adapters, base, place, form.lora_dtype)
    base.stock_scheduler(part.gamma, part.grid, part.prediction_type).save_pretrained(place / "scheduler")


WRITE: dict[str, Callable[[Base, Part, Path, str, Form], None]] = {
    "comfyui": _write_comfyui,
    "kohya": _write_kohya,
    "peft": _write_peft,
}


# ---- several formats ----


def export_as(
    formats: Sequence[str],
    student_folder: Path | str,
    base: Base,
    out: Path | str,
    card_table: str | None = None,
    snapshots: Mapping[int, Path] | None = None,
    gamma: float | None = None,
    languages: Sequence[str] = (),
    form: Form = AS_TRAINED,
) -> Path:
    """Write the student in one format to the new folder `out`, or in several to a folder each in it.

    `ALL` stands for those that the student can be in; a line is printed for each other. Arguments and errors are those
    of `export_for`.
    """
    out = Path(out)
    refuse_existing(out)
    has_folders = ALL in formats or len(formats) > 1  # the same places, however many `all` turns out to be
    if has_folders:  # before the first of them is written, which may take minutes
        formats = list(_possible(formats, students.load_student(base, student_folder), base, gamma, form))

    def write(one: str, place: Path, own: Form) -> Path:
        common = (student_folder, base, place, card_table, snapshots, gamma, languages, own)
        return export(*common) if one == "diffusers" else export_for(one, *common)

    if not has_folders:
        return write(formats[0], out, form)
    remove_partial_of(out)
    with replacing(out) as folder:
        folder.mkdir()
        for one in formats:
            is_opened = one in ("diffusers", "peft")  # by the path of its folder
            write(one, folder / one, replace(form, name=f"{out.name}/{one}" if is_opened else out.name))
    return out


def _possible(formats: Sequence[str], student: Student, base: Base, gamma: float | None, form: Form) -> Iterator[str]:
    """Yield the formats to write: those named, or with `ALL` those that the student can be in, and print why no others.

    Raise ValueError for one that is named and that the student cannot be in.
    """
    gamma = student.default_gamma if gamma is None else gamma
    takes_all = ALL in formats
    for client in ("diffusers", *CLIENTS) if takes_all else formats:
        try:
            if client in CLIENTS:
                refuse(client, student, base, gamma, form)
        except ValueError as error:
            if not takes_all:
                raise
            tell(f"--format {client}:", f"left out: {error}")
            continue
        yield client
