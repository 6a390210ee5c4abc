"""What a reward model is, and how it is asked."""

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
    """The contract above, for type checkers and readers; nobody has to inherit from it."""

    differentiable: bool
    needs_prompt: bool
    languages: tuple[str, ...]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


def score(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> Tensor:
    """`reward` of `images` (B, 3, H, W) for `prompts`, (B,) float32, checked against the contract.

    Raises ValueError for images that do not fit their prompts, and RewardError that names the reward for whatever it
    raises, for a wrong shape or dtype, and for a value that is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"reward {name}: images must be (B, 3, H, W) with B prompts, got {tuple(images.shape)} and {len(prompts)}"
        )
    try:
        with autocast.own(images.device):
            scores = reward(images, prompts)
    except (Exception, SystemExit) as error:  # whatever another's code raises; a run of five rewards must say which
        raise RewardError(f"reward {name} failed: {said(error)}") from error
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"reward {name}: must return a float32 tensor, returned {found}")
    if scores.shape != (len(images),):
        raise RewardError(f"reward {name}: must return shape ({len(images)},), returned {tuple(scores.shape)}")
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise RewardError(f"reward {name}: returned {scores[index].item()} for prompt {brief(prompts[index])}")
    return scores


def score_in_chunks(
    reward: RewardModel, name: str, images: Tensor, prompts: list[str], chunk_size: int | None = None
) -> Tensor:
    """`score` asked for `chunk_size` pictures at a time: (B,) float32 on the device of `images`, gradients kept."""
    size = chunk_size or max(len(prompts), 1)
    chunks = [
        score(reward, name, images[i : i + size], prompts[i : i + size]).to(images.device)
        for i in range(0, max(len(images), 1), size)
    ]
    return torch.cat(chunks)


def refuse_unread(reward: RewardModel, name: str, languages: Iterable[str]) -> None:
    """Raises RewardError when `reward` depends on prompts and does not read one of their `languages`."""
    unread = sorted(set(languages) - set(reward.languages)) if reward.needs_prompt else []
    if unread:
        raise RewardError(
            f"reward {name} reads prompts in {', '.join(reward.languages)}, not in {', '.join(unread)}: "
            "leave those prompts out, or take a reward that reads them"
        )


def said(error: BaseException) -> str:
    """What went wrong, in one piece: people's errors as they are, other ones with their type."""
    if isinstance(error, SystemExit):
        return f"it would end the program: {error!r}"
    if isinstance(error, SyntaxError):  # as text it ends with a place, of which the folder is left out
        return f"{type(error).__name__}: {error.msg}"
    return str(error) if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
