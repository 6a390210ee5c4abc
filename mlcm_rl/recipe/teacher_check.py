"""Checks of a teacher's folder before anything in it is built or loaded. No torch.

Every problem is a line with file and key. The checks are: each configuration (`teacher_types`, `schedule_types`), that
they fit each other, that there are only files and folders, and that weights exist in a form that is read.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..storage.untrusted import brief, parse_json, read_bytes, regular
from .families import Layout, geometry, layout_of
from .schedule_types import FlowScheduler, Scheduler
from .teacher_types import (
    Autoencoder,
    ChatGLM,
    Configuration,
    Denoiser,
    HunyuanDenoiser,
    Index,
    PixArtDenoiser,
    TextEncoder,
    Tokenizer,
    TokenizerOfPipeline,
)

MAX_BYTES = 2**22  # of a configuration: far above any real one
MAX_BYTES_OF_WORDS = 2**26  # of a tokenizer's file
WORDS = ("vocab.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")  # of a tokenizer, all objects
CONFIGURATIONS: dict[str, type[Configuration]] = {  # by class; the file of another class may be any JSON object
    "UNet2DConditionModel": Denoiser,
    "HunyuanDiT2DModel": HunyuanDenoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
    "AutoencoderKL": Autoencoder,
    "CLIPTextModel": TextEncoder,
    "CLIPTextModelWithProjection": TextEncoder,
    "ChatGLMModel": ChatGLM,
}
SINGLE_WORD_FILES = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt"}  # each a vocabulary alone
OF_STUDENTS = ("LCMScheduler", "TCDScheduler")  # schedulers that only few-step models are published with
IN_NAMES = {  # words in a model's name, and what they say of it
    r"turbo|lightning|lcm|tcd|hyper|dmd2?|schnell": "distilled to a few steps already",
    r"inpaint(ing)?|refiner|img2img|pix2pix|controlnet|upscaler": "no plain text-to-image model",
}
OF_OTHER_TASKS = ("Inpaint", "Img2Img", "InstructPix2Pix", "ControlNet", "Upscale")  # in names of diffusers' classes
AnyConfiguration = TypeVar("AnyConfiguration", bound=Configuration)


class TeacherFileError(ValueError):
    """A file of a teacher cannot be read or has wrong values; the message has a line for each key."""


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
    faults = [f"model_index.json: {name}: missing" for name in layout.required if index.component(name) is None]
    parts = [name for name in [*layout.required, *layout.possible] if index.component(name) is not None]
    faults += [f"model_index.json: {name}: no such folder" for name in parts if not (folder / name).is_dir()]
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
        *_of_weights(folder, networks, variant),
    ]
    if faults or not _has_weights(folder):
        return faults
    return list(_of_tokenizers(folder, layout, parts))


def read(path: Path, kind: type[AnyConfiguration]) -> AnyConfiguration:
    """Return the configuration in a file. Raise TeacherFileError with a line for each wrong key."""
    return validated(_object(path, MAX_BYTES), kind, _display_name(path))


def validated(content: dict[str, Any], kind: type[AnyConfiguration], file: str) -> AnyConfiguration:
    """Return the content of a configuration `file` as `kind`. Raise TeacherFileError with a line for each wrong key."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise TeacherFileError("\n".join(dict.fromkeys(f"{file}: {line}" for line in _lines(error)))) from error


def _display_name(path: Path) -> str:
    """Return the name of a teacher's file in messages."""
    return path.name if path.name == "model_index.json" else f"{path.parent.name}/{path.name}"


