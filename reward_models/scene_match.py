"""How sure a small network is that a picture is the scene that its prompt asks for: a log-probability."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mlcm_rl.rewards.scenes import Request, Requests

from ._scene_reader import SceneReader, log_match

SHIPPED = Path(__file__).with_suffix(".safetensors")


class SceneMatch:
    """log P(the right things, as many, where they should stand, in the style and on the background that are named).

    Summed over all arrangements that fit, so that none of the right pictures is preferred.
    """

    differentiable = True
    needs_prompt = True
    languages = ("en", "zh")

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, prompts: str | None = None):
        self.device, self.dtype = torch.device(device), dtype
        self.requests = Requests(prompts)
        with safe_open(SHIPPED, "pt") as file:
            self.concepts: list[str] = json.loads(file.metadata()["concepts"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, not a dict
        reader = SceneReader(len(self.concepts))
        reader.load_state_dict(weights)
        self.reader = reader.eval().requires_grad_(False).to(self.device, dtype)

    def refuse_prompt(self, prompt: str, aspect: float) -> None:
        """Raise ValueError for a `prompt` that is in none of the prompt files, or asks for an unknown concept."""
        self._request(prompt)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """log P (B,) float32, at most 0, of `images` (B, 3, H, W) in [0, 1].

        Raises ValueError for a prompt that `refuse_prompt` refuses.
        """
        requests = [self._request(prompt) for prompt in prompts]
        return log_match(*self.reader.read(images.to(self.device, self.dtype)), requests, self.concepts)

    def _request(self, prompt: str) -> Request:
        request = self.requests.of(prompt)
        if unknown := sorted(set(request.concepts) - set(self.concepts)):
            raise ValueError(f"scene_match does not know the concept {unknown[0]} of {request.code!r}")
        return request
