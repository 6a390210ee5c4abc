"""Reward models: what they are, how one is found by its name, how it is built and asked.

A reward model is a class. It is built with `(device, dtype, **settings)` and called with `images` (B, 3, H, W) in
[0, 1] and `prompts`, a list of B texts; it returns (B,) float32, higher is better. Three attributes of the class say
what it can do:

    differentiable   bool: gradients reach the images
    needs_prompt     bool: the score depends on the prompt
    languages        tuple of language codes that its prompts may be in; () where it needs no prompt

and a fourth, `weights`, which it may leave out, names the files that must be fetched first (weights.py). A reward that
not every prompt suits has a method `refuse_prompt(prompt, aspect)` as well, which raises ValueError for one that no
picture of that width / height can be scored for: all prompts are then checked before the first step (prompts.py).

`find` looks in three places: our file `reward_models/<name>.py`, which defines one public class and is imported only
when it is named; such a file in the folder `reward_models` of the working directory; and the entry-point group
`mlcm_rl.reward_models` of other people's distributions. One name in two places is refused.
"""

from .combining import Combined, Member, RunningNormaliser, combine
from .contract import RewardError, RewardModel, refuse_unread, score, score_in_chunks
from .finding import (
    build,
    find,
    found,
    names,
    refuse_settings,
    refuse_without_gradient,
    refuse_without_weights,
    settings_of,
    usable,
    weights_of,
)
from .weights import GivenFile, HubFile, MissingWeights, PipFile, Weights, WeightsError, read_checkpoint

__all__ = [
    "Combined",
    "GivenFile",
    "HubFile",
    "Member",
    "MissingWeights",
    "PipFile",
    "RewardError",
    "RewardModel",
    "RunningNormaliser",
    "Weights",
    "WeightsError",
    "build",
    "combine",
    "find",
    "found",
    "names",
    "read_checkpoint",
    "refuse_settings",
    "refuse_unread",
    "refuse_without_gradient",
    "refuse_without_weights",
    "score",
    "score_in_chunks",
    "settings_of",
    "usable",
    "weights_of",
]
