"""Reward models: what they are, how one is found by its name, how it is built and asked.

A reward model is a class. It is built with `(device, dtype, **settings)` and called with `images` (B, 3, H, W) in
[0, 1] and `prompts`, a list of B texts; it returns (B,) float32, higher is better. Three attributes of the class say
what it can do:

    differentiable   bool: gradients reach the images
    needs_prompt     bool: the score depends on the prompt
    languages        tuple of language codes that its prompts may be in; () where it needs no prompt

and a fourth, `weights`, which it may leave out, names the files that must be fetched first (weights.py). A reward that
not every prompt suits has a method `refuse_prompt(prompt, aspect)` as well, which raises ValueError for one that no
picture of that width / height can be scored for: all prompts are then checked before the first step (prompts.py).

`find` looks in three places: our file `reward_models/<name>.py`, which defines one public class and is imported only
when it is named; such a file in the folder `reward_models` of the working directory; and the entry-point group
`mlcm_rl.reward_models` of other people's distributions. One name in two places is refused.
"""

import difflib
import importlib
import importlib.metadata
import inspect
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import precision, reward_package
from ..data import guess_language
from ..recipe import Reward
from ..untrusted import brief
from .weights import GivenFile, HubFile, MissingWeights, PipFile, Weights, WeightsError, read_checkpoint

__all__ = [
    "Combined",
    "GivenFile",
    "HubFile",
    "Member",
    "PipFile",
    "RewardError",
    "RewardModel",
    "RunningNormaliser",
    "Weights",
    "build",
    "combine",
    "find",
    "found",
    "names",
    "read_checkpoint",
    "refuse_settings",
    "refuse_unread",
    "refuse_without_gradient",
    "refuse_without_weights",
    "score",
    "score_in_chunks",
    "settings_of",
    "usable",
    "weights_of",
]

FOLDER = reward_package.package().__name__  # bound to ours, whatever the working directory holds
ENTRY_POINTS = "mlcm_rl.reward_models"
ATTRIBUTES = {"differentiable": bool, "needs_prompt": bool, "languages": tuple}
STD_FLOOR = 1e-4  # of the running deviation: a reward that hardly varies is not blown up without bound


class RewardError(ValueError):
    """A reward model cannot be built, failed, or broke the contract; the message begins with its name."""


class RewardModel(Protocol):
    """The contract above, for type checkers and readers; nobody has to inherit from it."""

    differentiable: bool
    needs_prompt: bool
    languages: tuple[str, ...]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


# ---- found by name ----


def names() -> list[str]:
    """Every reward model that `find` would find, sorted; imports none of them."""
    return sorted(_files() | entry_points(group=ENTRY_POINTS).names)


def find(name: str) -> type[RewardModel]:
    """The class of the reward model `name`.

    Raises LookupError for an unknown name (with the nearest known ones) and for one that is claimed twice, by a
    file and an entry point or by two distributions; TypeError when what is found does not keep the contract.
    """
    points = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    claims = _claims(name)
    if not claims:
        known = names()
        nearest = difflib.get_close_matches(name, known, n=3) or known
        raise LookupError(f"there is no reward model {name!r}; the nearest names are {', '.join(nearest) or '(none)'}")
    if len(claims) > 1:
        raise LookupError(f"reward model {name!r} is claimed twice, by {' and by '.join(claims)}: rename one of them")
    return _kept(points[0].load() if points else _only_class(name), claims[0])


def found(name: str) -> type[RewardModel]:
    """`find`, for people: whatever is raised is a RewardError that names the reward, its file and the line in it."""
    try:
        return find(name)
    except (Exception, SystemExit) as error:  # an import of another's module may raise anything, and call sys.exit
        place = _place(name, error)
        is_plain = isinstance(error, ImportError) or not place  # a sentence already, of Python's or of `find`'s own
        what = str(error) if is_plain and not isinstance(error, SystemExit) else _said(error)
        raise RewardError(f"reward {name} cannot be used: {what}{place}") from error


def weights_of(reward: type[RewardModel]) -> tuple[Weights, ...]:
    """The weights that a reward model declares."""
    declared: tuple[Weights, ...] = inspect.getattr_static(reward, "weights", ())
    return declared


def settings_of(reward: type[RewardModel]) -> dict[str, inspect.Parameter]:
    """The settings that a reward model takes: its constructor's parameters after device and dtype."""
    return dict(list(inspect.signature(reward).parameters.items())[2:])


# ---- built ----


def build(asked: Reward, device: torch.device | str) -> RewardModel:
    """The reward model that a recipe asks for, on its own device or else on `device`.

    Raises RewardError that begins with its name, for one that cannot be found or imported, an unknown or a missing
    setting, and whatever its constructor raises; MissingWeights where its weights must be fetched.
    """
    constructor: Any = usable(asked)
    try:
        where = torch.device(asked.device or device)
        model: RewardModel = constructor(where, getattr(torch, asked.dtype), **asked.settings)
    except MissingWeights as error:
        raise MissingWeights(f"reward {asked.name}: {error.what}", asked.name) from error
    except (Exception, SystemExit) as error:  # whatever another's code raises; people need the name of the reward
        raise RewardError(f"reward {asked.name} cannot be built: {_said(error)}") from error
    return model


