"""What training a reward's head on frozen features takes: their scale, dropout, which pairs are held out.

N samples, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.prompts import Prompt
from ..storage.untrusted import brief
from ..training.seeding import generator

CONTRARY = 0.05  # share of judgements that are taken to be wrong: bounds the scores


@dataclass(frozen=True)
class FeatureScale:
    """Puts features on a scale that trains well, and takes itself away again when the head is finished."""

    mean: Tensor  # (D,)
    deviation: Tensor  # (), over all features: their proportions stay

    @classmethod
    def of(cls, features: Tensor) -> "FeatureScale":
        """The scale of `features` (..., D)."""
        mean = features.flatten(0, -2).mean(0)
        return cls(mean, (features - mean).square().mean().sqrt())

    def __call__(self, features: Tensor) -> Tensor:
        """(features - mean) / deviation (..., D)."""
        return (features - self.mean) / self.deviation

    @torch.no_grad()
    def fold_into(self, first: nn.Linear) -> None:
        """Make a head whose layer `first` was trained on scaled features take them as they are, in place."""
        first.weight /= self.deviation
        first.bias.sub_(first.weight @ self.mean)


def dropped(features: Tensor, share: float, draws: torch.Generator) -> Tensor:
    """`features` (..., D) with a `share` of them at 0 and the others larger by as much, drawn from `draws`."""
    kept = torch.rand(features.shape, generator=draws).to(features.device) >= share
    return features * kept / (1 - share)


def held_out_pairs(prompts: list[Prompt], share: float, seed: int) -> Tensor:
    """Which of the pairs (N,) bool are held out: those of a `share` of their N prompts, one prompt at least.

    Whole prompts, so that no picture of a concept that was trained on answers for one that was not.
    Raises ValueError where all pairs have one prompt.
    """
    texts = sorted({prompt.prompt for prompt in prompts})
    if len(texts) < 2:
        raise ValueError(
            f"all pairs are of one prompt, {brief(texts[0])}; those held out are of other prompts than those "
            "trained on, so there must be two prompts or more"
        )
    count = min(max(1, round(share * len(texts))), len(texts) - 1)
    order = torch.randperm(len(texts), generator=generator(seed, "train_reward", "held_out")).tolist()
    chosen = {texts[i] for i in order[:count]}
    return torch.tensor([prompt.prompt in chosen for prompt in prompts])


def right_way(scores: Tensor) -> Tensor:
    """(N,) of scores (N, 2): 1 where the chosen picture scores higher, 0 where the rejected one does, 0.5 for a tie."""
    return torch.heaviside(scores[:, 0] - scores[:, 1], scores.new_tensor(0.5))
