"""Students: a denoiser that starts as its teacher, what of it is trained, and the folder it is kept in.

A LoRA student shares the teacher's weights in memory and adds its own adapter; the teacher's module stays untouched, so
that both can be called side by side and one base can carry any number of students.

A student's folder holds `student.json` and either the denoiser in diffusers' format (full weights, `unet/` say) or
`pytorch_lora_weights.safetensors` in diffusers' layout with PEFT's configuration in its metadata, and then
`conditioning.safetensors` where the student is conditioned on its target time. A student tuned to preferences is a
distilled one, as it was, with `preference_lora_weights.safetensors` over it.

Roles over one set of base weights: the `distilled` adapter (or, of a student trained in full, the weights themselves)
is the reference of preference learning; `preference` comes on top and is all that is trained.
"""

import copy
import reprlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..equations.segments import NUM_SEGMENTS
from ..recipe import Full, Lora
from ..recipe.families import layout_of
from ..recipe.types import default_gamma
from ..storage import finite
from ..storage.files import CheckpointError, forget_origin, read_json, replacing, write_json
from ..storage.tensors import misfits, read_shapes, read_tensors, write_tensors
from .base import Base, TargetTimeProjection
from .lora_files import LORA_FILE, Adapter, combined, read_lora, write_lora

DISTILLED, PREFERENCE = "distilled", "preference"  # names of adapters
PREFERENCE_FILE = "preference_lora_weights.safetensors"
CONDITIONING_FILE = "conditioning.safetensors"
DESCRIPTION_FILE = "student.json"


@dataclass(frozen=True)
class Student:
    """A finished student, loaded."""

    denoiser: ModelMixin
    num_segments: int
    conditioned: bool
    folder: Path
    tuned: bool = False  # to preferences, by an adapter over the distilled student
    budgets: tuple[int, ...] = ()  # steps whose jumps alone it learned, ascending; none: every number

    @property
    def default_gamma(self) -> float:
        """1 (re-noise) for one segment; 0 (deterministic) for more, and for a student told where its jumps end."""
        return default_gamma(self.num_segments, self.conditioned)


def student(
    base: Base, adapter: Lora | Full, seed: int, condition_on_target: bool = False, start: Path | None = None
) -> ModelMixin:
    """A trainable denoiser whose output equals the teacher's bit for bit, or that of the student in folder `start`.

    LoRA matrices are drawn from `seed` (the up-projections are zero). `condition_on_target` adds a zero projection of
    the target time, trained in full. Raises ValueError where `start` holds another kind or size of student.
    """
    if start is not None:
        return _resume(base, adapter, condition_on_target, Path(start))
    denoiser = _denoiser(base, base.denoiser, condition_on_target, shared=isinstance(adapter, Lora))
    if isinstance(adapter, Full):
        return denoiser.requires_grad_(True)
    settings = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(base.lora_targets))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _with_lora(denoiser, settings)


def for_preference(base: Base, adapter: Lora, seed: int, start: Path) -> ModelMixin:
    """The distilled student in folder `start`, frozen, with a fresh trainable `preference` adapter drawn from `seed`.

    Its output equals the student's. Raises ValueError where `start` has been tuned already.
    """
    if (start / PREFERENCE_FILE).is_file():
        raise ValueError(f"{start} holds a tuned student; preference learning starts from a distilled one")
    return preferring(base, load_student(base, start).denoiser, adapter, seed)


def preferring(base: Base, denoiser: ModelMixin, adapter: Lora, seed: int) -> ModelMixin:
    """A distilled student's `denoiser`, frozen, with a fresh trainable `preference` adapter drawn from `seed`."""
    settings = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(base.lora_targets))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _with_preference(denoiser, settings)


@contextmanager
def as_reference(denoiser: ModelMixin) -> Iterator[ModelMixin]:
    """`denoiser` without its `preference` adapter: the distilled student, and never the bare teacher."""
    _activate(denoiser, [name for name in denoiser.peft_config if name != PREFERENCE])
    try:
        yield denoiser
    finally:
        _activate(denoiser, list(denoiser.peft_config))


