"""The instruments of an evaluation: a judge, rewards, CLIPScore, and an Inception with real pictures.

They read pictures batch by batch, so that none has to be kept; metrics are computed from a row's readings at its end.
Letters: B pictures, P prompts, I pictures of each, N = P I, D features.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import rewards
from ..data import geneval
from ..data.picture_files import pictures_of, read_picture, square
from ..data.prompts import Prompt
from ..data.scenes import CANVAS, Request
from ..recipe import Evaluate
from ..rewards import contract
from ..rewards.prompts import refuse_prompts
from ..storage.hashing import sha256
from ..storage.untrusted import Faults, brief
from . import detector, distribution, inception, metrics, scene_judge
from . import judge as judges

# readings that are no metric themselves
OTHERS = ("judge", "right", "scene", "inception", "geneval", distribution.PATCH)
NUM_SUBSETS = 10  # parts of the prompts, for the standard error of KID


@dataclass(frozen=True)
class Instruments:
    """The instruments of a recipe; those that it does not name are None or empty."""

    judge: judges.Judge | None
    concepts: Tensor  # (P,) index among the judge's concepts, -1 where there is none
    scene_judge: scene_judge.SceneJudge | None
    requests: list[Request | None]  # (P,) what each prompt asks that judge; empty without it
    inception: metrics.InceptionDistances | None
    distribution: distribution.Distribution | None  # to the reference's pictures
    clip: metrics.ClipScore | None
    geneval: detector.GenEval | None
    rewards: dict[str, rewards.Member]
    networks: dict[str, dict[str, Any]]  # the files of each network, for the report
    seed: int  # of the places of patches

    def read(self, images: Tensor, prompts: list[Prompt], samples: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return readings of `images` (B, 3, H, W) in [0, 1]: features (B, D), verdicts (B, V) and scores (B,).

        `prompts` are theirs, and `samples` (B,) the places of these among all P with the picture of each. Readings are
        on the CPU. A reward's score is NaN for a prompt in a language that it does not read.
        """
        readings = {}
        if self.judge is not None:
            readings["judge"] = self.judge.features(images).cpu()
        if self.scene_judge is not None:
            readings["right"] = self.scene_judge.verdicts(images, [self.requests[i] for i, _ in samples])
            if self.distribution is not None:
                readings["scene"] = self.scene_judge.features(images).cpu()
        if self.inception is not None:
            readings["inception"] = self.inception.features(images)
        if self.distribution is not None:
            crops = distribution.patches(images, self.seed, samples)
            readings[distribution.PATCH] = self.distribution.of_patches(crops).cpu()
        if self.clip is not None:
            readings["clip"] = self.clip(images, [prompt.prompt for prompt in prompts]).cpu()
        if self.geneval is not None:
            readings["geneval"] = self.geneval.read(images, [i for i, _ in samples])
        for name, reward in self.rewards.items():
            readings[f"reward/{name}"] = score(reward, images, prompts)
        return readings

    def values(
        self, readings: dict[str, Tensor], reference: dict[str, Tensor], images_per_prompt: int
    ) -> dict[str, Tensor]:
        """Return every metric by its key: one value per prompt (P,), some per subset of the prompts, one for FID.

        `readings` are those of a complete row (N, ...), prompt by prompt, and `reference` those of the reference that
        `distribution` compares with.
        """
        by_prompt = {name: reading.unflatten(0, (-1, images_per_prompt)) for name, reading in readings.items()}
        num_subsets = max(1, min(NUM_SUBSETS, len(self.concepts) // 2))
        values: dict[str, Tensor] = {}
        if self.judge is not None:
            values |= self._judge_metrics(self.judge, by_prompt["judge"], num_subsets)
        if self.scene_judge is not None:
            values |= scene_judge.metrics(by_prompt["right"], self.requests)
        if self.inception is not None:
            values |= self.inception.values(by_prompt["inception"], num_subsets)
        if self.distribution is not None:
            others = {name: reading.unflatten(0, (-1, images_per_prompt)) for name, reading in reference.items()}
            values |= self.distribution.values(by_prompt, others)
            if images_per_prompt > 1:
                values["diversity"] = metrics.diversity(by_prompt[self.distribution.reading])
        if self.geneval is not None:
            values |= self.geneval.metrics(by_prompt["geneval"])
        return values | {name: by_prompt[name].mean(1) for name in readings if name not in OTHERS}

    def _judge_metrics(self, judge: judges.Judge, features: Tensor, num_subsets: int) -> dict[str, Tensor]:
        """Return KID, retrieval and diversity of the `features` (P, I, D) of the `judge`."""
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


def load(stage: Evaluate, prompts: list[Prompt], resolution: int, device: torch.device, seed: int) -> Instruments:
    """Load the instruments of `stage` on `device`, for its `prompts` and pictures of `resolution`.

    Patches stand where `seed` puts them.
    Raise ValueError for prompts or a resolution that the judge does not have or a reward cannot score, and
    FileNotFoundError for a folder without real pictures.
    """
    judge, reader, requests = None, None, list[Request | None]()
    if stage.judge and scene_judge.is_scene_judge(Path(stage.judge)):
        refuse_size(stage.judge, CANVAS, resolution)
        reader = scene_judge.load(Path(stage.judge), device)
        requests = scene_judge.requests_of(prompts, reader.concepts, stage.prompts)
    elif stage.judge:
        judge = judges.load(Path(stage.judge), device)
        refuse_size(stage.judge, judge.picture_size, resolution)
    concepts = concept_indices(prompts, judge.concepts if judge else [], stage.prompts)
    distances, clip, networks = None, None, {}
    if stage.inception is not None:
        real = real_pictures(Path(stage.real_images), resolution, stage.batch_size) if stage.real_images else iter(())
        distances = metrics.InceptionDistances(inception.load(stage.inception, device), real, device)
        networks["inception"] = files_of(Path(stage.inception))
        if stage.real_images is not None:
            networks["inception"]["num_real_images"] = len(distances.real)
    if stage.clip is not None:
        clip = metrics.ClipScore(stage.clip, device)
        networks["clip"] = files_of(*sorted(Path(stage.clip).glob("*.safetensors")))
    accuracy = None
    if stage.detector is not None:
        tasks = geneval.read_tasks(stage.prompts, len(prompts))
        finder = detector.Detector(stage.detector, {name for task in tasks for name in task.names}, device)
        accuracy = detector.GenEval(finder, clip, tasks, stage.confidences, stage.prompts)
        networks["detector"] = files_of(*sorted(Path(stage.detector).glob("*.safetensors")))
    members = {}
    for reward in stage.reward_models:
        model = rewards.build(reward, device)
        members[reward.name] = rewards.Member(reward.name, model, chunk_size=reward.chunk_size)
    for name, member in members.items():
        refuse_prompts(member.model, name, prompts, stage.prompts, may_skip=True)
    sees = to_teacher_by(judge, reader, distances) if stage.distribution else None
    return Instruments(judge, concepts, reader, requests, distances, sees, clip, accuracy, members, networks, seed)


def refuse_size(judge: str, side: int, resolution: int) -> None:
    """Raise ValueError unless the pictures that a `judge` reads, `side` pixels a side, are those of the teacher."""
    if resolution != side:
        raise ValueError(
            f"judge: {judge} reads pictures of {side} pixels a side, and the teacher's have {resolution}: name a judge "
            "of such pictures, or leave it out"
        )


def to_teacher_by(
    judge: judges.Judge | None,
    reader: scene_judge.SceneJudge | None,
    distances: metrics.InceptionDistances | None,
) -> distribution.Distribution:
    """Return what sees pictures and patches beside the teacher's: the subject's own judge before Inception.

    A judge's features have unit length, for which gamma 1 is the kernel on features of unit mean square.
    """
    if judge is not None:
        return distribution.Distribution("judge", judge.patch_features, gamma=1.0)
    if reader is not None:
        return distribution.Distribution("scene", reader.patch_features, gamma=1.0)
    assert distances is not None, "the recipe's check"
    return distribution.Distribution("inception", distances.features, gamma=None)


def files_of(*weights: Path) -> dict[str, Any]:
    """Return a report's entry of a network: the names and hashes of its files."""
    return {"files": {path.name: sha256(path) for path in weights}}


def concept_indices(prompts: list[Prompt], concepts: list[str], path: str) -> Tensor:
    """Return the index (P,) of each prompt's concept in `concepts`; -1 for a prompt without one, or without `concepts`.

    Raise ValueError for a concept that is not among them: the prompts are not the judge's.
    """
    places: dict[str | None, int] = {concept: i for i, concept in enumerate(concepts)}
    unknown = sorted({prompt.concept for prompt in prompts if prompt.concept is not None} - set(places))
    if concepts and unknown:
        raise ValueError(
            f"{path}: the judge has no prototype of {len(unknown)} concepts, for example {brief(unknown[0])}"
        )
    return torch.tensor([places.get(prompt.concept, -1) for prompt in prompts])


def score(reward: rewards.Member, images: Tensor, prompts: list[Prompt]) -> Tensor:
    """Return the reward of each picture (B,), NaN if the reward does not read the language of its prompt."""
    model = reward.model
    readable = torch.tensor([contract.reads(model, prompt.language) for prompt in prompts])
    scores = torch.full((len(prompts),), math.nan)
    if readable.any():
        texts = [prompt.prompt for prompt, is_readable in zip(prompts, readable, strict=True) if is_readable]
        pictures = images[readable.to(images.device)]
        scores[readable] = rewards.score_in_chunks(model, reward.name, pictures, texts, reward.chunk_size).cpu()
    return scores


def real_pictures(folder: Path, side: int, batch_size: int) -> Iterator[Tensor]:
    """Yield the pictures in `folder`, by name, in batches (B, 3, side, side) uint8: central squares, resized (Lanczos).

    They then have the size of the sampled ones. Raise FileNotFoundError for a folder of fewer than two pictures, and
    ValueError, after the last picture, with the names of those that cannot be read.
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
