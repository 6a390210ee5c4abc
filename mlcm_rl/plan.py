"""What a recipe will do before it does it: network evaluations, disk, memory and time a stage. Loads no weights.

Evaluations are forward passes of a denoiser on one sample; a guided pass counts two. Sizes are read off the headers of
the teacher's files, or off its configuration where there are no weights yet; what a stage needs of memory is found in
`memory`, how long a device is at it in `operations`; both take seconds a stage, once (`estimates`).
"""

from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from . import estimates, operations, teacher_check
from .bases import LORA_TARGETS, files
from .checkpoint import CheckpointError, is_finished, read_json, read_shapes
from .devices import Device
from .fingerprint import STUDENTS, Located, locate
from .memory import PARTS, Memory, of_stage
from .memory.launches import Launch
from .operations import Operations, Passes, Work
from .recipe import (
    Distill,
    Dpo,
    Evaluate,
    Feedback,
    Full,
    Lora,
    Policy,
    Recipe,
    Stage,
    TrainReward,
    TrainTeacher,
    Trajectories,
    Tuning,
)

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
KEPT_BYTES = 12  # a trained float32 weight and its two moments, in a checkpoint
MEAN_ONLINE_STEPS = 4.5  # of Algorithm 1: 1 to 8 steps, segments drawn evenly


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
        asked = not done and not isinstance(stage, TrainReward)  # a head of a megabyte or two
        one = PlannedStage(stage.kind, found.fingerprint, found.folder, done, *costs)
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
    time = operations.seconds(work, device, launch) if work is not None and device is not None else None
    return replace(one, memory=needed, operations=total, seconds=time)