def trainable_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, in the module's order."""
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def save_student(denoiser: ModelMixin, folder: Path | str, description: dict[str, Any]) -> None:
    """Write a student's folder in one rename, replacing an older one.

    `description` goes into student.json with what the denoiser itself says ("adapter", "conditioned"); it must name
    "num_segments" (K of the last phase), "family" and "prediction_type". Raises ValueError where it does not.
    """
    missing = {"num_segments", "family", "prediction_type"} - set(description)
    if missing:
        raise ValueError(f"a student's description lacks {', '.join(sorted(missing))}")
    settings = _lora_settings(denoiser)
    adapter = Full() if settings is None else Lora(rank=settings.r, alpha=settings.lora_alpha)
    target_time, part = target_time_of(denoiser), layout_of(description["family"]).denoiser
    apart = settings is not None or not _is_configured(denoiser)
    with replacing(Path(folder)) as partial:
        partial.mkdir()
        if settings is None:
            finite.refuse_weights(denoiser.state_dict(), "the student")
            with _without_target_time(denoiser) if apart else nullcontext():
                denoiser.save_pretrained(partial / part)
            forget_origin(partial)
        else:
            _save_lora(denoiser, DISTILLED, partial / LORA_FILE, part)
        if target_time and apart:
            write_tensors(partial / CONDITIONING_FILE, target_time)
        described = {**description, "adapter": adapter.model_dump(), "conditioned": bool(target_time)}
        write_json(partial / DESCRIPTION_FILE, described)


def save_tuned(denoiser: ModelMixin, start: Path, folder: Path, tuned_steps: int) -> None:
    """Write a tuned student's folder in one rename: the distilled student in `start`, and the adapter over it.

    `tuned_steps` is the step that the guard kept, 0 where the student is as it was distilled.
    """
    settings = _lora_settings(denoiser, PREFERENCE)
    preference = Lora(rank=settings.r, alpha=settings.lora_alpha).model_dump()
    with replacing(folder) as partial:
        shutil.copytree(start, partial)
        _save_lora(denoiser, PREFERENCE, partial / PREFERENCE_FILE, layout_of(describe(start)["family"]).denoiser)
        described = {**describe(start), "preference": preference, "tuned_steps": tuned_steps}
        write_json(partial / DESCRIPTION_FILE, described)


def load_student(base: Base, folder: Path | str) -> Student:
    """The student in `folder`, over the weights of `base` where it is an adapter, bit for bit as it was saved.

    Its parameters ask for gradients as in training: torch multiplies by frozen matrices in another order, which would
    change the last bits. Raises FileNotFoundError where there is none, ValueError for one of another family or
    prediction type.
    """
    folder = Path(folder)
    described = describe(folder)
    for name, expected in (("family", base.family), ("prediction_type", base.prediction_type)):
        if described[name] != expected:
            raise ValueError(f"{folder}: the student's {name} is {described[name]}, the teacher's {expected}")
    denoiser = _load_denoiser(base, folder, described)
    tuned, budgets = "preference" in described, tuple(sorted(set(described["budgets"])))
    return Student(denoiser, described["num_segments"], described["conditioned"], folder, tuned, budgets)


def describe(folder: Path) -> dict[str, Any]:
    """What student.json in `folder` says.

    Raises FileNotFoundError where there is none, CheckpointError for one that is damaged.
    """
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no student: no {DESCRIPTION_FILE}; name a finished student's folder")
    described = read_json(file, family=str, prediction_type=str, conditioned=bool, adapter=dict)
    num_segments = described.setdefault("num_segments", described.pop("segments", None))  # its name in older folders
    if type(num_segments) is not int or not 1 <= num_segments <= NUM_SEGMENTS:
        message = f"num_segments must be a whole number from 1 to {NUM_SEGMENTS}, is {reprlib.repr(num_segments)}"
        raise CheckpointError(f"{file}: {message}")
    tuned_steps = described.get("tuned_steps", 0)  # older folders do not say
    if type(tuned_steps) is not int or tuned_steps < 0:
        raise CheckpointError(f"{file}: tuned_steps must be a whole number from 0, is {reprlib.repr(tuned_steps)}")
    budgets = described.setdefault("budgets", [])  # nor do they
    if type(budgets) is not list or not all(type(n) is int and 1 <= n <= NUM_SEGMENTS for n in budgets):
        raise CheckpointError(f"{file}: budgets must be numbers from 1 to {NUM_SEGMENTS}, are {reprlib.repr(budgets)}")
    return described


def tuned_steps(folder: Path) -> int | None:
    """The steps of preference learning that the student in `folder` has taken; None where it is not tuned, or says not.

    0 is a student that its guard found no better than the distilled one, which it then is.
    """
    described = describe(folder)
    return described.get("tuned_steps") if "preference" in described else None


