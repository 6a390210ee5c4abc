"""Parts of training a reward's head on frozen features: their scale, dropout, held-out pairs.

Letters: N samples, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.prompts import Prompt
from ..equations.statistics import wins
from ..storage.untrusted import brief
from ..training.seeding import generator

CONTRARY = 0.05  # assumed share of wrong judgements; it bounds the scores


@dataclass(frozen=True)
class FeatureScale:
    """Normalises features for training; `fold_into` merges the normalisation into the trained head."""

    mean: Tensor  # (D,)
    deviation: Tensor  # (), one for all features, so that their proportions stay

    @classmethod
    def of(cls, features: Tensor) -> "FeatureScale":
        """Return the scale of `features` (..., D)."""
        mean = features.flatten(0, -2).mean(0)
        return cls(mean, (features - mean).square().mean().sqrt())

    def __call__(self, features: Tensor) -> Tensor:
        """Return (features - mean) / deviation (..., D)."""
        return (features - self.mean) / self.deviation

    @torch.no_grad()
    def fold_into(self, first: nn.Linear) -> None:
        """Change `first`, a head's first layer trained on scaled features, in place, to take unscaled ones.

        W ((x - mean) / deviation) + b = (W / deviation) x + (b - (W / deviation) mean).
        """
        first.weight /= self.deviation
        first.bias.sub_(first.weight @ self.mean)


def dropout(features: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return `features` (..., D) with a `share` of them set to 0 and the others divided by 1 - share."""
    mask = torch.rand(features.shape, generator=generator).to(features.device) >= share
    return features * mask / (1 - share)


def held_out_pairs(prompts: list[Prompt], share: float, seed: int) -> Tensor:
    """Return which pairs (N,) bool are held out: those of a `share` of the distinct prompts, at least one.

    All pairs of a prompt are on one side, so that the held-out accuracy is on concepts that were not trained on. Raise
    ValueError if all pairs have one prompt.
    """
    texts = sorted({prompt.prompt for prompt in prompts})
    if len(texts) < 2:
        raise ValueError(
            f"all pairs are of one prompt, {brief(texts[0])}; held-out pairs have other prompts than those "
            "trained on, so there must be two prompts or more"
        )
    count = min(max(1, round(share * len(texts))), len(texts) - 1)
    order = torch.randperm(len(texts), generator=generator(seed, "train_reward", "held_out")).tolist()
    held_out = {texts[i] for i in order[:count]}
    return torch.tensor([prompt.prompt in held_out for prompt in prompts])


def is_correct(scores: Tensor) -> Tensor:
    """Return (N,) for scores (N, 2): 1 if the chosen picture scores higher, 0 if lower, 0.5 for a tie."""
    return wins(scores[:, 0], scores[:, 1])
