"""For rewards of scenes: the layout of `data/scenes.py`, and what a prompt asks for, looked up by its text.

A reward is given the texts of prompts alone. What they ask for stands in prompt files, as the `concept` of a line.
"""

import reprlib
from pathlib import Path

from ..data.prompts import prompts_with_lines
from ..data.scenes import (
    BACKGROUNDS,
    CANVAS,
    NUM_CELLS,
    STYLES,
    Reading,
    Request,
    border_of,
    cells_of,
    palette,
    read_code,
)
from ..recipe.reward_package import OURS

__all__ = [
    "BACKGROUNDS",
    "CANVAS",
    "NUM_CELLS",
    "STYLES",
    "Reading",
    "Request",
    "Requests",
    "border_of",
    "cells_of",
    "palette",
]

SHIPPED = OURS.parent / "recipes" / "scenes" / "prompts"


class Requests:
    """What each prompt of some prompt files asks of a scene."""

    def __init__(self, prompts: str | None) -> None:
        """Read a .jsonl file, or all in a folder; None takes those of `recipes/scenes`.

        Raise FileNotFoundError if there is none, and ValueError with file and line for a `concept` that is no request,
        or for a text that two lines mean differently.
        """
        self.place = SHIPPED if prompts is None else Path(prompts)
        paths = sorted(self.place.glob("*.jsonl")) if self.place.is_dir() else [self.place]
        if not paths or not paths[0].is_file():
            raise FileNotFoundError(
                f"{self.place}: no prompt file of scenes; name one, or a folder of them, as settings: {{prompts: ...}}"
            )
        self.by_text: dict[str, Request] = {}
        for where, prompt in (line for path in paths for line in prompts_with_lines(path)):
            if prompt.concept is None:
                continue
            try:
                request = read_code(prompt.concept)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if self.by_text.setdefault(prompt.prompt, request) != request:
                raise ValueError(f"{where}: {reprlib.repr(prompt.prompt)} asks for something else in an earlier line")

    def of(self, prompt: str) -> Request:
        """Return what `prompt` asks for. Raise ValueError for one that is in none of the files."""
        if prompt not in self.by_text:
            raise ValueError(
                f"what the prompt {reprlib.repr(prompt)} asks for is in no file of {self.place}; name the files that "
                "have it as settings: {prompts: ...}"
            )
        return self.by_text[prompt]