def load_published_lora(base: Base, path: Path | str, alpha: float = 8.0) -> ModelMixin:
    """The teacher with a LoRA file as the authors of TLCM publish it: keys as PEFT gives them, no configuration.

    Rank and modules are read from the tensors; `alpha` is PEFT's default of 8, which their code trains and loads with
    (diffusers would take alpha = rank, eight times too strong at rank 64).
    """
    tensors = {key.removeprefix("base_model.model."): value for key, value in read_tensors(Path(path)).items()}
    modules = sorted({key.rpartition(".lora_")[0] for key in tensors})
    first = tensors.get(f"{modules[0]}.lora_A.weight") if modules else None
    if first is None or first.ndim < 2:
        raise ValueError(f"{path}: its tensors are not a LoRA's, named as PEFT names them")
    rank = first.shape[0]
    denoiser = _denoiser(base, base.denoiser, condition=False, shared=True)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
    return _fill_lora(_with_lora(denoiser, settings), DISTILLED, tensors, path)


def as_one_lora(student: Student) -> Adapter | None:
    """Return the adapter that makes the teacher this student, with the preference adapter of a tuned one in it.

    None where its weights are its own. A target time's projection is not in it. Every scale is inside B (alpha = rank).
    """
    if not (student.folder / LORA_FILE).is_file():
        return None
    files = [LORA_FILE, PREFERENCE_FILE] if student.tuned else [LORA_FILE]
    return combined([read_lora(student.folder / file) for file in files])


def merged(student: Student, dtype: torch.dtype) -> ModelMixin:
    """A plain denoiser with weights of its own in `dtype` that computes what the student does.

    Raises ValueError where they do not fit `dtype`.
    """
    denoiser = copy.deepcopy(student.denoiser)
    if adapters := list(denoiser.__dict__.get("peft_config", {})):
        denoiser.fuse_lora(adapter_names=adapters)
        denoiser.unload_lora()
    nn.Module.to(denoiser, dtype)  # diffusers' own `to` warns of float32 modules that a UNet has not
    finite.refuse_weights(denoiser.state_dict(), "the student folded into the teacher")
    return denoiser


def _resume(base: Base, adapter: Lora | Full, condition_on_target: bool, folder: Path) -> ModelMixin:
    """The student in `folder`, trainable again."""
    described = describe(folder)
    if described["adapter"] != adapter.model_dump():
        raise ValueError(
            f"{folder} holds a student with adapter {described['adapter']}, the recipe asks for "
            f"{adapter.model_dump()}; a stage goes on with the adapter it starts from"
        )
    if described["conditioned"] and not condition_on_target:
        raise ValueError(f"{folder} holds a student conditioned on its target time; set condition_on_target: true")
    return _load_denoiser(base, folder, described, condition_on_target)


def _load_denoiser(base: Base, folder: Path, described: dict[str, Any], condition: bool = False) -> ModelMixin:
    """What `folder` holds, with the parameters trainable that were so when it was made.

    `condition` adds a target time where it has none.
    """
    denoiser = _load_distilled(base, folder, described, condition or described["conditioned"])
    if "preference" not in described:
        return denoiser
    settings, tensors = read_lora(folder / PREFERENCE_FILE)
    return _fill_lora(_with_preference(denoiser, settings), PREFERENCE, tensors, folder)


def _load_distilled(base: Base, folder: Path, described: dict[str, Any], condition: bool) -> ModelMixin:
    is_full = described["adapter"].get("kind") == "full"
    source = _load_whole(base, folder / base.denoiser_part) if is_full else base.denoiser
    denoiser = _denoiser(base, source, condition, shared=True)
    if described["conditioned"] and not (is_full and _is_configured(denoiser)):
        projection = read_tensors(folder / CONDITIONING_FILE)
        if misfits(projection, target_time_of(denoiser)):
            raise ValueError(f"{folder / CONDITIONING_FILE} is not the target time's projection of this teacher")
        denoiser.load_state_dict(projection, strict=False)
    if is_full:
        return denoiser.requires_grad_(True)
    settings, tensors = read_lora(folder / LORA_FILE)
    return _fill_lora(_with_lora(denoiser, settings), DISTILLED, tensors, folder)


