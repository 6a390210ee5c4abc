"""What a path to a student leads to, and what its files state of it. No torch.

A student of this package is described by its student.json. A pipeline in diffusers' format states its prediction type
and, by its scheduler, how it is sampled. A LoRA and a denoiser alone state neither: the recipe then has to.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..storage.files import read_json
from ..storage.tensor_headers import tensors_in
from ..storage.untrusted import regular
from .experiment import STUDENTS, TUNING
from .start import ORIGINAL_STEPS, StudentSource
from .types import default_gamma

DESCRIPTION_FILE = "student.json"
INDEX, CONFIG = "model_index.json", "config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the first name that diffusers looks for in a folder
PEFT_CONFIG = "adapter_config.json"  # beside a LoRA in PEFT's own names: its rank and alpha
OF_LORA = re.compile(r"[._]lora(_|\.)")
OF_ANOTHER_KIND = re.compile(r"[._](dora_scale|lora_magnitude_vector|hada_w\d\w*|lokr_w\d\w*|oft_\w+)(\.|$)")
# PEFT's own names: a module's, without the component in front, and its factor's.
OF_PEFT = re.compile(r"(base_model\.model\.|((down|up|mid)_block|(single_)?transformer_block)).*\.lora_[AB]\.")
GRIDS = {steps: name for name, steps in ORIGINAL_STEPS.items()}
RENOISING = ("LCMScheduler", "FlowMatchLCMScheduler")
DETERMINISTIC = ("EulerDiscreteScheduler", "DDIMScheduler")  # with trailing times, the samplers of published students
VALUES = {
    "gamma": "gamma: 1 (as LCM-LoRA), 0 (as SDXL-Lightning), or TCD's eta between",
    "grid": "grid: lcm, trailing, milestones, or the list of its times",
    "prediction": "prediction: x0 (as the one-step SDXL-Lightning), or teacher, which is meant where nothing is said",
    "alpha": f"alpha: as its authors train and load it (PEFT's default is 8), or put its {PEFT_CONFIG} beside it",
}
Kind = Literal["student", "export", "pipeline", "denoiser", "lora", "weights"]


@dataclass(frozen=True)
class Found:
    """A student's files, and what they state.

    kind   student: in the layout of `students.save_student`, of the finished `stage` if it is known; export: as `mlcm
           export` writes it; pipeline, denoiser: in diffusers' format; lora, weights: a .safetensors file
    place  the file, or the folder that holds the weights and their configuration
    """

    kind: Kind
    place: Path
    stage: Path | None = None
    gamma: float | None = None
    grid: str | None = None
    prediction_type: str | None = None
    takes_alpha: bool = False  # a LoRA whose file has none
    others: tuple[str, ...] = ()  # other keys that a recipe has to name

    @property
    def is_lora(self) -> bool:
        """Whether it is an adapter over the teacher's denoiser, and not a denoiser's own weights."""
        return self.kind == "lora" or (self.kind != "weights" and (self.place / LORA_FILE).is_file())

    @property
    def unstated(self) -> list[str]:
        """Return the keys that a recipe has to name."""
        sampling = [] if self.kind == "student" else ["gamma", "grid"]
        return [name for name in sampling if getattr(self, name) is None] + list(self.others)


def finished_in(path: Path) -> Path:
    """Return the last finished stage with a student of the run at `path`; `path` itself where that is no run."""
    for folder in sorted(path.glob("[0-9]*-*"), reverse=True):
        if _leaves_student(folder):
            return folder
    return path


def find(path: Path) -> Found:
    """Return what lies at `path`. Raise FileNotFoundError or ValueError where that is no student, or not one alone."""
    regular(path)
    if not path.is_dir():
        return _of_file(path)
    for folder in [path, *sorted(path.glob("[0-9]*-*"), reverse=True)]:
        if _leaves_student(folder):
            return Found("student", folder / "student", stage=folder)
        if folder != path and folder.name.endswith(tuple(f"-{kind}" for kind in STUDENTS)):
            raise ValueError(f"{folder} leads to a stage that is gone or unfinished; `mlcm run` its recipe again")
    if (path / INDEX).is_file():
        return _of_pipeline(path)
    if (path / DESCRIPTION_FILE).is_file():
        return _of_student(path)
    if (path / CONFIG).is_file():
        return Found("denoiser", path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _of_file(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several files, of which one has to be named: {names}")
    raise ValueError(
        f"{path} holds no student: name a run, a finished stage that leaves one, an exported folder, one in diffusers' "
        "format, or a .safetensors file"
    )


def _leaves_student(stage: Path) -> bool:
    return (stage / "manifest.json").is_file() and (stage / "student" / DESCRIPTION_FILE).is_file()


def refuse_unstated(found: Found, source: StudentSource) -> None:
    """Raise ValueError for what neither the files nor the recipe state, with the keys to write.

    And for an alpha that would have no effect.
    """
    if source.alpha is not None and not found.takes_alpha:
        what = f"{source.path} states its own" if found.kind == "lora" else f"{source.path} is no LoRA of a file"
        raise ValueError(f"alpha has no effect, since {what}: leave it out")
    missing = [name for name in found.unstated if getattr(source, name) is None]
    if missing:
        keys = ", ".join(f"{name}: ..." for name in missing)
        ways = "; ".join(VALUES[name] for name in missing)
        what = "its alpha" if missing == ["alpha"] else "how it is sampled"
        raise ValueError(
            f"{source.path} does not state {what}: write {{path: {source.path}, {keys}}}, where {ways}. The model's "
            "card says which (docs/start_from.md)"
        )


def _of_file(path: Path) -> Found:
    if path.suffix != ".safetensors":
        raise ValueError(f"expected a .safetensors file, found {path}: other formats can run code and are not read")
    names = tensors_in(path)
    if not names:
        raise ValueError(f"{path} holds no tensors")
    if others := sorted(filter(OF_ANOTHER_KIND.search, names)):
        raise ValueError(
            f"{path} is no plain LoRA: it has {others[0]}. One of another kind (DoRA, LoHa, LoKr) has to be merged "
            "into a denoiser, which `start` takes"
        )
    if not any(map(OF_LORA.search, names)):
        return Found("weights", path)
    has_alpha = any(name.endswith(".alpha") for name in names) or path.with_name(PEFT_CONFIG).is_file()
    needs_alpha = any(map(OF_PEFT.match, names)) and not has_alpha
    return Found("lora", path, takes_alpha=not has_alpha, others=("alpha",) if needs_alpha else ())


def _of_student(path: Path) -> Found:
    """Return the student in the folder `path`, whose tuning's gamma is in the manifest of its stage, beside it."""
    description, manifest = read_json(path / DESCRIPTION_FILE), path.parent / "manifest.json"
    is_stated = "preference" not in description or "gamma" in description
    is_stated = is_stated or (manifest.is_file() and read_json(manifest).get("kind") in TUNING)
    return Found("student", path, others=() if is_stated else ("gamma",))


def _of_pipeline(path: Path) -> Found:
    """Return what the scheduler of a pipeline states, and its student.json if `mlcm export` wrote it."""
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    name, spacing = scheduler.get("_class_name"), scheduler.get("timestep_spacing")
    gamma = 1.0 if name in RENOISING else 0.0 if name in DETERMINISTIC and spacing == "trailing" else None
    steps = scheduler.get("original_inference_steps")
    grid = GRIDS.get(steps) if isinstance(steps, int) else "trailing" if gamma == 0.0 else None
    prediction_type = scheduler.get("prediction_type")
    if not (path / DESCRIPTION_FILE).is_file():
        return Found("pipeline", path, None, gamma, grid, prediction_type)
    description: dict[str, Any] = read_json(path / DESCRIPTION_FILE, conditioned=bool)
    if gamma is None and "preference" not in description:  # an older export: the default of its kind
        gamma = default_gamma(description.get("num_segments", 1), description["conditioned"])
    return Found("export", path, None, description.get("gamma", gamma), description.get("grid", "milestones"))
