"""The folders of reward files: ours, which are shipped, and a user's, `reward_models` in the working directory.

Python would look for `reward_models` in the working directory first, where a folder of that name would replace ours.
Nothing here imports torch or a reward file.
"""

import pkgutil
import sys
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from . import shipped

NAME = "reward_models"
OURS = shipped.folder(NAME)
ENTRY_POINTS = "mlcm_rl.reward_models"  # of other distributions' rewards


def package() -> ModuleType:
    """Return the package of reward files: ours, then the folder of the working directory.

    Afterwards every import of `reward_models` is this package.
    """
    module = sys.modules.get(NAME)
    if module is None or not _is_ours(module):
        spec = spec_from_file_location(NAME, OURS / "__init__.py", submodule_search_locations=[str(OURS)])
        if spec is None or spec.loader is None:
            raise ImportError(f"{OURS}: the shipped reward models are gone; install mlcm-rl again")
        module = sys.modules[NAME] = module_from_spec(spec)
        spec.loader.exec_module(module)
    for folder in folders()[1:]:
        if str(folder) not in module.__path__:
            module.__path__.append(str(folder))
    return module


def folders() -> list[Path]:
    """Return the folders of reward files, ours first; a checkout of this package as working directory adds none."""
    theirs = Path.cwd() / NAME
    is_checkout = (theirs.parent / Path(__file__).parents[1].name / "__init__.py").is_file()
    return [OURS, theirs] if theirs.is_dir() and not is_checkout else [OURS]


def names_of_files() -> set[str]:
    """Return the names of the reward files in the package's folders."""
    modules = pkgutil.iter_modules(list(package().__path__))
    return {module.name for module in modules if not module.name.startswith("_")}


def names() -> list[str]:
    """Return the names of all reward models, of files and of entry points, sorted, without importing them."""
    return sorted(names_of_files() | entry_points(group=ENTRY_POINTS).names)


def _is_ours(module: ModuleType) -> bool:
    return any(Path(folder).resolve() == OURS for folder in getattr(module, "__path__", ()))
