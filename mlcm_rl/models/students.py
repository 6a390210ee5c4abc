"""Students: a denoiser that starts as a copy of its teacher, its trainable parameters, and its folder on disk.

A LoRA student shares the teacher's weights in memory and adds its own adapter. The teacher's module does not change, so
that both can be called and one base can have any number of students.

A student's folder holds `student.json` and either the denoiser in diffusers' format (full weights, `unet/` say) or
`pytorch_lora_weights.safetensors` in diffusers' layout with PEFT's configuration in its metadata, and
`conditioning.safetensors` if the student is conditioned on its target time. A student tuned to preferences is the
distilled one, unchanged, with `preference_lora_weights.safetensors` over it.

A student may predict x0 where its teacher predicts noise (`prediction_type` of student.json). Its denoiser carries that
as an attribute, which `Base.x0` reads.

Both roles of preference learning share one set of base weights: the `distilled` adapter (or the weights of a student
trained in full) is the reference; the `preference` adapter over it is all that is trained.
"""

import copy
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..recipe import Full, Lora
from ..recipe.families import layout_of
from ..storage import finite
from ..storage.files import forget_origin, replacing, write_json
from ..storage.tensors import misfits, read_shapes, read_tensors, write_tensors
from .base import OWN_PREDICTION, Base, TargetTimeProjection
from .grids import SamplingGrid
from .lora_files import LORA_FILE, Adapter, combined, read_lora, write_lora
from .quantised import is_quantised, quantise_like_
from .student_description import DESCRIPTION_FILE, default_gamma_in, describe, grid_of

DISTILLED, PREFERENCE = "distilled", "preference"  # names of adapters
PREFERENCE_FILE = "preference_lora_weights.safetensors"
CONDITIONING_FILE = "conditioning.safetensors"


@dataclass(frozen=True)
class Student:
    """A finished student, loaded."""

    denoiser: ModelMixin
    num_segments: int
    conditioned: bool
    folder: Path
    tuned: bool = False  # to preferences, by an adapter over the distilled student
    budgets: tuple[int, ...] = ()  # ascending, the numbers of steps that it was trained for; empty: all
    grid: SamplingGrid = field(default_factory=SamplingGrid)
    default_gamma: float = 0.0  # that it is sampled with, where nothing else is said


def student(
    base: Base,
    adapter: Lora | Full,
    seed: int,
    condition_on_target: bool = False,
    start: Path | None = None,
    prediction_type: str | None = None,
) -> ModelMixin:
    """Return a trainable denoiser whose output equals the teacher's bit for bit, or that of the student in `start`.

    LoRA matrices are drawn from `seed` (the up-projections are zero). `condition_on_target` adds a zero projection of
    the target time, trained in full. The output is from now on read as `prediction_type`, by default as before. Raise
    ValueError if `start` has a student of another adapter or one that predicts x0 and shall not, for a type that
    students of `base` cannot have, and for full weights over a quantised teacher.
    """
    if isinstance(adapter, Full) and is_quantised(base.denoiser):
        raise ValueError("full weights cannot be trained in integers: train a LoRA, or leave teacher.quantise out")
    if start is not None:
        return _resume(base, adapter, condition_on_target, Path(start), prediction_type)
    denoiser = _denoiser(base, base.denoiser, condition_on_target, shared=isinstance(adapter, Lora))
    _set_prediction(base, denoiser, prediction_type or base.prediction_type)
    if isinstance(adapter, Full):
        return denoiser.requires_grad_(True)
    settings = _new_settings(base, adapter)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _with_lora(denoiser, settings)


def for_preference(base: Base, adapter: Lora, seed: int, start: Path) -> ModelMixin:
    """Load the distilled student in folder `start`, frozen, with a new trainable `preference` adapter from `seed`.

    Its output equals the student's. Raise ValueError if the student in `start` has a tuning's adapter over it: that is
    to be made part of it first (`student_files.write_untuned`).
    """
    if (start / PREFERENCE_FILE).is_file():
        raise ValueError(f"{start} holds a tuned student; preference learning starts from a distilled one")
    return with_preference(base, load_student(base, start).denoiser, adapter, seed)


