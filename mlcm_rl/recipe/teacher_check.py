"""Checks of a teacher's folder before anything in it is built or loaded. No torch.

Every problem is a line with file and key. The checks are: each configuration (`teacher_types`, `schedule_types`), that
they fit each other, that there are only files and folders, and that those that loading needs exist (`teacher_files`).
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..storage.untrusted import brief, regular
from .families import Layout, geometry, layout_of
from .schedule_types import FlowScheduler, Scheduler
from .teacher_files import (
    MAX_BYTES,
    TeacherFileError,
    display_name,
    faults_of_tokenizers,
    faults_of_weights,
    has_weights,
    json_object,
    read,
)
from .teacher_types import (
    CONFIGURATIONS,
    Autoencoder,
    ChatGLM,
    Configuration,
    Denoiser,
    Index,
    TextEncoder,
    Tokenizer,
    TokenizerOfPipeline,
)

OF_STUDENTS = ("LCMScheduler", "TCDScheduler")  # schedulers that only few-step models are published with
IN_NAMES = {  # words in a model's name, and what they say of it
    r"turbo|lightning|lcm|tcd|hyper|dmd2?|schnell": "distilled to a few steps already",
    r"inpaint(ing)?|refiner|img2img|pix2pix|controlnet|upscaler": "no plain text-to-image model",
}
OF_OTHER_TASKS = ("Inpaint", "Img2Img", "InstructPix2Pix", "ControlNet", "Upscale")  # in names of diffusers' classes


def refuse(folder: Path, family: str, variant: str | None = None) -> None:
    """Raise ValueError with all that is wrong with the teacher in `folder`, a line each."""
    if faults := problems(folder, family, variant):
        raise ValueError("\n".join(f"teacher {folder}: {one}" for one in faults))


def refuse_student(path: str, folder: Path, index: dict[str, Any]) -> None:
    """Raise ValueError if the model `path` is a student already, by its model_index.json or a file in `folder`.

    Distilled as a teacher, its few steps would be imitated as if they were the many steps of the real one.
    """
    scheduler = [*index["scheduler"], "", ""][1] if isinstance(index.get("scheduler"), list) else ""
    if (folder / "student.json").is_file():
        reason = "`mlcm export` wrote it (student.json lies in it)"
    elif scheduler in OF_STUDENTS:
        reason = f"its model_index.json names {scheduler}"
    else:
        return
    raise ValueError(f"{path} is a student, for a few steps, already: {reason}; name the teacher that it was made from")


def fault_of_name(name: object) -> str:
    """Return why the model called `name` cannot be a teacher, and what to name instead; empty if it may be one.

    Of a path only the last part counts.
    """
    last = name.rstrip("/").rpartition("/")[2].lower() if isinstance(name, str) else ""
    for words, fault in IN_NAMES.items():
        if match := re.search(rf"(?<![a-z])({words})(?![a-z])", last):
            return f"{fault}, by its name ({match[1]}): name the text-to-image model that it was made from"
    return ""


def fault_of_class(name: str) -> str:
    """Return why a model of diffusers' class `name` cannot be a teacher, where that is its task; else empty."""
    if not any(task in name for task in OF_OTHER_TASKS):
        return ""
    return f"of the class {name}, no plain text-to-image model: name the one that it was made from (a refiner's base)"


