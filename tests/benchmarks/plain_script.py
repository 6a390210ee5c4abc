"""The step that the field's training scripts take, written plainly: what the benchmarks compare with.

As in the published LCM scripts pixels and text are encoded in the loop, the teacher is asked twice for its guidance,
and the target is a network of its own that follows the student by an average.
"""

import copy

import torch
from torch import Tensor

from mlcm_rl.equations.averaging import ema_update_
from mlcm_rl.equations.consistency import squared_l2
from mlcm_rl.equations.prediction import x0_from_prediction
from mlcm_rl.equations.schedule import add_noise
from mlcm_rl.equations.solver import ddim_step, guided
from mlcm_rl.models import students
from mlcm_rl.models.base import Base
from mlcm_rl.recipe import Full, Lora

SKIP = 20  # times between the two points of a pair
DECAY = 0.95


class PlainScript:
    """Student, target and optimiser of a plain script."""

    def __init__(self, base: Base, adapter: Lora | Full):
        self.base, self.student = base, students.student(base, adapter, seed=0)
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.parameters = students.trainable_parameters(self.student)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def step(self, images: Tensor, prompts: list[str], draws: torch.Generator) -> None:
        """One optimiser step on `images` (B, 3, H', W') in [0, 1] and their prompts."""
        base, count = self.base, len(images)
        t = torch.randint(SKIP, base.schedule.num_times, (count,), generator=draws).to(base.device)
        r = t - SKIP
        with torch.no_grad():
            conditioning, unconditional = base.encode_prompts(prompts), base.encode_prompts([""] * count)
            x_t = add_noise(base.autoencoder.encode(images), base.noise(draws, count), t, base.schedule)
        x0 = base.x0(self.student, x_t, t, conditioning)
        with torch.no_grad():
            given = base.predict(base.denoiser, x_t, t, conditioning)
            without = base.predict(base.denoiser, x_t, t, unconditional)
            prediction = guided(given, without, base.teacher.guidance_scale)
            teacher_x0 = x0_from_prediction(prediction, x_t, t, base.schedule, base.prediction_type)
            wanted = base.x0(self.target, ddim_step(x_t, teacher_x0, t, r, base.schedule), r, conditioning)
        squared_l2(x0, wanted).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        trained = (value for name, value in self.target.named_parameters() if name in self._names)
        ema_update_(trained, self.parameters, DECAY)

    @property
    def _names(self) -> set[str]:
        return {name for name, value in self.student.named_parameters() if value.requires_grad}
