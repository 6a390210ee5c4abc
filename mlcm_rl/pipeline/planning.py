"""What a recipe will do before it does it: network evaluations, disk, memory and time a stage. Loads no weights.

Evaluations are forward passes of a denoiser on one sample; a guided pass counts two. Sizes are read off the headers of
the teacher's files, or off its configuration where there are no weights yet; what a stage needs of memory is found in
`cost.memory`, how long a device is at it in `cost.flops`; both take seconds a stage, once (`estimates`).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..cost import flops
from ..cost.evaluations import network_evaluations, passes_of
from ..cost.flops import Operations, Work
from ..cost.gpus import Device
from ..cost.launches import Launch
from ..cost.memory import Memory, num_tokens, of_stage
from ..data.store_writer import share_written
from ..models import files
from ..models.teachers import class_of
from ..recipe import Full, Lora, Recipe, Stage, teacher_check
from ..recipe.takes import Values
from ..storage.checkpoints import checkpoints, step_of
from ..storage.files import CheckpointError, read_json
from ..storage.manifest import is_finished
from ..storage.tensors import read_shapes
from . import estimates
from .fingerprint import Located, locate

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan; memory is that of one process."""

    kind: str
    fingerprint: str
    folder: Path
    done: bool
    network_evaluations: int
    disk_bytes: int
    memory: Memory | None = None  # where it was asked for and the stage is still to do
    operations: float | None = None  # floating-point, of all processes; where a device was named
    seconds: float | None = None
    unknown: str | None = None  # why memory or time could not be predicted
    share_done: float = 0.0  # of a stage that was begun, in samples or steps that are saved


def planned_stages(
    recipe: Recipe, kind: str | None = None, launch: Launch | None = None, device: Device | None = None
) -> list[PlannedStage]:
    """What `run` would do now, with its memory where a `kind` of device ("cuda", "cpu") is given.

    Under `launch` (default: one process) memory is that of each process; on a `device` the time is told too. Raises
    FileNotFoundError for files that are named and missing, ValueError where processes cannot share a batch.
    """
    launch = launch or Launch()
    sizes = Sizes(recipe)
    earlier: list[Located] = []
    planned = []
    for stage in recipe.stages:
        found = locate(stage, recipe, earlier)
        done = is_finished(found.folder)
        costs = (network_evaluations(stage, recipe), sizes.disk(stage))
        asked = not done and bool(stage.passes(recipe))
        share = 1.0 if done else share_done(stage, found.folder)
        one = PlannedStage(stage.kind, found.fingerprint, found.folder, done, *costs, share_done=share)
        planned.append(_predicted(one, stage, sizes, kind, launch, device) if asked else one)
        earlier.append(found)
    return planned


def _predicted(
    one: PlannedStage, stage: Stage, sizes: "Sizes", kind: str | None, launch: Launch, device: Device | None
) -> PlannedStage:
    """Return `one` with its memory on a device of this `kind`, and its time on a `device`, where each is given."""
    try:
        needed = sizes.memory(stage, kind, launch) if kind is not None else None
        work = sizes.work(stage) if device is not None else None
    except (CheckpointError, OSError, ValueError):  # what people can mend, and a run would stop at too
        raise
    except Exception as error:  # a network that cannot be tried without data can still be run
        return replace(one, unknown=in_a_line(error))
    total = sum(part.count * part.each.total for part in work) if work is not None else None
    time = flops.seconds(work, device, launch) if work is not None and device is not None else None
    return replace(one, memory=needed, operations=total, seconds=time)


def share_done(stage: Stage, folder: Path) -> float:
    """Return how much of `stage` is saved in its folder, from 0 to 1; what is damaged there counts as nothing."""
    if stage.num_stored:
        with suppress(CheckpointError):
            return share_written(folder, stage.num_stored)
    if stage.steps_per_phase and (saved := checkpoints(folder)):
        return min(1.0, step_of(saved[-1]) / sum(stage.steps_per_phase))
    return 0.0