def in_a_line(error: Exception) -> str:
    """Return what is wrong where an estimate fails."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first}"


def network_evaluations(stage: Stage, recipe: Recipe) -> int:
    """Forward passes of a denoiser that `stage` takes, samples times passes."""
    taken = passes_of(stage, recipe)
    return round(taken.teacher + taken.student + taken.trained)


def passes_of(stage: Stage, recipe: Recipe) -> Passes:
    """How often `stage` takes each kind of pass."""
    guided = 1 if recipe.teacher.guidance_scale == 1.0 else 2
    if isinstance(stage, TrainReward):
        return Passes()
    if isinstance(stage, TrainTeacher):
        return Passes(trained=stage.num_steps * stage.batch_size)
    if isinstance(stage, Trajectories):
        return Passes(teacher=(stage.num_trajectories + stage.num_held_out) * stage.num_steps * guided)
    if isinstance(stage, Distill):
        teacher, target, student = map(sum, zip(*evaluations_per_phase(stage, guided), strict=True))
        return Passes(teacher=teacher, student=target, trained=student)
    if isinstance(stage, Feedback | Dpo | Policy):
        return _passes_of_tuning(stage)
    num_pictures = stage.num_prompts * stage.images_per_prompt
    by_teacher, by_students = rows_of_teacher(stage, recipe), rows_of_students(stage, recipe)
    return Passes(
        teacher=num_pictures * sum(by_teacher),
        student=num_pictures * sum(by_students),
        decoded=num_pictures * (len(by_teacher) + len(by_students)),
    )


def _passes_of_tuning(stage: Feedback | Dpo | Policy) -> Passes:
    samples = stage.num_steps * stage.batch_size
    looks = -(-stage.num_steps // stage.guard.every) + 1  # and one at the reference
    watched = looks * stage.guard.num_prompts
    trained = samples * evaluations_with_gradient(stage)
    evaluations = round(samples * evaluations_per_sample(stage)) + watched * stage.sampling_steps
    scored = graded = 0
    if isinstance(stage, Feedback):
        graded = samples * (stage.num_copies if stage.gradient == "low_variance" else 1)
    elif isinstance(stage, Policy):
        scored = samples
    elif not stage.pairs:
        scored = samples * stage.num_generations
    return Passes(student=evaluations - trained, trained=trained, scored=scored, graded=graded, watched=watched)


def evaluations_per_phase(stage: Distill, guided: int) -> list[tuple[float, float, float]]:
    """Evaluations of teacher, target and student in each phase. `guided` is what a teacher pass counts, 1 or 2."""
    if stage.method == "inter_segment":
        teacher = stage.num_teacher_steps * guided
        extra = stage.num_student_steps if stage.renoise == "student" else 0
    else:
        teacher = {"trajectories": 0, "online": (MEAN_ONLINE_STEPS + 1) * guided, "data": guided}[stage.source]
        extra = 0
    costs = []
    for steps, target in zip(stage.per_phase("num_steps"), stage.per_phase("target"), strict=True):
        samples = steps * stage.batch_size
        with_target = stage.method == "inter_segment" or target == "consistency"
        costs.append((samples * teacher, samples * (with_target + extra), samples))
    return costs


def evaluations_per_sample(stage: Feedback | Dpo | Policy) -> float:
    """Evaluations that one sample of a tuning step takes, one pair for dpo; those of the reference are counted."""
    steps = stage.sampling_steps
    if isinstance(stage, Dpo):
        measured = {"endpoint": steps, "diffusion_dpo": 1, "pso": steps - 1}[stage.form]
        sampled = 0 if stage.pairs else stage.num_generations * steps
        return sampled + measured * 2 * 2
    if isinstance(stage, Policy):
        return steps + (steps - 1) * (2 + stage.num_iterations)
    copies = stage.num_copies if stage.gradient == "low_variance" else 1
    sampled = {
        "last": steps,
        "random": steps - (stage.num_grad_steps - 1) / 2,
        "low_variance": steps + copies,
    }[stage.gradient]
    return sampled + copies * (stage.anchor > 0) + (steps + 2) * (stage.kl > 0) + (stage.consistency > 0)


def evaluations_with_gradient(stage: Feedback | Dpo | Policy) -> int:
    """Evaluations of those that carry gradient to what is trained."""
    steps = stage.sampling_steps
    if isinstance(stage, Dpo):
        return 2 * {"endpoint": steps, "diffusion_dpo": 1, "pso": steps - 1}[stage.form]
    if isinstance(stage, Policy):
        return (steps - 1) * stage.num_iterations
    of_sample = {"last": stage.num_grad_steps, "random": 1, "low_variance": stage.num_copies}[stage.gradient]
    return of_sample + (stage.kl > 0) + (stage.consistency > 0)


def evaluations_per_row(stage: Evaluate, recipe: Recipe) -> list[int]:
    """Evaluations that a picture of each row takes, at most: rows that would be equal are drawn once.

    Students are those of `also` and the recipe's own; the snapshots of `also` are not known before it is read.
    """
    return rows_of_teacher(stage, recipe) + rows_of_students(stage, recipe)


def rows_of_teacher(stage: Evaluate, recipe: Recipe) -> list[int]:
    """Evaluations a picture of the references' rows and of the undistilled teacher's."""
    guided = 1 if recipe.teacher.guidance_scale == 1.0 else 2
    references = [guided * n for n in stage.teacher_steps]
    undistilled = [n for n in stage.num_steps for _ in range(2 if guided == 2 and n % 2 == 0 else 1)]
    return references + undistilled * len(stage.teacher_solvers)


def rows_of_students(stage: Evaluate, recipe: Recipe) -> list[int]:
    """Evaluations a picture of the students' rows."""
    num_students = len(stage.also) + len({one.kind for one in recipe.stages} & set(STUDENTS))
    students = stage.num_steps * len(stage.gammas) * len(stage.grids) * num_students
    tuned = {one.kind: tuned_gamma(one, recipe) for one in recipe.stages if isinstance(one, Tuning)}
    unlisted = [gamma for gamma in tuned.values() if gamma not in stage.gammas]
    at_own_gamma = len(unlisted) + len(set(unlisted))  # tuned ones, and the distilled one beside them
    distilled = [one for one in recipe.stages if isinstance(one, Distill)]
    if stage.students == "snapshots" and distilled:
        at_own_gamma += len(distilled[-1].segments) - 1
    return students + stage.num_steps * len(stage.grids) * at_own_gamma