def with_preference(base: Base, denoiser: ModelMixin, adapter: Lora, seed: int) -> ModelMixin:
    """Add a new trainable `preference` adapter from `seed` to a distilled student's frozen `denoiser`; return it."""
    settings = _new_settings(base, adapter)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _add_preference(denoiser, settings)


def new_denoiser(base: Base, condition: bool) -> ModelMixin:
    """Return a float32 copy of the denoiser of `base`, to be given other weights.

    With `condition` it has a projection of the target time.
    """
    return _denoiser(base, base.denoiser, condition, shared=False)


@contextmanager
def as_reference(denoiser: ModelMixin) -> Iterator[ModelMixin]:
    """Yield `denoiser` without its `preference` adapter: the distilled student, not the teacher."""
    layers = _adapted(denoiser)
    _activate(layers, [name for name in denoiser.peft_config if name != PREFERENCE])
    try:
        yield denoiser
    finally:
        _activate(layers, list(denoiser.peft_config))


def trainable_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients, in the module's order."""
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def expected_of(base: Base) -> dict[str, Any]:
    """Return what a student of `base` must say of itself; its prediction may be another of `student_predictions`.

    Where the guidance scale is an input of the denoiser, that scale is among it: the student learned no other.
    """
    record: dict[str, Any] = {"family": base.family, "prediction_type": base.prediction_type}
    if layout_of(base.family).embeds_guidance:
        record["guidance_scale"] = base.teacher.guidance_scale
    return record


def refuse_other(folder: Path, description: dict[str, Any], base: Base) -> None:
    """Raise ValueError if the student in `folder` is not one of `base`, by its `description`."""
    for name, expected in expected_of(base).items():
        allowed = base.student_predictions if name == "prediction_type" else (expected,)
        if (actual := description.get(name)) not in allowed:
            raise ValueError(f"{folder}: the student's {name} is {actual}, the teacher's {expected}")


def save_student(denoiser: ModelMixin, folder: Path | str, description: dict[str, Any]) -> None:
    """Write a student's folder in one rename, replacing an older one.

    student.json holds `description` with the denoiser's own "adapter", "conditioned" and "prediction_type". Raise
    ValueError if `description` lacks "num_segments" (K of the last phase), "family" or "prediction_type".
    """
    missing = {"num_segments", "family", "prediction_type"} - set(description)
    if missing:
        raise ValueError(f"a student's description lacks {', '.join(sorted(missing))}")
    settings = _lora_settings(denoiser)
    adapter = Full() if settings is None else Lora(rank=settings.r, alpha=settings.lora_alpha)
    target_time, part = target_time_of(denoiser), layout_of(description["family"]).denoiser
    has_own_file = settings is not None or not _is_configured(denoiser)
    with replacing(Path(folder)) as partial:
        partial.mkdir()
        if settings is None:
            finite.refuse_weights(denoiser.state_dict(), "the student")
            with _without_target_time(denoiser) if has_own_file else nullcontext():
                denoiser.save_pretrained(partial / part)
            forget_origin(partial)
        else:
            _save_lora(denoiser, DISTILLED, partial / LORA_FILE, part)
        if target_time and has_own_file:
            write_tensors(partial / CONDITIONING_FILE, target_time)
        fields = {**description, "adapter": adapter.model_dump(), "conditioned": bool(target_time)}
        fields["prediction_type"] = getattr(denoiser, OWN_PREDICTION, description["prediction_type"])
        write_json(partial / DESCRIPTION_FILE, fields)


