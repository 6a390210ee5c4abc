"""diffusers pipeline of a student that is told where each of its jumps ends; exported beside it as pipeline.py.

It needs diffusers alone. What it changes in the stock pipeline: the denoiser's `timestep_cond`, which there embeds a
guidance scale, is the time that the step goes to before noise is put back. That is the next time of the scheduler's
grid (0 after the last), lower for TCDScheduler with `eta`, and 0 for LCMScheduler. The same times are its
`class_labels`: their embedding is all zeros and adds nothing, but a denoiser that has one does not run without them.
"""

import functools
import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, TCDScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding


class TargetTimePipeline(StableDiffusionXLPipeline):
    """Samples a conditioned student in one to eight steps. Guidance is inside it: `guidance_scale` changes nothing.

    Its denoiser raises ValueError where another class runs it, which would not say where its jumps end.
    """

    # Attributes, not constants of the module: what diffusers opens next from a folder takes the module's place.
    budgets = (1, 2, 3, 4, 5, 6, 7, 8)  # numbers of steps that the student learned
    eta = 0.0  # of TCDScheduler, unless a call says another
    code = Path(__file__).read_text(encoding="utf-8")

    @torch.no_grad()
    @functools.wraps(StableDiffusionXLPipeline.__call__)
    def __call__(self, *args: Any, **settings: Any) -> Any:
        """As the stock pipeline's call, with its order of arguments; without a number of steps, `default_steps`."""
        call = inspect.signature(super().__call__).bind(*args, **settings)
        asked = call.arguments
        if all(asked.get(name) is None for name in ("num_inference_steps", "timesteps", "sigmas")):
            asked["num_inference_steps"] = self.default_steps
        self._check(asked)
        asked.setdefault("guidance_scale", 0.0)
        eta = asked.setdefault("eta", self.eta)
        kept = 0.0 if isinstance(self.scheduler, LCMScheduler) else 1.0 - eta
        tell = functools.partial(self._tell_target_time, kept)
        hook = self.unet.register_forward_pre_hook(tell, with_kwargs=True, prepend=True)
        try:
            return super().__call__(*call.args, **call.kwargs)
        finally:
            hook.remove()

    @property
    def default_steps(self) -> int:
        """4, or the nearest number of steps that the student learned."""
        return min(self.budgets, key=lambda budget: (abs(budget - 4), budget))

    def _check(self, asked: dict[str, Any]) -> None:
        """Warn of what the student did not learn and of what changes nothing. Raise ValueError for over 8 steps."""
        times = next((asked[name] for name in ("timesteps", "sigmas") if asked.get(name) is not None), None)
        num_steps = asked["num_inference_steps"] if times is None else len(times)
        learned = ", ".join(map(str, self.budgets))
        if not 1 <= num_steps <= 8:
            raise ValueError(f"{num_steps} steps: this student draws in 1 to 8; it learned {learned}")
        if num_steps not in self.budgets:
            warnings.warn(f"{num_steps} steps: this student learned {learned}", stacklevel=4)
        unused = [name for name, value in asked.items() if name.startswith("negative_prompt") and value is not None]
        unused += ["guidance_scale"] if asked.get("guidance_scale", 0.0) > 1.0 else []
        if not isinstance(self.scheduler, LCMScheduler | TCDScheduler):
            other = f"{type(self.scheduler).__name__} goes through other times, or twice through one"
            warnings.warn(f"{other}: this student is for the scheduler of its folder", stacklevel=4)
        if unused:
            warnings.warn(f"{', '.join(unused)}: no effect, as guidance is inside this student", stacklevel=4)

    def _tell_target_time(
        self, kept: float, unet: UNet2DConditionModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        sample, t = args
        times = self.scheduler.timesteps.tolist()
        target = torch.tensor([math.floor(kept * [*times[1:], 0][times.index(int(t))])], device=sample.device)
        sinusoids = get_timestep_embedding(target, unet.config.time_cond_proj_dim).to(sample.dtype)
        told = {"timestep_cond": sinusoids.expand(len(sample), -1), "class_labels": target.expand(len(sample))}
        return args, kwargs | told

    def register_modules(self, **parts: Any) -> None:
        """As the stock pipeline's; the denoiser then says what it lacks, whoever else runs it."""
        super().register_modules(**parts)
        if parts.get("unet") is not None:
            parts["unet"].register_forward_pre_hook(refuse_untold, with_kwargs=True)

    def save_config(self, save_directory: Any, **settings: Any) -> None:
        """As the stock pipeline's, which `save_pretrained` calls; this file goes along."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(self.code, encoding="utf-8")
        super().save_config(save_directory, **settings)

    def to_json_string(self) -> str:
        """As the stock pipeline's, of model_index.json; the class is named with its file."""
        index = json.loads(super().to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def refuse_untold(unet: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where a denoiser is run without target times."""
    if kwargs.get("class_labels") is None:
        raise ValueError(
            "this denoiser must be told the time that each step goes to, and its own class TargetTimePipeline alone "
            "tells it; for other pipelines (image to image, inpainting, ControlNet) put an adapter or denoiser of its "
            "folders steps-<N> over the teacher, as its README.md shows"
        )
