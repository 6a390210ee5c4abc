"""The judge of scenes: it reads concept and style of every cell, or that it is empty, and the background colour.

It is for measurement and never trained against. A cell that shows something else is "unknown": such a picture is wrong
whatever was asked. Letters: B pictures.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.prompts import Prompt
from ..data.scenes import (
    BACKGROUNDS,
    CANVAS,
    NUM_CELLS,
    QUESTIONS,
    RELATIONS,
    STYLES,
    Reading,
    Request,
    answers,
    border_of,
    cells_of,
    palette,
    read_code,
)
from ..storage.files import CheckpointError, read_json
from ..storage.tensors import load_weights, read_tensors
from ..storage.untrusted import brief
from .judge import PictureEncoder

KIND = "scenes"  # in a judge's config.json
UNKNOWN = "unknown"
VERDICTS = ("all", *QUESTIONS)


class SceneJudge(nn.Module):
    """Reads pictures of scenes (B, 3, 128, 128) in [0, 1]; its head has an output a concept, "empty" and "unknown",
    and an output a style."""

    def __init__(self, concepts: Sequence[str]) -> None:
        super().__init__()
        self.concepts = list(concepts)
        self.encoder = PictureEncoder(len(concepts) + 2 + len(STYLES))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Reading]:
        """Return what is seen on each picture. Raise ValueError for pictures of another size."""
        if images.shape[1:] != (3, CANVAS, CANVAS):
            raise ValueError(
                f"the judge of scenes reads pictures (B, 3, {CANVAS}, {CANVAS}), not {tuple(images.shape)}"
            )
        logits = self.encoder.head(self.encoder.tapped(cells_of(images.float())))
        classes, styles = logits.split([len(self.concepts) + 2, len(STYLES)], dim=1)
        seen = [
            None if c == len(self.concepts) else ((*self.concepts, None, UNKNOWN)[c], STYLES[s])
            for c, s in zip(classes.argmax(1).tolist(), styles.argmax(1).tolist(), strict=True)
        ]
        cells = [tuple(seen[i : i + NUM_CELLS]) for i in range(0, len(seen), NUM_CELLS)]
        return [Reading(c, b) for c, b in zip(cells, read_backgrounds(images), strict=True)]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return unit features (B, TAPPED_WIDTH) of `images`: what its trunk sees, mean over the cells."""
        return F.normalize(self.encoder.tapped(cells_of(images.float())).unflatten(0, (-1, NUM_CELLS)).mean(1), dim=-1)

    @torch.no_grad()
    def patch_features(self, patches: Tensor) -> Tensor:
        """Return unit features (B, TAPPED_WIDTH) of crops (B, 3, s, s) of any size, which the trunk sees enlarged."""
        return F.normalize(self.encoder.tapped(patches.float()), dim=-1)

    def verdicts(self, images: Tensor, requests: Sequence[Request | None]) -> Tensor:
        """Return 1 where a picture is right and 0 where it is not, (B, len(VERDICTS)) float32 on the CPU.

        It is NaN for a question that the request leaves open, and for all of a prompt without a request.
        """
        rows = []
        for request, reading in zip(requests, self.read(images), strict=True):
            asked = ["all", *request.questions] if request else []
            right = answers(request, reading) if request else {}
            rows.append([float(right[name]) if name in asked else math.nan for name in VERDICTS])
        return torch.tensor(rows)


def read_backgrounds(images: Tensor) -> list[str]:
    """Return the name of the background nearest to the median colour of the border where no object stands."""
    colours = border_of(images).median(-1).values.float()
    return [list(BACKGROUNDS)[i] for i in torch.cdist(colours, palette(images.device)).argmin(1).tolist()]


def is_scene_judge(folder: Path) -> bool:
    """Return whether the judge in `folder` reads scenes. Raise CheckpointError if it has no `config.json`."""
    return read_json(folder / "config.json").get("kind") == KIND


def load(folder: Path, device: torch.device | str = "cpu") -> SceneJudge:
    """Return the judge in `folder`: `config.json` and `judge.safetensors`, half precision.

    Raise CheckpointError if a file is missing or is not a judge's.
    """
    config = read_json(folder / "config.json", kind=str, concepts=list, styles=list)
    concepts = config["concepts"]
    if not all(isinstance(concept, str) for concept in concepts) or len(set(concepts)) < len(concepts):
        raise CheckpointError(f"{folder / 'config.json'}: concepts must be different texts, are {brief(concepts)}")
    if config["styles"] != list(STYLES):
        raise CheckpointError(f"{folder / 'config.json'}: styles are {brief(config['styles'])}, not {list(STYLES)}")
    with torch.device("meta"):  # the width comes from an unverified file: nothing is allocated for it
        judge = SceneJudge(concepts)
    weights = {name: value.float() for name, value in read_tensors(folder / "judge.safetensors").items()}
    load_weights(judge.encoder, weights, folder / "judge.safetensors")
    return judge.to(device)


def request_of(prompt: Prompt) -> Request | None:
    """Return what `prompt` asks for, None without a concept. Raise ValueError for one that is no request's code."""
    return None if prompt.concept is None else read_code(prompt.concept)


def requests_of(prompts: Sequence[Prompt], concepts: Sequence[str], path: str) -> list[Request | None]:
    """Return what each of `prompts`, of the file `path`, asks for; None for one without a concept.

    Raise ValueError for a concept that is no request's code, or names what the judge does not know.
    """
    requests = []
    for prompt in prompts:
        try:
            request = request_of(prompt)
        except ValueError as error:
            raise ValueError(f"{path}: the judge of scenes reads requests, and {error}") from error
        unknown = sorted(set(request.concepts) - set(concepts)) if request else []
        if unknown:
            raise ValueError(f"{path}: the judge of scenes does not know {brief(unknown[0])} of {prompt.concept!r}")
        requests.append(request)
    return requests


def metrics(verdicts: Tensor, requests: Sequence[Request | None]) -> dict[str, Tensor]:
    """Return the share of right pictures (P,) by key, of `verdicts` (P, I, len(VERDICTS)) and the P prompts' requests.

    `right@all` and `right@<question>` are NaN for a prompt that does not ask it, `right@in_<relation>` is `right@all`
    of the prompts of one relation.
    """
    shares = verdicts.mean(1)
    values = {f"right@{name}": shares[:, i] for i, name in enumerate(VERDICTS)}
    for relation in RELATIONS:
        has_it = torch.tensor([request is not None and request.relation == relation for request in requests])
        values[f"right@in_{relation}"] = torch.where(has_it, shares[:, 0], math.nan)
    return values