def save_tuned(denoiser: ModelMixin, start: Path, folder: Path, tuned_steps: int) -> None:
    """Write a tuned student's folder in one rename: the distilled student in `start`, and the adapter over it.

    `tuned_steps` is the number of optimiser steps of the weights that the guard kept; 0 is the distilled student.
    """
    settings = denoiser.peft_config[PREFERENCE]
    preference = Lora(rank=settings.r, alpha=settings.lora_alpha).model_dump()
    with replacing(folder) as partial:
        shutil.copytree(start, partial)
        _save_lora(denoiser, PREFERENCE, partial / PREFERENCE_FILE, layout_of(describe(start)["family"]).denoiser)
        fields = {**describe(start), "preference": preference, "tuned_steps": tuned_steps}
        write_json(partial / DESCRIPTION_FILE, fields)


def load_student(base: Base, folder: Path | str, dtype: torch.dtype = torch.float32) -> Student:
    """Load the student in `folder`, over the weights of `base` if it is an adapter, bit for bit as it was saved.

    In another `dtype` than float32, that of `base`, its own weights are rounded: it is sampled as fast as its teacher.

    Its parameters require gradients as in training: torch multiplies by frozen matrices in another order, which would
    change the last bits. Raise FileNotFoundError if there is none, ValueError for another teacher's (`expected_of`).
    """
    folder = Path(folder)
    description = describe(folder)
    refuse_other(folder, description, base)
    denoiser = _load_denoiser(base, folder, description, dtype=dtype)
    tuned, budgets = "preference" in description, tuple(sorted(set(description["budgets"])))
    return Student(
        denoiser,
        description["num_segments"],
        description["conditioned"],
        folder,
        tuned,
        budgets,
        grid_of(description),
        default_gamma_in(description),
    )


def combined_lora(student: Student) -> Adapter | None:
    """Return one adapter over the teacher for this student: distilled and, if it is tuned, preference in one.

    None for a student trained in full. The target time's projection is not in it. Every scale is inside B (alpha =
    rank).
    """
    if not (student.folder / LORA_FILE).is_file():
        return None
    files = [LORA_FILE, PREFERENCE_FILE] if student.tuned else [LORA_FILE]
    return combined([read_lora(student.folder / file) for file in files])


def merged(student: Student, dtype: torch.dtype) -> ModelMixin:
    """Return a copy of the student's denoiser in `dtype` with its adapters merged into the weights.

    Raise ValueError if a weight overflows in `dtype`, and over a quantised teacher.
    """
    if is_quantised(student.denoiser):
        raise ValueError(f"{student.folder}: an adapter is merged into floats: load the teacher without quantise")
    denoiser = copy.deepcopy(student.denoiser)
    if adapters := list(denoiser.__dict__.get("peft_config", {})):
        _merge(denoiser, adapters)
    nn.Module.to(denoiser, dtype)  # diffusers' own `to` warns of float32 modules that a UNet does not have
    finite.refuse_weights(denoiser.state_dict(), "the student folded into the teacher")
    return denoiser


def _resume(
    base: Base, adapter: Lora | Full, condition_on_target: bool, folder: Path, prediction_type: str | None
) -> ModelMixin:
    """Load the student in `folder` to train it further, with another `prediction_type` if one is given."""
    description = describe(folder)
    if description["adapter"] != adapter.model_dump():
        raise ValueError(
            f"{folder} holds a student with adapter {description['adapter']}, the recipe has "
            f"{adapter.model_dump()}; a stage continues with the adapter of the student it starts from"
        )
    if description["conditioned"] and not condition_on_target:
        raise ValueError(
            f"{folder} holds a student conditioned on its target time, and the stage would go on without: a stage "
            "continues with the inputs of the student it starts from"
        )
    denoiser = _load_denoiser(base, folder, description, condition_on_target)
    before = description["prediction_type"]
    if prediction_type not in (None, before) and before != base.prediction_type:
        raise ValueError(
            f"{folder} holds a student that predicts x0, and the stage would go on with {prediction_type}: a stage "
            "continues with the prediction of the student it starts from (prediction: x0)"
        )
    _set_prediction(base, denoiser, prediction_type or before)
    return denoiser


