"""Reward models: their contract, and how they are found by name, built and called.

A reward model is a class. It is built with `(device, dtype, **settings)` and called with `images` (B, 3, H, W) in
[0, 1] and `prompts`, a list of B texts; it returns (B,) float32, higher is better. Three attributes of the class
declare what it can do:

    differentiable   bool: gradients reach the images
    needs_prompt     bool: the score depends on the prompt
    languages        tuple of language codes that its prompts may be in; () if it needs no prompt

A fourth, optional one, `weights`, names the files that must be fetched first (weights.py). A reward that cannot score
every prompt also has a method `refuse_prompt(prompt, aspect)`, which raises ValueError for a prompt that it cannot
score in a picture of that width / height: all prompts are then checked before the first step (prompts.py).

`find` looks in three places: this package's file `reward_models/<name>.py`, which defines one public class and is
imported only by its name; such a file in the folder `reward_models` of the working directory; and the entry-point group
`mlcm_rl.reward_models` of other distributions. A name in two places is refused.
"""

from .combining import Combined, Member, RunningNormaliser, combine
from .contract import RewardError, RewardModel, refuse_unread, score, score_in_chunks
from .finding import (
    build,
    checked_class,
    class_of,
    find,
    refuse_settings,
    refuse_without_gradient,
    refuse_without_weights,
    settings_of,
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
    "checked_class",
    "class_of",
    "combine",
    "find",
    "read_checkpoint",
    "refuse_settings",
    "refuse_unread",
    "refuse_without_gradient",
    "refuse_without_weights",
    "score",
    "score_in_chunks",
    "settings_of",
    "weights_of",
]