def _object(path: Path, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file. Raise TeacherFileError if it has none, or over `limit` bytes."""
    try:
        content = parse_json(read_bytes(path, limit).decode("utf-8"))
    except FileNotFoundError:
        raise TeacherFileError(f"{_display_name(path)}: missing") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        raise TeacherFileError(f"{_display_name(path)}: {reason}") from error
    if not isinstance(content, dict):
        raise TeacherFileError(f"{_display_name(path)}: expected an object in braces")
    return content


def _lines(error: ValidationError) -> Iterator[str]:
    """Yield a line for each of pydantic's errors."""
    for one in error.errors():
        if one["type"] == "value_error":
            yield str(one["ctx"]["error"])
            continue
        keys = [str(part) for part in one["loc"][:1]] + [f"[{part}]" for part in one["loc"][1:] if type(part) is int]
        if one["type"] == "missing":
            yield f"{''.join(keys)}: missing"
            continue
        value = repr(one["input"])
        text = value if len(value) < 50 else f"{value[:40]}..."
        message = one["msg"].replace("Input should be", "expected")
        if keys == ["prediction_type"]:
            text += "; no other prediction can be distilled: name a teacher with one of these"
        yield f"{''.join(keys)}: {message}, found {text}"


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
                yield f"{_display_name(path)}: a link that leads nowhere"
            except OSError as error:
                yield f"{_display_name(path)}: {error.strerror}"
            except ValueError as error:
                yield str(error).replace(str(path), _display_name(path))


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
        name = _object(path, MAX_BYTES).get("_name_or_path")
        if fault := fault_of_name(name):
            yield f"{_display_name(path)}: _name_or_path: {brief(name)} is {fault}; delete the key if it is not"


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


def _of_weights(folder: Path, networks: list[str], variant: str | None) -> Iterator[str]:
    """Yield a line for each network without readable weights. A folder without any weights is for planning alone."""
    files = {part: sorted(path.name for path in (folder / part).glob("*")) for part in networks}
    if not _has_weights(folder):
        return
    for part, names in files.items():
        tensors = [name for name in names if name.endswith(".safetensors")]
        plain = [name for name in tensors if "." not in name.removesuffix(".safetensors")]
        of_variant = [name for name in tensors if variant is not None and name.split(".")[1].split("-")[0] == variant]
        if plain or of_variant:
            continue
        others = sorted({name.split(".")[1].split("-")[0] for name in tensors})
        if others:
            yield f"{part}: its weights are the variant {others[0]}: write teacher.variant: {others[0]}"
        elif any(name.endswith(".bin") for name in names):
            yield (
                f"{part}: its weights are .bin files, which can run code and are not read: download the .safetensors "
                "files, or open the teacher with diffusers and save_pretrained(safe_serialization=True)"
            )
        else:
            yield f"{part}: no .safetensors file, and other parts have theirs: download it too"


def _has_weights(folder: Path) -> bool:
    """Return whether the folder has weights; without them it has only shapes, to plan with."""
    return any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*/*"))


def faults_of_tokenizers(folder: Path, family: str) -> list[str]:
    """Return a line for each tokenizer of a good teacher's folder without its files, or with wrong values in them."""
    index, layout = read(folder / "model_index.json", Index), layout_of(family)
    parts = [name for name in [*layout.required, *layout.possible] if index.component(name) is not None]
    return list(_of_tokenizers(folder, layout, parts))


def _of_tokenizers(folder: Path, layout: Layout, parts: list[str]) -> Iterator[str]:
    """Yield a line for each tokenizer without its files, or with wrong values in them."""
    for part in [name for name in parts if name.startswith("tokenizer")]:
        names, tower = {path.name for path in (folder / part).glob("*")}, part.replace("tokenizer", "text_encoder")
        if not names & SINGLE_WORD_FILES and not {"vocab.json", "merges.txt"} <= names:
            yield f"{part}: neither tokenizer.json nor vocab.json and merges.txt: download them"
        for path in [folder / part / name for name in WORDS if (folder / part / name).is_file()]:
            try:
                words = _object(path, MAX_BYTES_OF_WORDS)
                if path.name == "vocab.json" and CONFIGURATIONS.get(layout.classes[tower]) is TextEncoder:
                    _refuse_unknown(path, words, folder / tower / "config.json")
            except TeacherFileError as error:
                yield str(error)


def _refuse_unknown(path: Path, words: dict[str, Any], config: Path) -> None:
    """Raise TeacherFileError if one of a vocabulary's `words` has a number beyond its text encoder's vocabulary."""
    size = read(config, TextEncoder).vocab_size
    for word, number in words.items():
        if type(number) is not int or not 0 <= number < size:
            raise TeacherFileError(
                f"{_display_name(path)}: {brief(word)}: expected a whole number below {size}, the vocab_size of "
                f"{config.parent.name}, found {brief(number)}"
            )