def _set_prediction(base: Base, denoiser: ModelMixin, prediction_type: str) -> None:
    """Let the output of `denoiser` be read as `prediction_type`. Raise ValueError if `base` allows students no such."""
    if prediction_type not in base.student_predictions:
        raise ValueError(
            f"a student of {base.teacher.path} cannot predict {prediction_type}: of family {base.family} it predicts "
            f"{' or '.join(dict.fromkeys(base.student_predictions))}"
        )
    setattr(denoiser, OWN_PREDICTION, prediction_type)


def _load_denoiser(
    base: Base,
    folder: Path,
    description: dict[str, Any],
    condition: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ModelMixin:
    """Load the denoiser in `folder`, with the same trainable parameters as in its training, its own in `dtype`.

    `condition` adds a target time's projection if it has none.
    """
    denoiser = _load_distilled(base, folder, description, condition or description["conditioned"], dtype)
    if "preference" in description:
        settings, tensors = read_lora(folder / PREFERENCE_FILE)
        denoiser = _fill_lora(_add_preference(denoiser, settings), PREFERENCE, tensors, folder)
    for name, value in denoiser.named_parameters():
        if ".lora_" in name:
            value.data = value.data.to(dtype)
    return denoiser


def _load_distilled(
    base: Base, folder: Path, description: dict[str, Any], condition: bool, dtype: torch.dtype
) -> ModelMixin:
    is_full = description["adapter"].get("kind") == "full"
    source = _load_full(base, folder / base.denoiser_part, dtype) if is_full else base.denoiser
    denoiser = _denoiser(base, source, condition, shared=True)
    _set_prediction(base, denoiser, description["prediction_type"])
    if description["conditioned"] and not (is_full and _is_configured(denoiser)):
        projection = read_tensors(folder / CONDITIONING_FILE)
        if misfits(projection, target_time_of(denoiser)):
            raise ValueError(f"{folder / CONDITIONING_FILE} is not the target time's projection of this teacher")
        denoiser.load_state_dict(projection, strict=False)
    if is_full:
        return denoiser.requires_grad_(True)
    settings, tensors = read_lora(folder / LORA_FILE)
    return _fill_lora(_with_lora(denoiser, settings), DISTILLED, tensors, folder)


def _load_full(base: Base, folder: Path, dtype: torch.dtype) -> ModelMixin:
    """Load the denoiser in `folder` in `dtype` on the device of `base`."""
    for path in sorted(folder.glob("*.safetensors")):
        read_shapes(path)  # raises with the name of a damaged file
    denoiser = base.denoiser_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    place = {"device": base.device, "memory_format": base.memory_format}
    return nn.Module.to(denoiser, **place)  # type: ignore[call-overload]  # torch's stubs lack memory_format


def _denoiser(base: Base, source: ModelMixin, condition: bool, shared: bool) -> ModelMixin:
    """Return a new frozen module with the weights of `source`: the same tensors, or float32 copies.

    With `condition` it has a projection of the target time, which is zero unless `source` has one.
    """
    weights = source.state_dict()
    if not shared:
        weights = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    with torch.device("meta"):
        denoiser = base.empty_denoiser(source.config, condition)
    quantise_like_(denoiser, source)
    for name, value in target_time_of(denoiser).items():
        weights.setdefault(name, torch.zeros(value.shape, device=source.device))
    denoiser.load_state_dict(weights, assign=True)
    for name, buffer in source.named_buffers():
        if name not in weights:  # computed, not saved
            module, _, attribute = name.rpartition(".")
            denoiser.get_submodule(module).register_buffer(attribute, buffer, persistent=False)
    return denoiser.requires_grad_(False).eval()


def target_time_of(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the target time's projection, by name; empty if `denoiser` is not conditioned on one."""
    layers = denoiser.named_modules()
    return {f"{name}.weight": layer.weight for name, layer in layers if isinstance(layer, TargetTimeProjection)}


def _is_configured(denoiser: ModelMixin) -> bool:
    """Return whether diffusers' configuration of this denoiser includes the target time's projection."""
    return "time_cond_proj_dim" in denoiser.config


@contextmanager
def _without_target_time(denoiser: nn.Module) -> Iterator[None]:
    """Take the target time's projection out of `denoiser` inside the block, as diffusers' own class has none."""
    owners = [one for one in denoiser.modules() if isinstance(getattr(one, "cond_proj", None), TargetTimeProjection)]
    projections = [one.get_submodule("cond_proj") for one in owners]
    try:
        for one in owners:
            one.register_module("cond_proj", None)
        yield
    finally:
        for one, projection in zip(owners, projections, strict=True):
            one.register_module("cond_proj", projection)


def _with_lora(denoiser: ModelMixin, settings: LoraConfig) -> ModelMixin:
    """Add a new float32 adapter to `denoiser`, and make it and the target time's projection trainable."""
    inject_adapter_in_model(settings, denoiser, DISTILLED)
    for projection in target_time_of(denoiser).values():
        projection.requires_grad_(True)
    cast_training_params(denoiser, torch.float32)
    return denoiser.eval()


def _add_preference(denoiser: ModelMixin, settings: LoraConfig) -> ModelMixin:
    """Add a new float32 `preference` adapter to `denoiser`, and make it alone trainable."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # PEFT warns of a second adapter
        inject_adapter_in_model(settings, denoiser, PREFERENCE)
    _activate(_adapted(denoiser), list(denoiser.peft_config))
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(f".{PREFERENCE}." in name)
    cast_training_params(denoiser, torch.float32)
    return denoiser.eval()


def _adapted(denoiser: ModelMixin) -> list[BaseTunerLayer]:
    """Return the layers of `denoiser` that have adapters."""
    return [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]


def _merge(denoiser: ModelMixin, names: list[str]) -> None:
    """Add the adapters `names` to the weights of `denoiser`, in place, and take all adapters out of it."""
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=names)
            denoiser.set_submodule(name, layer.get_base_layer())
    del denoiser.peft_config


def _activate(layers: list[BaseTunerLayer], names: list[str]) -> None:
    """Make exactly the adapters `names` active in `layers`; `requires_grad` of all parameters stays as it is.

    PEFT's switches set `requires_grad` too, which would have to be put back: five times as long.
    """
    for layer in layers:
        layer._disable_adapters = not names
        if names:
            layer._active_adapter = names


def _fill_lora(denoiser: ModelMixin, name: str, tensors: dict[str, Tensor], source: Path | str) -> ModelMixin:
    """Replace the weights of adapter `name` of `denoiser`, in place, and return it.

    Raise ValueError unless names and shapes of `tensors` are exactly the adapter's.
    """
    if names := misfits(tensors, get_peft_model_state_dict(denoiser, adapter_name=name)):
        raise ValueError(
            f"{source}: {len(names)} LoRA tensors do not fit the teacher's denoiser, for example {names[0]}"
        )
    set_peft_model_state_dict(denoiser, tensors, adapter_name=name)
    return denoiser


def _new_settings(base: Base, adapter: Lora) -> LoraConfig:
    modules = list(base.adapted_modules(base.denoiser.config))
    return LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=modules)


def _lora_settings(denoiser: ModelMixin, name: str = DISTILLED) -> LoraConfig | None:
    return denoiser.__dict__.get("peft_config", {}).get(name)


def _save_lora(denoiser: ModelMixin, name: str, file: Path, part: str) -> None:
    adapter = _lora_settings(denoiser, name), get_peft_model_state_dict(denoiser, adapter_name=name)
    write_lora({part: adapter}, file)
