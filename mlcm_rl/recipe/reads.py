"""Marks on the settings with paths that a stage reads: how they are checked and how their content is hashed."""

from dataclasses import dataclass
from pathlib import PurePath

from .lpips_layout import FILE as LPIPS_FILE
from .types import Strict


@dataclass(frozen=True)
class Reads:
    """The mark, inside `Annotated`, of a setting with the path of a file or a folder.

    holding      None for a file; for a folder, the file that it must have in it, or "" for any folder
    is_network   whether it is a folder of weights and configuration, of which only those are hashed
    of_pictures  whether its pictures are read, or those that it lists
    of_prompts   whether it is a file of prompts
    of_student   whether it is a student, in a file or in any of several kinds of folders
    or_file      whether a file may stand in place of the folder, which is then read for `holding` alone
    """

    holding: str | None = None
    is_network: bool = False
    of_pictures: bool = False
    of_prompts: bool = False
    of_student: bool = False
    or_file: bool = False

    def held_by(self, path: str) -> str | None:
        """Return `holding` for this `path`: None where its suffix makes it a file in place of the folder."""
        return None if self.or_file and PurePath(path).suffix else self.holding


PROMPTS = Reads(of_prompts=True)
PICTURES = Reads(holding="metadata.jsonl", of_pictures=True)
STUDENT = Reads(of_student=True)
LPIPS = Reads(holding=LPIPS_FILE, or_file=True)


def reads_of(stage: Strict) -> dict[str, Reads]:
    """Return the marks of the settings of `stage` with paths to read, set or not."""
    fields = type(stage).model_fields.items()
    return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Reads)}


def paths_of(stage: Strict) -> dict[str, tuple[str, Reads]]:
    """Return (path, mark) of every setting of `stage` with a path to read, if it is set."""
    return {name: (path, mark) for name, mark in reads_of(stage).items() if (path := getattr(stage, name))}
