"""The feedback stage: the gradient of a reward through the student's own samples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from . import hinge_defaults
from .distill import Distill
from .preference import Tuning
from .reads import Reads
from .stage import OneStage, Requirement, States
from .surrogate import Surrogate
from .takes import Networks, Pass
from .terms import Matching
from .types import Full, Lora, NonNegativeFloat, PositiveInt

if TYPE_CHECKING:
    from .experiment import Recipe


class Feedback(Tuning):
    """The gradient of a differentiable reward through the student's last sampling steps."""

    maths: ClassVar[int] = 3  # noise by sample, the rewards' scale by the steps before

    kind: Literal["feedback"] = "feedback"
    form: Literal["direct", "bounded"] = Field(
        "direct",
        description="the reward's gradient through the sampler, or a step of bounded size up that gradient as the "
        "target of a squared error (OPSD)",
    )
    target_bound: PositiveFloat = Field(
        0.1, description="of form bounded: root mean square of the step from a sample's x0 to its target"
    )
    gradient: Literal["last", "random", "low_variance"] = Field(
        "last", description="through the last steps (DRaFT-K), one random late one (ReFL), re-noised copies (DRaFT-LV)"
    )
    num_grad_steps: PositiveInt = Field(1, description="K of `last`; how many late steps `random` draws from")
    num_copies: int = Field(2, gt=0, le=1024, description="of `low_variance`: n re-noised copies of a sample")
    shape: Literal["negative", "hinge", "mps_hinge"] = Field(
        "negative", description="-r; relu(threshold - r); or that and relu of r under another's prompt, of raw scores"
    )
    threshold: float = Field(0.0, description="of the hinges, on the summed reward's scale; 16 for mps_hinge of mps")
    anchor: NonNegativeFloat = Field(0.0, description="weight of the mean squared distance to the reference's last x0")
    kl: NonNegativeFloat = Field(0.0, description="weight of one stochastic step's KL to the reference, per element")
    consistency: NonNegativeFloat = Field(0.0, description="weight of the distillation loss on stored trajectories")
    matching: Matching | None = Field(
        None, description="distribution matching on the samples that are scored (DMDR, Flash-DMD); default: none"
    )
    surrogate: Surrogate | None = Field(
        None, description="a learned stand-in whose gradient is taken, so that rewards need none; default: their own"
    )
    small_decoder: Annotated[str | None, Reads(holding="config.json", is_network=True)] = Field(
        None, description="folder of an AutoencoderTiny that draws for the rewards trained on, never for the guard"
    )
    _hinge_is_settled = model_validator(mode="after")(hinge_defaults.settle)

    @model_validator(mode="after")
    def _term_acts(self):
        for message in self.matching.conflicts(self.num_steps) if self.matching else ():
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _sampler_has_those_steps(self):
        if self.num_grad_steps > self.sampling_steps:
            raise ValueError(f"num_grad_steps {self.num_grad_steps} is more than sampling_steps {self.sampling_steps}")
        if self.gradient == "low_variance" and self.num_grad_steps != type(self).model_fields["num_grad_steps"].default:
            raise ValueError("num_grad_steps is of gradient: last and random; low_variance is of the last step alone")
        if self.gradient != "low_variance" and self.num_copies != type(self).model_fields["num_copies"].default:
            raise ValueError("num_copies is of gradient: low_variance")
        if self.surrogate and self.shape != "negative":
            raise ValueError(
                f"shape {self.shape} is of rewards with a gradient; surrogate learns the sum: take negative"
            )
        if self.surrogate and self.gradient == "low_variance":
            raise ValueError("gradient: low_variance scores copies of a sample; with surrogate take last or random")
        if self.surrogate and (self.batch_size // self.gradient_accumulation) % self.surrogate.num_generations:
            raise ValueError(
                f"batch_size must hold whole groups of surrogate.num_generations {self.surrogate.num_generations}"
            )
        if self.surrogate and self.surrogate.head_start >= self.num_steps:
            raise ValueError(
                f"surrogate.head_start {self.surrogate.head_start} of num_steps {self.num_steps} leaves no step in "
                "which the student is tuned: lower it"
            )
        if self.form == "bounded" and self.gradient == "last" and self.num_grad_steps > 1:
            raise ValueError(
                "num_grad_steps: form bounded has the target of one step; take 1, or gradient: random for any late one"
            )
        if self.form != "bounded" and self.target_bound != type(self).model_fields["target_bound"].default:
            raise ValueError("target_bound is of form bounded")
        if self.kl and self.gamma == 0.0:
            raise ValueError("kl needs gamma above 0: a deterministic step has no distribution; take anchor")
        if self.kl and self.sampling_steps < 2:
            raise ValueError("kl needs sampling_steps 2 or more: the last step puts no noise back; take anchor")
        return self

    @property
    def corrections(self) -> int:
        """One more: the student's moments held the gradients of heads that had learned nothing at its first update."""
        return super().corrections + int(self.surrogate is not None and self.surrogate.head_start > 0)

    def states_read(self, earlier: Sequence[OneStage]) -> States | None:
        """Return the states that its student was distilled on, for the term that keeps it a consistency model."""
        distilled = [stage for stage in earlier if isinstance(stage, Distill)]
        return distilled[-1].states_drawn if self.consistency and distilled else None

    @property
    def reads_trajectories(self) -> bool:
        """Whether a store of trajectories is needed."""
        return self.consistency > 0

    @property
    def uses_teacher(self) -> bool:
        """Whether steps evaluate the teacher, whose denoiser then stays in memory: of distribution matching."""
        return self.matching is not None

    @property
    def is_held(self) -> bool:
        """Whether a term keeps the student to itself before tuning, or to the teacher."""
        return bool(self.anchor or self.kl or self.consistency or self.matching)

    @property
    def needs_random_steps(self) -> bool:
        """Whether the sampler must put noise back."""
        return self.kl > 0

    @property
    def samples_together(self) -> int:
        """Samples that must be in one process together: a prompt's, whose scores are compared by a surrogate."""
        return self.surrogate.num_generations if self.surrogate else 1

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return those of all tuning, the heads of a surrogate, and the fake score of distribution matching."""
        return replace(
            super().networks(distilled),
            head_width=self.surrogate.width if self.surrogate else 0,
            fake=self.matching.fake if self.matching else None,
        )

    @property
    def parents(self) -> tuple[str, ...]:
        """Those of all tuning, and the student's store of trajectories if it is read."""
        return (*super().parents, *["trajectories"] * self.reads_trajectories)

    @property
    def requirements(self) -> list[Requirement]:
        """Those of all tuning, and the student's store of trajectories if it is read."""
        store = Requirement(("trajectories",), "consistency needs", "consistency")
        return [*super().requirements, *[store] * self.reads_trajectories]

    @property
    def copies_scored(self) -> int:
        """How many copies of each sample are scored, and are matched."""
        return self.num_copies if self.gradient == "low_variance" else 1

    def step(self, samples: int, part: int) -> list[Pass]:
        """Return the sampling steps without and with gradient, and the passes of each term beside the reward."""
        steps, copies = self.sampling_steps, self.copies_scored
        graded = {"last": self.num_grad_steps, "random": 1, "low_variance": 1}[self.gradient]
        before = {
            "last": steps - self.num_grad_steps,
            "random": steps - (self.num_grad_steps - 1) / 2 - 1,
            "low_variance": steps,
        }[self.gradient]
        scored = Pass(
            "student",
            samples * copies,
            graded,
            part * copies,
            gradient=True,
            is_chained=self.gradient != "low_variance",
            viewer="rewards",
            num_scores=2 if self.shape == "mps_hinge" else 1,
        )
        with_keys = 1 if self.gradient == "low_variance" else None  # the others have gradient in the same sampler
        passes = [Pass("student", samples, before, is_chained=True, num_with_keys=with_keys), scored]
        if self.surrogate:  # scored without gradient; the heads' gradient is taken at the sample
            scores = replace(passes[0], batch=part, viewer="rewards")
            passes = [scores, replace(scored, viewer=""), Pass("heads", samples, batch=part, gradient=True)]
            passes.append(Pass("heads", samples, self.surrogate.num_updates, part, gradient=True, beside=True))
        if self.max_drops:  # the same samples by the reference
            passes += [replace(one, role="reference", gradient=False, num_scores=1) for one in passes[:2]]
        if self.anchor:
            passes.append(Pass("reference", samples * copies, batch=part * copies))
        if self.kl:  # of one step of a sample of its own
            sampled = Pass("student", samples, steps, is_chained=True, num_with_keys=1)
            passes += [sampled, Pass("reference", samples)]
        own_terms = (self.kl > 0) + (self.consistency > 0)
        return passes + [Pass("student", samples, batch=part, gradient=True)] * own_terms

    def step_by_teacher(self, recipe: "Recipe", samples: int, part: int) -> list[Pass]:
        """Return the passes of distribution matching: on every copy that is scored."""
        if self.matching is None:
            return []
        shown, batch = samples * self.copies_scored, part * self.copies_scored
        compared = self.matching.passes_of_loss(recipe.teacher, self.num_steps, shown, batch)
        return [*compared, self.matching.pass_of_network(shown, batch)]
