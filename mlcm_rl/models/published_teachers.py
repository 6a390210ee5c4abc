"""Configurations of published teachers, so that `plan` needs no download.

Each has a folder in diffusers' layout, with only the files that shapes, schedule and prompt lengths are read from.
"""

from pathlib import Path

from ..recipe import Teacher

FOLDER = Path(__file__).with_name("published")
FOLDERS = {  # by the hub's name
    "stabilityai/stable-diffusion-xl-base-1.0": "stable-diffusion-xl-base-1.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion-v1-5",
    "Kwai-Kolors/Kolors-diffusers": "kolors",
    "black-forest-labs/FLUX.1-dev": "flux.1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux.2-klein-base-4b",
    "Tongyi-MAI/Z-Image": "z-image",
    "Qwen/Qwen-Image": "qwen-image",
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": "hunyuan-dit-v1.2",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma-xl-2-1024",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana-1600m-1024",
}


def shipped(teacher: Teacher) -> Path | None:
    """Return the folder with the configurations of a teacher on the hub; None if it is local or not shipped here."""
    name = FOLDERS.get(teacher.path)
    return None if name is None or Path(teacher.path).is_dir() else FOLDER / name
