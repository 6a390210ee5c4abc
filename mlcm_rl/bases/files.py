"""A teacher's files: what its folder, or a pinned revision of the hub, holds and lacks, read as a pipeline."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ..checkpoint import read_json, read_shapes
from ..published import shipped
from ..recipe import Teacher
from ..recipe.file import refuse_student

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OTHER_PARTS = ("text_encoder", "tokenizer", "safety_checker", "image_encoder", "feature_extractor")


def load_pipeline(
    pipeline_class: type[DiffusionPipeline], teacher: Teacher, dtype: torch.dtype, device: torch.device
) -> DiffusionPipeline:
    """The frozen pipeline on `device`; its autoencoder in float32, since half precision overflows in SDXL's."""
    index = index_of(pipeline_class, teacher)
    unused = {name: None for name in ("safety_checker", "image_encoder", "feature_extractor") if name in index}
    check_components(teacher, {name: value for name, value in index.items() if name not in unused})
    precision = {"default": dtype, "vae": torch.float32}
    pipeline = local_first(pipeline_class.from_pretrained, teacher, dtype=precision, use_safetensors=True, **unused)
    pipeline = pipeline.to(device)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    for part in (pipeline.unet, pipeline.vae):
        torch.nn.Module.to(part, memory_format=MEMORY_FORMATS[teacher.memory_format])
    return pipeline


def empty_pipeline(pipeline_class: type[DiffusionPipeline], teacher: Teacher) -> DiffusionPipeline:
    """The pipeline of a local folder with a denoiser and an autoencoder without data, and nothing else."""
    folder, index = Path(teacher.path), index_of(pipeline_class, teacher)
    check_components(teacher, {name: value for name, value in index.items() if not name.startswith(OTHER_PARTS)})
    with torch.device("meta"):
        parts = {
            name: kind.from_config(kind.load_config(folder / name))
            for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
        }
    others = {name: None for name in index if name.startswith(OTHER_PARTS)}
    return pipeline_class.from_pretrained(folder, local_files_only=True, **parts, **others)


def shapes_folder(teacher: Teacher) -> Path:
    """Return a folder with the configurations of `teacher`: its own, one that is shipped, or a few kB of the hub.

    Raise FileNotFoundError where there is none.
    """
    if Path(teacher.path).is_dir():
        return Path(teacher.path)
    if (folder := shipped(teacher)) is not None:
        return folder
    asked = {"revision": teacher.revision, "allow_patterns": ["model_index.json", "*/*config.json"]}
    for local in (True, False):
        with suppress(OSError, ValueError, HfHubHTTPError):
            if teacher.revision is not None:
                return Path(snapshot_download(teacher.path, local_files_only=local, **asked))
    raise FileNotFoundError(
        f"plan reads a teacher's shapes off its files: {teacher.path} is not a local folder and its JSON files could "
        "not be fetched. They are enough, a few kB: download these alone into a folder and say teacher.path=FOLDER"
    )


def local_first(read: Callable[..., Any], teacher: Teacher, **settings: Any) -> Any:
    """`read` of the teacher's files on this machine; the hub is asked only for a pinned revision that is not here."""
    try:
        return read(teacher.path, revision=teacher.revision, local_files_only=True, **settings)
    except OSError:
        if teacher.revision is None:
            raise
    return read(teacher.path, revision=teacher.revision, **settings)


def folder_of(teacher: Teacher) -> Path:
    """Return the folder with the teacher's files: its own, or where a pinned revision of the hub was fetched to."""
    folder = Path(teacher.path)
    return folder if folder.is_dir() else Path(local_first(DiffusionPipeline.download, teacher, use_safetensors=True))


def pipeline_index(teacher: Teacher) -> dict[str, Any]:
    """What model_index.json says, from the folder or from the hub at the pinned revision.

    Raises FileNotFoundError where there is none, ValueError for a student's.
    """
    folder = Path(teacher.path)
    if teacher.revision is None and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"teacher {teacher.path}: no model_index.json in {folder.resolve()}; give a folder in diffusers format "
            "or a hub name with a pinned revision"
        )
    index = dict(local_first(DiffusionPipeline.load_config, teacher))
    refuse_student(f"teacher {teacher.path}", folder, index)
    return index


def index_of(pipeline_class: type[DiffusionPipeline], teacher: Teacher) -> dict[str, Any]:
    """The same for a teacher that `pipeline_class` loads. Raises ValueError for one of another family."""
    index = pipeline_index(teacher)
    if index.get("_class_name") != pipeline_class.__name__:
        raise ValueError(
            f"teacher {teacher.path}: its model_index.json is of a {index.get('_class_name')}, "
            f"and family {teacher.family} loads {pipeline_class.__name__}; set teacher.family to match"
        )
    return index


def check_components(teacher: Teacher, index: dict[str, Any]) -> None:
    """Raise ValueError for a part that neither diffusers nor transformers defines: its module would be imported.

    Raises FileNotFoundError for the parts that a local folder's index names and the folder lacks, ValueError for
    weights that are listed outside it.
    """
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value[:1] != [None]}
    for name, value in parts.items():
        library, kind = [*map(str, value), "", ""][:2]
        if library not in ("diffusers", "transformers") or re.match("Auto[A-Z]", kind):  # those run a folder's code
            raise ValueError(f"teacher {teacher.path}: {name} is a {library}.{kind}; only known classes are loaded")
    folder = Path(teacher.path)
    missing = [name for name in parts if not (folder / name).is_dir()]
    if folder.is_dir() and missing:
        raise FileNotFoundError(f"teacher {folder}: model_index.json names {', '.join(missing)}, not in the folder")
    for path in sorted(folder.glob("*/*.safetensors")):
        read_shapes(path)  # a damaged file is told by its name, before anything is built
    for path in sorted(folder.glob("*/*.index.json")):
        shards = read_json(path, weight_map=dict)["weight_map"].values()
        if climbing := [name for name in shards if not isinstance(name, str) or Path(name).name != name]:
            raise ValueError(f"{path}: {climbing[0]!r} is not a file beside it")


def parts_with_weights(teacher: Teacher) -> list[str]:
    """The parts of the teacher in a local folder that are loaded and have weights, by name."""
    index = pipeline_index(teacher)
    named = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    return [name for name in named if name in ("unet", "vae") or name.startswith("text_encoder")]


def shapes_from_configuration(teacher: Teacher, parts: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Shapes of the weights of `parts` by name, where there are configuration files and no weights yet.

    Raises as `load` does.
    """
    index, folder = pipeline_index(teacher), Path(teacher.path)
    check_components(teacher, {name: index[name] for name in parts})
    found = {}
    for name in parts:
        library, kind = index[name]
        with torch.device("meta"):
            if library == "diffusers":
                denoiser_or_autoencoder = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
                part = denoiser_or_autoencoder.from_config(denoiser_or_autoencoder.load_config(folder / name))
            else:
                text_encoder = getattr(transformers, kind)
                part = text_encoder(text_encoder.config_class.from_pretrained(folder / name, local_files_only=True))
        found[name] = {key: list(value.shape) for key, value in part.state_dict().items()}
    return found
