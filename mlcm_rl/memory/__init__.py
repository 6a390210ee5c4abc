"""What a stage needs of memory, in one process, before it is run: every part of it from shapes, with no weights loaded.

Weights are counted as they are kept, and what passes hold is found by taking them on the meta device (`passes`,
`live_bytes`). Rewards are built there too, which reads their files once.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import adapters, bases, tuning
from ..bases import Base
from ..checkpoint import read_json
from ..recipe import Distill, Full, Lora, Recipe, Stage, Training, TrainTeacher, Tuning
from ..rewards import RewardError, RewardModel, build
from ..rewards.weights import WeightsError
from . import passes
from .live_bytes import Kernels, Live

PARTS = ("unet", "vae")  # of a teacher, that passes here go through
ADAM_BYTES = 8  # two float32 moments a trained weight
NUM_TOKENS = 77  # of CLIP's text towers, where no tokenizer says otherwise


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at a stage's peak; they add up to it.

    parameters    every network as it is kept, frozen or trained, but for rewards
    gradients     of the trained weights
    optimiser     Adam's moments
    averages      the target's averaged weights, or the best ones that the guard keeps
    activations   what passes hold at the peak on top of whole gradients
    rewards       their weights, of those trained on and those held out
    uncounted     rewards that could not be built or asked: their weights are not here, and what they hold is left out
    """

    parameters: int = 0
    gradients: int = 0
    optimiser: int = 0
    averages: int = 0
    activations: int = 0
    rewards: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimiser + self.averages + self.activations + self.rewards


def of_stage(stage: Stage, recipe: Recipe, others: int, distilled: Lora | Full, device: str) -> Memory:
    """What `stage` takes on a device of the kind `device` ("cuda", "cpu").

    `others`: bytes of the networks that no pass here needs, text encoders and an evaluation's own. Where the stage
    encodes its prompts ahead they are gone when gradients come: what counts is how much they are more than what comes
    after them. `distilled`: the adapter of the student that it starts from.
    """
    live = Live()
    kernels = Kernels(device, isinstance(stage, Training) and stage.precision == "bf16")
    with live:
        base = bases.skeleton(recipe.teacher)
        student = _student(stage, base, distilled)
        small = tuning.small_decoder(stage, base) if isinstance(stage, Tuning) else None
        parameters = live.now
        models, missing = _rewards(stage)
        rewards = live.now - parameters
        conditioned = student.config.time_cond_proj_dim is not None
        roles = passes.Roles(base, student, conditioned, num_tokens(Path(recipe.teacher.path)), models, set(), small)
        trained = adapters.trainable_parameters(student) if isinstance(stage, Training) else []
        if isinstance(stage, Training) and stage.gradient_checkpointing:
            student.enable_gradient_checkpointing(kernels.checkpointed)
            if isinstance(stage, Tuning):
                base.vae.enable_gradient_checkpointing(kernels.checkpointed)
            if small is not None:
                small.enable_gradient_checkpointing(kernels.checkpointed)
        if isinstance(stage, Tuning) and stage.autoencoder_tiles:
            base.use_tiles(stage.autoencoder_tiles, kernels.checkpointed)
        held = peak_of_passes(stage, recipe, roles, trained, live, kernels)
    size = sum(value.numel() for value in trained)
    found = Memory(
        parameters=parameters,
        gradients=4 * size,
        optimiser=ADAM_BYTES * size,
        averages=4 * size * _keeps_average(stage),
        activations=max(0, held - 4 * size),
        rewards=rewards,
        uncounted=tuple(sorted(missing | roles.failed)),
    )
    later = found.total - parameters - rewards if _encodes_ahead(stage) else 0
    return replace(found, parameters=parameters + max(0, others - later))


def peak_of_passes(
    stage: Stage, recipe: Recipe, roles: passes.Roles, trained: list[Tensor], live: Live, kernels: Kernels
) -> int:
    """The most bytes that passes and gradients hold at once, in a step or between steps."""
    start, live.peak = live.now, live.now
    passes.between_steps(stage, recipe, roles)
    if isinstance(stage, Training):
        if stage.gradient_accumulation > 1:  # gradients of the micro-batches before this one
            for value in trained:
                value.grad = torch.empty_like(value)
        with kernels:
            passes.step(stage, recipe, roles).backward()
    return live.peak - start


def num_tokens(folder: Path) -> int:
    """Tokens of a prompt, as the teacher's tokenizer pads it."""
    for path in sorted(folder.glob("tokenizer*/tokenizer_config.json")):
        return int(read_json(path).get("model_max_length", NUM_TOKENS))
    return NUM_TOKENS


def _student(stage: Stage, base: Base, distilled: Lora | Full) -> nn.Module:
    """The denoiser that `stage` trains or draws with, shaped as the stage itself would make it."""
    with torch.device("meta"):
        if isinstance(stage, TrainTeacher):
            return adapters.student(base, Full(), seed=0)
        if isinstance(stage, Distill):
            return adapters.student(base, stage.adapter, 0, stage.condition_on_target)
        student = adapters.student(base, distilled, seed=0)
        return adapters.preferring(base, student, stage.adapter, seed=0) if isinstance(stage, Tuning) else student


def _rewards(stage: Stage) -> tuple[dict[str, RewardModel], set[str]]:
    """The rewards that `stage` keeps in memory, by name, and the names of those that cannot be built now."""
    asked = [*stage.rewards, *stage.guard.rewards] if isinstance(stage, Tuning) else []
    built: dict[str, RewardModel] = {}
    missing = set()
    for one in asked:
        try:
            built[one.name] = build(one.model_copy(update={"device": None}), "meta")
        except (RewardError, WeightsError):
            missing.add(one.name)
    return built, missing


def _encodes_ahead(stage: Stage) -> bool:
    """Whether text encoders have left memory when the first step comes."""
    return isinstance(stage, Distill | Tuning) and stage.encodes_ahead


def _keeps_average(stage: Stage) -> bool:
    if isinstance(stage, Distill):
        return stage.target_ema > 0
    return isinstance(stage, TrainTeacher | Tuning)
