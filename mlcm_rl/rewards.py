"""Reward models: what they are, how one is found by its name, how one is asked.

A reward model is a class. It is built with `(device, dtype, **settings)` and called with `images` (B, 3, H, W) in
[0, 1] and `prompts`, a list of B texts; it returns (B,) float32, higher is better. Three attributes of the class say
what it can do:

    differentiable   bool: gradients reach the images
    needs_prompt     bool: the score depends on the prompt
    languages        tuple of language codes that its prompts may be in; () where it needs no prompt

`find` looks in two places: the file `reward_models/<name>.py`, which defines one public class and is imported only
when it is named, and the entry-point group `mlcm_rl.reward_models` of other people's distributions.
"""

import difflib
import importlib
import inspect
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

import torch
from torch import Tensor

FOLDER = "reward_models"
ENTRY_POINTS = "mlcm_rl.reward_models"
ATTRIBUTES = {"differentiable": bool, "needs_prompt": bool, "languages": tuple}


class RewardModel(Protocol):
    """The contract above, for type checkers and readers; nobody has to inherit from it."""

    differentiable: bool
    needs_prompt: bool
    languages: tuple[str, ...]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


def names() -> list[str]:
    """Every reward model that `find` would find, sorted; imports none of them."""
    return sorted(_files() | entry_points(group=ENTRY_POINTS).names)


def find(name: str) -> type[RewardModel]:
    """The class of the reward model `name`.

    Raises LookupError for an unknown name (with the nearest known ones) and for one that is claimed twice, by a
    file and an entry point or by two distributions; TypeError when what is found does not keep the contract.
    """
    points = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    claims = [f"the entry point of {_origin(point)}" for point in points]
    if name in _files():
        claims.insert(0, f"{FOLDER}/{name}.py")
    if not claims:
        known = names()
        nearest = difflib.get_close_matches(name, known, n=3) or known
        raise LookupError(f"there is no reward model {name!r}; the nearest names are {', '.join(nearest) or '(none)'}")
    if len(claims) > 1:
        raise LookupError(f"reward model {name!r} is claimed twice, by {' and by '.join(claims)}: rename one of them")
    return _kept(points[0].load() if points else _only_class(name), claims[0])


def score(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> Tensor:
    """`reward` of `images` (B, 3, H, W) for `prompts`, (B,) float32, checked against the contract.

    Raises ValueError or TypeError that names the reward for a wrong shape, dtype or a value that is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"reward {name}: images must be (B, 3, H, W) with B prompts, got {tuple(images.shape)} and {len(prompts)}"
        )
    scores = reward(images, prompts)
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"reward {name}: must return a float32 tensor, returned {found}")
    if scores.shape != (len(images),):
        raise ValueError(f"reward {name}: must return shape ({len(images)},), returned {tuple(scores.shape)}")
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"reward {name}: returned {scores[index].item()} for prompt {prompts[index]!r}")
    return scores


def _files() -> set[str]:
    folder = importlib.import_module(FOLDER)
    return {module.name for module in pkgutil.iter_modules(folder.__path__) if not module.name.startswith("_")}


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
    return reward
