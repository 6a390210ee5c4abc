"""Keys of recipes that once had another name, or another default.

A file with an old key is read with a warning that has the new one; the recipe of a finished run is read without a
warning. Fingerprints hash the first names, and settings that are not at their first defaults, for ever, so that
finished stages are found (pipeline/fingerprint.py).
"""

from dataclasses import replace
from typing import Any

from .tree import Key, Node, Place, Problem

OF_SAMPLES = {"num_steps": "sampling_steps"}
OF_STAGES = {  # kind -> {old name: new name}
    "trajectories": {"num_steps": "solver_steps"},
    "distill": {"segments": "num_segments"},
    "policy": {"epsilon": "clip_range"},
    "evaluate": {"num_steps": "sampling_steps"},
}

FIRST_DEFAULTS: dict[tuple[str, str], Any] = {("trajectories", "solver_steps"): 48}  # (kind, today's key) -> value
# (key of a stage, key in it that came later) -> the value with which it is as before
LATER: dict[tuple[str, str], Any] = {
    ("adversarial", "jumps"): "clean",
    ("adversarial", "sees_start"): False,
    ("adversarial", "warmup_steps"): 0,
}


def renewed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded recipe, as dicts and lists, with today's keys."""
    current = dict(recipe)
    if isinstance(samples := recipe.get("samples"), dict):
        current["samples"] = _renewed(samples, OF_SAMPLES)
    if isinstance(stages := recipe.get("stages"), list):
        current["stages"] = [renewed_stage(stage) if isinstance(stage, dict) else stage for stage in stages]
    return current


def renewed_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded stage with today's keys."""
    return _renewed(stage, _names(stage.get("kind")))


def under_first_names(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stage of `kind` with the first name of each key, as fingerprints hash them.

    Without keys inside them that came later, where these change nothing.
    """
    for (outer, inner), value in LATER.items():
        if isinstance(inside := settings.get(outer), dict) and inside.get(inner) == value:
            settings = settings | {outer: {name: one for name, one in inside.items() if name != inner}}
    return _renewed(settings, {new: old for old, new in _names(kind).items()})


def renew_tree(tree: Node, file: str) -> tuple[Node, list[str], list[Problem]]:
    """Return the tree of a recipe's file with today's keys, a warning for each old one, and problems.

    A problem is a key that the file has under both names. If one of them is from the command line, that one counts.
    """
    if not isinstance(tree.content, dict):
        return tree, [], []
    renamer = _Renamer(file)
    content = dict(tree.content)
    if "samples" in content:
        content["samples"] = renamer.renew(content["samples"], ("samples",), OF_SAMPLES)
    if "stages" in content and isinstance(stages := content["stages"].content, list):
        renewed_stages = []
        for i, stage in enumerate(stages):
            kind = stage.child("kind")
            renewed_stages.append(renamer.renew(stage, ("stages", i), _names(kind.content if kind else None)))
        content["stages"] = replace(content["stages"], content=renewed_stages)
    return replace(tree, content=content), renamer.warnings, renamer.problems


def renew_parts(tree: Node, parts: list[str], text: str, file: str, warnings: list[str]) -> list[str]:
    """Return the parts of the key of an override with today's names; append a warning for an old one.

    `text` is the override as it was given, over the recipe `tree` of `file`.
    """
    content = tree.content if isinstance(tree.content, dict) else {}
    place, names = 1, OF_SAMPLES
    if parts[0] == "stages" and len(parts) > 1 and "stages" in content:
        stages = content["stages"].content
        kinds = [one.child("kind") for one in stages] if isinstance(stages, list) else []
        found = kinds[int(parts[1])] if parts[1].isdecimal() and int(parts[1]) < len(kinds) else None
        place, names = 2, _names(found.content if found else parts[1])
    elif parts[0] != "samples":
        return parts
    if len(parts) <= place or parts[place] not in names:
        return parts
    new = [*parts[:place], names[parts[place]], *parts[place + 1 :]]
    message = f"is called {names[parts[place]]} now, and still read"
    warnings.append(str(Problem((".".join(parts),), message, file=file, place=Place(override=text))))
    return new


class _Renamer:
    """Renames the keys of a file, and collects warnings and problems."""

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
