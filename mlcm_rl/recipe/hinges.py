"""The hinges on a reward: their settings by default, and those that contradict each other. Imports no torch.

Eq. 11 of TLCM v6 is relu(16 - s) + relu(s') on raw scores of the MPS model: the threshold is on the scale of those.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .preference import Feedback

PAPERS_THRESHOLD = 16.0


def settle(stage: "Feedback") -> "Feedback":
    """Return `stage`, what it does not set of `mps_hinge` as in the paper: raw scores, and its threshold of MPS.

    Raise ValueError where a hinge has no threshold that means something, or another shape has one.
    """
    if stage.shape == "negative" and stage.threshold != 0.0:
        raise ValueError("threshold has no meaning for shape negative: leave it out, or take shape hinge")
    if stage.shape != "mps_hinge":
        return stage
    if stage.batch_size == 1:
        raise ValueError("shape: mps_hinge needs batch_size 2 or more: an irrelevant prompt is another of the step")
    normalise = stage.normalise if "normalise" in stage.model_fields_set else False
    if "threshold" in stage.model_fields_set:
        threshold = stage.threshold
    elif not normalise and [(reward.name, reward.weight) for reward in stage.rewards] == [("mps", 1.0)]:
        threshold = PAPERS_THRESHOLD
    else:
        scale = "running deviations" if normalise else "the summed reward's own scale"
        raise ValueError(
            f"threshold: set it for mps_hinge, here in {scale}: the paper's {PAPERS_THRESHOLD:g} is of raw scores of "
            "the reward mps alone, at weight 1"
        )
    stage.__dict__.update(normalise=normalise, threshold=threshold)  # it is frozen once it is made
    return stage
