"""Hashes of a reward model's files, without importing it: its module, that module's imports of its package, weights.

Weights that a module declares (weights.py) are pinned in its source; for those without a pin, the hash of the fetched
file is used. A data file beside a module with the module's name, such as `emoji_style.safetensors`, is included.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path

from ..recipe.reward_package import ENTRY_POINTS
from ..storage.files import read_json
from ..storage.hashing import sha256_once
from .finding import FOLDER
from .weights import SAFE_SUFFIXES, Weights, weights_folder


def source_hashes(name: str) -> dict[str, str]:
    """Return the sha256 of every file of the reward model `name`, by module; modules without a file are left out.

    Modules of other packages are not followed, and data files of other names are not included.
    """
    waiting = [_module_of(name)]
    hashes: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        spec = None if module in hashes else _spec(module)
        if spec is None or spec.origin is None or not (path := Path(spec.origin)).is_file():
            continue
        hashes[module] = sha256_once(path)
        for suffix in SAFE_SUFFIXES:
            if (data_file := path.with_suffix(suffix)).is_file():
                hashes[module + suffix] = sha256_once(data_file)
        if (tree := _parse(path)) is not None:
            hashes |= _unpinned(tree)
            waiting += _imports(tree, spec)
    return hashes


def _module_of(name: str) -> str:
    """Return the module of a reward model: its entry point's, else in `reward_models`. `find` refuses both at once."""
    points = [point.module for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    return points[0] if points else f"{FOLDER}.{name}"


def _spec(module: str) -> ModuleSpec | None:
    """Return the spec of `module`, without importing it or its package."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        loaded = sys.modules.get(spec.name)
        folders = loaded.__path__ if loaded is not None else spec.submodule_search_locations
        spec = PathFinder.find_spec(f"{spec.name}.{part}", folders)
    return spec


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file; None if it is not Python source, which `build` refuses."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _imports(tree: ast.Module, spec: ModuleSpec) -> Iterator[str]:
    """Yield the dotted names that a module imports from its own package, of modules and of names in them."""
    top = spec.name.split(".")[0]
    package = spec.name if spec.submodule_search_locations is not None else spec.parent
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = (package or "").split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.split(".")[0] == top)


def _unpinned(tree: ast.Module) -> dict[str, str]:
    """Return the sha256 of the fetched files of weights that a module declares without one, by name in the cache."""
    hashes = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == Weights.__name__:
            arguments = dict(zip(("name", "source", "sha256"), node.args, strict=False))
            arguments |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            name, pin = (arguments.get(key) for key in ("name", "sha256"))
            if isinstance(name, ast.Constant) and isinstance(pin, ast.Constant) and pin.value is None:
                origin = weights_folder() / str(name.value) / "origin.json"
                if origin.is_file():
                    hashes[str(name.value)] = read_json(origin, fetched_sha256=str)["fetched_sha256"]
    return hashes
