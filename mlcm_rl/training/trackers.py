"""The trackers of a stage: started, given figures and pictures, of which each has its own type, and finished.

A tracker is for looking on: one that raises is reported and left out, and the stage goes on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..storage.untrusted import in_a_line
from .progress import tell

MAX_SIDE = 2048  # pixels of a picture that is sent; the file beside it is whole


def start(accelerator: Accelerator, project: str, config: dict[str, Any], options: Mapping[str, dict]) -> None:
    """Start the trackers of `accelerator` one by one, with the run's `config` and the `options` of each by name."""
    started: list[GeneralTracker] = []
    for one in list(accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [one], []
        try:
            accelerator.init_trackers(project, config, dict(options))
        except (Exception, SystemExit) as error:  # of another package; wandb leaves the process by itself
            _tell_off(str(one), error)
            continue
        started += accelerator.trackers
    accelerator.trackers = started


def for_each(accelerator: Accelerator, action: Callable[[GeneralTracker], object]) -> None:
    """Call `action` with each tracker; one that raises gets nothing more in this stage."""
    for tracker in list(accelerator.trackers):
        try:
            action(tracker)
        except (Exception, SystemExit) as error:  # of another package: no connection, a full disk, its own limits
            accelerator.trackers.remove(tracker)
            _tell_off(tracker.name, error)


def _tell_off(name: str, error: BaseException) -> None:
    """Print that the tracker `name` has failed."""
    message = f"{in_a_line(error)}: it is off for the rest of this stage, which goes on; log.jsonl has the figures"
    tell(f"tracker {name}:", message, "yellow")


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
