"""Whether the prompt files of a recipe hold as many prompts as its stages are to use. No torch."""

from collections.abc import Iterator

from .evaluation import Evaluate
from .experiment import Recipe
from .languages import prompts_in
from .paths import Folders
from .preference import Tuning
from .tree import Key, Problem
from .types import MIN_WATCHED


def problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield the numbers of prompts that a stage would stop at, when the students before it are finished."""
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Evaluate):
            count = _count(("stages", i, "prompts"), stage.prompts, folders)
            if 0 < count < stage.num_prompts:
                message = f"{stage.prompts} holds {_prompts(count)}, num_prompts is {stage.num_prompts}: write "
                yield Problem(("stages", i, "num_prompts"), f"{message}num_prompts: {count}, or name a longer file")
        if isinstance(stage, Tuning):
            key, path, count = _watched(i, stage, folders)
            if 0 < count < MIN_WATCHED:
                message = f"{path} holds {_prompts(count)} for the guard to watch, whose gain is in deviations over "
                message += f"them: write {MIN_WATCHED} or more, or name another file in guard_prompts"
                yield Problem(key, message)


def warnings(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield the guards that a recipe gives more prompts to watch than there are: they watch those that there are."""
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Tuning) and "num_prompts" in stage.guard.model_fields_set:
            _, path, count = _watched(i, stage, folders)
            if MIN_WATCHED <= count < stage.guard.num_prompts:
                message = f"is {stage.guard.num_prompts}, and {path} holds {_prompts(count)}: the guard watches these"
                yield Problem(("stages", i, "guard", "num_prompts"), message)


def _watched(i: int, stage: Tuning, folders: Folders) -> tuple[Key, str, int]:
    """Return the key and path of the prompts that the guard of stage `i` watches, and how many it can."""
    name = "guard_prompts" if stage.guard_prompts else "prompts"
    key, path = ("stages", i, name), stage.guard_prompts or stage.prompts
    return key, path, _count(key, path, folders, stage.languages)


def _count(key: Key, path: str, folders: Folders, weights: dict[str, float] | None = None) -> int:
    """Return the number of prompts of a file, of languages with weight alone where there are `weights`.

    It is 0 for a file that cannot be read, which is reported for itself.
    """
    languages = [language for language, _ in prompts_in(folders.place(key, path))]
    return sum(bool(weights.get(language)) for language in languages) if weights else len(languages)


def _prompts(count: int) -> str:
    return f"{count} prompt" + "s" * (count != 1)