def tuned_gamma(stage: Tuning, recipe: Recipe) -> float:
    """The gamma that `stage` tunes under: its own, or what suits the student that the recipe distils."""
    if stage.gamma is not None:
        return stage.gamma
    distilled = [one for one in recipe.stages if isinstance(one, Distill)][-1]
    return distilled.default_gamma


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
        unet = read_json(
            self.folder / "unet" / "config.json", sample_size=int, in_channels=int, cross_attention_dim=int
        )
        vae = read_json(self.folder / "vae" / "config.json", block_out_channels=list)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side = recipe.teacher.resolution // factor if recipe.teacher.resolution else unet["sample_size"]
        self.latent = unet["in_channels"] * side * side
        self.pixels = (side * factor) ** 2
        self.context_width = unet["cross_attention_dim"]

    def weights(self, part: str) -> int:
        return sum(map(prod, self.parts[part].values()))

    def trained(self, stage: Distill | TrainTeacher | Tuning) -> int:
        """Trained weights: all of the denoiser, or a LoRA's two matrices for every module that it changes."""
        if isinstance(stage, TrainTeacher) or not isinstance(stage.adapter, Lora):
            return self.weights("unet")
        rank, total = stage.adapter.rank, 0
        for name, shape in self.parts["unet"].items():
            if len(shape) > 1 and is_lora_target(name):
                total += rank * (prod(shape[1:]) + shape[0])
        return total

    def work(self, stage: Stage) -> list[Work]:
        """Return what the stage computes. What was worked out before is not worked out again."""
        taken, distilled = passes_of(stage, self.recipe), self.distilled(stage)
        described = {"work": asdict(taken), "distilled": distilled.model_dump()}

        def found() -> dict[str, Any]:
            return {"work": [asdict(one) for one in operations.of_stage(stage, self.recipe, taken, distilled)]}

        kept = estimates.remembered(estimates.described(stage, self.recipe, self.folder, **described), found)["work"]
        return [Work(**one | {"each": Operations(**one["each"])}) for one in kept]

    def memory(self, stage: Stage, kind: str, launch: Launch | None = None) -> Memory:
        """Return what the stage takes in one process of `launch` (default: the only one) on a device of this `kind`.

        What was worked out before is not worked out again.
        """
        others = sum(self.weights(part) for part in self.parts if part not in PARTS)
        needed = others * BYTES[self.recipe.teacher.dtype]
        if isinstance(stage, Evaluate):
            measuring = read_shapes(Path(stage.inception)) if stage.inception else {}
            measuring |= files.shapes(Path(stage.clip)) if stage.clip else {}
            needed += 4 * sum(map(prod, measuring.values()))
        distilled = self.distilled(stage)
        described = {"memory": kind, "others": needed, "distilled": distilled.model_dump()}
        described["launch"] = asdict(launch or Launch())

        def found() -> dict[str, Any]:
            return asdict(of_stage(stage, self.recipe, needed, distilled, kind, launch))

        kept = estimates.remembered(estimates.described(stage, self.recipe, self.folder, **described), found)
        return Memory(**kept | {"uncounted": tuple(kept["uncounted"])})

    def distilled(self, stage: Stage) -> Lora | Full:
        """The adapter of the student that `stage` starts from or draws with: the last one distilled before it."""
        before = self.recipe.stages[: self.recipe.stages.index(stage)] if stage in self.recipe.stages else []
        return next((one.adapter for one in reversed(before) if isinstance(one, Distill)), Full())

    def disk(self, stage: Stage) -> int:
        """Bytes of what the stage keeps, and of its newest checkpoints while it runs."""
        if isinstance(stage, Trajectories):
            tokenizer = self.folder / "tokenizer" / "tokenizer_config.json"
            num_tokens = read_json(tokenizer, model_max_length=int)["model_max_length"]
            row = (stage.num_steps + 2) * self.latent + num_tokens * self.context_width
            return (stage.num_trajectories + stage.num_held_out) * row * BYTES[stage.dtype]
        if isinstance(stage, TrainTeacher):
            return self.weights("unet") * (2 + stage.keep_checkpoints * 16)
        if isinstance(stage, Distill):
            return self.trained(stage) * (4 * (1 + len(stage.segments)) + stage.keep_checkpoints * KEPT_BYTES)
        if isinstance(stage, Tuning):  # the distilled student once more, at most all of it, and the adapter
            return 4 * self.weights("unet") + self.trained(stage) * (4 + stage.keep_checkpoints * (4 + KEPT_BYTES))
        if isinstance(stage, Evaluate) and stage.keep_pictures:  # before PNG makes them smaller
            num_pictures = stage.num_prompts * stage.images_per_prompt * len(evaluations_per_row(stage, self.recipe))
            return 3 * self.pixels * num_pictures
        return 0  # a page and a few pictures


def is_lora_target(name: str) -> bool:
    """Whether the weight `name` of a UNet is of a module that the published adapter changes."""
    return any(name.removesuffix(".weight").endswith(f".{target}") for target in LORA_TARGETS)
