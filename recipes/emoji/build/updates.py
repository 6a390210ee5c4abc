"""How every training of this folder takes its steps, and how it says where it stands."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Updates:
    """AdamW whose rate rises over the first tenth of the steps to `learning_rate` and falls over the rest."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        num_steps: int,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
    ) -> None:
        self.parameters, self.max_norm = list(parameters), max_norm
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, betas, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, total_steps=num_steps, pct_start=0.1
        )

    def take(self, loss: Tensor) -> None:
        """Take one step down `loss`, a scalar, its gradient clipped to a norm of `max_norm` where there is one."""
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.schedule.step()


def say_every(interval: int, num_steps: int) -> Callable[[int, float], None]:
    """Return a function of (step, loss) that prints, at every `interval`-th step, how long the rest will take."""
    started = time.time()

    def say(step: int, loss: float) -> None:
        if step % interval == 0:
            seconds = time.time() - started
            left = seconds / step * (num_steps - step)
            print(f"step {step}/{num_steps} loss {loss:.4f} {seconds:.0f} s, {left:.0f} s left", flush=True)

    return say