def in_a_line(error: Exception) -> str:
    """Return what is wrong where an estimate fails."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first}"


class Sizes:
    """Bytes of a recipe's stages, from configuration files and the headers of weight files."""

    def __init__(self, recipe: Recipe):
        self.folder = files.shapes_folder(recipe.teacher)
        here = recipe.teacher.model_copy(update={"path": str(self.folder), "revision": None})
        self.recipe = recipe = recipe.model_copy(update={"teacher": here})
        teacher_check.refuse(self.folder, here.family, here.variant)
        self.parts = {name: files.shapes(self.folder / name, here.variant) for name in files.parts_with_weights(here)}
        if empty := [name for name, found in self.parts.items() if not found]:
            self.parts |= files.shapes_from_configuration(recipe.teacher, empty)
        self.family = class_of(here.family)
        denoiser = read_json(self.folder / self.family.denoiser_part / "config.json")
        vae = read_json(self.folder / "vae" / "config.json", block_out_channels=list)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side = recipe.teacher.resolution // factor if recipe.teacher.resolution else denoiser["sample_size"]
        self.latent = denoiser["in_channels"] * side * side
        self.pixels = (side * factor) ** 2
        shapes = self.family.conditioning_shapes(denoiser, num_tokens(self.folder))
        self.context = prod(shapes["context"])

    def weights(self, part: str) -> int:
        return sum(map(prod, self.parts[part].values()))

    @property
    def denoiser_weights(self) -> int:
        return self.weights(self.family.denoiser_part)

    def trained(self, adapter: Lora | Full | None) -> int:
        """Trained weights: all of the denoiser, or a LoRA's two matrices for every module that it changes."""
        if not isinstance(adapter, Lora):
            return self.denoiser_weights
        rank, total = adapter.rank, 0
        for name, shape in self.parts[self.family.denoiser_part].items():
            if len(shape) > 1 and is_lora_target(name, self.family.lora_targets):
                total += rank * (prod(shape[1:]) + shape[0])
        return total

    def work(self, stage: Stage) -> list[Work]:
        """Return what the stage computes. What was worked out before is not worked out again."""
        taken, distilled = passes_of(stage, self.recipe), self.distilled(stage)
        described = {"work": asdict(taken), "distilled": distilled.model_dump()}

        def found() -> dict[str, Any]:
            return {"work": [asdict(one) for one in flops.of_stage(stage, self.recipe, taken, distilled)]}

        kept = estimates.remembered(estimates.described(stage, self.recipe, self.folder, **described), found)["work"]
        return [Work(**one | {"each": Operations(**one["each"])}) for one in kept]

    def memory(self, stage: Stage, kind: str, launch: Launch | None = None) -> Memory:
        """Return what the stage takes in one process of `launch` (default: the only one) on a device of this `kind`.

        What was worked out before is not worked out again.
        """
        others = sum(self.weights(part) for part in self.parts if part not in (self.family.denoiser_part, "vae"))
        needed = others * BYTES[self.recipe.teacher.dtype]
        distilled = self.distilled(stage)
        for path in map(Path, stage.networks(distilled).measuring):
            measuring = files.shapes(path) if path.is_dir() else read_shapes(path)
            needed += 4 * sum(map(prod, measuring.values()))
        described = {"memory": kind, "others": needed, "distilled": distilled.model_dump()}
        described["launch"] = asdict(launch or Launch())

        def found() -> dict[str, Any]:
            return asdict(of_stage(stage, self.recipe, needed, distilled, kind, launch))

        kept = estimates.remembered(estimates.described(stage, self.recipe, self.folder, **described), found)
        return Memory(**kept | {"uncounted": tuple(kept["uncounted"])})

    def distilled(self, stage: Stage) -> Lora | Full:
        """The adapter of the student that `stage` starts from or draws with: the last one distilled before it."""
        before = self.recipe.stages[: self.recipe.stages.index(stage)] if stage in self.recipe.stages else []
        return next((one.adapter for one in reversed(before) if one.kind == "distill"), Full())

    def disk(self, stage: Stage) -> int:
        """Bytes of what the stage keeps, and of its newest checkpoints while it runs."""
        values = Values(
            denoiser=self.denoiser_weights,
            trained=self.trained(stage.networks(self.distilled(stage)).trained),
            latent=self.latent,
            prompt=self.context,
            pixels=self.pixels,
        )
        return stage.disk(self.recipe, values)


def is_lora_target(name: str, targets: Sequence[str]) -> bool:
    """Whether the weight `name` of a denoiser is of a module among the `targets` of an adapter."""
    return any(name.removesuffix(".weight").endswith(f".{target}") for target in targets)
