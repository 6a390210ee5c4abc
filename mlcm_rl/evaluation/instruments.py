"""What an evaluation measures pictures with: a judge, rewards, a CLIP, an Inception beside real pictures.

They read batch by batch, so that no picture is kept for them; what a row's readings come to is said at its end.
Letters: B pictures, P prompts, I pictures of each, N = P I, D features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import rewards
from ..data.picture_files import pictures_of, read_picture, square
from ..data.prompts import Prompt
from ..recipe import Evaluate
from ..rewards.prompts import refuse_prompts
from ..storage.hashing import sha256
from ..storage.untrusted import Faults, brief
from . import inception, metrics
from . import judge as judges

NUM_SUBSETS = 10  # of the prompts, for the standard error of KID


@dataclass(frozen=True)
class Instruments:
    """All that a recipe asks for; what it does not name is None or empty."""

    judge: judges.Judge | None
    concepts: Tensor  # (P,) index among the judge's concepts, -1 where there is none
    inception: metrics.InceptionDistances | None
    clip: metrics.ClipScore | None
    rewards: dict[str, rewards.Member]
    networks: dict[str, dict[str, Any]]  # which files measured, for the report

    def read(self, images: Tensor, prompts: list[Prompt]) -> dict[str, Tensor]:
        """Readings of `images` (B, 3, H, W) in [0, 1]: features (B, D) and scores (B,), on the CPU.

        A reward of a prompt in a language that it does not read is nan.
        """
        readings = {}
        if self.judge is not None:
            readings["judge"] = self.judge.features(images).cpu()
        if self.inception is not None:
            readings["inception"] = self.inception.features(images)
        if self.clip is not None:
            readings["clip"] = self.clip(images, [prompt.prompt for prompt in prompts]).cpu()
        for name, reward in self.rewards.items():
            readings[f"reward/{name}"] = score(reward, images, prompts)
        return readings

    def values(self, readings: dict[str, Tensor], images_per_prompt: int) -> dict[str, Tensor]:
        """One value a prompt (P,) of every metric, by its key; of KID one a subset of the prompts, of FID one.

        `readings` are those of a whole row (N, ...), prompt by prompt.
        """
        by_prompt = {name: reading.unflatten(0, (-1, images_per_prompt)) for name, reading in readings.items()}
        num_subsets = max(1, min(NUM_SUBSETS, len(self.concepts) // 2))
        values: dict[str, Tensor] = {}
        if self.judge is not None:
            values |= self._judged(self.judge, by_prompt["judge"], num_subsets)
        if self.inception is not None:
            values |= self.inception.values(by_prompt["inception"], num_subsets)
        return values | {name: by_prompt[name].mean(1) for name in readings if name not in ("judge", "inception")}

    def _judged(self, judge: judges.Judge, features: Tensor, num_subsets: int) -> dict[str, Tensor]:
        """KID, retrieval and diversity by the `judge` and its `features` (P, I, D)."""
        images_per_prompt = features.shape[1]
        values = {"kid": metrics.kid(features, judge.reference_features.cpu(), num_subsets, gamma=1.0)}
        concepts = self.concepts.repeat_interleave(images_per_prompt).clamp(min=0)
        rank = metrics.ranks(features.flatten(0, 1), judge.prototypes.cpu(), concepts)
        for k in (1, 5):
            hits = metrics.recall(rank, k).unflatten(0, (-1, images_per_prompt)).mean(1)
            values[f"r@{k}"] = torch.where(self.concepts >= 0, hits, math.nan)
        if images_per_prompt > 1:
            values["diversity"] = metrics.diversity(features)
        return values


def load(stage: Evaluate, prompts: list[Prompt], resolution: int, device: torch.device) -> Instruments:
    """What `stage` names, on `device`; `prompts` are those of the evaluation, `resolution` is of its pictures.

    Raises ValueError for prompts that the judge does not have or a reward cannot score, and for a folder without real
    pictures.
    """
    found = judges.load(Path(stage.judge), device) if stage.judge else None
    concepts = concept_indices(prompts, found.concepts if found else [], stage.prompts)
    distances, clip, networks = None, None, {}
    if stage.inception is not None and stage.real_images is not None:
        real = real_pictures(Path(stage.real_images), resolution, stage.batch_size)
        distances = metrics.InceptionDistances(inception.load(stage.inception, device), real, device)
        networks["inception"] = files_of(Path(stage.inception)) | {"num_real_images": len(distances.real)}
    if stage.clip is not None:
        clip = metrics.ClipScore(stage.clip, device)
        networks["clip"] = files_of(*sorted(Path(stage.clip).glob("*.safetensors")))
    asked = [(one, rewards.build(one, device)) for one in stage.reward_models]
    for one, model in asked:
        refuse_prompts(model, one.name, prompts, stage.prompts, may_skip=True)
    members = {one.name: rewards.Member(one.name, model, chunk_size=one.chunk_size) for one, model in asked}
    return Instruments(found, concepts, distances, clip, members, networks)


def files_of(*weights: Path) -> dict[str, Any]:
    """What the report says of a network: which files it was read from."""
    return {"files": {path.name: sha256(path) for path in weights}}


def concept_indices(prompts: list[Prompt], concepts: list[str], path: str) -> Tensor:
    """Index (P,) of each prompt's concept in `concepts`, -1 for a prompt without one, or for all without `concepts`.

    Raises ValueError for a concept that is not there: the prompts are not the judge's.
    """
    places: dict[str | None, int] = {concept: i for i, concept in enumerate(concepts)}
    unknown = sorted({prompt.concept for prompt in prompts if prompt.concept is not None} - set(places))
    if concepts and unknown:
        raise ValueError(
            f"{path}: the judge has no prototype of {len(unknown)} concepts, for example {brief(unknown[0])}"
        )
    return torch.tensor([places.get(prompt.concept, -1) for prompt in prompts])


def score(reward: rewards.Member, images: Tensor, prompts: list[Prompt]) -> Tensor:
    """`reward` of each picture (B,), nan where the prompt is in a language that it does not read."""
    model = reward.model
    read = torch.tensor([not model.needs_prompt or prompt.language in model.languages for prompt in prompts])
    scores = torch.full((len(prompts),), math.nan)
    if read.any():
        texts = [prompt.prompt for prompt, readable in zip(prompts, read, strict=True) if readable]
        chosen = images[read.to(images.device)]
        scores[read] = rewards.score_in_chunks(model, reward.name, chosen, texts, reward.chunk_size).cpu()
    return scores


def real_pictures(folder: Path, side: int, batch_size: int) -> Iterator[Tensor]:
    """The pictures in `folder`, by name, in batches (B, 3, side, side) uint8: central squares, resized (Lanczos).

    So they meet the drawn ones at one size. Raises FileNotFoundError for a folder without two pictures, and ValueError
    after the last that names those that cannot be read.
    """
    paths, faults = pictures_of(folder), Faults()
    if len(paths) < 2:
        raise FileNotFoundError(f"real_images: {folder} holds {len(paths)} pictures; FID and KID need two or more")
    for first in range(0, len(paths), batch_size):
        batch = []
        for path in paths[first : first + batch_size]:
            with faults.collect():
                batch.append(square(read_picture(path, f"real_images: {path}"), side))
        if not faults.texts:
            yield torch.stack(batch)
    faults.raise_all()
