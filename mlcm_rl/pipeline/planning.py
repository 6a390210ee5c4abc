"""The plan of a recipe: network evaluations, disk, memory and time of each stage. Loads no weights.

Evaluations are forward passes of a denoiser on one sample; a guided pass counts two. Sizes come from the headers of the
teacher's files, or from its configuration where there are no weights yet. `cost.memory` predicts memory, `cost.flops`
time; both take seconds a stage, and are then cached (`estimates`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..cost import flops
from ..cost.evaluations import network_evaluations
from ..cost.flops import Operations, Work
from ..cost.gpus import Device
from ..cost.launches import Launch
from ..cost.memory import Memory, num_tokens, of_stage
from ..data.prompts import texts_of
from ..models import files, text_adapter
from ..models.student_files import adapter_of
from ..models.teachers import class_of
from ..recipe import AdaptText, Distill, Full, Lora, Recipe, Stage, Start, teacher_check
from ..recipe.experiment import student_before
from ..recipe.families import geometry, layout_of
from ..recipe.takes import BYTES, Networks, Values
from ..storage.files import CheckpointError, read_json
from ..storage.manifest import is_finished
from ..storage.tensors import read_shapes
from ..storage.untrusted import in_a_line
from . import estimates
from .fingerprint import Located, locate
from .results import share_done


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan; memory is that of one process."""

    kind: str
    fingerprint: str
    folder: Path
    done: bool
    network_evaluations: int
    disk_bytes: int
    memory: Memory | None = None  # None where it was not requested, or the stage is done
    operations: float | None = None  # floating-point, of all processes; None without a device
    seconds: float | None = None
    unknown: str | None = None  # why memory or time could not be predicted
    share_done: float = 0.0  # of a stage that was begun: the saved samples or steps


def planned_stages(
    recipe: Recipe, kind: str | None = None, launch: Launch | None = None, device: Device | None = None
) -> list[PlannedStage]:
    """Return what `run` would do now, with its memory where a `kind` of device ("cuda", "cpu") is given.

    Under `launch` (default: one process) memory is that of each process; with a `device` there is the time too.
    Raises FileNotFoundError for missing files, ValueError where processes cannot share a batch.
    """
    launch = launch or Launch()
    sizes = Sizes(recipe)
    earlier: list[Located] = []
    planned = []
    for stage in recipe.stages:
        place = locate(stage, recipe, earlier)
        done = is_finished(place.folder)
        costs = (network_evaluations(stage, recipe), sizes.disk(stage))
        needs_prediction = not done and bool(stage.passes(recipe))
        share = 1.0 if done else share_done(stage, place.folder)
        one = PlannedStage(stage.kind, place.fingerprint, place.folder, done, *costs, share_done=share)
        planned.append(_predicted(one, stage, sizes, kind, launch, device) if needs_prediction else one)
        earlier.append(place)
    return planned


def _predicted(
    one: PlannedStage, stage: Stage, sizes: "Sizes", kind: str | None, launch: Launch, device: Device | None
) -> PlannedStage:
    """Return `one` with its memory on a device of this `kind`, and its time on a `device`, where these are given."""
    try:
        memory = sizes.memory(stage, kind, launch) if kind is not None else None
        work = sizes.work(stage) if device is not None else None
    except (CheckpointError, OSError, ValueError):  # a run would stop at these too
        raise
    except Exception as error:  # a network that cannot run without data can still be trained
        return replace(one, unknown=in_a_line(error))
    total = sum(part.count * part.each.total for part in work) if work is not None else None
    time = flops.seconds(work, device, launch) if work is not None and device is not None else None
    return replace(one, memory=memory, operations=total, seconds=time)


