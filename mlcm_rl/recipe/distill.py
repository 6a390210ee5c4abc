"""The distill stage: multistep consistency distillation, in phases of fewer and fewer segments."""

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from ..equations.axis import NUM_SEGMENTS
from .distill_conflicts import LOG, PER_PHASE, conflicts
from .reads import LPIPS, PICTURES, PROMPTS
from .stage import OneStage, Requirement, States, Training
from .takes import SAVED, Networks, Pass, Values
from .terms import Adversarial, Matching
from .types import Fraction, Full, Lora, NonNegativeFloat, PositiveInt, default_gamma, presentation

if TYPE_CHECKING:
    from .experiment import Recipe

MAX_ENCODED_AHEAD = 8192  # prompts of a stage that are encoded before its first step
MEAN_ONLINE_STEPS = 4.5  # of Algorithm 1: 1 to 8 steps, segments drawn uniformly

NumSegments = Literal[32, 16, 8, 4, 2, 1]
PERCEPTUAL = ("lpips", "features", "log_lpips", "log_features")  # distances of x0, by a network
Distance = Literal["l2", "huber", "log_l2", "lpips", "features", "log_lpips", "log_features"]
# The settings of a distill stage whose form is open: the best one of the study. The form is open if the stage sets none
# of OWN_FORM, has no list with an entry a phase, and has the values of OPEN, which this form needs.
RECOMMENDED = {"condition_on_target": True, "num_segments": [1], "budgets": [2, 3, 4, 6, 8], "distance": "log_l2"}
OWN_FORM = ("condition_on_target", "num_segments", "budgets")
OPEN = {
    "method": "segments",
    "source": "trajectories",
    "target": "trajectory",
    "space": "z",
    "starts": "any",
    "ends": "segment",
    "keep_segments": False,
}


