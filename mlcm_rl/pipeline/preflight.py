"""Checks of a stage before any stage runs: rewards, weights, prompts, pairs, a batch that processes can share.

Each check is the one that the stage itself makes, hours later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.geneval import read_tasks, refuse_colours, refuse_detector
from ..data.pairs import PairTable
from ..data.prompts import Prompt, first_prompts, parallel_prompts, read_prompts
from ..models.text_encoder import states_width, tokenizer_of
from ..preference import tuning
from ..recipe import AdaptText, Dpo, Evaluate, Feedback, Reward, Stage, Training, Tuning
from ..recipe.reads import paths_of
from ..rewards import build, checked_class, refuse_without_gradient, refuse_without_weights
from ..rewards.prompts import refuse_prompts
from ..storage.files import CheckpointError, read_json
from ..training import processes

PromptList = tuple[str, list[Prompt]]  # a file, and those of its prompts that the stage uses


def problems(stage: Stage) -> list[tuple[str, Exception]]:
    """Return (setting, error) of every check that `stage` fails."""
    errors: list[tuple[str, Exception]] = []

    @contextmanager
    def collect(key: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, CheckpointError) as error:
            if str(error) not in [str(other) for _, other in errors]:  # two settings may name one file
                errors.append((key, error))

    if isinstance(stage, Training):
        with collect("batch_size"):
            processes.part(stage.micro_batch, processes.world_size(), stage.samples_together)
    lists: dict[str, PromptList] = {}
    for key, path in _prompt_files(stage):
        with collect(key):
            lists[key] = (path, _read(stage, key, path))
    if isinstance(stage, AdaptText):
        with collect("encoder"):
            tokenizer_of(Path(stage.encoder))
            states_width(Path(stage.encoder))
    if isinstance(stage, Evaluate) and stage.detector:
        with collect("detector"):
            refuse_detector(read_json(Path(stage.detector) / "config.json").get("model_type"), stage.detector)
    if isinstance(stage, Evaluate) and stage.detector and "prompts" in lists:
        with collect("prompts"):
            tasks = read_tasks(stage.prompts, stage.num_prompts)
            if stage.clip is None:
                refuse_colours(tasks, stage.prompts)
    if pairs := getattr(stage, "pairs", None):
        with collect("pairs"):
            PairTable(pairs)
    trained_on = len(stage.trained_on or stage.reward_models)
    for i, reward in enumerate(stage.reward_models):
        is_trained_on = i < trained_on
        with collect(f"rewards[{i}]" if is_trained_on else f"guard.rewards[{i - trained_on}]"):
            _refuse_reward(stage, reward.from_folder(""), is_trained_on, _lists_for(stage, lists, is_trained_on))
    return errors


def _prompt_files(stage: Stage) -> Iterator[tuple[str, str]]:
    """Yield (setting, path) of the prompt files that `stage` reads."""
    yield from ((name, path) for name, (path, mark) in paths_of(stage).items() if mark.of_prompts)
    if isinstance(stage, Tuning) and not stage.guard_prompts:
        yield "guard_prompts", stage.prompts


def _read(stage: Stage, key: str, path: str) -> list[Prompt]:
    """Return the prompts that `stage` uses of the file of the setting `key`."""
    if isinstance(stage, Evaluate):
        return first_prompts(path, stage.num_prompts)
    if isinstance(stage, AdaptText):
        return parallel_prompts(path, stage.languages)
    if not isinstance(stage, Tuning):
        return read_prompts(path)
    if key == "guard_prompts":
        return tuning.watched_prompts(stage)
    return tuning.spoken(read_prompts(path), stage.languages, path)


def _lists_for(stage: Stage, lists: dict[str, PromptList], is_trained_on: bool) -> list[PromptList]:
    """Return the prompt lists whose pictures a reward scores; the guard scores by the rewards trained on too."""
    names = ["guard_prompts"] if isinstance(stage, Tuning) else ["prompts"]
    if isinstance(stage, Tuning) and is_trained_on and not (isinstance(stage, Dpo) and stage.pairs):
        names.insert(0, "prompts")
    return [lists[name] for name in names if name in lists]


def _refuse_reward(stage: Stage, settings: Reward, is_trained_on: bool, lists: list[PromptList]) -> None:
    """Raise where `stage` cannot use the reward of `settings` for the prompts of `lists`."""
    model = checked_class(settings)
    if isinstance(stage, Feedback) and is_trained_on and not stage.surrogate:
        refuse_without_gradient({settings.name: model})
    may_skip = isinstance(stage, Evaluate)
    for path, prompts in lists:  # before its weights are fetched
        refuse_prompts(model, settings.name, prompts, path, may_skip=may_skip)
    refuse_without_weights(settings, model)
    if hasattr(model, "refuse_prompt"):
        reward = build(settings.model_copy(update={"device": None}), "cpu")
        for path, prompts in lists:
            refuse_prompts(reward, settings.name, prompts, path, may_skip=may_skip)
