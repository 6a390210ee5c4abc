"""The inputs of `mlcm sample` beside prompts: read from the command, checked, loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data.picture_files import read_picture, square
from ..equations.edges import edge_map
from ..models import control
from ..models.base import Base, precision_of
from ..models.composition import Composition, Weighted
from ..models.students import Student
from ..recipe.families import layout_of
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
    controls: tuple[Weighted, ...] = ()
    control_images: tuple[Path, ...] = ()  # one of each
    takes_edges: bool = False  # the control networks are given the edges of their pictures
    ip_adapter: Weighted | None = None
    ip_image: Path | None = None

    def pictures(self) -> list[tuple[str, Path]]:
        """Return the picture files, each with the option that names it."""
        single = [("--image", self.image), ("--mask", self.mask), ("--ip-image", self.ip_image)]
        named = [(option, file) for option, file in single if file is not None]
        return named + [("--control-image", file) for file in self.control_images]

    def record(self) -> dict[str, str]:
        """Return them as text, for the metadata of a picture."""
        image = [] if self.image is None else [self.image]
        files: dict[str, Sequence[object]] = {
            "image": image,
            "strength": [f"{self.strength:g}"] * len(image),
            "mask": [] if self.mask is None else [self.mask],
            "lora": self.loras,
            "control": self.controls,
            "control_image": self.control_images,
            "edges": ["of control_image"] * self.takes_edges,
            "ip_adapter": [] if self.ip_adapter is None else [self.ip_adapter],
            "ip_image": [] if self.ip_image is None else [self.ip_image],
        }
        return {name: "\n".join(map(str, values)) for name, values in files.items() if values}


def of_command(
    image: Path | None = None,
    strength: float | None = None,
    mask: Path | None = None,
    loras: Sequence[str] = (),
    controls: Sequence[str] = (),
    control_images: Sequence[Path] = (),
    takes_edges: bool = False,
    ip_adapter: str | None = None,
    ip_image: Path | None = None,
) -> Inputs:
    """Return what a command composes a student with; the default strength is 0.5, and 1 with a mask.

    Raise BadArgument for options that need another one, and for files that are not there.
    """
    for name, value in (("--strength", strength), ("--mask", mask)):
        if value is not None and image is None:
            raise BadArgument(f"{name}: it needs --image, the picture that is drawn over")
    if len(controls) != len(control_images):
        message = (
            f"--control: {len(controls)} networks, and {len(control_images)} --control-image: give each network one"
        )
        raise BadArgument(message)
    if takes_edges and not controls:
        raise BadArgument("--edges: it needs --control, the network that is given them")
    if (ip_adapter is None) != (ip_image is None):
        raise BadArgument("--ip-adapter: it needs --ip-image, the picture that it attends to, and that needs it")
    with prefix_errors("--lora", BadArgument):
        styles = tuple(map(Weighted.parse, loras))
    with prefix_errors("--control", BadArgument):
        networks = tuple(map(Weighted.parse, controls))
    with prefix_errors("--ip-adapter", BadArgument):
        adapter = None if ip_adapter is None else Weighted.parse(ip_adapter)
    if strength is None:
        strength = 1.0 if image is None or mask is not None else 0.5
    return Inputs(image, strength, mask, styles, networks, tuple(control_images), takes_edges, adapter, ip_image)


def read(inputs: Inputs, family: str) -> dict[Path, Image.Image]:
    """Return the pictures of `inputs` by file.

    Raise BadArgument for inputs that a teacher of `family` does not take; no network is loaded.
    """
    layout = layout_of(family)
    if inputs.loras and not layout.loads_lora:
        raise BadArgument(f"--lora: diffusers loads no LoRA into a {layout.pipeline}")
    with prefix_errors("--control", BadArgument):
        for one in inputs.controls:
            control.refuse_control(one.path, family)
    with prefix_errors("--ip-adapter", BadArgument):
        if inputs.ip_adapter is not None:
            control.refuse_ip_adapter(family)
    pictures = {}
    for option, file in inputs.pictures():
        with prefix_errors(option, BadArgument):
            pictures[file] = read_picture(file, str(file))
    for style in inputs.loras:
        if not style.path.is_file():
            raise BadArgument(f"--lora: {style.path} is a folder; name the .safetensors file in it")
    return pictures


def compose(base: Base, student: Student, inputs: Inputs, pictures: Mapping[Path, Image.Image]) -> Composition:
    """Return the student's denoiser composed with `inputs` and their `pictures`; it is changed in place."""
    image = None if inputs.image is None else squared(base, pictures[inputs.image])
    mask = None if inputs.mask is None else squared(base, pictures[inputs.mask]).mean(dim=1, keepdim=True)
    controls = []
    for one, file in zip(inputs.controls, inputs.control_images, strict=True):
        shown = squared(base, pictures[file])
        shown = edge_map(shown).expand(-1, 3, -1, -1) if inputs.takes_edges else shown
        network = control.load_control(base, one.path, precision_of(student.denoiser))
        shown = control.shown(base, network, shown)
        control.refuse_unfit(base, student, network, shown, f"--control {one.path}")
        controls.append((network, shown, one.weight))
    if inputs.ip_adapter is not None and inputs.ip_image is not None:
        shown = squared(base, pictures[inputs.ip_image])
        control.add_ip_adapter(base, student.denoiser, inputs.ip_adapter.path, shown, inputs.ip_adapter.weight)
    return Composition(base, student.denoiser, inputs.loras, controls, image, inputs.strength, mask)


def squared(base: Base, picture: Image.Image) -> Tensor:
    """Return the central square of a picture as (1, 3, H', W') in [0, 1], at the resolution of `base`."""
    return square(picture, base.resolution)[None].to(base.device) / 255
