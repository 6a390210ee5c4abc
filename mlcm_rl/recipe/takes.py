"""What a stage takes, as data: its passes through the networks, the networks that stay in memory, what it leaves.

Each stage's type says it once, beside its settings. Evaluations, floating-point operations, memory, time and disk are
all derived from that, in `cost` and `pipeline`, and nothing there knows one stage from another. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from .types import Full, Lora

Role = Literal["teacher", "student", "target", "reference", "encoder"]


@dataclass(frozen=True)
class Pass:
    """Passes of one kind through one network.

    role         teacher: guided; student: what is trained or draws; target: the student's weights, or their average;
                 reference: the student without its preference adapter; encoder: of pictures, by the autoencoder
    samples      that go through over the whole stage; 0 for what is small beside the rest and not counted
    evaluations  of the denoiser that each of them takes; a guided pass of the teacher is two
    batch        of them in memory at a time in one process; 0 where another pass beside it holds more
    gradient     whether the graph stays for the backward pass
    is_chained   whether each evaluation starts where the one before ended, as a sampler's does
    output       what comes of it: the sample, or the network's own prediction
    seen_by      who looks at the decoded pictures: no one, a person, the rewards trained on, or all rewards
    num_looks    how often they look at each in one step
    in_step      whether it is part of an optimiser step, under autocast; else it is alone in memory
    """

    role: Role
    samples: float = 0
    evaluations: float = 1
    batch: int = 0
    gradient: bool = False
    is_chained: bool = False
    output: Literal["x0", "prediction"] = "x0"
    seen_by: Literal["", "person", "rewards", "guard"] = ""
    num_looks: int = 1
    in_step: bool = True


@dataclass(frozen=True)
class Networks:
    """What a stage has in memory beside what its passes hold.

    student        the adapter of the student, or that all its weights are its own; none where the teacher draws
    is_conditioned whether the student is given its target time
    preference     the adapter over the student that is trained in its place
    asks_teacher   whether the teacher's denoiser stays
    encodes_ahead  whether text encoders have left when the first step comes
    has_average    whether there is a second set of trained weights: an average, or the guard's best
    tiles          pixels a side of the tiles that the autoencoder works in
    measuring      files and folders of networks that only measure
    """

    student: Lora | Full | None = None
    is_conditioned: bool = False
    preference: Lora | None = None
    asks_teacher: bool = True
    encodes_ahead: bool = False
    has_average: bool = False
    tiles: int | None = None
    measuring: tuple[str, ...] = ()

    @property
    def trained(self) -> Lora | Full | None:
        """What a stage that trains would train."""
        return self.preference or self.student


@dataclass(frozen=True)
class Values:
    """How many numbers things are made of, for what a stage leaves on disk."""

    denoiser: int
    trained: int
    latent: int
    prompt: int  # encoded
    pixels: int  # of a picture, before its three colours
