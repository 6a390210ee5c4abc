"""The contract of reward models, and calling one under it."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..storage.untrusted import brief
from ..training import autocast
from .weights import WeightsError

ATTRIBUTES = {"differentiable": bool, "needs_prompt": bool, "languages": tuple}


class RewardError(ValueError):
    """A reward model cannot be built, failed, or broke the contract; the message begins with its name."""


class RewardModel(Protocol):
    """The contract in `rewards/__init__.py` as a type; reward models do not have to inherit from it."""

    differentiable: bool
    needs_prompt: bool
    languages: tuple[str, ...]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


def score(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> Tensor:
    """Return the scores (B,) float32 of `images` (B, 3, H, W) for `prompts`, checked against the contract.

    Raise ValueError if images and prompts do not match; RewardError with the name of the reward for whatever it raises,
    for a wrong shape or dtype, and for a score that is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"reward {name}: images must be (B, 3, H, W) with B prompts, got {tuple(images.shape)} and {len(prompts)}"
        )
    try:
        with autocast.own(images.device):
            scores = reward(images, prompts)
    except (Exception, SystemExit) as error:  # other people's code raises anything; of several rewards, name which
        raise RewardError(f"reward {name} failed: {message_of(error)}") from error
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"reward {name}: must return a float32 tensor, returned {kind}")
    if scores.shape != (len(images),):
        raise RewardError(f"reward {name}: must return shape ({len(images)},), returned {tuple(scores.shape)}")
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise RewardError(f"reward {name}: returned {scores[index].item()} for prompt {brief(prompts[index])}")
    return scores


def score_in_chunks(
    reward: RewardModel, name: str, images: Tensor, prompts: list[str], chunk_size: int | None = None
) -> Tensor:
    """Return `score` (B,) float32 on the device of `images`, with gradient, for `chunk_size` pictures at a time."""
    size = chunk_size or max(len(prompts), 1)
    chunks = [
        score(reward, name, images[i : i + size], prompts[i : i + size]).to(images.device)
        for i in range(0, max(len(images), 1), size)
    ]
    return torch.cat(chunks)


def reads(reward: RewardModel | type[RewardModel], language: str) -> bool:
    """Return whether `reward` can score a picture whose prompt is in `language`."""
    return not reward.needs_prompt or language in reward.languages


def refuse_unread(reward: RewardModel, name: str, languages: Iterable[str]) -> None:
    """Raise RewardError if `reward` depends on prompts and does not read one of their `languages`."""
    if unread := sorted({language for language in languages if not reads(reward, language)}):
        raise RewardError(
            f"reward {name} reads prompts in {', '.join(reward.languages)}, not in {', '.join(unread)}: "
            "leave those prompts out, or take a reward that reads them"
        )


def message_of(error: BaseException) -> str:
    """Return the message of an error, with its type unless it is written for the user (WeightsError)."""
    if isinstance(error, SystemExit):
        return f"it would end the program: {error!r}"
    if isinstance(error, SyntaxError):  # str() would add the file without its folder
        return f"{type(error).__name__}: {error.msg}"
    return str(error) if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
