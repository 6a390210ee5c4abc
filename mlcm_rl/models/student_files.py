"""Students from elsewhere, written as folders of ours: runs' students, exports, published LoRAs and denoisers.

A LoRA may have diffusers' names, kohya's in either spelling of the blocks, or PEFT's; what it adds to every weight is
what diffusers' own reader adds. It becomes one adapter of the largest rank, with every scale inside B.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..equations.prediction import X0
from ..recipe import Full, Lora, student_sources
from ..recipe.families import layout_of
from ..recipe.start import StudentSource
from ..recipe.student_sources import Found
from ..storage import finite
from ..storage.files import public, read_json, replacing, write_json
from ..storage.manifest import verify
from ..storage.tensors import misfits, read_shapes, read_tensors, write_tensors
from ..storage.untrusted import first_few
from ..training.progress import tell
from . import students, teacher_lora, teachers
from .base import Base
from .gammas import own_gamma
from .grids import MILESTONES
from .lora_files import LORA_FILE, Adapter, combined, read_lora, write_lora
from .quantised import is_quantised

OF_TUNING = ("preference", "tuned_steps")  # keys of student.json
CLASS_LABELS = "class_embedding."  # weights of zeros that `mlcm export` adds to a conditioned student's denoiser


def take_in(base: Base, source: StudentSource, out: Path) -> None:
    """Write the student that `source` names to the folder `out`, as a distilled student of `base`, in one rename.

    Raise FileNotFoundError or ValueError where it is no student of `base`, or does not state how it is sampled, and
    CheckpointError where its files are damaged.
    """
    found = student_sources.find(Path(source.path))
    student_sources.refuse_unstated(found, source)
    if found.kind == "student":
        if found.stage is not None:
            verify(found.stage)
        description = students.describe(found.place)
        students.refuse_other(found.place, description, base)
        _tell_other_teacher(source, description, base)
        gamma = own_gamma(found.place) if source.gamma is None else source.gamma
        write_untuned(found.place, out, _description(base, source, found, description | {"gamma": gamma}))
        return
    exported: dict[str, Any] = {"num_segments": 1, "budgets": [], "conditioned": False}
    if found.kind == "export":
        exported = students.describe(found.place)
        students.refuse_other(found.place, exported, base)
    description = _description(base, source, found, exported)
    lora = _adapter(base, source, found, exported)
    if lora is not None:
        write_adapter(lora, out, base.denoiser_part, description)
    else:
        weights = _weights(base, found)
        finite.refuse_of_others(weights, f"start: {source.path}")
        write_denoiser(base, weights, exported["conditioned"], out, description, source.path)


def _description(base: Base, source: StudentSource, found: Found, known: dict[str, Any]) -> dict[str, Any]:
    """Return the student.json of a student that is taken in: what is `known` of it, and what `source` says instead."""
    description = {key: value for key, value in known.items() if key not in (*OF_TUNING, "quantise")}
    description |= {name: value for name in ("gamma", "grid") if (value := getattr(found, name)) is not None}
    named = source.model_dump(include={"gamma", "grid", "num_segments"})
    description |= {name: value for name, value in named.items() if value is not None}
    if isinstance(description.get("grid"), list):
        description["budgets"] = [len(description["grid"])]
    if known["conditioned"] and description.get("grid", MILESTONES) != MILESTONES:
        raise ValueError(
            f"start: {source.path}: it is told the times that it jumps to, which are milestones: leave grid out"
        )
    description |= students.expected_of(base) | {"prediction_type": _prediction_of(base, source, found, known)}
    teacher = base.teacher
    description |= {"teacher": public(teacher.path), "teacher_hash": teachers.teacher_hash(teacher)}
    description |= {"quantise": teacher.quantise} if teacher.quantise is not None else {}
    return description | {"source": public(source.path)}


def _prediction_of(base: Base, source: StudentSource, found: Found, known: dict[str, Any]) -> str:
    """Return the prediction type of a student that is taken in: named, what its files state, or its teacher's.

    Raise ValueError for one that students of `base` cannot have.
    """
    stated = known.get("prediction_type", found.prediction_type)
    named = {"x0": X0, "teacher": base.prediction_type, None: stated or base.prediction_type}[source.prediction]
    if named not in base.student_predictions:
        says = f"start: {source.path}: prediction: {source.prediction}"
        if source.prediction is None:
            says = f"{found.place}: its scheduler says prediction_type {named}"
        raise ValueError(
            f"{says}, the teacher {base.teacher.path} predicts {base.prediction_type}: its student predicts "
            f"{' or '.join(dict.fromkeys(base.student_predictions))}"
        )
    return named


def _tell_other_teacher(source: StudentSource, description: dict[str, Any], base: Base) -> None:
    """Print a line where the adapter of a run's student goes over another teacher than it was distilled from."""
    hashed = description.get("teacher_hash")  # older folders have none
    if description["adapter"].get("kind") == "lora" and hashed not in (None, teachers.teacher_hash(base.teacher)):
        theirs, own = description.get("teacher"), public(base.teacher.path)
        tell("start", f"{source.path} was distilled from {theirs}: what it adds goes over the weights of {own} here")