def problems(folder: Path, family: str, variant: str | None = None) -> list[str]:
    """Return what is wrong with the teacher in `folder`, a line each: file, key, what was expected."""
    try:
        index = read(folder / "model_index.json", Index)
    except TeacherFileError as error:
        return str(error).splitlines()
    layout = layout_of(family)
    faults = [
        f"model_index.json: {name}: missing: name the folder of a whole {layout.pipeline}"
        for name in layout.required
        if index.component(name) is None
    ]
    parts = [name for name in [*layout.required, *layout.possible] if index.component(name) is not None]
    faults += [
        f"model_index.json: {name}: no such folder: download {name}/ too"
        for name in parts
        if not (folder / name).is_dir()
    ]
    kinds = {name: (index.component(name) or [])[1:] for name in parts if name in layout.classes}
    faults += [
        f"model_index.json: {name}: expected {layout.classes[name]}, found {' '.join(map(str, kind)) or 'no class'}"
        for name, kind in kinds.items()
        if kind != [layout.classes[name]] and kind != [layout.older_classes.get(name)]
    ]
    if faults:
        return faults
    networks = [part for part in parts if part in layout.classes]
    faults = [
        *_irregular(folder, parts),
        *_of_parts(folder, family, parts, index),
        *faults_of_weights(folder, networks, variant),
    ]
    if faults or not has_weights(folder):
        return faults
    return faults_of_tokenizers(folder, family)


def _irregular(folder: Path, parts: list[str]) -> Iterator[str]:
    """Yield a line for whatever is neither a file nor a folder in the loaded components: reading it would not end."""
    for part in parts:
        try:
            inside = sorted((folder / part).iterdir())
        except OSError as error:
            yield f"{part}: cannot be read: {error.strerror}"
            continue
        for path in inside:
            try:
                regular(path)
            except FileNotFoundError:
                yield f"{display_name(path)}: a link that leads nowhere"
            except OSError as error:
                yield f"{display_name(path)}: {error.strerror}"
            except ValueError as error:
                yield str(error).replace(str(path), display_name(path))


def _of_parts(folder: Path, family: str, parts: list[str], index: Index) -> list[str]:
    """Return a line for each wrong value in the configurations, and for each two that do not fit each other."""
    layout, configurations, faults = layout_of(family), dict[str, Configuration](), list[str]()
    for part in parts:
        file, kind = _file_of(part, layout)
        try:
            configurations[part] = read(folder / part / file, kind)
        except TeacherFileError as error:
            faults += str(error).splitlines()
    if not faults:
        faults += _distilled(layout, {"model_index": index, **configurations})
        faults += _of_other_times(layout, configurations["scheduler"])
        faults += _misnamed(layout, folder)
    denoiser, vae = configurations.get(layout.denoiser), configurations.get("vae")
    if faults or denoiser is None or vae is None:
        return faults
    if isinstance(denoiser, Denoiser) and isinstance(vae, Autoencoder):
        return list(_misfits(layout, denoiser, vae, configurations))
    # these denoisers are built on meta before their weights are read, which finds the rest
    return list(_other_channels(layout, denoiser.model_dump(), vae.model_dump()))


def _distilled(layout: Layout, configurations: dict[str, Configuration]) -> Iterator[str]:
    """Yield a line for a value that only few-step models of this family have in a component's configuration."""
    for path, (value, original) in layout.distilled.items():
        part, key = path.split(".")
        if configurations[part].model_dump().get(key) == value:
            file = "model_index.json" if part == "model_index" else f"{part}/{_file_of(part, layout)[0]}"
            yield (
                f"{file}: {key}: {json.dumps(value)} is of a model that is distilled to a few steps already; name the "
                f"model that it was made from, {original}"
            )


def _of_other_times(layout: Layout, scheduler: Configuration) -> Iterator[str]:
    """Yield a line for a schedule of another number of times than this family's."""
    if isinstance(scheduler, Scheduler) and (num_times := scheduler.num_train_timesteps) != layout.num_times:
        message = f"expected {layout.num_times}, found {num_times}"
        yield f"scheduler/scheduler_config.json: num_train_timesteps: {message}"


def _other_channels(layout: Layout, denoiser: dict[str, Any], vae: dict[str, Any]) -> Iterator[str]:
    """Yield a line if a transformer takes other latents than the autoencoder has, where both say how many."""
    latents = vae.get("latent_channels") or vae.get("z_dim")
    with suppress(LookupError, TypeError):
        channels = geometry(layout, denoiser, vae).channels
        if latents is not None and channels != latents * layout.patchifies**2:
            yield (
                f"{layout.denoiser}/config.json: in_channels: the denoiser takes latents of {channels} channels and "
                f"the autoencoder has {latents}; only plain text-to-image teachers can be distilled"
            )