def _load_whole(base: Base, folder: Path) -> ModelMixin:
    """The denoiser in `folder`, float32, where `base` is."""
    for path in sorted(folder.glob("*.safetensors")):
        read_shapes(path)  # a damaged file is told by its name
    loaded = base.denoiser_class.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    return nn.Module.to(loaded, base.device, memory_format=base.memory_format)


def _denoiser(base: Base, source: ModelMixin, condition: bool, shared: bool) -> ModelMixin:
    """A frozen module of its own with the weights of `source`: the same memory, or a float32 copy.

    `condition` gives it diffusers' hook for an embedding beside that of t, its projection all zeros.
    """
    weights = source.state_dict()
    if not shared:
        weights = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    with torch.device("meta"):
        denoiser = base.empty_denoiser(source.config, condition)
    for name, value in target_time_of(denoiser).items():
        weights.setdefault(name, torch.zeros(value.shape, device=source.device))
    denoiser.load_state_dict(weights, assign=True)
    return denoiser.requires_grad_(False).eval()


def target_time_of(denoiser: nn.Module) -> dict[str, Tensor]:
    """The weights of the target time's projection, by name; none where `denoiser` is not conditioned on one."""
    layers = denoiser.named_modules()
    return {f"{name}.weight": layer.weight for name, layer in layers if isinstance(layer, TargetTimeProjection)}


def _is_configured(denoiser: ModelMixin) -> bool:
    """Whether diffusers' own configuration of this denoiser says that a target time enters."""
    return "time_cond_proj_dim" in denoiser.config


@contextmanager
def _without_target_time(denoiser: nn.Module) -> Iterator[None]:
    """`denoiser` as diffusers knows it, for as long as the block lasts."""
    owners = [one for one in denoiser.modules() if isinstance(getattr(one, "cond_proj", None), TargetTimeProjection)]
    projections = [one.cond_proj for one in owners]
    try:
        for one in owners:
            one.cond_proj = None
        yield
    finally:
        for one, projection in zip(owners, projections, strict=True):
            one.cond_proj = projection


def _with_lora(denoiser: ModelMixin, settings: LoraConfig) -> ModelMixin:
    """`denoiser` with a fresh float32 adapter; it and the target time's projection are trainable."""
    denoiser.add_adapter(settings, adapter_name=DISTILLED)
    for projection in target_time_of(denoiser).values():
        projection.requires_grad_(True)
    cast_training_params(denoiser, torch.float32)
    return denoiser.eval()


def _with_preference(denoiser: ModelMixin, settings: LoraConfig) -> ModelMixin:
    """`denoiser` with a fresh float32 `preference` adapter beside what it has; that alone asks for gradients."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # PEFT's, of a second adapter: it is meant
        denoiser.add_adapter(settings, adapter_name=PREFERENCE)
    _activate(denoiser, list(denoiser.peft_config))
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(f".{PREFERENCE}." in name)
    cast_training_params(denoiser, torch.float32)
    return denoiser.eval()


def _activate(denoiser: ModelMixin, names: list[str]) -> None:
    """Make exactly the adapters `names` active, layer by layer; what asks for gradients stays as set.

    PEFT's switches turn gradients on and off as well, and walk all modules for each: half a second a step on SDXL.
    """
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            asked = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
            if layer.disable_adapters == bool(names):
                layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names)
            for parameter, asks in asked:
                parameter.requires_grad_(asks)


def _fill_lora(denoiser: ModelMixin, name: str, tensors: dict[str, Tensor], source: Path | str) -> ModelMixin:
    """`denoiser` with the weights of its adapter `name` replaced.

    Raises ValueError unless `tensors` are the adapter's, and all of them.
    """
    if odd := misfits(tensors, get_peft_model_state_dict(denoiser, adapter_name=name)):
        raise ValueError(f"{source}: {len(odd)} LoRA tensors do not fit the teacher's denoiser, for example {odd[0]}")
    set_peft_model_state_dict(denoiser, tensors, adapter_name=name)
    return denoiser


def _lora_settings(denoiser: ModelMixin, name: str = DISTILLED) -> LoraConfig | None:
    return denoiser.__dict__.get("peft_config", {}).get(name)


def _save_lora(denoiser: ModelMixin, name: str, file: Path, part: str) -> None:
    write_lora(_lora_settings(denoiser, name), get_peft_model_state_dict(denoiser, adapter_name=name), file, part)
