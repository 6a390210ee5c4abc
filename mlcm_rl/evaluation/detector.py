"""GenEval's accuracy by an object detector from a local folder, and by a CLIP for the colours.

GenEval itself looks with Mask2Former and blanks what is outside of an object's mask before its colour is read; a
detector of boxes has no masks, so figures compare between rows, not with published ones. Letters: B pictures, P
prompts, I pictures of each, O objects.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

from ..data.geneval import (
    COLOURS,
    COUNTING,
    OPEN_VOCABULARY,
    Box,
    Detection,
    Task,
    refuse_colours,
    refuse_detector,
)
from ..models.pictures import to_pil
from .local_networks import load_network, load_part
from .metrics import ClipScore

GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # of COCO's classes
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class Detector:
    """An object detector in transformers' format.

    One of a closed vocabulary knows the classes of its configuration, COCO's for those that are published; one of an
    open vocabulary looks for `names`.
    """

    def __init__(self, folder: Path | str, names: set[str], device: torch.device | str):
        kind = load_part(AutoConfig, folder, "detector").model_type
        refuse_detector(kind, folder)
        self.is_open, self.names = kind in OPEN_VOCABULARY, sorted(names)
        model = AutoModelForZeroShotObjectDetection if self.is_open else AutoModelForObjectDetection
        self.model = load_network(model, folder, "detector").to(device).eval().requires_grad_(False)
        processor = AutoProcessor if self.is_open else AutoImageProcessor
        self.processor: Any = load_part(processor, folder, "detector", backend="pil")
        if not self.is_open:
            labels = {int(place): name for place, name in self.model.config.id2label.items()}
            self.labels = {place: GENEVAL_NAMES.get(name, name) for place, name in labels.items()}
            if unknown := sorted(names - set(self.labels.values())):
                raise ValueError(f"detector: {folder} does not know {len(unknown)} classes, for example {unknown[0]!r}")

    @torch.no_grad()
    def detect(self, images: Tensor, confidence: float) -> list[list[Detection]]:
        """Return what is seen above `confidence` on each of `images` (B, 3, H, W) in [0, 1]."""
        pictures, sizes = [to_pil(image) for image in images], [tuple(images.shape[-2:])] * len(images)
        texts = {"text": [self.names] * len(images)} if self.is_open else {}
        inputs = self.processor(images=pictures, return_tensors="pt", **texts).to(self.model.device)
        outputs = self.model(**inputs)
        if self.is_open:
            found = self.processor.post_process_grounded_object_detection(outputs, confidence, sizes)
            labels = dict(enumerate(self.names))
        else:
            found = self.processor.post_process_object_detection(outputs, confidence, sizes)
            labels = self.labels
        return [
            [
                Detection(labels[label], score, tuple(box))
                for label, score, box in zip(*(one[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
            ]
            for one in found
        ]


class GenEval:
    """Says of each picture whether it is as its prompt's task asks.

    `confidences` are those above which an object is seen, and above which one is counted. Raise ValueError for colours
    without a `clip`.
    """

    def __init__(
        self, detector: Detector, clip: ClipScore | None, tasks: list[Task], confidences: tuple[float, float], path: str
    ):
        if clip is None:
            refuse_colours(tasks, path)
        self.detector, self.clip, self.tasks, self.confidences = detector, clip, tasks, confidences
        self._colours: dict[str, Tensor] = {}  # name of a class -> text features of its ten colours

    def read(self, images: Tensor, places: list[int]) -> Tensor:
        """Return 1 for a right picture and 0 for a wrong one (B,) float32, for `images` (B, 3, H, W) in [0, 1].

        `places` are their prompts' among all P.
        """
        seen, counted = self.confidences
        verdicts = []
        detections = self.detector.detect(images, min(self.confidences))
        for image, place, objects in zip(images, places, detections, strict=True):
            task = self.tasks[place]
            confidence = counted if task.tag == COUNTING else seen
            verdicts.append(task.is_right(objects, confidence, partial(self.colours_of, image)))
        return torch.tensor(verdicts).float()

    @torch.no_grad()
    def colours_of(self, image: Tensor, name: str, boxes: list[Box]) -> list[str]:
        """Return which of COLOURS each box (O) of a class has on `image` (3, H, W), by the nearest text."""
        assert self.clip is not None, "checked when it was made"
        if name not in self._colours:
            self._colours[name] = torch.stack([self._text_of(colour, name) for colour in COLOURS])
        crops = self.clip.image_features([crop(image, box)[None] for box in boxes])
        return [COLOURS[place] for place in (crops @ self._colours[name].T).argmax(1).tolist()]

    def _text_of(self, colour: str, name: str) -> Tensor:
        """Return unit features (D,) of a colour of a class: the mean over TEMPLATES."""
        assert self.clip is not None, "checked when it was made"
        texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
        return F.normalize(self.clip.text_features(texts).mean(0), dim=0)

    def metrics(self, right: Tensor) -> dict[str, Tensor]:
        """Return accuracies (P,) by key, of `right` (P, I): `geneval@<tag>` of each task, NaN for the others' prompts.

        The mean of `geneval` is GenEval's own score, the mean over tasks of the shares of right pictures: a prompt's
        share is weighted so that each task weighs the same.
        """
        shares, tags = right.mean(1), [task.tag for task in self.tasks]
        names = list(dict.fromkeys(tags))
        weights = torch.tensor([len(tags) / (len(names) * tags.count(tag)) for tag in tags])
        values = {"geneval": shares * weights}
        for name in names:
            has_it = torch.tensor([tag == name for tag in tags])
            values[f"geneval@{name}"] = torch.where(has_it, shares, math.nan)
        return values


def crop(image: Tensor, box: Box) -> Tensor:
    """Return the part of `image` (3, H, W) in a box, in whole pixels, at least one."""
    height, width = image.shape[-2:]
    left, top = (min(max(round(side), 0), size - 1) for side, size in zip(box[:2], (width, height), strict=True))
    right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
    return image[:, top:bottom, left:right]
