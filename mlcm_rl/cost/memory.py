"""The memory that a stage needs in each process, predicted from shapes alone: no weights are loaded.

Weights are counted in their own precision, and the memory of passes by taking them on the meta device (`passes`,
`live_bytes`). Rewards are built there too, which reads their files once. `launches` has what several processes share.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import control, heads, lpips, students, teachers, text_adapter
from ..models.base import Base
from ..models.text_adapter import TextAdapter
from ..preference import tuning
from ..recipe import Full, Lora, Recipe, Stage, Training, Tuning
from ..recipe.lpips_layout import new_layout
from ..recipe.takes import LpipsSizes, Networks, TextNetwork
from ..rewards import RewardError, RewardModel, build
from ..rewards.weights import WeightsError
from ..storage.files import read_json
from ..training import autocast, processes
from . import launches, passes
from .launches import Launch
from .live_bytes import Kernels, Live

NUM_TOKENS = 77  # of CLIP's text towers, where the teacher has no tokenizer


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at a stage's peak; all but `host` add up to it.

    parameters    of every network, frozen or trained, but for rewards
    gradients     of the trained weights
    optimiser     Adam's moments, and the copy of the weights that DeepSpeed updates
    averages      the target's averaged weights, or the guard's best ones
    activations   of passes at the peak, beside gradients; autocast's copies of trained weights too
    exchange      buffers between processes, and weights gathered from their shards
    rewards       weights of the rewards, trained on and held out
    host          of the optimiser, where a launch keeps it in the memory of the CPU
    uncounted     names of rewards that could not be built or called: neither weights nor activations are counted
    unbuilt       those of them that could not be built: their weights are not here, say
    """

    parameters: int = 0
    gradients: int = 0
    optimiser: int = 0
    averages: int = 0
    activations: int = 0
    exchange: int = 0
    rewards: int = 0
    host: int = 0
    uncounted: tuple[str, ...] = ()
    unbuilt: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All bytes on the device."""
        of_training = self.gradients + self.optimiser + self.averages + self.activations + self.exchange
        return self.parameters + self.rewards + of_training


def of_stage(
    stage: Stage,
    recipe: Recipe,
    others: int,
    distilled: Lora | Full,
    device: str,
    launch: Launch | None = None,
    leaving: int = 0,
) -> Memory:
    """Return the memory of `stage` in one process of `launch` (default: the only one), on a `device` ("cuda", "cpu").

    `others`: bytes of the networks that no pass here needs, text encoders and an evaluation's own. `leaving`: those of
    text encoders that are gone before the first step, when pictures are encoded too: the peak is then or later, and
    what it has more then counts as parameters. `distilled`: the adapter of the student that it starts from.
    Raises ValueError where processes cannot share a micro-batch evenly.
    """
    launch = launch if launch is not None and isinstance(stage, Training) else Launch()
    live, has_average = Live(), stage.networks(distilled).has_average
    has_autocast = isinstance(stage, Training) and stage.precision == "bf16"
    kernels = Kernels(device, has_autocast, caches=launch.level < 3)  # training.loop keeps none of weights in parts
    with live:
        models, missing = rewards_of(stage, recipe)
        rewards = live.now
        roles = roles_of(
            stage, recipe, distilled, models, kernels.checkpointed, kernels.own_precision, kernels.forget_copies
        )
        parameters = live.now - rewards
        trained = students.trainable_parameters(roles.trained) if isinstance(stage, Training) else []
        beside = [value for one in roles.beside.values() for value in students.trainable_parameters(one)]
        outline = launches.outline(roles.trained, roles.base.denoiser, launch.blocks)
        ahead, highest = peaks_of_passes(stage, recipe, roles, trained, live, kernels, launch)
    uncounted, unbuilt = tuple(sorted(missing | roles.failed)), tuple(sorted(missing))
    if not trained:
        parameters += others + max(0, leaving - highest)
        return Memory(parameters, activations=highest, rewards=rewards, uncounted=uncounted, unbuilt=unbuilt)
    whole = 0 if launch.level > 1 else launches.FLOAT * outline.trained
    activations = max(0, highest - whole)
    shard = launches.shard(outline, launch)
    memory = Memory(
        parameters=parameters + others - shard.saved,
        gradients=shard.gradients,
        optimiser=shard.optimiser + launches.ADAM * sum(value.numel() for value in beside),
        averages=shard.averaged * has_average,
        activations=activations,
        exchange=shard.exchange,
        rewards=rewards,
        host=shard.host,
        uncounted=uncounted,
        unbuilt=unbuilt,
    )
    later = memory.gradients + memory.optimiser + memory.activations + memory.exchange
    return replace(memory, parameters=memory.parameters + max(0, leaving + ahead - later))


def peaks_of_passes(
    stage: Stage,
    recipe: Recipe,
    roles: passes.Roles,
    trained: list[nn.Parameter],
    live: Live,
    kernels: Kernels,
    launch: Launch,
) -> tuple[int, int]:
    """Return the peaks in bytes before the first step, and of all passes and gradients.

    Where gradients are sharded they are freed as they are computed, and are not in it.
    """
    start, live.peak = live.now, live.now
    part = 0
    if isinstance(stage, Training):
        part = processes.part(stage.micro_batch, launch.processes, stage.samples_together)
    with Kernels(kernels.kind, autocast=False):
        passes.before_steps(stage, recipe, roles, part)
        ahead = live.peak - start
        passes.between_steps(stage, recipe, roles, part)
    if isinstance(stage, Training):
        if launch.level > 1:
            for value in trained:
                value.register_post_accumulate_grad_hook(_free_gradient)
        elif stage.gradient_accumulation > 1:  # gradients of the micro-batches before this one
            for value in trained:
                value.grad = torch.empty_like(value)
        with kernels:
            passes.step(stage, recipe, roles, part).backward()
            for value in trained:
                value.grad = None
            for loss in passes.beside(stage, recipe, roles, part):  # what is trained after the student's update
                loss.backward()
    return ahead, live.peak - start


def _free_gradient(value: Tensor) -> None:
    value.grad = None


def roles_of(
    stage: Stage,
    recipe: Recipe,
    distilled: Lora | Full,
    rewards: dict[str, RewardModel],
    recompute: Callable[..., Any],
    own_precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    forget_copies: Callable[[], None] = lambda: None,
) -> passes.Roles:
    """Return teacher and student of `stage` on the meta device, set up as the stage does.

    `recompute` checkpoints their blocks, frozen networks compute in `own_precision`, and `forget_copies` is called
    where trained weights change places.
    """
    base = teachers.skeleton(recipe.teacher)
    networks = stage.networks(distilled)
    student = _student(networks, base)
    if not networks.uses_teacher:
        base.forget_denoiser()
    if isinstance(stage, Training) and stage.precision == "bf16":
        autocast.frozen_in_bfloat16(student)
    small = tuning.small_decoder(stage, base) if isinstance(stage, Tuning) else None
    conditioned = bool(students.target_time_of(student))
    if isinstance(stage, Training) and stage.gradient_checkpointing:
        base.checkpoint_blocks(student, recompute)
        if networks.preference is not None:  # gradients come through it
            base.autoencoder.checkpoint_blocks(recompute)
        if small is not None:
            enable: Any = small.enable_gradient_checkpointing
            enable(recompute)
    if networks.tiles:
        base.autoencoder.use_tiles(networks.tiles, recompute)
    tokens = num_tokens(Path(recipe.teacher.path))
    network = None
    if networks.has_control:
        with torch.device("meta"):
            network = control.new_control_net(base, seed=0)
        if isinstance(stage, Training) and stage.gradient_checkpointing:
            base.checkpoint_blocks(network, recompute)
    own = [sizes for one in recipe.stages if (sizes := one.lpips_sizes) is not None]
    roles = passes.Roles(
        base=base,
        student=student,
        conditioned=conditioned,
        num_tokens=tokens,
        rewards=rewards,
        own_precision=own_precision,
        forget_copies=forget_copies,
        has_average=networks.has_average,
        small_decoder=small,
        text_adapter=_text_adapter(networks.text_adapter, base, tokens),
        control_net=network,
        lpips=None if networks.lpips is None else _lpips(networks.lpips, own, base),
        trains_lpips=networks.trains_lpips,
        feature_blocks=networks.feature_blocks,
        is_tuned=networks.preference is not None,
    )
    roles.beside.update(_beside(networks, stage, roles, recompute))
    return roles


def _beside(
    networks: Networks, stage: Stage, roles: passes.Roles, recompute: Callable[..., Any]
) -> dict[str, nn.Module]:
    """Return the networks that a stage trains beside the student, by role, set up as the stage does."""
    base, beside = roles.base, {}
    recomputes = isinstance(stage, Training) and stage.gradient_checkpointing
    with torch.device("meta"):
        if networks.fake is not None:
            fake = students.student(base, networks.fake, seed=0)
            beside["fake"] = fake
            if isinstance(stage, Training) and stage.precision == "bf16":
                autocast.frozen_in_bfloat16(fake)
            if recomputes:
                base.checkpoint_blocks(fake, recompute)
        if networks.head_width:
            with torch.no_grad():
                shapes = [one.shape[1:] for one in roles.read(*roles.points(1))]
            beside["heads"] = heads.Heads(shapes, networks.head_width, 0, networks.head_states)
            if recomputes and networks.uses_teacher:
                base.checkpoint_blocks(base.denoiser, recompute)
    return beside


def _lpips(place: str, own: list[LpipsSizes], base: Base) -> lpips.LatentLpips:
    """Return the latent LPIPS at `place`, or without it the last of those that the recipe trains."""
    if place:
        return lpips.skeleton(Path(place)).requires_grad_(False)
    with torch.device("meta"):
        return lpips.LatentLpips(new_layout(base.latent_shape[0], own[-1].widths, own[-1].depths))


def _text_adapter(network: TextNetwork | None, base: Base, num_tokens: int) -> TextAdapter | None:
    """Return the text adapter that a stage trains, None where it trains none."""
    if network is None:
        return None
    shapes = base.conditioning_shapes(base.denoiser.config, num_tokens)
    with torch.device("meta"):
        return TextAdapter(text_adapter.sizes_of(network, shapes))


def num_tokens(folder: Path) -> int:
    """Return the tokens of a prompt, as the teacher's tokenizer pads it."""
    for path in sorted(folder.glob("tokenizer*/tokenizer_config.json")):
        return int(read_json(path).get("model_max_length", NUM_TOKENS))
    return NUM_TOKENS


def _student(networks: Networks, base: Base) -> nn.Module:
    """Return the denoiser that a stage trains or samples with, built as the stage itself would."""
    if networks.student is None:
        return base.denoiser
    with torch.device("meta"):
        student = students.student(base, networks.student, 0, networks.is_conditioned)
        if networks.preference is None:
            return student
        return students.with_preference(base, student, networks.preference, seed=0)


def rewards_of(stage: Stage, recipe: Recipe) -> tuple[dict[str, RewardModel], set[str]]:
    """Return the rewards that `stage` keeps in memory, by name, and the names of those that cannot be built now."""
    members = stage.reward_models if any(one.viewer == "guard" for one in stage.passes(recipe)) else stage.trained_on
    built: dict[str, RewardModel] = {}
    missing = set()
    for one in members:
        try:
            built[one.name] = build(one.model_copy(update={"device": None}), "meta")
        except (RewardError, WeightsError):
            missing.add(one.name)
    return built, missing
