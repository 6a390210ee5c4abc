"""What a stage needs that can be looked at before any stage runs: rewards, weights, prompts, pairs, a batch to share.

Each check is the one that the stage itself makes, hours later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ..data.pairs import PairTable
from ..data.prompts import Prompt, first_prompts, read_prompts
from ..preference import tuning
from ..recipe import Dpo, Evaluate, Feedback, Reward, Stage, Training, Tuning
from ..recipe.reads import paths_of
from ..rewards import build, checked_class, refuse_without_gradient, refuse_without_weights
from ..rewards.prompts import refuse_prompts
from ..training import processes

PromptList = tuple[str, list[Prompt]]  # a file and those of its prompts that are drawn


def refused(stage: Stage) -> list[tuple[str, Exception]]:
    """Return (setting, what is raised for it) of every check that `stage` does not pass."""
    found: list[tuple[str, Exception]] = []

    @contextmanager
    def collect(key: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if str(error) not in [str(other) for _, other in found]:  # two settings may name one file
                found.append((key, error))

    if isinstance(stage, Training):
        with collect("batch_size"):
            processes.part(stage.micro_batch, processes.world_size(), stage.samples_together)
    lists: dict[str, PromptList] = {}
    for key, path in _prompt_files(stage):
        with collect(key):
            lists[key] = (path, _read(stage, key, path))
    if pairs := getattr(stage, "pairs", None):
        with collect("pairs"):
            PairTable(pairs)
    trained_on = len(stage.trained_on or stage.reward_models)
    for i, reward in enumerate(stage.reward_models):
        is_trained_on = i < trained_on
        with collect(f"rewards[{i}]" if is_trained_on else f"guard.rewards[{i - trained_on}]"):
            _refuse_reward(stage, reward.from_folder(""), is_trained_on, _lists_for(stage, lists, is_trained_on))
    return found


def _prompt_files(stage: Stage) -> Iterator[tuple[str, str]]:
    """Yield (setting, path) of the prompt files that `stage` reads."""
    yield from ((name, path) for name, (path, mark) in paths_of(stage).items() if mark.of_prompts)
    if isinstance(stage, Tuning) and not stage.guard_prompts:
        yield "guard_prompts", stage.prompts


def _read(stage: Stage, key: str, path: str) -> list[Prompt]:
    """Return the prompts that `stage` draws from the file of the setting `key`."""
    if isinstance(stage, Evaluate):
        return first_prompts(path, stage.num_prompts)
    if not isinstance(stage, Tuning):
        return read_prompts(path)
    if key == "guard_prompts":
        return tuning.watched_prompts(stage)
    return tuning.spoken(read_prompts(path), stage.languages, path)


def _lists_for(stage: Stage, lists: dict[str, PromptList], is_trained_on: bool) -> list[PromptList]:
    """Return the lists whose pictures a reward is asked for; a guard watches those trained on beside its own."""
    names = ["guard_prompts"] if isinstance(stage, Tuning) else ["prompts"]
    if isinstance(stage, Tuning) and is_trained_on and not (isinstance(stage, Dpo) and stage.pairs):
        names.insert(0, "prompts")
    return [lists[name] for name in names if name in lists]


def _refuse_reward(stage: Stage, asked: Reward, is_trained_on: bool, lists: list[PromptList]) -> None:
    model = checked_class(asked)
    if isinstance(stage, Feedback) and is_trained_on:
        refuse_without_gradient({asked.name: model})
    refuse_without_weights(asked, model)
    reward = build(asked.model_copy(update={"device": None}), "cpu") if hasattr(model, "refuse_prompt") else model
    for path, prompts in lists:
        refuse_prompts(reward, asked.name, prompts, path, may_skip=isinstance(stage, Evaluate))
