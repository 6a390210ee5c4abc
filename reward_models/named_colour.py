"""How near the ink of a picture is to the colour that its prompt names: a closed formula, no weights."""

import re
import reprlib

import torch
from torch import Tensor

COLOURS = {  # in 0..255; the Chinese names count wherever the character stands
    ("black", "黑"): (32, 32, 32),
    ("red", "红"): (216, 32, 32),
    ("blue", "蓝"): (32, 64, 208),
    ("green", "绿"): (16, 128, 48),
    ("yellow", "黄"): (240, 208, 0),
    ("orange", "橙"): (240, 128, 0),
    ("purple", "紫"): (128, 32, 160),
    ("pink", "粉"): (240, 128, 176),
    ("brown", "棕"): (128, 80, 32),
    ("grey", "灰"): (128, 128, 128),
    ("gray", "灰"): (128, 128, 128),
}
RGB_OF = {name: colour for names, colour in COLOURS.items() for name in names}
ENGLISH = rf"(?<!\w)(?:{'|'.join(english for english, _ in COLOURS)})(?!\w)"
NAMED = re.compile(f"{ENGLISH}|[{''.join(chinese for _, chinese in COLOURS)}]", re.ASCII | re.IGNORECASE)
PAPER = 1e-3  # of the pixels count as ink of white: a page without ink has a colour, and a gradient that is a number


class NamedColour:
    """Minus the squared distance of the mean colour of the ink to the named colour, both in [0, 1] per channel.

    A pixel counts as ink by how far its darkest channel is from white, so white paper does not count.
    """

    differentiable = True
    needs_prompt = True
    languages = ("en", "zh")

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype

    def refuse_prompt(self, prompt: str, aspect: float) -> None:
        """Raise ValueError for a `prompt` that names no known colour."""
        named_colour(prompt)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score (B,) float32, at most 0, of `images` (B, 3, H, W) in [0, 1].

        Raises ValueError for a prompt that names no known colour; the first one that it names counts.
        """
        wanted = torch.tensor([named_colour(prompt) for prompt in prompts], device=self.device) / 255
        pixels = images.to(self.device, self.dtype).float()
        ink = 1.0 - pixels.amin(1, keepdim=True)
        mean = ((ink * pixels).mean((2, 3)) + PAPER) / (ink.mean((2, 3)) + PAPER)
        return -(mean - wanted).square().sum(1)


def named_colour(prompt: str) -> tuple[int, int, int]:
    """The first colour that `prompt` names, RGB in 0..255; raises ValueError where it names none."""
    found = NAMED.search(prompt)
    if found is None:
        known = ", ".join(english for english, _ in COLOURS)
        raise ValueError(
            f"the prompt {reprlib.repr(prompt)} names no colour; known are {known}, and their Chinese names"
        )
    return RGB_OF[found.group().lower()]
