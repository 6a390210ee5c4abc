"""The recipe: every setting of a run as strict types, and nothing that needs torch.

A recipe names a teacher and a list of stages. `kind` picks the stage; unknown keys are errors. A field marked with
`presentation` cannot change a result (how often to log, where to put files) and stays out of the fingerprint.

Only types stand here: `recipe_file.py` loads a file into them and says what is wrong with it. A validator's message
begins with the name of the setting that it is about, so that the error points at that setting's line.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NumSegments = Literal[8, 4, 2, 1]


def presentation(default: Any, **settings: Any) -> Any:
    """A field that cannot change a stage's result and is therefore not hashed into its fingerprint."""
    return Field(default, json_schema_extra={"presentation": True}, **settings)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Teacher(Strict):
    """The model to distil: a folder in diffusers format (or a hub name with a pinned revision)."""

    path: str = Field(description="folder in diffusers format, relative to the working directory, or a hub name")
    revision: str | None = Field(None, description="pinned commit of a hub model")
    family: Literal["sdxl", "sd"] = Field(description="file in mlcm_rl/bases that loads it")
    guidance_scale: NonNegativeFloat = Field(8.0, description="classifier-free guidance of the teacher (1 = none)")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="precision of the frozen weights")
    resolution: PositiveInt | None = Field(None, description="pixels a side; default: the model's own")


class Lora(Strict):
    """Low-rank adapter on the family's published target modules."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 64
    alpha: PositiveFloat = 64.0


class Full(Strict):
    """All weights of the denoiser."""

    kind: Literal["full"] = "full"


class Training(Strict):
    """What every stage that trains has in common."""

    batch_size: PositiveInt = Field(description="samples per optimiser step")
    gradient_accumulation: PositiveInt = Field(
        1, description="micro-batches a step is split into; must divide batch_size"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory")
    precision: Literal["no", "bf16"] = Field("no", description="autocast of the student's passes")
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: PositiveFloat = 1.0
    log_every: PositiveInt = presentation(10)
    save_every: PositiveInt = presentation(200, description="steps between checkpoints to resume from")
    sample_every: PositiveInt = presentation(200, description="steps between sample grids")

    @model_validator(mode="after")
    def _accumulation_divides_batch(self):
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation {self.gradient_accumulation} does not divide batch_size {self.batch_size}"
            )
        return self


class TrainTeacher(Training):
    """The denoiser's diffusion loss on a captioned image folder: trains the teacher itself."""

    kind: Literal["train_teacher"] = "train_teacher"
    images: str = Field(description="folder with metadata.jsonl ({file_name, prompts}) beside the pictures")
    num_steps: PositiveInt
    learning_rate: PositiveFloat = 4e-4
    warmup_steps: int = Field(100, ge=0)
    ema_decay: Fraction = 0.999
    prompt_dropout: Fraction = Field(0.1, description="share of prompts dropped for classifier-free guidance")
    min_snr_gamma: PositiveFloat | None = Field(None, description="loss weight min(SNR, gamma) / SNR, arXiv 2303.09556")
    start: Literal["teacher", "random"] = Field("random", description="denoiser weights to begin from")


class Trajectories(Strict):
    """The teacher's guided DDIM trajectories from noise to data, every state kept."""

    kind: Literal["trajectories"] = "trajectories"
    prompts: str = Field(description=".txt (one a line) or .jsonl ({prompt, language, ...}) file")
    num_trajectories: PositiveInt
    num_held_out: int = Field(0, ge=0, description="trajectories of prompts after the first, for the held-out loss")
    num_steps: PositiveInt = Field(48, description="solver steps: 8 segments of 6")
    batch_size: PositiveInt = presentation(16, description="trajectories solved at a time")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the stored states; never bfloat16")
    shard_size: PositiveInt = presentation(64, description="trajectories in a file")

    @model_validator(mode="after")
    def _steps_hold_milestones(self):
        if self.num_steps % 8:
            raise ValueError(
                f"num_steps {self.num_steps} must be a multiple of 8 so that every milestone is on the grid"
            )
        return self


