"""What a stage needs that can be looked at before any stage runs: rewards, weights, prompts, a batch to share.

Each check is the one that the stage itself makes, hours later.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from . import distributed, tuning
from .data import first_prompts, read_prompts
from .recipe import Evaluate, Feedback, Reward, Stage, Training, Trajectories, Tuning
from .rewards import refuse_without_gradient, refuse_without_weights, usable

Check = Callable[[], Any]


def refused(stage: Stage) -> Iterator[tuple[str, Exception]]:
    """(setting, what is raised for it) of every check that `stage` does not pass."""
    for key, check in _checks(stage):
        try:
            check()
        except (OSError, ValueError) as error:
            yield key, error


def _checks(stage: Stage) -> Iterator[tuple[str, Check]]:
    trained_on = len(stage.rewards) if isinstance(stage, Tuning) else len(stage.reward_models)
    for i, reward in enumerate(stage.reward_models):
        key = f"rewards[{i}]" if i < trained_on else f"guard.rewards[{i - trained_on}]"
        yield key, partial(_reward, reward.from_folder(""), isinstance(stage, Feedback) and i < trained_on)
    if isinstance(stage, Training):
        yield "batch_size", partial(distributed.part, stage.micro_batch, distributed.count(), stage.samples_together)
    if isinstance(stage, Tuning):
        yield "prompts", lambda: tuning.spoken(read_prompts(stage.prompts), stage.languages, stage.prompts)
        if stage.guard_prompts:
            yield "guard_prompts", lambda: tuning.watched_prompts(stage)
    if isinstance(stage, Trajectories):
        yield "prompts", lambda: read_prompts(stage.prompts)
    if isinstance(stage, Evaluate):
        yield "prompts", lambda: first_prompts(stage.prompts, stage.num_prompts)


def _reward(asked: Reward, is_learned_from: bool) -> None:
    model = usable(asked)
    if is_learned_from:
        refuse_without_gradient({asked.name: model})
    refuse_without_weights(asked, model)
