"""A teacher's files, in its folder or at a pinned revision of the hub: checked, and loaded as a pipeline."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ..recipe import Teacher, teacher_check
from ..recipe.families import layout_of
from ..storage.files import CheckpointError, read_json
from ..storage.tensors import read_shapes
from ..storage.untrusted import in_a_line
from . import teacher_lora
from .published_teachers import shipped
from .quantised import quantise_

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Other names of the words' embedding, of T5 and of Qwen3 as a language model (whose own, where it has another matrix,
# no pipeline uses): files have one or both.
SECOND_NAMES = ("encoder.embed_tokens.weight", "lm_head.weight")
UNUSED_PARTS = ("safety_checker", "image_encoder", "feature_extractor")
OTHER_PARTS = ("text_encoder", "tokenizer", "safety_checker", "image_encoder", "feature_extractor")


def load_pipeline(
    pipeline_class: type[DiffusionPipeline], teacher: Teacher, dtype: torch.dtype, device: torch.device
) -> DiffusionPipeline:
    """Load the frozen pipeline on `device`, its autoencoder in float32, since SDXL's overflows in half precision."""
    index = index_of(pipeline_class, teacher)
    unused: dict[str, None] = dict.fromkeys(name for name in UNUSED_PARTS if name in index)
    unused |= {name: None for name, value in index.items() if value == [None, None]}  # diffusers requires some of them
    check_components(teacher, {name: value for name, value in index.items() if name not in unused})
    if Path(teacher.path).is_dir():
        teacher_check.refuse(Path(teacher.path), teacher.family, teacher.variant)
        refuse_other_weights(teacher)
    settings = {"dtype": {"default": dtype, "vae": torch.float32}, "variant": teacher.variant, **unused}
    with in_words(teacher):
        pipeline = local_first(pipeline_class.from_pretrained, teacher, use_safetensors=True, **settings)
        for name, part in pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                part("a")  # raises here if a special token is not in its vocabulary
    refuse_unknown_tokens(pipeline, teacher)
    if teacher.lora is not None:
        teacher_lora.fuse(pipeline, teacher)
    if teacher.quantise is not None:  # before the move, since the device may not have room for floats
        quantise_(getattr(pipeline, layout_of(teacher.family).denoiser), teacher.quantise, device)
    pipeline = pipeline.to(
        device, silence_dtype_warnings=True
    )  # it has one for each part, and says that none would run
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    for part in (getattr(pipeline, layout_of(teacher.family).denoiser), pipeline.vae):
        for weight in part.parameters():
            if weight.ndim == 4:  # an autoencoder of videos has weights of five dimensions, which have no such format
                weight.data = weight.data.to(memory_format=MEMORY_FORMATS[teacher.memory_format])
    return pipeline


def empty_pipeline(pipeline_class: type[DiffusionPipeline], teacher: Teacher) -> DiffusionPipeline:
    """Return the pipeline of a local folder with a denoiser and an autoencoder without data, and nothing else."""
    folder, index = Path(teacher.path), index_of(pipeline_class, teacher)
    check_components(teacher, {name: value for name, value in index.items() if not name.startswith(OTHER_PARTS)})
    teacher_check.refuse(folder, teacher.family, teacher.variant)
    with in_words(teacher):
        with torch.device("meta"):
            classes = layout_of(teacher.family).classes
            parts = {
                name: empty(folder / name, getattr(diffusers, classes[name]))
                for name in (layout_of(teacher.family).denoiser, "vae")
            }
        absent: dict[str, Any] = {name: None for name in index if name.startswith(OTHER_PARTS)}
        if "requires_safety_checker" in signature(pipeline_class).parameters:
            absent["requires_safety_checker"] = False  # or diffusers warns that it is missing; nothing is sampled here
        return pipeline_class.from_pretrained(folder, local_files_only=True, **parts, **absent)


def empty(folder: Path, network: type[ModelMixin]) -> ModelMixin:
    """Return a network of diffusers' class `network` with the configuration in `folder`."""
    return network.from_config(network.load_config(folder))


