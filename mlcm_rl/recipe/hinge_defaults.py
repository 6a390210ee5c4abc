"""The hinges on a reward: their default settings, and which settings contradict each other. Imports no torch.

Eq. 11 of TLCM v6 is relu(16 - s) + relu(s') on raw scores of the MPS model: its threshold is on their scale.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .feedback import Feedback

PAPERS_THRESHOLD = 16.0


def settle(stage: "Feedback") -> "Feedback":
    """Return `stage` with the paper's defaults for `mps_hinge`: raw scores, and the threshold of MPS.

    Raise ValueError if a hinge needs a threshold that is not set, or if another shape has one.
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
    elif not normalise and [(reward.name, reward.weight) for reward in stage.objectives] == [("mps", 1.0)]:
        threshold = PAPERS_THRESHOLD
    else:
        scale = "running deviations" if normalise else "the summed reward's own scale"
        raise ValueError(
            f"threshold: set it for mps_hinge, here in {scale}: the paper's {PAPERS_THRESHOLD:g} is of raw scores of "
            "the reward mps alone, at weight 1"
        )
    stage.__dict__.update(normalise=normalise, threshold=threshold)  # it is frozen once it is made
    return stage
