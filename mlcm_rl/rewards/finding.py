"""Reward models found by name, built, and refused where they cannot do what a stage asks."""

import difflib
import importlib
import importlib.metadata
import inspect
import traceback
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from ..recipe import Reward, reward_package
from .contract import ATTRIBUTES, RewardError, RewardModel, said
from .weights import MissingWeights, Weights

FOLDER = reward_package.package().__name__  # bound to ours, whatever the working directory holds
ENTRY_POINTS = "mlcm_rl.reward_models"


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
        what = str(error) if is_plain and not isinstance(error, SystemExit) else said(error)
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
        raise RewardError(f"reward {asked.name} cannot be built: {said(error)}") from error
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
