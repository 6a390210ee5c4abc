"""diffusers pipeline of a student conditioned on the target time of each step; exported beside it as pipeline.py.

It needs diffusers alone. It differs from the stock pipeline in the denoiser's `timestep_cond`: there it embeds a
guidance scale, here the time that the step goes to before noise is added again. That is the next time of the
scheduler's grid (0 after the last), a lower one for TCDScheduler with `eta`, and 0 for LCMScheduler. The same times are
the `class_labels`: their embedding is all zeros and adds nothing, but a denoiser that has one does not run without
them.
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
    """Samples a conditioned student in one to eight steps. Guidance is distilled: `guidance_scale` has no effect.

    Its denoiser raises ValueError if another class runs it without target times.
    """

    # Attributes, not constants of the module: diffusers replaces the module when it opens another folder's pipeline.
    budgets = (1, 2, 3, 4, 5, 6, 7, 8)  # numbers of steps that the student was trained for
    eta = 0.0  # of TCDScheduler, unless a call passes another
    code = Path(__file__).read_text(encoding="utf-8")

    @torch.no_grad()
    @functools.wraps(StableDiffusionXLPipeline.__call__)
    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Sample as the stock pipeline does, with its order of arguments; `default_steps` steps by default."""
        call = inspect.signature(super().__call__).bind(*args, **settings)
        arguments = call.arguments
        if all(arguments.get(name) is None for name in ("num_inference_steps", "timesteps", "sigmas")):
            arguments["num_inference_steps"] = self.default_steps
        self._check(arguments)
        arguments.setdefault("guidance_scale", 0.0)
        eta = arguments.setdefault("eta", self.eta)
        scale = 0.0 if isinstance(self.scheduler, LCMScheduler) else 1.0 - eta
        add_target_time = functools.partial(self._add_target_time, scale)
        hook = self.unet.register_forward_pre_hook(add_target_time, with_kwargs=True, prepend=True)
        try:
            return super().__call__(*call.args, **call.kwargs)
        finally:
            hook.remove()

    @property
    def default_steps(self) -> int:
        """Return 4, or the nearest number of steps that the student was trained for."""
        return min(self.budgets, key=lambda budget: (abs(budget - 4), budget))

    def _check(self, arguments: dict[str, Any]) -> None:
        """Warn of steps and schedulers that the student was not trained for, and of arguments without effect.

        Raise ValueError for over 8 steps.
        """
        times = next((arguments[name] for name in ("timesteps", "sigmas") if arguments.get(name) is not None), None)
        num_steps = arguments["num_inference_steps"] if times is None else len(times)
        budgets = ", ".join(map(str, self.budgets))
        if not 1 <= num_steps <= 8:
            raise ValueError(f"{num_steps} steps: this student samples in 1 to 8; it was trained for {budgets}")
        if num_steps not in self.budgets:
            warnings.warn(f"{num_steps} steps: this student was trained for {budgets}", stacklevel=4)
        unused = [name for name, value in arguments.items() if name.startswith("negative_prompt") and value is not None]
        unused += ["guidance_scale"] if arguments.get("guidance_scale", 0.0) > 1.0 else []
        if not isinstance(self.scheduler, LCMScheduler | TCDScheduler):
            other = f"{type(self.scheduler).__name__} visits other times, or one time twice"
            warnings.warn(f"{other}: this student is for the scheduler of its folder", stacklevel=4)
        if unused:
            warnings.warn(f"{', '.join(unused)}: no effect, as guidance is inside this student", stacklevel=4)

    def _add_target_time(
        self, scale: float, unet: UNet2DConditionModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Add the target time, `scale` times the next of the grid, to the denoiser's arguments."""
        sample, t = args
        times = self.scheduler.timesteps.tolist()
        target = torch.tensor([math.floor(scale * [*times[1:], 0][times.index(int(t))])], device=sample.device)
        sinusoids = get_timestep_embedding(target, unet.config.time_cond_proj_dim).to(sample.dtype)
        target_times = {"timestep_cond": sinusoids.expand(len(sample), -1), "class_labels": target.expand(len(sample))}
        return args, kwargs | target_times

    def register_modules(self, **parts: Any) -> None:
        """Register `parts` as the stock pipeline does, with a check on the denoiser for whatever else runs it."""
        super().register_modules(**parts)
        if parts.get("unet") is not None:
            parts["unet"].register_forward_pre_hook(refuse_without_target_time, with_kwargs=True)

    def save_config(self, save_directory: Any, **settings: Any) -> None:
        """Save the index as the stock pipeline does (`save_pretrained` calls this), and this file beside it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(self.code, encoding="utf-8")
        super().save_config(save_directory, **settings)

    def to_json_string(self) -> str:
        """Return model_index.json as the stock pipeline does, but with this file in the name of the class."""
        index = json.loads(super().to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def refuse_without_target_time(unet: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a denoiser is run without target times."""
    if kwargs.get("class_labels") is None:
        raise ValueError(
            "this denoiser needs the target time of each step, which only its own class TargetTimePipeline passes; for "
            "other pipelines (image to image, inpainting, ControlNet) load an adapter or denoiser of its folders "
            "steps-<N> over the teacher, as its README.md shows"
        )