def _misnamed(layout: Layout, folder: Path) -> Iterator[str]:
    """Yield a line for each name in the files of pipeline and denoiser that is one of a model that cannot be taught."""
    for path in (folder / "model_index.json", folder / layout.denoiser / "config.json"):
        name = json_object(path, MAX_BYTES).get("_name_or_path")
        if fault := fault_of_name(name):
            yield f"{display_name(path)}: _name_or_path: {brief(name)} is {fault}; delete the key if it is not"


def _file_of(part: str, layout: Layout) -> tuple[str, type[Configuration]]:
    """Return the name of a component's configuration file, and its type."""
    if part == "scheduler":
        return "scheduler_config.json", FlowScheduler if layout.is_flow else Scheduler
    if part.startswith("tokenizer"):
        return "tokenizer_config.json", TokenizerOfPipeline if layout.own_library else Tokenizer
    return "config.json", CONFIGURATIONS.get(layout.classes[part], Configuration)


def _misfits(
    layout: Layout, unet: Denoiser, vae: Autoencoder, configurations: dict[str, Configuration]
) -> Iterator[str]:
    """Yield a line for each two configurations of a teacher that are right alone but do not fit each other."""
    if (unet.in_channels, unet.out_channels) != (vae.latent_channels, vae.latent_channels):
        yield (
            f"unet/config.json: in_channels: the denoiser maps {unet.in_channels} channels to {unet.out_channels} and "
            f"the autoencoder has {vae.latent_channels}; only plain text-to-image teachers can be distilled"
            + ("; nine are of an inpainting model: name the one that it was made from" if unet.in_channels == 9 else "")
        )
    towers = {name: one for name, one in configurations.items() if isinstance(one, TextEncoder | ChatGLM)}
    width = sum(one.hidden_size for one in towers.values())
    if unet.context_width != width:
        names, key = " and ".join(sorted(towers)), "encoder_hid_dim" if unet.encoder_hid_dim else "cross_attention_dim"
        yield f"unet/config.json: {key}: expected {width}, the width of {names}, found {unet.context_width}"
    lengths = {name: one.model_max_length for name, one in configurations.items() if isinstance(one, Tokenizer)}
    for name, length in lengths.items():
        tower = towers.get(name.replace("tokenizer", "text_encoder"))
        if isinstance(tower, TextEncoder) and length > tower.max_position_embeddings:
            yield (
                f"{name}/tokenizer_config.json: model_max_length: expected at most {tower.max_position_embeddings}, "
                f"which the text encoder reads, found {length}"
            )
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name} {length}" for name, length in lengths.items())
        yield f"tokenizer/tokenizer_config.json: model_max_length: expected one for all tokenizers, found {listing}"
    if layout.pooled_by:
        yield from _misfits_of_sizes(layout, unet, towers[layout.pooled_by])
    elif unet.addition_embed_type is not None:
        yield f"unet/config.json: addition_embed_type: expected none, found {unet.addition_embed_type}"


def _misfits_of_sizes(layout: Layout, unet: Denoiser, tower: TextEncoder | ChatGLM) -> Iterator[str]:
    """Yield a line if the denoiser does not take six sizes and the projection of its text encoder `tower`."""
    if unet.addition_embed_type is None:
        yield f"unet/config.json: addition_embed_type: expected text_time, as {layout.pipeline} gives"
    else:
        expected_width, refiners_width = (n * (unet.addition_time_embed_dim or 0) + tower.pooled_width for n in (6, 5))
        if (actual_width := unet.projection_class_embeddings_input_dim) != expected_width:
            yield (
                f"unet/config.json: projection_class_embeddings_input_dim: expected {expected_width}, six sizes of "
                f"addition_time_embed_dim and {layout.pooled_by}'s pooled vector, found {actual_width}"
                + ("; five sizes are of a refiner: name its base model" if actual_width == refiners_width else "")
            )
