"""What is wrong with the file of a latent LPIPS that a recipe names, by the names and shapes of its tensors."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..storage.tensor_headers import tensors_in
from ..storage.untrusted import read_bytes
from .distill import Distill
from .experiment import Recipe
from .families import geometry, layout_of
from .lpips_layout import CONVERT, FILE
from .lpips_layout import layout_of as lpips_layout_of
from .paths import Folders
from .tree import Key, Problem
from .types import Teacher


def problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield what is wrong with each file; `file` reports those that are missing."""
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Distill) and stage.lpips:
            key: Key = ("stages", i, "lpips")
            place = Path(folders.place(key, stage.lpips))
            path = place / FILE if os.path.isdir(place) else place
            if os.path.isfile(path) and path.suffix != ".safetensors":
                message = f"expected a .safetensors file, found {stage.lpips}: other formats can run code and are not "
                yield Problem(key, f"{message}read; {CONVERT}")
            elif os.path.isfile(path):
                yield from _of_file(key, stage.lpips, path, _channels(recipe.teacher, folders))


def _of_file(key: Key, name: str, path: Path, channels: int | None) -> Iterator[Problem]:
    try:
        layout = lpips_layout_of({one: entry["shape"] for one, entry in tensors_in(path).items()})
    except ValueError as error:
        yield Problem(key, f"{name}: {error}")
        return
    if channels is not None and layout.channels != channels:
        message = f"{name} compares latents of {layout.channels} channels, and the teacher's have {channels}: "
        yield Problem(key, f"{message}take weights that were trained for this autoencoder")


def _channels(teacher: Teacher, folders: Folders) -> int | None:
    """Return the channels of a teacher's latents; None where no folder here says, which `teacher_problems` reports."""
    folder = Path(folders.place(("teacher", "path"), teacher.path))
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        layout = layout_of(teacher.family)
        configs = [json.loads(read_bytes(folder / part / "config.json")) for part in (layout.denoiser, "vae")]
        return geometry(layout, *configs).channels
    return None