class Distill(Training):
    """Multistep consistency distillation. A list has one entry a phase; a single value counts for every phase.

    A stage whose form is open takes the recommended one: one student, conditioned on its target time, for the budgets
    [2, 3, 4, 6, 8].
    """

    leaves_student: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    method: Literal["segments", "inter_segment", "simulation"] = Field(
        "segments",
        description="segments: stage 1; inter_segment: stage 2; simulation: the terms alone, on states of the "
        "student's own sampler, as DMD2",
    )
    source: Literal["trajectories", "online", "data"] = Field(
        "trajectories", description="stored states; the paper's Algorithm 1; or real latents plus noise, as LCM"
    )
    images: Annotated[str | None, PICTURES] = Field(
        None, description="captioned image folder, for source: data and real: images"
    )
    prompts: Annotated[str | None, PROMPTS] = Field(
        None, description="prompt file, for source: online, for inter_segment on samples and for simulation"
    )
    adapter: Lora | Full = Field(
        default_factory=Lora, discriminator="kind", description="what is trained: a low-rank adapter, or all weights"
    )
    num_segments: list[NumSegments] = Field(
        [8, 4, 2, 1],
        min_length=1,
        max_length=10,
        description="of each phase; [1] in the default form; 32 and 16 only with starts: milestones",
    )
    starts: Literal["any", "milestones"] = Field(
        "any",
        description="where jumps start: any stored time; or the tops of the segments alone, as progressive "
        "distillation, so that a phase is for samplers of K steps",
    )
    ends: Literal["segment", "random"] = Field(
        "segment",
        description="where jumps end: the start of the segment; or any time from there to the pair's second point, as "
        "Hyper-SD and CTM",
    )
    keep_segments: bool = Field(
        False, description="each sample of a phase draws K from those of the phases up to it, against forgetting"
    )
    num_steps: PositiveInt | list[PositiveInt] = Field(description="optimiser steps of each phase")
    learning_rate: PositiveFloat | list[PositiveFloat] = Field(1e-4, description="peak; decays to 0 within each phase")
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000, description="linear warm-up at the start of each phase")
    target: Literal["trajectory", "consistency"] | list[Literal["trajectory", "consistency"]] = Field(
        "trajectory", description="stored milestone state, or the student's own jump from the pair's second point"
    )
    pair: Literal["next", "random"] | list[Literal["next", "random"]] = Field(
        "next", description="second point of a consistency pair: one grid step down, or any stored point of the segment"
    )
    space: Literal["z", "x0"] | list[Literal["z", "x0"]] = Field(
        "z", description="loss on the latents at the segment's start, or on x0 with weight SNR + 1"
    )
    distance: Distance | list[Distance] = Field(
        "l2",
        description="squared; by Huber; or the logarithm of its mean, where near and far jumps weigh alike, as "
        "in the default form; or as a network sees x0: LPIPS of latents, the teacher's first blocks, or the "
        "logarithm of these",
    )
    lpips: Annotated[str | None, LPIPS] = Field(
        None,
        description="of distance lpips: .safetensors file of a latent LPIPS, or the folder of a train_perceptual "
        "stage; default: the recipe's own",
    )
    feature_blocks: list[Annotated[int, Field(ge=0, le=999)]] = Field(
        [0, 1], min_length=1, description="of distance features: blocks of the teacher's denoiser, from 0"
    )
    feature_time: int = Field(49, ge=0, le=999, description="of distance features: time whose noise both have")
    target_ema: Fraction = Field(0.0, description="decay of the target's averaged weights; 0 = the student's own")
    optimizer_state: Literal["keep", "reset"] | list[Literal["keep", "reset"]] = Field(
        "keep", description="what a phase does at its start with Adam's moments of the one before"
    )
    condition_on_target: bool = Field(
        False,
        description="give the student the time it jumps to: one for all steps; true in the default form",
    )
    prediction: Literal["teacher", "x0"] = Field(
        "teacher",
        description="what the student's network predicts: the same as its teacher's; or x0, as the one-step "
        "SDXL-Lightning, after a stage or a phase that has a distance",
    )
    budgets: list[Annotated[int, Field(ge=1, le=8)]] = Field(
        [],
        description="with condition_on_target: draw the jumps of samplers with these numbers of steps, and no others; "
        "[2, 3, 4, 6, 8] in the default form",
    )
    skip: int = Field(20, gt=0, le=999, description="times between a pair's points for source online and data")
    num_teacher_steps: int = Field(3, gt=0, le=125, description="inter_segment: p, teacher steps between milestones")
    num_student_steps: int = Field(
        4, ge=1, le=8, description="q, steps of the student's own sample, for inter_segment and matching"
    )
    renoise: Literal["student", "stored"] = Field(
        "stored", description="inter_segment: what is re-noised to a milestone"
    )
    distance_weight: NonNegativeFloat = Field(
        1.0, description="factor of the distance in its sum with the terms; 0: the terms alone"
    )
    matching: Matching | None = Field(None, description="a term of distribution matching; default: none")
    adversarial: Adversarial | None = Field(None, description="an adversarial term; default: none")
    held_out_every: PositiveInt = presentation(50, description="steps between losses on the held-out trajectories")

    @model_validator(mode="after")
    def _open_form_is_the_recommended(self):
        explicit = self.model_fields_set
        has_phases = any(isinstance(getattr(self, name), list) for name in PER_PHASE)
        is_open = all(getattr(self, name) == value for name, value in OPEN.items())
        if is_open and not has_phases and not explicit & set(OWN_FORM):
            self.__dict__.update({name: value for name, value in deepcopy(RECOMMENDED).items() if name not in explicit})
        return self

    @model_validator(mode="after")
    def _settings_agree(self):
        for message in conflicts(self):
            raise ValueError(message)
        return self

    @property
    def reads_trajectories(self) -> bool:
        """Whether the stage needs a store of trajectories."""
        if self.method == "simulation":
            return False
        return self.renoise == "stored" if self.method == "inter_segment" else self.source == "trajectories"

    @property
    def states_drawn(self) -> States:
        """Which states its jumps over stored trajectories lie between."""
        return "milestones" if self.budgets else "all"

    def states_read(self, earlier: Sequence[OneStage]) -> States | None:
        """Return where its jumps begin and end; inter_segment reads the clean samples alone."""
        return self.states_drawn if self.reads_trajectories and self.method == "segments" else None

    @property
    def terms(self) -> list[str]:
        """The keys of the terms that it adds to the distance."""
        return [name for name in ("matching", "adversarial") if getattr(self, name) is not None]

    @property
    def makes_samples(self) -> bool:
        """Whether its points are made from samples of the student, from which a fake score then learns too."""
        return self.method == "simulation" or (self.method == "inter_segment" and self.renoise == "student")

    @property
    def uses_teacher(self) -> bool:
        """Whether steps evaluate the teacher, or part of it; if not, its denoiser leaves memory before the first."""
        return self.samples_teacher or bool(self.terms) or self.compares_by("features")

    @property
    def samples_teacher(self) -> bool:
        """Whether steps take guided passes of the teacher."""
        return self.method == "inter_segment" or (self.method == "segments" and self.source != "trajectories")

    def compares_by(self, network: Literal["lpips", "features"]) -> bool:
        """Return whether a phase has the distance of this `network`, or its logarithm."""
        return any(name.removeprefix(LOG) == network for name in self.per_phase("distance"))

    @property
    def uses_own_lpips(self) -> bool:
        """Whether it compares by the network of an earlier train_perceptual stage."""
        return self.compares_by("lpips") and self.lpips is None

    @property
    def texts(self) -> str | None:
        """The prompt file or the folder of captioned pictures whose texts it encodes; None where these are stored."""
        if self.reads_trajectories:
            return None
        return self.images if self.method == "segments" and self.source == "data" else self.prompts

    @property
    def most_encoded_ahead(self) -> int:
        """How many different texts are encoded before the first step at most: what fits memory, and what is drawn.

        The text encoders then leave memory; of more texts each step encodes its own.
        """
        return min(sum(self.steps_per_phase) * self.batch_size, MAX_ENCODED_AHEAD)

    @property
    def default_gamma(self) -> float:
        """The sampler's default gamma for the finished student."""
        return default_gamma(self.num_segments[-1], self.condition_on_target)

    def steps_learned(self, num_segments: int) -> list[int]:
        """Return the numbers of steps that the student after a phase of K segments draws in; empty for all.

        A network that predicts noise is near its teacher at times that it did not see; one turned to x0 is not.
        """
        whole = self.prediction == "x0" and self.starts == "milestones" and num_segments <= NUM_SEGMENTS
        return self.budgets or [num_segments] * whole

    def per_phase(self, name: str) -> list:
        """Return the value of `name` for each phase."""
        value = getattr(self, name)
        return list(value) if isinstance(value, list) else [value] * len(self.num_segments)

    def until(self, num_phases: int | None) -> "Distill":
        """Return the stage that ends after its first `num_phases` phases."""
        lists = {name: self.per_phase(name)[:num_phases] for name in PER_PHASE}
        return self.model_copy(update={"num_segments": self.num_segments[:num_phases], **lists})

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps of each phase."""
        return self.per_phase("num_steps")

    @property
    def jumps_again(self) -> list[bool]:
        """For each phase, whether its target is another jump, of the student or of its average."""
        if self.method != "segments":
            return [self.method == "inter_segment"] * len(self.num_segments)
        return [target == "consistency" for target in self.per_phase("target")]

    @property
    def corrections(self) -> int:
        """Five: the average was not used under autocast; the caption of a picture depended on the time; the last bits
        of an encoded prompt depended on the micro-batch (by 5e-7 of the largest, where that is not a multiple of 4); an
        adversary of clean jumps saw x0 beside targets that have the noise of time 0; a student of whole segments did
        not say so in its student.json.
        """
        unseen = self.precision == "bf16" and self.target_ema > 0 and any(self.jumps_again)
        chosen = self.method == "segments" and self.source == "data"
        given = self.adversarial
        noisy = self.method == "segments" and given is not None and (given.real, given.jumps) == ("milestones", "clean")
        return unseen + chosen + noisy + (not self.reads_trajectories) + (self.starts == "milestones")

    @property
    def parents(self) -> tuple[str, ...]:
        """The teacher, the store if one is read, and the student to go on with."""
        own = ["trajectories"] * self.reads_trajectories + ["train_perceptual"] * self.uses_own_lpips
        return (*super().parents, *own, "distill")

    @property
    def requirements(self) -> list[Requirement]:
        """The store, if it is read, and the network that it compares by, without a file of it."""
        needed = []
        if self.reads_trajectories:
            setting = "source" if self.method == "segments" else "renoise"
            needed.append(Requirement(("trajectories",), f"{setting}: {getattr(self, setting)} needs", setting))
        if self.uses_own_lpips:
            needed.append(
                Requirement(("train_perceptual",), "distance: lpips needs lpips: (a file or a folder), or", "distance")
            )
        return needed

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the passes of a step, the encoding of pictures before the first step, and sample grids."""
        batch, steps = part or self.micro_batch, self.steps_per_phase
        samples = sum(steps) * self.batch_size
        again = sum(n for n, jumps in zip(steps, self.jumps_again, strict=True) if jumps) * self.batch_size
        passes = [Pass("student", samples, batch=batch, gradient=True)]
        if self.samples_teacher:
            guided = recipe.teacher.evaluations
            evaluations, with_keys = self._teacher_steps * guided, guided if self.method == "inter_segment" else None
            passes.insert(0, Pass("teacher", samples, evaluations, batch, num_with_keys=with_keys))
        if again:
            passes.append(Pass("target", again, batch=batch))
        for network in ("lpips", "features"):
            names = zip(steps, self.per_phase("distance"), strict=True)
            if compared := sum(n for n, name in names if name.removeprefix(LOG) == network) * self.batch_size:
                passes.append(Pass(network, compared, batch=batch, gradient=True))
        if self.method == "inter_segment" and self.renoise == "student":
            passes.append(Pass("student", samples, self.num_student_steps, is_chained=True, num_with_keys=1))
        if self.method == "simulation":
            passes.append(Pass("student", samples, (self.num_student_steps - 1) / 2, is_chained=True))
        passes += self._passes_of_terms(recipe, samples, batch)
        takes_pictures = self.adversarial is not None and self.adversarial.real == "images"
        if takes_pictures or (self.method == "segments" and self.source == "data"):
            passes.append(Pass("encoder", batch=self.micro_batch, in_step=False))
        return passes + self.sample_grids(recipe)

    def _passes_of_terms(self, recipe: "Recipe", samples: int, batch: int) -> list[Pass]:
        """Return the passes of the terms that it adds to the distance, the student's first.

        Terms are of the jumps that end at time 0, and the fake score learns from samples of all prompts.
        """
        clean, own = samples * self._share_of_clean, list[Pass]()
        passes: list[Pass] = []
        if self.matching:
            passes = self.matching.passes_of_loss(recipe.teacher, sum(self.steps_per_phase), clean, batch)
            if not self.makes_samples:
                passes.append(Pass("student", samples, self.num_student_steps, is_chained=True, num_with_keys=1))
            own = [self.matching.pass_of_network(samples, batch)]
        if self.adversarial:
            seen = samples if self.adversarial.jumps == "all" else clean
            opposed = seen * self.adversarial.acting(sum(self.steps_per_phase))
            passes.append(Pass("heads", opposed, batch=batch, gradient=True))
            if self.adversarial.sees_start:  # for the student's loss, and for the heads'
                passes.append(Pass("teacher", opposed + seen, batch=batch))
            if self.adversarial.loss == "relativistic":  # real samples, for the student's
                passes.append(Pass("teacher", opposed, batch=batch))
            own.append(Pass("heads", seen, 2, batch, gradient=True, beside=True))  # of real samples, and of its own
        return passes + own

    @property
    def _share_of_clean(self) -> float:
        """The share of jumps that end at time 0, of one segment: with a target time, one of the later milestones."""
        if self.method != "segments" or not self.condition_on_target:
            return 1.0
        if self.budgets:
            return sum(1 / num_steps for num_steps in self.budgets) / len(self.budgets)
        return sum(1 / below for below in range(1, NUM_SEGMENTS + 1)) / NUM_SEGMENTS

    @property
    def _teacher_steps(self) -> float:
        """Steps of the teacher for each sample of a step; online, to its first point and from there to the second."""
        if self.method == "inter_segment":
            return self.num_teacher_steps
        return {"trajectories": 0, "online": MEAN_ONLINE_STEPS + 1, "data": 1}[self.source]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the student, and the teacher if steps evaluate it."""
        return Networks(
            self.adapter,
            is_conditioned=self.condition_on_target,
            uses_teacher=self.uses_teacher,
            encodes_ahead=True,
            texts=self.texts,
            most_texts=self.most_encoded_ahead,
            has_average=self.target_ema > 0,
            lpips=(self.lpips or "") if self.compares_by("lpips") else None,
            feature_blocks=tuple(self.feature_blocks) if self.compares_by("features") else (),
            fake=self.matching.fake if self.matching else None,
            head_width=self.adversarial.width if self.adversarial else 0,
            head_states=2 if self.adversarial and self.adversarial.sees_start else 1,
        )

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of the student, its snapshots and its checkpoints, which hold the fake score too."""
        in_checkpoints = (values.trained + values.fake) * self.keep_checkpoints * SAVED
        return values.trained * 4 * (1 + len(self.num_segments)) + in_checkpoints
