"""Keys of recipes that had another name once.

A file that still says the old one is read with a warning that names the new one; a recipe recorded by a finished run is
read without. Fingerprints go on hashing the old names, so that no finished stage is lost (pipeline/fingerprint.py).
"""

from dataclasses import replace
from typing import Any

from .tree import Key, Node, Problem

OF_SAMPLES = {"num_steps": "sampling_steps"}
OF_STAGES = {  # kind -> {old name: new name}
    "trajectories": {"num_steps": "solver_steps"},
    "distill": {"segments": "num_segments"},
    "policy": {"epsilon": "clip_range"},
    "evaluate": {"num_steps": "sampling_steps"},
}


def renewed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded recipe, as dicts and lists, under the names of today."""
    changed = dict(recipe)
    if isinstance(samples := recipe.get("samples"), dict):
        changed["samples"] = _renewed(samples, OF_SAMPLES)
    if isinstance(stages := recipe.get("stages"), list):
        changed["stages"] = [renewed_stage(stage) if isinstance(stage, dict) else stage for stage in stages]
    return changed


def renewed_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded stage under the names of today."""
    return _renewed(stage, _names(stage.get("kind")))


def under_first_names(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stage of `kind` under the name that each had first, as fingerprints hash them."""
    return _renewed(settings, {new: old for old, new in _names(kind).items()})


def renew_tree(tree: Node, file: str) -> tuple[Node, list[str], list[Problem]]:
    """Return the tree of a recipe's file under the names of today, a warning for each old one, and what is wrong.

    Wrong is a file that gives a key under both names; where the command line gave one of them, that one counts.
    """
    if not isinstance(tree.content, dict):
        return tree, [], []
    pen = _Pen(file)
    content = dict(tree.content)
    if "samples" in content:
        content["samples"] = pen.renew(content["samples"], ("samples",), OF_SAMPLES)
    if "stages" in content and isinstance(stages := content["stages"].content, list):
        renewed_stages = []
        for i, stage in enumerate(stages):
            kind = stage.child("kind")
            renewed_stages.append(pen.renew(stage, ("stages", i), _names(kind.content if kind else None)))
        content["stages"] = replace(content["stages"], content=renewed_stages)
    return replace(tree, content=content), pen.warnings, pen.problems


class _Pen:
    """What renames keys of a file and writes down what there is to say of it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.warnings: list[str] = []
        self.problems: list[Problem] = []

    def renew(self, node: Node, key: Key, names: dict[str, str]) -> Node:
        """Return the mapping at `key` with `names` replaced; any other value as it is."""
        if not isinstance(node.content, dict):
            return node
        children: dict[str, Node] = {}
        for name, child in node.content.items():
            new = names.get(name, name)
            if new != name:
                self._warn((*key, name), child, new)
            if new not in children or child.place.override:
                children[new] = child
            elif not children[new].place.override:
                old = next(old for old in names if names[old] == new)
                message = f"the key is given twice, as {old} too, its old name"
                self.problems.append(Problem((*key, new), message, file=self.file, place=child.place))
        return replace(node, content=children)

    def _warn(self, key: Key, child: Node, new: str) -> None:
        message = f"is called {new} now, and still read: write {new}"
        self.warnings.append(str(Problem(key, message, file=self.file, place=child.place)))


def _names(kind: object) -> dict[str, str]:
    return OF_STAGES.get(kind, {}) if isinstance(kind, str) else {}


def _renewed(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): one for name, one in value.items()}
