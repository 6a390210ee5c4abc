"""Find reward models by name, build them, and refuse those that cannot do what a stage needs."""

import ast
import difflib
import importlib
import importlib.metadata
import inspect
import traceback
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..recipe import Reward, reward_package, reward_settings
from .contract import ATTRIBUTES, RewardError, RewardModel, message_of
from .weights import MissingWeights, Weights

FOLDER = reward_package.package().__name__  # this package's, whatever is in the working directory


# ---- by name ----


def find(name: str) -> type[RewardModel]:
    """Return the class of the reward model `name`.

    Raise LookupError for an unknown name (with the nearest names) and for one that two files, distributions, or a file
    and a distribution define; TypeError if the class breaks the contract.
    """
    points = [point for point in entry_points(group=reward_package.ENTRY_POINTS) if point.name == name]
    claims = _claims(name)
    if not claims:
        all_names = reward_package.names()
        nearest = difflib.get_close_matches(name, all_names, n=3) or all_names
        raise LookupError(f"there is no reward model {name!r}; the nearest names are {', '.join(nearest) or '(none)'}")
    if len(claims) > 1:
        raise LookupError(f"reward model {name!r} is claimed twice, by {' and by '.join(claims)}: rename one of them")
    return _checked(points[0].load() if points else _only_class(name), claims[0])


def class_of(name: str) -> type[RewardModel]:
    """Return `find(name)`. Raise RewardError for any failure, with the reward, its file and the line."""
    try:
        return find(name)
    except (Exception, SystemExit) as error:  # importing other people's code may raise anything, or call sys.exit
        place = _place(name, error)
        is_plain = isinstance(error, ImportError) or not place  # Python's or `find`'s own message, a full sentence
        message = str(error) if is_plain and not isinstance(error, SystemExit) else message_of(error)
        raise RewardError(f"reward {name} cannot be used: {message}{place}") from error


def shipped(name: str) -> ModuleType:
    """Return the module of the reward file `name` in our own folder."""
    return importlib.import_module(f"{FOLDER}.{name}")


def weights_of(reward: type[RewardModel]) -> tuple[Weights, ...]:
    """Return the weights that a reward model declares."""
    declared: tuple[Weights, ...] = inspect.getattr_static(reward, "weights", ())
    return declared


def settings_of(reward: type[RewardModel]) -> dict[str, inspect.Parameter]:
    """Return the settings that a reward model takes: its constructor's parameters after device and dtype."""
    return dict(list(inspect.signature(reward).parameters.items())[2:])


# ---- building ----


def build(config: Reward, device: torch.device | str) -> RewardModel:
    """Build the reward model of a recipe, on its own device or else on `device`.

    Raise RewardError if it cannot be found or imported, for an unknown or a missing setting, and for whatever its
    constructor raises; MissingWeights if its weights must be fetched. The messages begin with its name.
    """
    constructor: Any = checked_class(config)
    try:
        where = torch.device(config.device or device)
        model: RewardModel = constructor(where, getattr(torch, config.dtype), **config.settings)
    except MissingWeights as error:
        raise MissingWeights(f"reward {config.name}: {error.what}", config.name) from error
    except (Exception, SystemExit) as error:  # other people's code raises anything; the user needs the reward's name
        raise RewardError(f"reward {config.name} cannot be built: {message_of(error)}") from error
    return model


def checked_class(config: Reward) -> type[RewardModel]:
    """Return the class of a recipe's reward model, without building it.

    Raise RewardError if it cannot be found or imported, or does not take the recipe's settings.
    """
    reward = class_of(config.name)
    refuse_settings(config.name, reward, config.settings)
    return reward


def refuse_without_weights(config: Reward, reward: type[RewardModel]) -> None:
    """Raise MissingWeights if weights that `reward` opens must be fetched.

    It is built on the meta device to find out, since it may declare several weights and open one of them.
    """
    if not all(weights.is_present() for weights in weights_of(reward)):
        try:
            build(config.model_copy(update={"device": None}), "meta")
        except MissingWeights:
            raise
        except RewardError:  # it cannot be built without data, which says nothing about its weights
            return


def refuse_without_gradient(rewards: Mapping[str, RewardModel | type[RewardModel]]) -> None:
    """Raise RewardError for those of `rewards`, by name, that are not differentiable."""
    if opaque := [name for name, reward in rewards.items() if not reward.differentiable]:
        raise RewardError(reward_settings.without_gradient(opaque))


def refuse_settings(name: str, reward: type[RewardModel], settings: Mapping[str, Any]) -> None:
    """Raise RewardError for `settings` whose name or type `reward` does not take, and for a missing one."""
    parameters = settings_of(reward)
    takes = f"its settings are {', '.join(parameters)}" if parameters else "it takes no settings"
    for setting, value in settings.items():
        if setting not in parameters:
            nearest = difflib.get_close_matches(setting, parameters, n=1)
            suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
            raise RewardError(f"reward {name}: unknown setting {setting!r}{suggestion}; {takes}")
        annotation = parameters[setting].annotation
        if annotation is not inspect.Parameter.empty:
            text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
            if message := reward_settings.misfit(value, ast.parse(text, mode="eval").body):
                raise RewardError(f"reward {name}: the setting {setting!r}: {message}")
    for setting, parameter in parameters.items():
        if parameter.default is parameter.empty and setting not in settings:
            raise RewardError(f"reward {name}: the setting {setting!r} is missing; {takes}")


def _place(name: str, error: BaseException) -> str:
    """Return where the import of the reward model `name` failed, in brackets; "" for errors of `find` itself."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" ({error.filename}, line {error.lineno})" if error.lineno else f" ({error.filename})"
    of_import = (__file__, importlib.__file__, importlib.metadata.__file__)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename not in of_import and not frame.filename.startswith("<frozen importlib"):
            return f" ({frame.filename}, line {frame.lineno})"
    return f" ({_claims(name)[0]})" if isinstance(error, SyntaxError) else ""


def _claims(name: str) -> list[str]:
    """Return the places that define a reward model of this name, in words; more than one is an error."""
    points = [point for point in entry_points(group=reward_package.ENTRY_POINTS) if point.name == name]
    paths = [Path(folder) / f"{name}.py" for folder in reward_package.package().__path__]
    ours = {reward_package.OURS: Path(FOLDER)}  # without this machine's path
    files = [str(ours.get(path.parent, path.parent) / path.name) for path in paths if path.is_file()]
    return files + [f"the entry point of {_origin(point)}" for point in points]


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _only_class(name: str) -> type:
    """Return the one public class that `reward_models/<name>.py` itself defines."""
    module = shipped(name)
    classes = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if len(classes) != 1:
        listing = ", ".join(value.__name__ for value in classes) or "none"
        raise TypeError(f"{FOLDER}/{name}.py: must define one public class, defines {listing}")
    return classes[0]


def _checked(reward: type, where: str) -> type:
    """Return `reward`. Raise TypeError unless it declares the attributes of the contract."""
    for attribute, kind in ATTRIBUTES.items():
        value = inspect.getattr_static(reward, attribute, None)
        if not isinstance(value, kind):
            raise TypeError(f"{where}: {reward.__name__}.{attribute} must be a {kind.__name__}, is {value!r}")
    if inspect.getattr_static(reward, "needs_prompt") and not inspect.getattr_static(reward, "languages"):
        raise TypeError(f"{where}: {reward.__name__} needs a prompt, so its languages must name at least one")
    if not all(isinstance(weights, Weights) for weights in weights_of(reward)):
        raise TypeError(f"{where}: {reward.__name__}.weights must be a tuple of mlcm_rl.rewards.Weights")
    return reward