@contextmanager
def in_words(teacher: Teacher) -> Iterator[None]:
    """Raise ValueError in place of other errors of diffusers and transformers, which damaged files cause."""
    try:
        yield
    except (OSError, ValueError, CheckpointError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = f"teacher {teacher.path}: its files could not be loaded: {in_a_line(error)}"
        raise ValueError(message) from error


def refuse_unknown_tokens(pipeline: DiffusionPipeline, teacher: Teacher) -> None:
    """Raise ValueError if a tokenizer has more tokens than its text encoder."""
    for name, tokenizer in pipeline.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        tower = pipeline.components[name.replace("tokenizer", "text_encoder")]
        size = tower.get_input_embeddings().num_embeddings
        if len(tokenizer) > size:
            raise ValueError(
                f"teacher {teacher.path}: {name} has {len(tokenizer)} tokens and its text encoder {size} "
                "(vocab_size): one of its special tokens is not in its vocabulary"
            )


def refuse_other_weights(teacher: Teacher) -> None:
    """Raise ValueError if the headers of a local teacher's weights do not match its configurations."""
    folder, parts = Path(teacher.path), parts_with_weights(teacher)
    expected = shapes_from_configuration(teacher, parts)
    lines = []
    for name in parts:
        in_files = {_current(key): shape for key, shape in shapes(folder / name, teacher.variant).items()}
        in_config = {_current(key): shape for key, shape in expected[name].items()}
        differ = (key for key in in_files | in_config if in_files.get(key) != in_config.get(key))
        keys = sorted(key for key in differ if key not in SECOND_NAMES and "position_ids" not in key)
        if keys:
            shape, config_shape = (kind.get(keys[0], "absent") for kind in (in_files, in_config))
            lines.append(
                f"teacher {folder}: {name}: {len(keys)} tensors are not those of config.json, for example {keys[0]}: "
                f"{shape} in the files, {config_shape} by the configuration"
            )
    if lines:
        raise ValueError("\n".join(lines))


def shapes(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a folder's safetensors files, from their headers.

    If the weights are there in several variants, read `variant` if it is there, else the one without a name.
    """
    paths = {path: path.name.split(".")[1].split("-")[0] for path in sorted(folder.glob("*.safetensors"))}
    files = [path for path, form in paths.items() if variant is not None and form == variant]
    files = files or [path for path in paths if "." not in path.stem] or list(paths)
    shapes: dict[str, list[int]] = {}
    for path in files:
        shapes |= read_shapes(path)
    return shapes


def _current(key: str) -> str:
    """Return the name of a tensor without what differs between files: a tower's own prefixes, older layers' names."""
    key = re.sub(r"^((text_)?model\.|language_model\.)+", "", key)
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        key = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", key)
    return key


def shapes_folder(teacher: Teacher) -> Path:
    """Return a folder with the configurations of `teacher`: its own, one shipped here, or one fetched from the hub.

    The fetched files are a few kB. Raise FileNotFoundError if there is none.
    """
    if Path(teacher.path).is_dir():
        return Path(teacher.path)
    if (folder := shipped(teacher)) is not None:
        return folder
    patterns = ["model_index.json", "*/*config.json"]
    for local in (True, False):
        with suppress(OSError, ValueError, HfHubHTTPError):
            if teacher.revision is not None:
                return Path(
                    snapshot_download(
                        teacher.path, revision=teacher.revision, local_files_only=local, allow_patterns=patterns
                    )
                )
    raise FileNotFoundError(
        f"plan reads a teacher's shapes from its files: {teacher.path} is not a local folder and its JSON files could "
        "not be fetched. They are enough, a few kB: download them into a folder and pass teacher.path=FOLDER"
    )


def local_first(read: Callable[..., Any], teacher: Teacher, **settings: Any) -> Any:
    """Call `read` on the teacher's local files; on the hub's only for a pinned revision that is not in the cache.

    Raise FileNotFoundError where the hub does not give it.
    """
    try:
        return read(teacher.path, revision=teacher.revision, local_files_only=True, **settings)
    except OSError:
        if teacher.revision is None:
            raise
    try:
        return read(teacher.path, revision=teacher.revision, **settings)
    except OSError as error:  # diffusers says of a hub that is not reached that a file is not in it; its cause knows
        reason = str(error.__context__ or error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"teacher {teacher.path}: revision {teacher.revision} is not whole on this machine, and the hub did not "
            f"give it ({reason}): check the network and HF_HUB_OFFLINE, or download it elsewhere and name its folder "
            "in teacher.path, without revision"
        ) from error


def folder_of(teacher: Teacher) -> Path:
    """Return the folder with the teacher's files: its own, or the hub's cache of a pinned revision."""
    folder = Path(teacher.path)
    return folder if folder.is_dir() else Path(local_first(DiffusionPipeline.download, teacher, use_safetensors=True))


def pipeline_index(teacher: Teacher) -> dict[str, Any]:
    """Read model_index.json from the folder, or from the hub at the pinned revision.

    Raise FileNotFoundError if there is none, ValueError for a student's.
    """
    folder = Path(teacher.path)
    if teacher.revision is None and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"teacher {teacher.path}: no model_index.json in {folder.resolve()}; give a folder in diffusers format "
            "or a hub name with a pinned revision"
        )
    path = folder / "model_index.json"
    index = dict(read_json(path) if path.is_file() else local_first(DiffusionPipeline.load_config, teacher))
    teacher_check.refuse_student(f"teacher {teacher.path}", folder, index)
    return index


def index_of(pipeline_class: type[DiffusionPipeline], teacher: Teacher) -> dict[str, Any]:
    """Read model_index.json as `pipeline_index` does. Raise ValueError for a class other than `pipeline_class`."""
    index = pipeline_index(teacher)
    if index.get("_class_name") != pipeline_class.__name__:
        raise ValueError(
            f"teacher {teacher.path}: its model_index.json is of a {index.get('_class_name')}, "
            f"and family {teacher.family} loads {pipeline_class.__name__}; set teacher.family to match"
        )
    return index


def check_components(teacher: Teacher, index: dict[str, Any]) -> None:
    """Raise ValueError for a component that neither diffusers nor transformers defines, whose module would be imported.

    Raise FileNotFoundError for components that are in the index and missing in a local folder.
    """
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value[:1] != [None]}
    for name, value in parts.items():
        library, kind = [*map(str, value), "", ""][:2]
        known = ("diffusers", "transformers", *filter(None, [layout_of(teacher.family).own_library]))
        if library not in known or re.match("Auto[A-Z]", kind):  # Auto classes may run a folder's code
            raise ValueError(f"teacher {teacher.path}: {name} is a {library}.{kind}; only known classes are loaded")
    folder = Path(teacher.path)
    missing = [name for name in parts if not (folder / name).is_dir()]
    if folder.is_dir() and missing:
        raise FileNotFoundError(f"teacher {folder}: model_index.json names {', '.join(missing)}, not in the folder")
    for path in sorted(folder.glob("*/*.safetensors")):
        read_shapes(path)  # raises with the name of a damaged file, before anything is built


def _module(library: str) -> Any:
    """Return the module of a `library` in model_index.json: transformers, or the pipeline's own in diffusers."""
    return transformers if library == "transformers" else getattr(diffusers.pipelines, library)


def parts_with_weights(teacher: Teacher) -> list[str]:
    """Return the names of a local teacher's components that are loaded and have weights."""
    index = pipeline_index(teacher)
    present = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    return [name for name in present if name in layout_of(teacher.family).classes]


def shapes_from_configuration(teacher: Teacher, parts: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Return the shapes of the weights of `parts`, by name, from configuration files alone.

    Raise as `load_pipeline` does.
    """
    index, folder = pipeline_index(teacher), Path(teacher.path)
    check_components(teacher, {name: index[name] for name in parts})
    shapes = {}
    for name in parts:
        library, kind = index[name]
        with in_words(teacher), torch.device("meta"):
            if library == "diffusers":
                part = empty(folder / name, getattr(diffusers, kind))
            else:
                text_encoder = getattr(_module(library), kind)
                where = {"device": "meta"} if "device" in signature(text_encoder).parameters else {}
                settings = text_encoder.config_class.from_pretrained(folder / name, local_files_only=True)
                part = text_encoder(settings, **where)  # of its own; ChatGLM's does not see torch's default device
        weights = part.state_dict(keep_vars=True)
        first_names = {id(value): key for key, value in reversed(weights.items())}  # of a weight that has several
        shapes[name] = {key: list(value.shape) for key, value in weights.items() if first_names[id(value)] == key}
    return shapes
