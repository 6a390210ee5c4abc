"""diffusers pipeline of a student that is told where each of its jumps ends; exported beside it as pipeline.py.

It needs diffusers alone. What it changes in the stock pipeline: the denoiser's `timestep_cond`, which there embeds a
guidance scale, is the time that the step goes to before noise is put back. That is the next time of the scheduler's
grid (0 after the last), lower for TCDScheduler with `eta`, and 0 for LCMScheduler.
"""

import functools
import math
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from diffusers.models.embeddings import get_timestep_embedding


class TargetTimePipeline(StableDiffusionXLPipeline):
    """Samples a conditioned student in one to eight steps; guidance is inside it and `guidance_scale` is unused."""

    @torch.no_grad()
    def __call__(self, prompt: str | list[str] | None = None, num_inference_steps: int = 4, **settings: Any) -> Any:
        """As the stock pipeline's call; see there for `settings` and for what is returned."""
        kept = 0.0 if isinstance(self.scheduler, LCMScheduler) else 1.0 - settings.get("eta", 0.0)
        tell = functools.partial(self._tell_target_time, kept)
        hook = self.unet.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            return super().__call__(prompt, num_inference_steps=num_inference_steps, **settings)
        finally:
            hook.remove()

    def _tell_target_time(
        self, kept: float, unet: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        sample, t = args
        times = self.scheduler.timesteps.tolist()
        target = math.floor(kept * [*times[1:], 0][times.index(int(t))])
        sinusoids = get_timestep_embedding(torch.tensor([target]), unet.config.time_cond_proj_dim)
        return args, {**kwargs, "timestep_cond": sinusoids.expand(len(sample), -1).to(sample.device, sample.dtype)}
