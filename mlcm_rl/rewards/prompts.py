"""Refuse prompts that a reward cannot score, by file and line, before anything is sampled for them."""

from collections.abc import Collection
from pathlib import Path

from ..data.prompts import Prompt, prompts_with_lines
from ..storage.untrusted import first_few
from .contract import RewardError, RewardModel, reads


def refuse_prompts(
    reward: RewardModel | type[RewardModel],
    name: str,
    prompts: Collection[Prompt],
    path: str | Path,
    *,
    aspect: float = 1.0,
    may_skip: bool = False,
) -> None:
    """Raise RewardError with the lines of `path` whose prompts `reward` cannot score, of those in `prompts`.

    aspect: width / height of the pictures. With `may_skip`, prompts in a language that the reward does not read are not
    refused: they have no score. Of a reward that is given as its class, only the languages are looked at.
    """
    reasons = {prompt: why for prompt in prompts if (why := _why_not(reward, name, prompt, aspect, may_skip))}
    if not reasons:
        return
    places = [f"{where}: {reasons[prompt]}" for where, prompt in prompts_with_lines(path) if prompt in reasons]
    raise RewardError(
        f"reward {name} cannot score {len(places)} of the prompts: {first_few(places)}. Correct or remove these "
        "lines, or use another reward"
    )


def _why_not(
    reward: RewardModel | type[RewardModel], name: str, prompt: Prompt, aspect: float, may_skip: bool
) -> str | None:
    """Return why `reward` cannot score `prompt`; None if it does not refuse it."""
    if not reads(reward, prompt.language):
        return None if may_skip else f"{name} reads prompts in {', '.join(reward.languages)}, not in {prompt.language}"
    if not isinstance(reward, type) and (refuse := getattr(reward, "refuse_prompt", None)):
        try:
            refuse(prompt.prompt, aspect)
        except Exception as error:  # whatever other people's code raises is a refusal
            return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None
