"""Marks on the settings that name what a stage reads: how it is found when a recipe is loaded, and how it is hashed."""

from dataclasses import dataclass

from .types import Strict


@dataclass(frozen=True)
class Reads:
    """The mark, inside `Annotated`, of a setting that names a file or a folder.

    holding      None for a file; for a folder, the file that it must hold, or "" for any
    is_network   a folder with weights and a configuration, which are hashed; else all that is there is
    of_pictures  its pictures are read, or those that it names
    of_prompts   a file of prompts
    """

    holding: str | None = None
    is_network: bool = False
    of_pictures: bool = False
    of_prompts: bool = False


PROMPTS = Reads(of_prompts=True)
PICTURES = Reads(holding="metadata.jsonl", of_pictures=True)


def read_by(stage: Strict) -> dict[str, Reads]:
    """Return the settings of `stage` that name what it reads, given or not."""
    fields = type(stage).model_fields.items()
    return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Reads)}


def named_by(stage: Strict) -> dict[str, tuple[str, Reads]]:
    """Return (path, mark) of every setting of `stage` that names what it reads and is given."""
    return {name: (path, mark) for name, mark in read_by(stage).items() if (path := getattr(stage, name))}
