"""A checkpoint in one .safetensors file, in Stability AI's layout, made into a teacher's folder.

diffusers renames the weights; configurations and tokenizers are those of a folder of the same base, so that nothing is
fetched. The folder is then a teacher like any other, to hashes, plans and checks.
"""

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from ..recipe import Teacher, teacher_check, teacher_files
from ..recipe.families import Layout, family_of, layout_of, tokenizer_of
from ..recipe.teacher_types import Index
from ..storage.files import forget_origin, read_json, remove_partial_of, replacing
from ..storage.tensors import read_shapes
from ..storage.untrusted import in_a_line
from . import files
from .teacher_lora import FACTOR
from .teachers import class_of

DENOISER = "model.diffusion_model."  # before the names of the denoiser's tensors
TEXTS_OF_SD3 = {  # before the names of its text encoders' tensors; a file may lack all of them, or T5 alone
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
MARK_OF_V = "v_pred"  # a tensor by which tools know a fine-tune that predicts v
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
FIRST_LAYERS = {"sd": FIRST_LAYER, "sdxl": FIRST_LAYER, "sd3": "model.diffusion_model.x_embedder.proj.weight"}
PARTS = {  # beginnings of the names of tensors in files of other things
    r"(first_stage_model\.)?(encoder|decoder|quant_conv|post_quant_conv)\.": "an autoencoder alone: put it into vae/",
    r"control_model\.|controlnet": "a ControlNet: name the checkpoint that it is for",
    r".*\.(hada|lokr)_w": "a LoHa or a LoKr: merge it into the checkpoint of its base",
    r"clip_[lg]$|emb_params$": "an embedding of a word: name the checkpoint that it is for",
}
OF_REFINER = "conditioner.embedders.0.model.text_projection"


def convert(file: Path, like: Path, out: Path) -> Path:
    """Write the checkpoint `file` as the new folder `out` in diffusers' format, in one rename, and return `out`.

    `like` is a folder of the same base in diffusers' format, without weights or with them; components that the file
    lacks are taken from it. Raise FileExistsError if `out` exists, FileNotFoundError for missing files, and ValueError
    for a file that is no text-to-image checkpoint of that base or has not all of its weights.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} is there already; name a new folder")
    if file.suffix == ".gguf":
        raise ValueError(f"{file}: its weights are quantised: take the checkpoint in float16 or bfloat16, .safetensors")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a .safetensors file; other formats can run code and are not read")
    family = family_like(like)
    shapes = read_shapes(file)
    _refuse_other_kinds(file, shapes)
    if FIRST_LAYERS[family] not in shapes:
        raise ValueError(
            f"{file}: its denoiser has no {FIRST_LAYERS[family]}, as that of {like} has: give "
            "the folder of its own base"
        )
    _refuse_other_prediction(file, shapes, like)
    pipeline_class, layout = class_of(family).pipeline_class, layout_of(family)
    index = read_json(like / "model_index.json")
    parts: dict[str, Any] = {name: None for name in files.UNUSED_PARTS if name in index}
    parts |= {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    parts |= _texts_beside(shapes, like, layout) if family == "sd3" else {}
    dtype = _dtype(file)
    remove_partial_of(out)
    try:
        pipeline = pipeline_class.from_single_file(
            str(file), config=str(like), local_files_only=True, dtype=dtype, **parts
        )
    except Exception as error:  # of diffusers and transformers; a gap is a tensor without data to them
        reason = "weights are missing" if isinstance(error, NotImplementedError) else in_a_line(error)
        raise ValueError(f"{file}: no whole checkpoint of the base in {like}: {reason}") from error
    _refuse_other_size(file, like, getattr(pipeline, layout.denoiser), shapes)
    with replacing(out) as folder:
        pipeline.save_pretrained(folder)
        forget_origin(folder)
        written = Teacher(path=str(folder), family=family)
        teacher_check.refuse(folder, family)
        files.refuse_other_weights(written)
    return out


def family_like(like: Path) -> str:
    """Return the family of the folder `like`. Raise ValueError, or FileNotFoundError, with all that it lacks."""
    if not (like / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{like} holds no model_index.json: give its base's folder in diffusers' format, of which the JSON "
            "and TXT files are enough (a few MB)"
        )
    name = teacher_files.read(like / "model_index.json", Index).class_name
    family = family_of(name)
    if family is None:
        raise ValueError(f"{like}: model_index.json is of a {name}, which no family loads")
    if family not in FIRST_LAYERS:
        raise ValueError(
            f"{like}: single files of a {name} are not converted, only those of {', '.join(FIRST_LAYERS)}: name a "
            "folder in diffusers' format in teacher.path"
        )
    teacher_check.refuse(like, family)
    if faults := teacher_files.faults_of_tokenizers(like, family):
        raise FileNotFoundError("\n".join(f"{like}: {one}" for one in faults))
    return family


def _refuse_other_kinds(file: Path, shapes: dict[str, list[int]]) -> None:
    """Raise ValueError for a file that is no whole text-to-image checkpoint in Stability AI's layout."""
    if any(FACTOR.fullmatch(name) for name in shapes):
        raise ValueError(f"{file} is a LoRA, not a checkpoint: name it in teacher.lora, over the folder of its base")
    for names, kind in PARTS.items():
        if shapes and all(re.match(names, name) or name.endswith(".alpha") for name in shapes):
            raise ValueError(f"{file} is {kind}")
    if not any(name.startswith(DENOISER) for name in shapes):
        raise ValueError(
            f"{file}: none of its {len(shapes)} tensors begins with {DENOISER}: it is no checkpoint in the original "
            "layout; a file of diffusers' belongs into its folder, unet/ or transformer/"
        )
    if shapes.get(FIRST_LAYER, [0, 0])[1] == 9:
        raise ValueError(f"{file} is an inpainting model (9 channels): name the model that it was made from")
    if OF_REFINER in shapes:
        raise ValueError(f"{file} is SDXL's refiner, which only finishes pictures: name its base model")


def _refuse_other_prediction(file: Path, shapes: dict[str, list[int]], like: Path) -> None:
    """Raise ValueError for a checkpoint that is marked to predict v beside a schedule of another prediction."""
    scheduler = read_json(like / "scheduler" / "scheduler_config.json")
    if MARK_OF_V in shapes and scheduler.get("prediction_type") != "v_prediction":
        zero = ' and "rescale_betas_zero_snr": true' if "ztsnr" in shapes else ""
        raise ValueError(
            f"{file} predicts v (it has a tensor {MARK_OF_V}), and {like} does not: write "
            f'"prediction_type": "v_prediction"{zero} into a copy of its scheduler/scheduler_config.json'
        )


def _texts_beside(shapes: dict[str, list[int]], like: Path, layout: Layout) -> dict[str, Any]:
    """Return the text encoders that SD3's file lacks: those in `like`; None for T5 and its tokenizer without it."""
    parts: dict[str, Any] = {}
    for name, prefix in TEXTS_OF_SD3.items():
        if any(key.startswith(prefix) for key in shapes):
            continue
        if list((like / name).glob("*.safetensors")):
            text_encoder = getattr(transformers, layout.classes[name])
            parts[name] = text_encoder.from_pretrained(like / name, local_files_only=True, use_safetensors=True)
        elif name in layout.optional:
            parts |= {name: None, tokenizer_of(name): None}
    return parts


def _dtype(file: Path) -> torch.dtype:
    """Return the precision that most of the file's tensors have; float32 for one that is not written.

    Raise ValueError if the denoiser's are quantised.
    """
    with safe_open(file, "pt") as content:
        dtypes = {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118, not a dict
    quantised = [
        name for name, dtype in dtypes.items() if name.startswith(DENOISER) and dtype[:2] in ("F8", "F4", "I8", "U8")
    ]
    if quantised:
        raise ValueError(
            f"{file}: {len(quantised)} of its tensors are quantised, for example {quantised[0]} in "
            f"{dtypes[quantised[0]]}: take the checkpoint in float16, bfloat16 or float32"
        )
    return DTYPES.get(Counter(dtypes.values()).most_common(1)[0][0], torch.float32)


def _refuse_other_size(file: Path, like: Path, denoiser: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Raise ValueError for a denoiser of another size in the file than in `like`: diffusers drops what is too much."""
    in_file = sum(prod(shape) for name, shape in shapes.items() if name.startswith(DENOISER))
    taken = sum(value.numel() for value in denoiser.state_dict().values())
    if in_file != taken:
        raise ValueError(
            f"{file}: its denoiser has {in_file:,} weights and that of {like} takes {taken:,}: give the folder of its "
            "own base"
        )
