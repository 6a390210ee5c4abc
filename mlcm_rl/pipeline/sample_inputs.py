"""The inputs of `mlcm sample` beside prompts: read from the command, checked, loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..data.picture_files import read_picture, square
from ..models.base import Base
from ..models.composition import Composition, Weighted
from ..models.students import Student
from .errors import BadArgument, prefix_errors


@dataclass(frozen=True)
class Inputs:
    """Files that join the prompts. Without any, pictures are those of the prompts alone.

    strength  share of the time axis that is drawn; at 1 nothing of `image` is left but what `mask` keeps, where it is
              black
    """

    image: Path | None = None
    strength: float = 1.0
    mask: Path | None = None
    loras: tuple[Weighted, ...] = ()

    def record(self) -> dict[str, str]:
        """Return them as text, for the metadata of a picture."""
        image = {} if self.image is None else {"image": str(self.image), "strength": f"{self.strength:g}"}
        mask = {} if self.mask is None else {"mask": str(self.mask)}
        return image | mask | _record("lora", self.loras)


def of_command(
    image: Path | None = None, strength: float | None = None, mask: Path | None = None, loras: Sequence[str] = ()
) -> Inputs:
    """Return what a command composes a student with; the default strength is 0.5, and 1 with a mask.

    Raise BadArgument for options that need another one, and for a LoRA that is not there.
    """
    for name, value in (("--strength", strength), ("--mask", mask)):
        if value is not None and image is None:
            raise BadArgument(f"{name}: it needs --image, the picture that is drawn over")
    with prefix_errors("--lora", BadArgument):
        weighted = tuple(map(Weighted.parse, loras))
    if strength is None:
        strength = 1.0 if image is None or mask is not None else 0.5
    return Inputs(image, strength, mask, weighted)


def compose(base: Base, student: Student, inputs: Inputs) -> Composition:
    """Return the student's denoiser composed with `inputs`; it is changed in place."""
    image = None if inputs.image is None else read(base, inputs.image, "--image")
    mask = None if inputs.mask is None else read(base, inputs.mask, "--mask").mean(dim=1, keepdim=True)
    return Composition(base, student.denoiser, inputs.loras, image, inputs.strength, mask)


def read(base: Base, file: Path, option: str) -> Tensor:
    """Return the central square of a picture file as (1, 3, H', W') in [0, 1], at the resolution of `base`."""
    return square(read_picture(file, f"{option} {file}"), base.resolution)[None].to(base.device) / 255


def _record(name: str, values: Sequence[object]) -> dict[str, str]:
    return {name: " ".join(map(str, values))} if values else {}
