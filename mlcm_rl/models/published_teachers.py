"""Shapes of published teachers, so that `plan` needs no download: their configurations as they are published, no more.

A folder each, in diffusers' layout; of its files only what shapes, schedule and prompt lengths are read from.
"""

from pathlib import Path

from ..recipe import Teacher

FOLDER = Path(__file__).with_name("published")
FOLDERS = {  # by the hub's name
    "stabilityai/stable-diffusion-xl-base-1.0": "stable-diffusion-xl-base-1.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion-v1-5",
}


def shipped(teacher: Teacher) -> Path | None:
    """Return the folder of shapes that stands for a teacher on the hub; None for a local one, or one not shipped."""
    name = FOLDERS.get(teacher.path)
    return None if name is None or Path(teacher.path).is_dir() else FOLDER / name