def _adapter(base: Base, source: StudentSource, found: Found, exported: dict[str, Any]) -> Adapter | None:
    """Return the student as an adapter over `base`; None where it comes as a denoiser's weights.

    The adapter of an export has the teacher's own LoRA in it: where there is one, its denoiser is taken.
    """
    if found.kind == "export" and not exported["conditioned"] and base.teacher.lora is None:
        return read_lora(found.place / LORA_FILE) if (found.place / LORA_FILE).is_file() else None
    if found.kind != "lora":
        return None
    where, over = f"start: {source.path}", f"the teacher {base.teacher.path}"
    updates = teacher_lora.read_updates(base.pipeline, found.place, where, over, alpha=source.alpha)
    if others := sorted(set(updates) - {base.denoiser_part}):
        raise ValueError(
            f"{where}: it changes {', '.join(others)} too, and a student is a denoiser: give it as teacher.lora"
        )
    return teacher_lora.as_adapter(base.denoiser_part, updates[base.denoiser_part])


def _weights(base: Base, found: Found) -> dict[str, Tensor]:
    """Return the tensors of a denoiser in a file, or in a folder in diffusers' format.

    Raise ValueError for one that takes a guidance scale.
    """
    if found.kind == "weights":
        return read_tensors(found.place)
    folder = found.place if found.kind == "denoiser" else found.place / base.denoiser_part
    if found.kind != "export" and read_json(folder / "config.json").get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{folder}: it takes a guidance scale as an input (time_cond_proj_dim), which teachers of family "
            f"{base.family} do not: take the LoRA of the same student"
        )
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file)
    return {name: value for name, value in tensors.items() if not name.startswith(CLASS_LABELS)}


def write_adapter(adapter: Adapter, out: Path, part: str, description: dict[str, Any]) -> None:
    """Write a LoRA student's folder in one rename; `part` is the component that it changes."""
    with replacing(out) as partial:
        partial.mkdir()
        _write_adapter(adapter, partial, part, description)


def _write_adapter(adapter: Adapter, folder: Path, part: str, description: dict[str, Any]) -> None:
    write_lora({part: adapter}, folder / LORA_FILE)
    settings = Lora(rank=adapter[0].r, alpha=float(adapter[0].lora_alpha)).model_dump()
    write_json(folder / students.DESCRIPTION_FILE, {**description, "adapter": settings})


def write_denoiser(
    base: Base, tensors: Mapping[str, Tensor], condition: bool, out: Path, description: dict[str, Any], where: str
) -> None:
    """Write a student with weights of its own, `tensors` by the names of the denoiser of `base`, in one rename.

    With `condition` it is conditioned on its target time. Raise ValueError where they do not fit.
    """
    if is_quantised(base.denoiser):
        raise ValueError(f"start: {where}: it has weights of its own, so that teacher.quantise has to be left out")
    denoiser = students.new_denoiser(base, condition)
    if names := misfits(tensors, denoiser.state_dict()):
        raise ValueError(
            f"start: {where}: {len(names)} tensors do not fit the denoiser of {base.teacher.path}, for example "
            f"{first_few(names, 2)}: it was made over another base, or is a checkpoint of one file, which `mlcm "
            "convert` makes a folder of"
        )
    denoiser.load_state_dict(tensors)
    students.save_student(denoiser, out, description)


def write_untuned(source: Path, out: Path, description: dict[str, Any]) -> None:
    """Write the student in the folder `source` to `out` with this `description`, in one rename.

    What tuning added becomes part of its adapter or its weights, so that it can be tuned again.
    """
    with replacing(out) as partial:
        shutil.copytree(source, partial)
        (partial / students.PREFERENCE_FILE).unlink(missing_ok=True)
        write_json(partial / students.DESCRIPTION_FILE, description)
        if not (source / students.PREFERENCE_FILE).is_file():
            return
        preference, part = read_lora(source / students.PREFERENCE_FILE), layout_of(description["family"]).denoiser
        if (source / LORA_FILE).is_file():
            both = combined([read_lora(source / LORA_FILE), preference])
            _write_adapter(both, partial, part, description)
        else:
            for file in sorted((partial / part).glob("*.safetensors")):
                write_tensors(file, with_adapter(read_tensors(file), preference), {"format": "pt"})


def with_adapter(weights: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Return a denoiser's `weights` with (alpha / rank) B A of an `adapter` added, in float32, where they have it."""
    settings, factors = adapter
    merged = dict(weights)
    for name, down in factors.items():
        module = name.removesuffix(".lora_A.weight")
        weight = weights.get(f"{module}.weight")
        if module != name and weight is not None:
            up = factors[f"{module}.lora_B.weight"]
            update = teacher_lora.Update(down.float(), up.float(), settings.lora_alpha / settings.r).total()
            merged[f"{module}.weight"] = (weight.float() + update.reshape(weight.shape)).to(weight.dtype)
    return merged


def adapter_of(source: StudentSource) -> Lora | Full:
    """Return what kind of student `source` names, from the headers of its files: an adapter of some rank, or weights.

    Raise as `student_sources.find`, and CheckpointError for a damaged file.
    """
    found = student_sources.find(Path(source.path))
    if not found.is_lora:
        return Full()
    file = found.place if found.kind == "lora" else found.place / LORA_FILE
    downs = (shape for name, shape in read_shapes(file).items() if re.search(r"[._]lora[._](A|down)\.", name))
    return Lora(rank=max((shape[0] for shape in downs if shape), default=1))


def untuned_description(folder: Path) -> dict[str, Any]:
    """Return the student.json of the student in `folder` without its tuning, with the gamma that it was tuned under."""
    description = {key: value for key, value in students.describe(folder).items() if key not in OF_TUNING}
    return description | {"gamma": own_gamma(folder)}