class Sizes:
    """Bytes of a recipe's stages, from configuration files and the headers of weight files."""

    def __init__(self, recipe: Recipe):
        self.folder = files.shapes_folder(recipe.teacher)
        here = recipe.teacher.model_copy(update={"path": str(self.folder), "revision": None})
        self.recipe = recipe = recipe.model_copy(update={"teacher": here})
        teacher_check.refuse(self.folder, here.family, here.variant)
        self.parts = {name: files.shapes(self.folder / name, here.variant) for name in files.parts_with_weights(here)}
        if empty := [name for name, shapes in self.parts.items() if not shapes]:
            self.parts |= files.shapes_from_configuration(recipe.teacher, empty)
        self.family = class_of(here.family)
        denoiser = read_json(self.folder / self.family.denoiser_part / "config.json")
        vae = read_json(self.folder / "vae" / "config.json")
        latents = geometry(layout_of(here.family), denoiser, vae)
        side = recipe.teacher.resolution // latents.downscale if recipe.teacher.resolution else latents.side
        self.latent = latents.channels * side * side
        self.pixels = (side * latents.downscale) ** 2
        self.conditioning = self.family.conditioning_shapes(denoiser, num_tokens(self.folder))
        self.adapted = self.family.adapted_modules(denoiser)

    def weights(self, part: str) -> int:
        """Return the number of weights of a `part` of the teacher's pipeline."""
        return sum(map(prod, self.parts[part].values()))

    @property
    def denoiser_weights(self) -> int:
        """The number of weights of the denoiser."""
        return self.weights(self.family.denoiser_part)

    def trained(self, networks: Networks) -> int:
        """Return the number of trained weights: all of the denoiser's, or an adapter's.

        A LoRA has two matrices for every target.
        """
        if networks.text_adapter is not None:
            return text_adapter.num_weights(text_adapter.sizes_of(networks.text_adapter, self.conditioning))
        return self.adapter(networks.trained) if isinstance(networks.trained, Lora) else self.denoiser_weights

    def adapter(self, lora: Lora | None) -> int:
        """Return the number of weights of an adapter over the denoiser; 0 without one."""
        total = 0
        for name, shape in self.parts[self.family.denoiser_part].items():
            if lora is not None and len(shape) > 1 and is_lora_target(name, self.adapted):
                total += lora.rank * (prod(shape[1:]) + shape[0])
        return total

    def work(self, stage: Stage) -> list[Work]:
        """Return what the stage computes, from the cache of estimates where it is there."""
        distilled = self.distilled(stage)
        settings = {"work": list(map(asdict, stage.passes(self.recipe))), "distilled": distilled.model_dump()}

        def estimate() -> dict[str, Any]:
            return {"work": [asdict(one) for one in flops.of_stage(stage, self.recipe, distilled)]}

        description = estimates.description(stage, self.recipe, self.folder, **settings)
        entries = estimates.cached(description, estimate)["work"]
        return [Work(**one | {"each": Operations(**one["each"])}) for one in entries]

    def memory(self, stage: Stage, kind: str, launch: Launch | None = None) -> Memory:
        """Return the memory of the stage in one process of `launch` (default: the only one) on a `kind` of device.

        It comes from the cache of estimates where it is there.
        """
        distilled = self.distilled(stage)
        networks = stage.networks(distilled)
        encoders = sum(self.weights(part) for part in self.parts if part not in (self.family.denoiser_part, "vae"))
        others = {"staying": 0, "leaving": 0}
        encoding = encoders * BYTES[self.recipe.teacher.dtype] + 4 * self.second_encoder(stage)
        others["leaving" if encodes_ahead(networks) else "staying"] += encoding
        for path in map(Path, networks.measuring):
            measuring = files.shapes(path) if path.is_dir() else read_shapes(path)
            others["staying"] += 4 * sum(map(prod, measuring.values()))
        settings = {"memory": kind, "others": others, "distilled": distilled.model_dump()}
        settings["launch"] = asdict(launch or Launch())

        def estimate() -> dict[str, Any]:
            staying, leaving = others["staying"], others["leaving"]
            return asdict(of_stage(stage, self.recipe, staying, distilled, kind, launch, leaving))

        description = estimates.description(stage, self.recipe, self.folder, **settings)
        fields = estimates.cached(description, estimate)
        return Memory(**fields | {name: tuple(fields.get(name, ())) for name in ("uncounted", "unbuilt")})

    def second_encoder(self, stage: Stage) -> int:
        """Return the number of weights of the text encoder of other languages that `stage` encodes prompts by.

        It is that of `teacher.text_adapter`, or of an adapt_text stage, this one or an earlier one. Its adapter is
        small beside it and not counted.
        """
        number = self.recipe.stages.index(stage) if stage in self.recipe.stages else 0
        folder = self.recipe.teacher.text_adapter
        folders = [Path(folder) / text_adapter.ENCODER] if folder is not None else []
        folders += [Path(one.encoder) for one in self.recipe.stages[: number + 1] if isinstance(one, AdaptText)]
        return sum(map(prod, files.shapes(folders[-1]).values())) if folders else 0

    def distilled(self, stage: Stage) -> Lora | Full:
        """Return the adapter of the student that `stage` starts from or samples: of the last one before it."""
        stages = self.recipe.stages
        position = student_before(stages, stages.index(stage)) if stage in stages else None
        while position is not None:
            one = stages[position]
            if isinstance(one, Distill):
                return one.adapter
            if isinstance(one, Start):
                return adapter_of(one)
            position = student_before(stages, position)
        return Full()

    def disk(self, stage: Stage) -> int:
        """Return the bytes of the stage's results, and of its newest checkpoints while it runs."""
        networks = stage.networks(self.distilled(stage))
        values = Values(
            denoiser=self.denoiser_weights,
            trained=self.trained(networks),
            fake=self.adapter(networks.fake),
            latent=self.latent,
            prompt=sum(map(prod, self.conditioning.values())),
            pixels=self.pixels,
        )
        return stage.disk(self.recipe, values)


def encodes_ahead(networks: Networks) -> bool:
    """Return whether text encoders leave memory before the first step. Raises as `texts_of` where that matters."""
    if not networks.encodes_ahead or networks.texts is None:
        return networks.encodes_ahead
    return len(set(texts_of(networks.texts))) <= networks.most_texts


def is_lora_target(name: str, targets: Sequence[str]) -> bool:
    """Return whether the weight `name` of a denoiser belongs to a module among the `targets` of an adapter."""
    module = f".{name.removesuffix('.weight')}"
    return any(module.endswith(f".{target}") for target in targets)
