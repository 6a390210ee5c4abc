"""What a stage takes, as data: its passes through networks, the networks in memory, the values on disk.

Each stage's type states it once, beside its settings. Evaluations, FLOPs, memory, time and disk are all derived from
that, in `cost` and `pipeline`, which do not distinguish kinds of stages. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from .types import Full, Lora

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a number
SAVED = 12  # bytes in a checkpoint for each trained weight: it and its two moments, in float32
AVERAGED = SAVED + 4  # and its average
Role = Literal["teacher", "student", "target", "reference", "encoder", "lpips", "features", "fake", "heads"]


@dataclass(frozen=True)
class Pass:
    """Passes of one kind through one network.

    role         teacher: guided; student: trained or sampled; target: the student's weights, or their average;
                 reference: the student without its preference adapter; encoder: the autoencoder's, of pictures;
                 lpips, features: the distance of two latents, by its own network or the teacher's first blocks;
                 fake: the score of the student's own samples; heads: the teacher, whose features an adversary reads
    samples      number over the whole stage; 0 if it is small beside the rest and not counted
    evaluations  of the denoiser for each sample; a guided pass of the teacher is two
    batch        samples in memory at a time in one process; 0 if another pass beside it has more
    gradient     whether the graph stays for the backward pass
    is_chained   whether each evaluation starts where the one before ended, as in a sampler
    output       the sample x0, or the network's own prediction
    viewer       of the decoded pictures: no one, a person, the rewards trained on, or ("guard") all rewards
    num_scores   how often each picture is scored in one step, under one prompt or another
    in_step      whether it is part of an optimiser step, under autocast; else it is alone in memory
    beside       whether it trains that network of its role, after the student's update and apart from it
    num_with_keys  of the evaluations of a sample, those that compute the keys and values of its prompt, which the
                 others take from them (`Base.same_prompts`); None: all
    """

    role: Role
    samples: float = 0
    evaluations: float = 1
    batch: int = 0
    gradient: bool = False
    is_chained: bool = False
    output: Literal["x0", "prediction"] = "x0"
    viewer: Literal["", "person", "rewards", "guard"] = ""
    num_scores: int = 1
    in_step: bool = True
    beside: bool = False
    num_with_keys: int | None = None

    @property
    def num_without_keys(self) -> float:
        """The other evaluations of each sample."""
        return 0.0 if self.num_with_keys is None else max(0.0, self.evaluations - self.num_with_keys)


@dataclass(frozen=True)
class TextNetwork:
    """A text adapter that is trained: the folder of its encoder, the width and the number of its blocks."""

    encoder: str
    width: int
    num_layers: int


@dataclass(frozen=True)
class LpipsSizes:
    """The latent LPIPS that a stage trains: the channels of its slices, and their numbers of convolutions."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Networks:
    """The networks that a stage has in memory, beside the activations of its passes.

    student        the student's adapter, or Full for weights of its own; None if only the teacher samples
    is_conditioned whether the student takes its target time
    preference     the adapter over the student that is trained instead of it
    uses_teacher   whether the teacher's denoiser stays in memory
    encodes_ahead  whether text encoders leave memory before the first step
    texts          with it: a prompt file or a folder of captioned pictures; they stay if it has more than `most_texts`
    most_texts     different ones
    has_average    whether there is a second set of trained weights: an average, or the guard's best
    tiles          pixels a side of the autoencoder's tiles
    measuring      files and folders of the networks of metrics
    text_adapter   what is trained in place of a student, whose frozen weights are then the teacher's
    has_control    whether a ControlNet is trained in its place
    lpips          what latents are compared by: its file or folder, or "" for the one that the recipe trains
    trains_lpips   whether that is trained in place of a student
    feature_blocks blocks of the teacher's denoiser that they are compared by
    fake           the adapter that is the score of the student's samples, trained beside it
    head_width     channels of an adversary's heads, trained beside it; 0 without
    head_states    states whose features they read together: the end of a jump, and its start if they see it
    """

    student: Lora | Full | None = None
    is_conditioned: bool = False
    preference: Lora | None = None
    uses_teacher: bool = True
    encodes_ahead: bool = False
    texts: str | None = None
    most_texts: int = 0
    has_average: bool = False
    tiles: int | None = None
    measuring: tuple[str, ...] = ()
    text_adapter: TextNetwork | None = None
    has_control: bool = False
    lpips: str | None = None
    trains_lpips: bool = False
    feature_blocks: tuple[int, ...] = ()
    fake: Lora | None = None
    head_width: int = 0
    head_states: int = 1

    @property
    def trained(self) -> Lora | Full | None:
        """What a training stage trains: the preference adapter, else the student."""
        return self.preference or self.student


@dataclass(frozen=True)
class Values:
    """Numbers of elements, for the bytes that a stage writes to disk."""

    denoiser: int
    trained: int
    fake: int  # of the score of the student's samples, where there is one
    latent: int
    prompt: int  # of its conditioning
    pixels: int  # of a picture, each with three colours
