"""Pictures for the trackers of a run: each has its own type of picture."""

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

MAX_SIDE = 2048  # pixels of a picture that is sent; the file beside it is whole


def log_picture(tracker: GeneralTracker, name: str, picture: Image.Image, step: int) -> None:
    """Send `picture` as `name` after `step` steps to one of accelerate's trackers: TensorBoard, wandb or trackio."""
    small = picture.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(small)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({name: [small]}, step=step)
    else:  # accelerate's tracker has no pictures of its own
        import trackio

        tracker.log({name: trackio.Image(np.asarray(small))}, step=step)
