"""Networks that are trained beside the student, each by an optimiser of its own: a fake score, an adversary's heads."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..recipe import Training
from . import states
from .engines import Whole, trained_of


class Beside:
    """A network trained beside the student of `stage`: under every launch file each process holds it whole.

    `name` is its own in checkpoints and messages. The rate is constant; betas, weight decay and the gradient's largest
    norm are the stage's. Several processes average its gradients.
    """

    def __init__(self, name: str, network: nn.Module, learning_rate: float, stage: Training):
        self.name = name
        parameters = list(trained_of(network).values())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=learning_rate, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.engine = Whole(network, self.optimizer, stage)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of its trained weights, by name."""
        return self.engine.shapes

    def tensors(self) -> dict[str, Tensor]:
        """Return its trained weights and its optimiser's state, under `name` and `name_optimizer`."""
        moments = {name.removeprefix("optimizer."): value for name, value in self.engine.moments().items()}
        weights = states.add_prefix(self.name, self.engine.full())
        return weights | states.add_prefix(f"{self.name}_optimizer", moments)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `tensors` returned. Raise ValueError if the state is of another network's optimiser, or missing."""
        self.engine.fill(states.under_prefix(self.name, tensors))
        moments = states.under_prefix(f"{self.name}_optimizer", tensors)
        if not moments:
            raise ValueError(f"it has no state of the optimiser of {self.name}")
        self.engine.fill_moments(states.add_prefix("optimizer", dict(moments)))
