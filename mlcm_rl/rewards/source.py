"""What a reward model is made of, told without importing it: its module, what that imports of its own package, weights.

Weights that a module declares (weights.py) are pinned in its source; of those that nobody could pin, what was fetched
counts. A data file counts that lies beside a module under the module's name, as `emoji_style.safetensors` does.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path

from ..storage.files import read_json
from ..storage.hashing import sha256_once
from .finding import ENTRY_POINTS, FOLDER
from .weights import KEPT_AS_THEY_ARE, Weights, cache_folder


def source_hashes(name: str) -> dict[str, str]:
    """sha256 of every file that the reward model `name` is made of, by module; none of one whose file is not found.

    Modules of other packages are not followed, nor are data files of other names.
    """
    waiting, found = [_module_of(name)], {}
    while waiting:
        module = waiting.pop()
        spec = None if module in found else _spec(module)
        if spec is None or spec.origin is None or not (path := Path(spec.origin)).is_file():
            continue
        found[module] = sha256_once(path)
        for suffix in KEPT_AS_THEY_ARE:
            if (beside := path.with_suffix(suffix)).is_file():
                found[module + suffix] = sha256_once(beside)
        if (tree := _parsed(path)) is not None:
            found |= _unpinned(tree)
            waiting += _imported(tree, spec)
    return found


def _module_of(name: str) -> str:
    """Where a reward model is: what an entry point says, else a file of ours. `find` refuses a name that is in both."""
    points = [point.module for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    return points[0] if points else f"{FOLDER}.{name}"


def _spec(module: str) -> ModuleSpec | None:
    """Where `module` would be imported from; neither it nor a package that it is in is imported for that."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        loaded = sys.modules.get(spec.name)
        folders = loaded.__path__ if loaded is not None else spec.submodule_search_locations
        spec = PathFinder.find_spec(f"{spec.name}.{part}", folders)
    return spec


def _parsed(path: Path) -> ast.Module | None:
    """The module in a file; None for one that is no Python source, and that `build` will refuse."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _imported(tree: ast.Module, spec: ModuleSpec) -> Iterator[str]:
    """What a module imports of its own package, by dotted name; what is no module but a name in one comes along."""
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
    """sha256 of what was fetched of the weights that a module declares without one, by their name in the cache."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == Weights.__name__:
            given = dict(zip(("name", "source", "sha256"), node.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            name, pin = (given.get(key) for key in ("name", "sha256"))
            if isinstance(name, ast.Constant) and isinstance(pin, ast.Constant) and pin.value is None:
                origin = cache_folder() / str(name.value) / "origin.json"
                if origin.is_file():
                    found[str(name.value)] = read_json(origin, fetched_sha256=str)["fetched_sha256"]
    return found
