"""What is wrong with the teacher of a recipe, by its keys and the small files of its folder. Weights are not opened."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..storage.untrusted import read_bytes
from . import missing, teacher_check
from .adapt_text import AdaptText
from .control import CONTROLLED, TrainControl
from .experiment import Recipe
from .families import absent_extras, adaptable, family_of, geometry, layout_of, of_denoiser
from .paths import Folders
from .teacher_stages import Trajectories
from .tree import Problem
from .types import Teacher


def problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield what is wrong with the teacher, its LoRA and its text adapter, and with stages that it does not allow."""
    yield from _folder_problems(recipe.teacher, folders)
    yield from _lora_problems(recipe, folders)
    yield from _text_adapter_problems(recipe, folders)
    yield from _control_problems(recipe)


def _folder_problems(teacher: Teacher, folders: Folders) -> Iterator[Problem]:
    """Yield what is wrong with the teacher's family, when another distribution's, and its folder or hub name.

    A hub name is `owner/model`: one slash, and no folder `owner` here; with a revision, `model` alone too.
    """
    key = ("teacher", "path")
    try:
        layout_of(teacher.family)
    except ValueError as error:
        yield Problem(("teacher", "family"), str(error))
        return
    for message in absent_extras(teacher.family):
        yield Problem(("teacher", "family"), message)
    name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", teacher.path)
    is_hub_name = name and name[1] and not any(os.path.isdir((one / teacher.path).parent) for one in folders.of(key))
    if teacher.revision is None and is_hub_name:
        message = (
            f"missing: {teacher.path} is not a folder here, and a hub name needs its commit, 40 hexadecimal digits"
        )
        yield Problem(("teacher", "revision"), message, looked_in=folders.looked_in(key, teacher.path))
    elif teacher.revision is None or not name:
        folder = folders.place(key, teacher.path)
        if Path(teacher.path).suffix == ".safetensors" and os.path.isfile(folder):
            message = (
                f"{teacher.path} is one file: `mlcm convert {teacher.path} FOLDER --like BASE` makes a folder of it "
            )
            yield Problem(key, f"{message}to name here, where BASE is its base model's folder in diffusers format")
            return
        yield from missing.absent(key, teacher.path, folders, holding="model_index.json")
        yield from (wrong := list(_family_problems(teacher, folder)))
        yield from _resolution_problems(teacher, folder)
        if not wrong and os.path.exists(folder / "model_index.json"):
            for one in teacher_check.problems(folder, teacher.family, teacher.variant):
                yield Problem(key, f"{teacher.path}: {one}")
    elif fault := teacher_check.fault_of_name(teacher.path):
        yield Problem(key, f"{teacher.path} is {fault}")


def _lora_problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield what is wrong with the file of the teacher's LoRA. Its tensors are compared when the teacher is loaded."""
    name, key = recipe.teacher.lora, ("teacher", "lora")
    if name is None:
        if recipe.teacher.lora_weight != 1.0:
            yield Problem(("teacher", "lora_weight"), "it has no effect without teacher.lora")
        return
    if name and os.path.isfile(folders.place(key, name)) and Path(name).suffix != ".safetensors":
        yield Problem(key, f"expected a .safetensors file, found {name}: other formats can run code and are not read")
    yield from missing.absent(key, name, folders)
    with suppress(ValueError):  # of a family that is reported as broken
        layout = layout_of(recipe.teacher.family)
        if not layout.loads_lora:
            yield Problem(key, f"diffusers loads no LoRA into a {layout.pipeline}: merge it into the checkpoint")
    for i, stage in enumerate(recipe.stages):
        if stage.kind == "train_teacher":
            message = "train_teacher writes a checkpoint of its own, into which teacher.lora would go in part: merge "
            yield Problem(("stages", i), f"{message}the LoRA into the checkpoint of teacher.path, or leave it out")


def _text_adapter_problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield what is wrong with the teacher's text adapter, or with a stage that is to make one."""
    teacher, key = recipe.teacher, ("teacher", "text_adapter")
    if teacher.text_adapter is not None:
        yield from missing.absent(key, teacher.text_adapter, folders, holding="text_adapter.json")
    adapting = [(i, stage) for i, stage in enumerate(recipe.stages) if isinstance(stage, AdaptText)]
    if (teacher.text_adapter or adapting) and teacher.family not in (able := adaptable()):
        message = (
            f"{teacher.family} takes more of a prompt than a text adapter makes: name a teacher of {', '.join(able)}"
        )
        yield Problem(("teacher", "family"), message)
    for i, adapt in adapting:
        if teacher.text_adapter is not None:
            yield Problem(key, f"stages[{i}] (adapt_text) makes one itself: leave it out")
        if teacher.dtype == "float16":
            message = "the gradients of adapt_text go through the denoiser, and in float16 small ones are lost: write "
            yield Problem(("teacher", "dtype"), f"{message}bfloat16, or float32")
        before = [stage.prompts for stage in recipe.stages[:i] if isinstance(stage, Trajectories)]
        if before and before[-1] != adapt.prompts:
            message = f"expected {before[-1]}, the prompts of the trajectories before it, found {adapt.prompts}"
            yield Problem(("stages", i, "prompts"), message)


def _control_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what does not go with a stage that trains a ControlNet: other denoisers, and weights without gradients."""
    if not any(isinstance(stage, TrainControl) for stage in recipe.stages):
        return
    teacher, able = recipe.teacher, of_denoiser(CONTROLLED)
    if teacher.family not in able:
        message = f"train_control makes a ControlNet of a {CONTROLLED}: name a teacher of {', '.join(able)}"
        yield Problem(("teacher", "family"), message)
    if teacher.dtype == "float16":
        message = "the gradients of train_control go through the denoiser, and in float16 small ones are lost: write "
        yield Problem(("teacher", "dtype"), f"{message}bfloat16, or float32")
    if teacher.quantise is not None:
        message = "train_control copies half of the denoiser, which must be floats: leave it out"
        yield Problem(("teacher", "quantise"), message)


def _family_problems(teacher: Teacher, folder: Path) -> Iterator[Problem]:
    """Yield a problem for the folder of a student or of another family. `teacher_check` reports a damaged index."""
    with suppress(OSError, ValueError, RecursionError):
        index = json.loads(read_bytes(folder / "model_index.json"))
        if not isinstance(index, dict):
            return
        try:
            teacher_check.refuse_student(teacher.path, folder, index)
        except ValueError as error:
            yield Problem(("teacher", "path"), str(error))
            return
        class_name = index.get("_class_name")
        if isinstance(class_name, str) and (fault := teacher_check.fault_of_class(class_name)):
            yield Problem(("teacher", "path"), f"{teacher.path} is {fault}")
        elif isinstance(class_name, str) and class_name != layout_of(teacher.family).pipeline:
            message = f"{teacher.family} does not load the {class_name} that is in {teacher.path}"
            yield Problem(("teacher", "family"), message, family_of(class_name) or "")


def _resolution_problems(teacher: Teacher, folder: Path) -> Iterator[Problem]:
    """Yield a problem for a side that is not a multiple of what autoencoder and denoiser need.

    `teacher_check` reports damaged files.
    """
    if teacher.resolution is None:
        return
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        layout = layout_of(teacher.family)
        configs = [json.loads(read_bytes(folder / part / "config.json")) for part in (layout.denoiser, "vae")]
        smallest = geometry(layout, *configs).pixels
        if teacher.resolution % smallest:
            message = f"expected a multiple of {smallest}, as {teacher.path} needs, found {teacher.resolution}"
            yield Problem(("teacher", "resolution"), message)
