"""A weighted sum of several rewards, with running normalisation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..recipe import Reward
from ..recipe.languages import guess_language
from .contract import RewardModel, refuse_unread, score_in_chunks
from .finding import build

STD_FLOOR = 1e-4  # of the running deviation, so that a nearly constant reward is not amplified without bound


@dataclass
class RunningNormaliser:
    """Running mean and deviation of all scores, after Chan, Golub and LeVeque (1979): Welford's update by batches.

    `squares` is the sum of squared differences from the mean. Old scores have the same weight as new ones for ever. The
    state is three numbers, which JSON keeps exactly.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: Tensor) -> None:
        """Add `scores` (B,) to the statistics."""
        batch = scores.detach().cpu().double()  # moved once: each number read from a device waits for it
        count, mean = self.count + len(batch), batch.mean().item()
        step = mean - self.mean
        self.squares += (batch - mean).square().sum().item() + step**2 * self.count * len(batch) / count
        self.mean += step * len(batch) / count
        self.count = count

    @property
    def std(self) -> float:
        """Return the sample deviation (n - 1), at least STD_FLOOR; 1 for fewer than two scores."""
        return max((self.squares / (self.count - 1)) ** 0.5, STD_FLOOR) if self.count > 1 else 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        """Return (scores - mean) / std, (B,); the statistics are constants in the gradient."""
        return (scores - self.mean) / self.std


@dataclass(frozen=True)
class Member:
    """One reward of a `Combined`."""

    name: str
    model: RewardModel
    weight: float = 1.0
    chunk_size: int | None = None
    is_constraint: bool = False  # scored, and no part of the sum


class Combined:
    """A weighted sum of rewards, each normalised by its running mean and deviation.

    Those that are constraints are scored beside it, as they are.

    Only `take_in` changes the statistics: a step uses those of the steps before it and adds all its scores at its end,
    so that nothing depends on how it was split. In the first step they are those of the reference's samples.
    """

    def __init__(self, members: Sequence[Member], normalise: bool = True):
        self.members = {member.name: member for member in members}
        if len(self.members) != len(members):
            raise ValueError(f"a reward is named twice: {', '.join(member.name for member in members)}")
        self.objectives = {name: member for name, member in self.members.items() if not member.is_constraint}
        self.normalisers = {name: RunningNormaliser() for name in self.objectives} if normalise else {}

    @property
    def needs_prompt(self) -> bool:
        """Return whether every reward of the sum depends on the prompt."""
        return all(member.model.needs_prompt for member in self.objectives.values())

    def refuse_unread(self, languages: Iterable[str]) -> None:
        """Raise RewardError if a reward depends on prompts and does not read one of their `languages`."""
        languages = set(languages)
        for name, member in self.members.items():
            refuse_unread(member.model, name, languages)

    def raw(
        self,
        images: Tensor,
        prompts: list[str],
        languages: Sequence[str] | None = None,
        only: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return the raw scores (B,) of every reward, or of `only` some, on the device of `images`, with gradient.

        `languages` are those of the prompts, by default guessed from their script. Raise as `score` does, and
        RewardError for a prompt in a language that a reward does not read: in training every sample needs every score.
        """
        self.refuse_unread(languages or [guess_language(prompt) for prompt in prompts])
        members = (self.members[name] for name in (self.members if only is None else only))
        return {
            member.name: score_in_chunks(member.model, member.name, images, prompts, member.chunk_size)
            for member in members
        }

    def __call__(
        self, images: Tensor, prompts: list[str], languages: Sequence[str] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of weight * normalised score (B,), and raw scores (B,) by name; statistics do not change."""
        raw = self.raw(images, prompts, languages)
        return self.total(raw), raw

    def take_in(self, raw: Mapping[str, Tensor]) -> None:
        """Add the raw scores (B,) of all processes, by name, to the statistics; ignore other names."""
        for name in self.normalisers.keys() & raw.keys():
            self.normalisers[name].update(raw[name])

    def total(self, raw: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum (B,) of `raw` under the current statistics, which do not change."""
        terms = self.normalised(raw)
        weighted = [member.weight * terms[name] for name, member in self.objectives.items()]
        return torch.stack(weighted).sum(0)

    def normalised(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `raw` of the sum normalised by the current statistics; `raw` itself without normalisation."""
        return {name: one(raw[name]) for name, one in self.normalisers.items()} if self.normalisers else raw

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the statistics by reward, for a checkpoint's JSON, which keeps floats exactly."""
        return {name: asdict(normaliser) for name, normaliser in self.normalisers.items()}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore the result of `state`. Raise ValueError if it is of other rewards."""
        if state.keys() != self.normalisers.keys():
            saved, own = (", ".join(names) or "none" for names in (state, self.normalisers))
            raise ValueError(f"the checkpoint holds statistics of the rewards {saved}, not of {own}")
        if any(values.keys() != asdict(RunningNormaliser()).keys() for values in state.values()):
            raise ValueError("the checkpoint's statistics of the rewards are incomplete: delete checkpoints/")
        self.normalisers = {name: RunningNormaliser(**values) for name, values in state.items()}


def combine(
    configs: Iterable[Reward],
    device: torch.device | str,
    normalise: bool = True,
) -> Combined:
    """Build and combine the rewards of a recipe. Raise as `build` does."""
    members = [
        Member(config.name, build(config, device), config.weight, config.chunk_size, config.is_constraint)
        for config in configs
    ]
    return Combined(members, normalise)