def usable(asked: Reward) -> type[RewardModel]:
    """The class of the reward model that a recipe asks for, which takes its settings; nothing is built.

    Raises RewardError that begins with its name, for one that cannot be found or imported and for its settings.
    """
    reward = found(asked.name)
    refuse_settings(asked.name, reward, asked.settings)
    return reward


def refuse_without_weights(asked: Reward, reward: type[RewardModel]) -> None:
    """Raises MissingWeights where weights that `reward` opens must be fetched: of those it declares it may need one."""
    if not all(weights.is_present() for weights in weights_of(reward)):
        try:
            build(asked.model_copy(update={"device": None}), "meta")
        except MissingWeights:
            raise
        except RewardError:  # it cannot be built without data; that is no fault of its weights
            return


def refuse_without_gradient(rewards: Mapping[str, RewardModel | type[RewardModel]]) -> None:
    """Raises RewardError for those of `rewards`, by name, from which no gradient comes."""
    if opaque := [name for name, reward in rewards.items() if not reward.differentiable]:
        raise RewardError(
            f"feedback needs rewards with a gradient, which {', '.join(opaque)} has not; dpo and policy take any"
        )


def refuse_settings(name: str, reward: type[RewardModel], settings: Collection[str]) -> None:
    """Raises RewardError for settings (by name) that `reward` does not take, and for one that it lacks."""
    known = settings_of(reward)
    takes = f"its settings are {', '.join(known)}" if known else "it takes no settings"
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise RewardError(f"reward {name}: unknown setting {setting!r}{meant}; {takes}")
    for setting, parameter in known.items():
        if parameter.default is parameter.empty and setting not in settings:
            raise RewardError(f"reward {name}: the setting {setting!r} is missing; {takes}")


# ---- asked ----


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
        with precision.own(images.device):
            scores = reward(images, prompts)
    except (Exception, SystemExit) as error:  # whatever another's code raises; a run of five rewards must say which
        raise RewardError(f"reward {name} failed: {_said(error)}") from error
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


# ---- several, weighted ----


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


def refuse_unread(reward: RewardModel, name: str, languages: Iterable[str]) -> None:
    """Raises RewardError when `reward` depends on prompts and does not read one of their `languages`."""
    unread = sorted(set(languages) - set(reward.languages)) if reward.needs_prompt else []
    if unread:
        raise RewardError(
            f"reward {name} reads prompts in {', '.join(reward.languages)}, not in {', '.join(unread)}: "
            "leave those prompts out, or take a reward that reads them"
        )


def _said(error: BaseException) -> str:
    """What went wrong, in one piece: people's errors as they are, other ones with their type."""
    if isinstance(error, SystemExit):
        return f"it would end the program: {error!r}"
    if isinstance(error, SyntaxError):  # as text it ends with a place, of which the folder is left out
        return f"{type(error).__name__}: {error.msg}"
    return str(error) if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"


def _place(name: str, error: BaseException) -> str:
    """Where the import of the reward model `name` failed, in brackets; "" for what `find` itself raises."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" ({error.filename}, line {error.lineno})" if error.lineno else f" ({error.filename})"
    of_import = (__file__, importlib.__file__, importlib.metadata.__file__)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename not in of_import and not frame.filename.startswith("<frozen importlib"):
            return f" ({frame.filename}, line {frame.lineno})"
    return f" ({_claims(name)[0]})" if isinstance(error, SyntaxError) else ""


def _claims(name: str) -> list[str]:
    """Where a reward model of this name would come from, in words; more than one is an error."""
    points = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    paths = [Path(folder) / f"{name}.py" for folder in reward_package.package().__path__]
    ours = {reward_package.OURS: Path(FOLDER)}  # told without the place of this machine
    files = [str(ours.get(path.parent, path.parent) / path.name) for path in paths if path.is_file()]
    return files + [f"the entry point of {_origin(point)}" for point in points]


def _files() -> set[str]:
    return reward_package.names(list(reward_package.package().__path__))


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _only_class(name: str) -> type:
    """The one public class that `reward_models/<name>.py` itself defines."""
    module = importlib.import_module(f"{FOLDER}.{name}")
    classes = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if len(classes) != 1:
        found = ", ".join(value.__name__ for value in classes) or "none"
        raise TypeError(f"{FOLDER}/{name}.py: must define one public class, defines {found}")
    return classes[0]


def _kept(reward: type, where: str) -> type:
    """`reward`, when it declares the attributes of the contract."""
    for attribute, kind in ATTRIBUTES.items():
        value = inspect.getattr_static(reward, attribute, None)
        if not isinstance(value, kind):
            raise TypeError(f"{where}: {reward.__name__}.{attribute} must be a {kind.__name__}, is {value!r}")
    if inspect.getattr_static(reward, "needs_prompt") and not inspect.getattr_static(reward, "languages"):
        raise TypeError(f"{where}: {reward.__name__} needs a prompt, so its languages must name at least one")
    if not all(isinstance(weights, Weights) for weights in weights_of(reward)):
        raise TypeError(f"{where}: {reward.__name__}.weights must be a tuple of mlcm_rl.rewards.Weights")
    return reward
