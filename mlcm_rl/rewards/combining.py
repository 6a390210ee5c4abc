"""Several rewards as one: weights, and running normalisation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.prompts import guess_language
from ..recipe import Reward
from .contract import RewardModel, refuse_unread, score_in_chunks
from .finding import build

STD_FLOOR = 1e-4  # of the running deviation: a reward that hardly varies is not blown up without bound


@dataclass
class RunningNormaliser:
    """Mean and deviation of every score seen, after Chan, Golub and LeVeque (1979): Welford's update by batches.

    `squares` is the sum of squared differences from the mean. The state is three numbers, which JSON keeps exactly.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: Tensor) -> None:
        """Take in `scores` (B,)."""
        seen = scores.detach().cpu().double()  # moved once: each figure read from a device waits for it
        count, mean = self.count + len(seen), seen.mean().item()
        step = mean - self.mean
        self.squares += (seen - mean).square().sum().item() + step**2 * self.count * len(seen) / count
        self.mean += step * len(seen) / count
        self.count = count

    @property
    def std(self) -> float:
        """The sample deviation (n - 1), at least STD_FLOOR; 1 until two scores have been seen."""
        return max((self.squares / (self.count - 1)) ** 0.5, STD_FLOOR) if self.count > 1 else 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        """(scores - mean) / std, (B,); the statistics are constants to the gradient."""
        return (scores - self.mean) / self.std


@dataclass(frozen=True)
class Member:
    """One reward of a `Combined`."""

    name: str
    model: RewardModel
    weight: float = 1.0
    chunk_size: int | None = None


class Combined:
    """A weighted sum of rewards, each put on one scale by its running mean and deviation.

    The statistics change by `take_in` alone: a step asks by those of the steps before it, and gives all its scores
    when it ends, so that nothing depends on how it was split. Before the first step they are those of the reference.
    """

    def __init__(self, members: Sequence[Member], normalise: bool = True):
        self.members = {member.name: member for member in members}
        if len(self.members) != len(members):
            raise ValueError(f"a reward is named twice: {', '.join(member.name for member in members)}")
        self.normalisers = {name: RunningNormaliser() for name in self.members} if normalise else {}

    @property
    def needs_prompt(self) -> bool:
        """Whether every reward depends on the prompt."""
        return all(member.model.needs_prompt for member in self.members.values())

    def refuse_unread(self, languages: Iterable[str]) -> None:
        """Raises RewardError for a reward that depends on prompts and does not read one of their `languages`."""
        asked = set(languages)
        for name, member in self.members.items():
            refuse_unread(member.model, name, asked)

    def raw(self, images: Tensor, prompts: list[str], languages: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Every reward's scores (B,) on the device of `images`, as they are, with gradient; no statistics change.

        `languages` are the prompts' own, guessed from their script where not given. Raises what `score` raises, and
        RewardError for a prompt in a language that a reward does not read: in training every sample needs every score.
        """
        self.refuse_unread(languages or [guess_language(prompt) for prompt in prompts])
        return {
            name: score_in_chunks(member.model, name, images, prompts, member.chunk_size)
            for name, member in self.members.items()
        }

    def __call__(
        self, images: Tensor, prompts: list[str], languages: Sequence[str] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of weight * normalised score (B,), raw scores (B,) by name); no statistics change."""
        raw = self.raw(images, prompts, languages)
        return self.total(raw), raw

    def take_in(self, raw: Mapping[str, Tensor]) -> None:
        """Add raw scores (B,) by name, those of all processes, to the statistics; names of others are passed over."""
        for name in self.normalisers.keys() & raw.keys():
            self.normalisers[name].update(raw[name])

    def total(self, raw: dict[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of `raw` on the present scale; no statistics change."""
        terms = self.normalised(raw)
        weighted = [member.weight * terms[name] for name, member in self.members.items()]
        return torch.stack(weighted).sum(0)

    def normalised(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """`raw` on the present scale; the same numbers where the sum is of raw scores."""
        return {name: self.normalisers[name](scores) for name, scores in raw.items()} if self.normalisers else raw

    def state(self) -> dict[str, dict[str, Any]]:
        """The statistics by reward, for a checkpoint's JSON: it keeps floats exactly."""
        return {name: asdict(normaliser) for name, normaliser in self.normalisers.items()}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Put back what `state` gave. Raises ValueError where it was taken of other rewards."""
        if state.keys() != self.normalisers.keys():
            kept, mine = (", ".join(names) or "none" for names in (state, self.normalisers))
            raise ValueError(f"the checkpoint holds statistics of the rewards {kept}, not of {mine}")
        if any(values.keys() != asdict(RunningNormaliser()).keys() for values in state.values()):
            raise ValueError("the checkpoint's statistics of the rewards are incomplete: delete checkpoints/")
        self.normalisers = {name: RunningNormaliser(**values) for name, values in state.items()}


def combine(
    asked: Iterable[Reward],
    device: torch.device | str,
    normalise: bool = True,
) -> Combined:
    """The rewards of a recipe, built and combined. Raises what `build` raises."""
    members = [Member(one.name, build(one, device), one.weight, one.chunk_size) for one in asked]
    return Combined(members, normalise)
