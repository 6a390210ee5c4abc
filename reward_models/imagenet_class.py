"""How sure EfficientNet-Lite0 is that a picture shows the ImageNet class that its prompt names."""

import json
import re
import reprlib
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from mlcm_rl.rewards import Weights

from ._efficientnet_lite import EFFICIENTNET_LITE0_WEIGHTS, EfficientNetLite0, efficientnet_pixels

NAMES = Path(__file__).with_suffix(".json")
SIDE = 224  # pixels, of the square that the published accuracy is measured at


class ImagenetClass:
    """The log-probability of the class, out of ImageNet-1k, whose name stands in the prompt."""

    differentiable = True
    needs_prompt = True
    languages = ("en", "zh")
    weights: ClassVar[tuple[Weights, ...]] = (EFFICIENTNET_LITE0_WEIGHTS,)

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        classifier = EfficientNetLite0()
        classifier.load_state_dict(load_file(EFFICIENTNET_LITE0_WEIGHTS.path()))
        self.classifier = classifier.eval().requires_grad_(False).to(self.device, dtype)
        self.class_of = _ClassFinder()

    def refuse_prompt(self, prompt: str, aspect: float) -> None:
        """Raise ValueError for a `prompt` that names no class."""
        self.class_of(prompt)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """log p (B,) float32, at most 0, of `images` (B, 3, H, W) in [0, 1].

        Raises ValueError for a prompt that names no class.
        """
        classes = torch.tensor([self.class_of(prompt) for prompt in prompts], device=self.device)
        logits = self.classifier(efficientnet_pixels(images.to(self.device, self.dtype), SIDE))
        return logits.float().log_softmax(-1).gather(1, classes[:, None]).squeeze(1)


class _ClassFinder:
    """Finds the class that a text names: the longest known name in it, an English one as whole words."""

    def __init__(self) -> None:
        listed = json.loads(NAMES.read_text(encoding="utf-8"))
        self.classes = {name: i for i, names in enumerate(listed) for name in (*names["en"], *names["zh"])}
        english, chinese = (
            sorted((name for names in listed for name in names[language]), key=len, reverse=True)
            for language in ("en", "zh")
        )
        self.english = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, english))})s?(?!\w)", re.ASCII)
        self.chinese = re.compile("|".join(map(re.escape, chinese)))

    def __call__(self, text: str) -> int:
        """The number of the class, 0 to 999; raises ValueError where the text names none."""
        text = text.lower()
        found = [match.group() for match in self.english.finditer(text)] or self.chinese.findall(text)
        if not found:
            raise ValueError(
                f"the prompt {reprlib.repr(text)} names no class of ImageNet; {NAMES.name} lists those that are known"
            )
        longest = max(found, key=len)
        return self.classes[longest if longest in self.classes else longest[:-1]]
