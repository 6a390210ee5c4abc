"""Load a recipe's teacher, or its skeleton without data, and the small decoder beside its autoencoder."""

from importlib import import_module
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from ..recipe import Teacher
from ..recipe.families import absent_extras, layout_of, origin
from ..storage.files import read_json
from ..storage.hashing import folder_hash, sha256_once
from ..storage.tensors import read_shapes
from ..training.progress import say_once
from . import text_adapter
from .base import Base
from .files import empty_pipeline, load_pipeline
from .quantised import quantise_


def class_of(family: str) -> type[Base]:
    """Return the class of a family's teachers, whether it is ours or another distribution's.

    Raise ValueError if it cannot be loaded, is no `Base`, or has another `family` than its name in recipes, and
    ImportError if it needs a module that is not installed.
    """
    if messages := absent_extras(family):
        raise ImportError("; ".join(messages))
    implementation = layout_of(family).implementation
    module, _, name = implementation.partition(":")
    try:
        loaded = getattr(import_module(module), name)
    except Exception as error:  # of another's code
        reason = f"cannot be loaded: {type(error).__name__}: {error}"
        raise ValueError(f"{origin(family)}: implementation {implementation} {reason}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Base)):
        raise ValueError(
            f"{origin(family)}: implementation {implementation} is no subclass of mlcm_rl.models.base.Base"
        )
    if (actual := getattr(loaded, "family", None)) != family:
        raise ValueError(f"{origin(family)}: {implementation} has family {actual!r}, expected {family!r}")
    return loaded


def load(teacher: Teacher, device: torch.device | str, computes: bool = True) -> "Base":
    """Load the recipe's teacher, frozen, on `device`. One that `computes` in float16 on a CPU is reported as slow.

    Raise FileNotFoundError for a missing folder or component, ValueError for another family than the recipe's or for a
    schedule that cannot be distilled, or for a text adapter of another kind of teacher.
    """
    family = class_of(teacher.family)
    where = torch.device(device)
    if computes and teacher.dtype == "float16" and where.type == "cpu":
        say_once("teacher.dtype float16 is for GPUs: a CPU computes in it slowly; set teacher.dtype=float32")
    base = family(teacher, where, load_pipeline(family.pipeline_class, teacher, getattr(torch, teacher.dtype), where))
    if teacher.text_adapter is not None:
        shapes = {name: value.shape[1:] for name, value in base.unconditional(1).items()}
        base.adapted = text_adapter.load(Path(teacher.text_adapter), teacher.family, shapes, base.num_tokens, where)
    return base


def skeleton(teacher: Teacher) -> "Base":
    """Return a local teacher on the meta device: denoiser and autoencoder without data, and no text encoders.

    It is built from the configuration files alone; memory and operations are estimated on it. Raise as `load` does.
    """
    family = class_of(teacher.family)
    pipeline = empty_pipeline(family.pipeline_class, teacher)
    denoiser = getattr(pipeline, family.denoiser_part)
    for part, dtype in ((denoiser, getattr(torch, teacher.dtype)), (pipeline.vae, torch.float32)):
        torch.nn.Module.to(part, dtype).requires_grad_(False).eval()  # diffusers' own `to` warns without reason
    if teacher.quantise is not None:
        quantise_(denoiser, teacher.quantise, torch.device("meta"))
    return family(teacher, torch.device("meta"), pipeline)


def small_decoder(folder: str, base: Base) -> AutoencoderTiny:
    """Load the AutoencoderTiny (TAESD's layout) in `folder`, frozen, on the device of `base`, whose latents it decodes.

    On the meta device it has no data. Raise FileNotFoundError if it is missing, ValueError for another model or for one
    made for other latents.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"small_decoder: no {path}; give a folder with an AutoencoderTiny in diffusers format")
    if (kind := read_json(path).get("_class_name")) != "AutoencoderTiny":
        raise ValueError(f"small_decoder: {path} is of a {kind}, and an AutoencoderTiny is needed")
    with torch.device("meta"):
        skeleton = AutoencoderTiny.from_config(AutoencoderTiny.load_config(folder))
    settings = skeleton.config
    has = {
        "latent channels": settings.latent_channels,
        "pixels a latent": settings.upsampling_scaling_factor ** (len(settings.decoder_block_out_channels) - 1),
        "scaling_factor": settings.scaling_factor,
        "shift_factor": settings.shift_factor,
    }
    needs = dict(zip(has, (base.latent_shape[0], base.geometry.downscale, 1.0, 0.0), strict=True))
    for name, value in needs.items():
        if has[name] != value:
            raise ValueError(
                f"small_decoder: {path} has {name} {has[name]}, and the denoiser of {base.teacher.path} makes latents "
                f"that need {value}; take the one that was made for this teacher"
            )
    if base.device.type == "meta":
        return skeleton.requires_grad_(False).eval()
    for path in sorted(Path(folder).glob("*.safetensors")):
        read_shapes(path)  # a damaged file is told by its name
    small = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return small.to(base.device).requires_grad_(False).eval()


def teacher_hash(teacher: Teacher) -> str:
    """Return the identity of a teacher's weights and configuration: one hash of all files, or the pinned revision.

    A LoRA of its own is part of it, and the integers that the weights are rounded to. A text adapter is not: the
    students of a teacher are its students with one too.
    """
    folder = Path(teacher.path)
    identity = folder_hash(folder) if folder.is_dir() else f"{teacher.path}@{teacher.revision}"
    if teacher.lora is not None:
        identity += f"+{sha256_once(Path(teacher.lora))}*{teacher.lora_weight}"
    return identity if teacher.quantise is None else f"{identity} in {teacher.quantise}"


def tell_truncated(base: Base, prompts: list[str], source: str) -> None:
    """Report how many of the `prompts` in `source` are longer than the teacher reads, and which is the longest."""
    counts = base.count_tokens(prompts)
    num_longer = sum(count > base.num_tokens for count in counts)
    if num_longer:
        longest = counts.index(max(counts))
        say_once(
            f"{source}: {num_longer} of {len(prompts)} prompts are longer than the {base.num_tokens} tokens that the "
            f"teacher reads; their ends are cut off. The longest is number {longest + 1}, "
            f"of {counts[longest]} tokens: {prompts[longest][:40]!r}"
        )
