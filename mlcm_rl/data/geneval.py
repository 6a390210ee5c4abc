"""Tasks of GenEval (Ghosh et al., arXiv 2310.11513): what must be on a picture, and whether boxes that were seen fit.

A line of GenEval's prompt file has, beside the prompt, `tag` (its task: single_object, two_object, counting, colors,
position, color_attr), `include`, a list of {"class", "count", and maybe "color" or "position": [relation, place of
another entry]}, and maybe `exclude`, a list of {"class", "count"}. Boxes are (left, top, right, bottom) in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..storage.untrusted import Faults, brief
from .prompts import GENEVAL_KEYS, records_of

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"  # the tag whose objects need more confidence
MAX_OBJECTS = 16  # of a class, the most confident
OPEN_VOCABULARY = ("owlvit",)  # detectors that look for what a text names; the processor of owlv2 needs scipy
CLOSED_VOCABULARY = ("conditional_detr", "deformable_detr", "detr", "rt_detr", "rt_detr_v2", "yolos")
SLACK = 0.1  # of two objects' sizes together, by which one must be beyond the other's centre

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """An object that a detector sees."""

    name: str  # its class
    confidence: float
    box: Box


@dataclass(frozen=True)
class Wanted:
    """At least `count` objects of the class `name`, in a `colour`, or in a `relation` to those of entry `other`."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    other: int = 0


@dataclass(frozen=True)
class Task:
    """What a prompt asks for. Of the classes in `excluded` there must be fewer objects than their number."""

    tag: str
    included: tuple[Wanted, ...]
    excluded: tuple[tuple[str, int], ...] = ()

    @property
    def names(self) -> set[str]:
        """The classes that a detector must know."""
        return {one.name for one in self.included} | {name for name, _ in self.excluded}

    @property
    def has_colours(self) -> bool:
        """Whether colours have to be told apart."""
        return any(one.colour for one in self.included)

    def is_right(
        self, detections: Sequence[Detection], confidence: float, colours_of: Callable[[str, list[Box]], list[str]]
    ) -> bool:
        """Return whether the `detections` above `confidence` are as asked.

        The most confident objects of a class are those that count and whose colour and place are asked for.
        `colours_of` returns the colours of the boxes of a class.
        """
        seen: dict[str, list[Box]] = {}
        for one in sorted(detections, key=lambda one: -one.confidence):
            if one.confidence > confidence and len(seen.setdefault(one.name, [])) < MAX_OBJECTS:
                seen[one.name].append(one.box)
        matched: list[list[Box]] = []  # for each entry; empty where it does not match
        for wanted in self.included:
            boxes = seen.get(wanted.name, [])[: wanted.count]
            fits = len(boxes) == wanted.count
            if fits and wanted.colour is not None:
                fits = all(colour == wanted.colour for colour in colours_of(wanted.name, boxes))
            if fits and wanted.relation is not None:
                others = matched[wanted.other]
                fits = bool(others) and all(
                    wanted.relation in relations(box, other) for box in boxes for other in others
                )
            matched.append(boxes if fits else [])
        return all(matched) and all(len(seen.get(name, [])) < count for name, count in self.excluded)


def relations(box: Box, other: Box) -> set[str]:
    """Return those of RELATIONS in which `box` stands to `other`.

    The offset of their centres, shortened in each direction by SLACK of both sizes there, must have more than half of
    the length of the whole offset in a direction.
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i]) for i in (0, 1)]
    shortened = [math.copysign(max(abs(far) - SLACK * size, 0.0), far) for far, size in zip(offset, sizes, strict=True)]
    if all(abs(far) < 1e-3 for far in shortened):
        return set()
    across, down = (far / math.hypot(*offset) for far in shortened)
    fits = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, is_so in fits.items() if is_so}


def read_tasks(path: str | Path, count: int) -> list[Task]:
    """Return the tasks of the first `count` prompts of a file in GenEval's layout.

    Raise ValueError with file, line and key for a line that is not in it.
    """
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"{path}: detector needs a .jsonl file of prompts with the keys {', '.join(GENEVAL_KEYS)}")
    tasks, faults = [], Faults()
    for where, record in list(records_of(Path(path)))[:count]:
        with faults.collect():
            tasks.append(_task(record, where))
    faults.raise_all()
    return tasks


def refuse_detector(kind: object, folder: Path | str) -> None:
    """Raise ValueError for an object detector in `folder` of a `kind`, transformers' model type, that is not read."""
    if kind not in OPEN_VOCABULARY + CLOSED_VOCABULARY:
        known = ", ".join(CLOSED_VOCABULARY + OPEN_VOCABULARY)
        raise ValueError(f"{folder} is of the kind {brief(kind)}; read are {known}")


def refuse_colours(tasks: Sequence[Task], path: str | Path) -> None:
    """Raise ValueError where one of the `tasks` of a file asks for a colour, for an evaluation without a CLIP."""
    if any(task.has_colours for task in tasks):
        raise ValueError(f"{path}: has prompts that ask for a colour, which needs clip: a CLIP tells colours apart")


def _task(record: dict, where: str) -> Task:
    tag = record.get("tag")
    if not isinstance(tag, str) or not tag:
        raise ValueError(f"{where}: tag must be the name of a task, got {brief(tag)}")
    entries = enumerate(_entries(record, "include", where))
    included = [_wanted(entry, f"{where}: include[{i}]", i) for i, entry in entries]
    if not included:
        raise ValueError(f"{where}: include is empty: there is nothing to look for")
    excluded = [
        (_name(entry, f"{where}: exclude[{i}]"), _count(entry, f"{where}: exclude[{i}]"))
        for i, entry in enumerate(_entries(record, "exclude", where))
    ]
    for i, (name, count) in enumerate(excluded):
        asked = max((one.count for one in included if one.name == name), default=0)
        if asked >= count:
            raise ValueError(f"{where}: exclude[{i}]: no picture is right: {asked} of {name} and fewer than {count}")
    return Task(tag, tuple(included), tuple(excluded))


def _entries(record: dict, key: str, where: str) -> list[dict]:
    entries = record.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{where}: {key} must be a list of objects in braces, got {brief(entries)}")
    return entries


def _wanted(entry: dict, where: str, place: int) -> Wanted:
    colour, position = entry.get("color"), entry.get("position")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"{where}: color must be one of {', '.join(COLOURS)}, got {brief(colour)}")
    if position is None:
        return Wanted(_name(entry, where), _count(entry, where), colour)
    is_pair = isinstance(position, list) and len(position) == 2
    if not is_pair or position[0] not in RELATIONS or type(position[1]) is not int or position[1] not in range(place):
        raise ValueError(
            f"{where}: position must be one of {', '.join(RELATIONS)} and the place of an entry before this one, got "
            f"{brief(position)}"
        )
    return Wanted(_name(entry, where), _count(entry, where), colour, position[0], position[1])


def _name(entry: dict, where: str) -> str:
    if not isinstance(entry.get("class"), str) or not entry["class"]:
        raise ValueError(f"{where}: class must be the name of a class of objects, got {brief(entry.get('class'))}")
    return entry["class"]


def _count(entry: dict, where: str) -> int:
    count = entry.get("count")
    if type(count) is not int or not 1 <= count <= MAX_OBJECTS:  # more are never seen
        raise ValueError(f"{where}: count must be a whole number from 1 to {MAX_OBJECTS}, got {brief(count)}")
    return count