class Distill(Training):
    """Multistep consistency distillation. A list holds one entry a phase; a single value is meant for every phase."""

    kind: Literal["distill"] = "distill"
    method: Literal["segments", "inter_segment"] = Field(
        "segments", description="segments: stage 1; inter_segment: stage 2"
    )
    source: Literal["trajectories", "online", "data"] = Field(
        "trajectories", description="stored states; the paper's Algorithm 1; or real latents plus noise, as LCM"
    )
    images: str | None = Field(None, description="captioned image folder, for source: data")
    prompts: str | None = Field(None, description="prompt file, for source: online and for inter_segment on samples")
    adapter: Lora | Full = Field(default_factory=Lora, discriminator="kind")
    segments: list[NumSegments] = Field([8, 4, 2, 1], min_length=1, description="number of segments, phase by phase")
    num_steps: PositiveInt | list[PositiveInt] = Field(description="optimiser steps of each phase")
    learning_rate: PositiveFloat | list[PositiveFloat] = Field(1e-4, description="peak; decays to 0 within each phase")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up at the start of each phase")
    target: Literal["trajectory", "consistency"] | list[Literal["trajectory", "consistency"]] = Field(
        "trajectory", description="stored milestone state, or the student's own jump from the pair's second point"
    )
    pair: Literal["next", "random"] | list[Literal["next", "random"]] = Field(
        "next", description="second point of a consistency pair: one grid step down, or any stored point of the segment"
    )
    space: Literal["z", "x0"] | list[Literal["z", "x0"]] = Field(
        "z", description="loss on the latents at the segment's start, or on x0 with weight SNR + 1"
    )
    distance: Literal["l2", "huber"] | list[Literal["l2", "huber"]] = "l2"
    target_ema: Fraction = Field(0.0, description="decay of the target's averaged weights; 0 = the student's own")
    optimizer_state: Literal["keep", "reset"] = Field("keep", description="what a new phase does with Adam's moments")
    condition_on_target: bool = Field(
        False, description="give the student the time it jumps to; one student for all steps"
    )
    skip: PositiveInt = Field(20, description="times between a pair's points for source online and data")
    num_teacher_steps: PositiveInt = Field(3, description="inter_segment: p, teacher steps from milestone to milestone")
    num_student_steps: int = Field(4, ge=1, le=8, description="inter_segment: q, steps of the student's own sample")
    renoise: Literal["student", "stored"] = Field(
        "stored", description="inter_segment: what is re-noised to a milestone"
    )

    held_out_every: PositiveInt = presentation(50, description="steps between losses on the held-out trajectories")

    @model_validator(mode="after")
    def _phases_agree(self):
        for name in ("num_steps", "learning_rate", "target", "pair", "space", "distance"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.segments):
                raise ValueError(f"{name} has {len(value)} entries for {len(self.segments)} phases ({self.segments})")
        if list(self.segments) != sorted(self.segments, reverse=True):
            raise ValueError(f"segments {self.segments} must not increase: phases merge segments")
        if self.method == "inter_segment" and list(self.segments) != [1]:
            raise ValueError("method: inter_segment is consistency over the whole time axis, so segments must be [1]")
        if self.method == "inter_segment" and self.renoise == "student" and self.prompts is None:
            raise ValueError("renoise: student needs prompts: a prompt file")
        if self.source == "data" and self.images is None:
            raise ValueError("source: data needs images: a captioned image folder")
        if self.source == "online" and self.prompts is None:
            raise ValueError("source: online needs prompts: a prompt file")
        if self.source != "trajectories" and self.method == "segments" and "trajectory" in self.per_phase("target"):
            raise ValueError(f"source: {self.source} stores no states, so target must be consistency")
        return self

    @property
    def reads_trajectories(self) -> bool:
        """Whether a store of trajectories is needed."""
        return self.renoise == "stored" if self.method == "inter_segment" else self.source == "trajectories"

    def per_phase(self, name: str) -> list:
        """The value of `name` for each phase."""
        value = getattr(self, name)
        return list(value) if isinstance(value, list) else [value] * len(self.segments)


class Evaluate(Strict):
    """Students beside their teacher on fixed prompts and seeds: report.json, report.html."""

    kind: Literal["evaluate"] = "evaluate"
    prompts: str = Field(description="prompt file, disjoint from the one distilled on")
    num_prompts: PositiveInt = 64
    num_steps: list[Annotated[int, Field(ge=1, le=8)]] = [1, 2, 3, 4, 6, 8]
    gammas: list[Fraction] = [0.0, 1.0]
    grids: list[Literal["milestones", "paper"]] = ["milestones"]
    students: Literal["last", "snapshots"] = Field(
        "last", description="the finished student, or the one after each phase too"
    )
    teacher_steps: list[PositiveInt] = Field(
        [25, 50], description="guided steps of the reference rows; the last is the reference"
    )
    teacher_solvers: list[Literal["ddim", "dpmpp", "unipc"]] = Field(
        ["ddim"], description="undistilled at equal evaluations"
    )
    also: list[str] = Field([], description="further finished stage folders to put in the same table")
    judge: str | None = Field(None, description="folder of a judge, for retrieval and KID")
    rewards: list[str] = []
    images_per_prompt: PositiveInt = Field(1, description="more than one also measures diversity")
    batch_size: PositiveInt = presentation(32)


Stage = Annotated[TrainTeacher | Trajectories | Distill | Evaluate, Field(discriminator="kind")]


class Samples(Strict):
    """The fixed prompts and seeds of the grids that runs leave behind."""

    prompts: list[str] = Field([], description="prompts of the sample grids, any language")
    num_steps: list[Annotated[int, Field(ge=1, le=8)]] = [1, 2, 4, 8]


class Recipe(Strict):
    """One experiment, from a teacher to a report."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="folder of links under runs")
    seed: int = Field(0, ge=0)
    teacher: Teacher
    stages: list[Stage] = Field(min_length=1)
    samples: Samples = presentation(Samples())
    runs: str = presentation("runs", description="folder that holds every run")
    device: Literal["auto", "cpu", "cuda", "mps"] = presentation("auto")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = presentation(["tensorboard"])


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: descriptions, defaults and names come from the types."""
    schema = Recipe.model_json_schema()
    for definition in schema["$defs"].values():
        if "kind" in definition["properties"]:  # has a default for Python, but a file must say it
            definition["required"] = ["kind", *definition.get("required", [])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
