"""Settings of a distill stage that cannot be together: each is a message that says which, why, and what to write."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..equations.axis import NUM_SEGMENTS

if TYPE_CHECKING:
    from .distill import Distill

LOG = "log_"  # begins the name of the logarithm of a distance
PER_PHASE = ("num_steps", "learning_rate", "target", "pair", "space", "distance", "optimizer_state")


def conflicts(stage: "Distill") -> Iterator[str]:
    """Yield what is wrong with the settings of `stage` taken together."""
    yield from _of_phases(stage)
    yield from _of_jumps(stage)
    yield from _of_terms(stage)
    yield from _without_effect(stage)


def _without_effect(stage: "Distill") -> Iterator[str]:
    """Yield the settings that were changed and that nothing reads, with what would."""
    jumps = stage.method == "segments"
    has_own_target = jumps and "consistency" in stage.per_phase("target")
    by_features = stage.compares_by("features"), "distance: features or log_features"
    needs = {
        "lpips": (stage.compares_by("lpips"), "distance: lpips or log_lpips"),
        "feature_blocks": by_features,
        "feature_time": by_features,
        "source": (jumps, "method: segments"),
        "target": (jumps, "method: segments"),
        "space": (stage.method != "simulation", "method: segments or inter_segment"),
        "pair": (has_own_target or stage.ends == "random", "target: consistency or ends: random"),
        "target_ema": (
            has_own_target or stage.method == "inter_segment",
            "target: consistency or method: inter_segment",
        ),
        "skip": (jumps and stage.source != "trajectories", "source: online or data"),
        "renoise": (stage.method == "inter_segment", "method: inter_segment"),
        "num_teacher_steps": (stage.method == "inter_segment", "method: inter_segment"),
        "num_student_steps": (
            stage.renoise == "student" or stage.method == "simulation" or stage.matching is not None,
            "renoise: student, method: simulation or matching",
        ),
    }
    for name, (is_read, by) in needs.items():
        default = type(stage).model_fields[name].default
        values = stage.per_phase(name) if name in PER_PHASE else [getattr(stage, name)]
        if not is_read and any(value != default for value in values):
            yield f"{name} has no effect without {by}: leave it out"


def _of_phases(stage: "Distill") -> Iterator[str]:
    """Yield what of the phases and of where points come from does not go together."""
    for name in PER_PHASE:
        value = getattr(stage, name)
        if isinstance(value, list) and len(value) != len(stage.num_segments):
            yield f"{name} has {len(value)} entries for {len(stage.num_segments)} phases ({stage.num_segments})"
    if list(stage.num_segments) != sorted(stage.num_segments, reverse=True):
        yield f"num_segments {stage.num_segments} must not increase: phases merge segments"
    if stage.method != "segments" and list(stage.num_segments) != [1]:
        yield f"method: {stage.method} is of the whole time axis, so num_segments must be [1]"
    if stage.method == "inter_segment" and stage.renoise == "student" and stage.prompts is None:
        yield "renoise: student needs prompts: a prompt file"
    if stage.budgets and not (stage.condition_on_target and list(stage.num_segments) == [1]):
        yield "budgets are jumps across segments: they need condition_on_target: true and num_segments: [1]"
    if stage.budgets and (stage.source != "trajectories" or "consistency" in stage.per_phase("target")):
        yield "budgets are jumps between stored states: they need those, and target: trajectory"
    pairs = zip(stage.per_phase("space"), stage.per_phase("distance"), strict=True)
    for name in (distance for space, distance in pairs if space == "x0" and distance.startswith(LOG)):
        yield f"distance: {name} weighs all jumps alike and space: x0 does not; with {name} take space: z"
    if list(stage.feature_blocks) != sorted(set(stage.feature_blocks)):
        yield f"feature_blocks {stage.feature_blocks} must increase"
    if stage.keep_segments and len(set(stage.num_segments)) == 1:
        yield (
            f"keep_segments draws K of earlier phases, and all of num_segments {stage.num_segments} are one: leave "
            "it out"
        )
    if stage.adversarial and stage.adversarial.real == "images" and stage.images is None:
        yield "adversarial.real: images needs images: a captioned image folder"
    if stage.source == "data" and stage.images is None:
        yield "source: data needs images: a captioned image folder"
    if stage.source == "online" and stage.prompts is None:
        yield "source: online needs prompts: a prompt file"
    if stage.source != "trajectories" and stage.method == "segments" and "trajectory" in stage.per_phase("target"):
        yield f"source: {stage.source} stores no states, so target must be consistency"


def _of_jumps(stage: "Distill") -> Iterator[str]:
    """Yield what of the starts and ends of jumps does not go together."""
    conditioned = stage.condition_on_target or stage.budgets
    if stage.starts == "milestones" and (
        stage.method != "segments" or stage.source != "trajectories" or conditioned or stage.keep_segments
    ):
        yield (
            "starts: milestones are whole segments between stored states: it needs method: segments and source: "
            "trajectories, without condition_on_target, budgets and keep_segments"
        )
    if stage.starts == "any" and max(stage.num_segments) > NUM_SEGMENTS:
        yield (
            f"num_segments {stage.num_segments}: more than {NUM_SEGMENTS} are for starts: milestones, as "
            "phases before those of samplers"
        )
    if stage.ends == "random" and (stage.method != "segments" or conditioned or stage.starts == "milestones"):
        yield (
            "ends: random draws the ends of jumps between segment starts and points: it needs method: segments, "
            "without condition_on_target and budgets, which say themselves where jumps end, and starts: any"
        )


def _of_terms(stage: "Distill") -> Iterator[str]:
    """Yield what of the terms beside the distance does not go together."""
    of_all = stage.adversarial is not None and stage.adversarial.jumps == "all"
    of_clean = [name for name in stage.terms if not (of_all and name == "adversarial")]
    if of_clean and (list(stage.num_segments) != [1] or stage.ends == "random"):
        yield (
            f"{' and '.join(of_clean)}: terms are of clean samples, and jumps to the starts of several segments, "
            "or to random ends, end at noisy ones: they need num_segments: [1] and ends: segment, or method: "
            "inter_segment; adversarial takes jumps: all"
        )
    for term in (stage.matching, stage.adversarial):
        if term:
            yield from term.conflicts(sum(stage.steps_per_phase))
    if stage.adversarial and of_all:
        if stage.method != "segments":
            yield f"adversarial.jumps: all has no effect with method: {stage.method}: all jumps end at 0"
        if stage.adversarial.real == "images":
            yield "adversarial.real: images are clean: with them leave jumps: all out"
    if stage.adversarial and stage.adversarial.sees_start and stage.adversarial.real == "images":
        yield "adversarial.sees_start: pictures of real: images are the ends of no jump: leave it out"
    if stage.distance_weight != 1.0 and (not stage.terms or stage.method == "simulation"):
        yield "distance_weight has no effect without both a distance and a term beside it"
    if stage.method == "simulation":
        if stage.per_phase("distance") != ["l2"]:
            yield "method: simulation has no distance: leave it out"
        if stage.prompts is None:
            yield "method: simulation needs prompts: a prompt file"
        if stage.matching is None and (stage.adversarial is None or stage.adversarial.real != "images"):
            yield "method: simulation is of the terms alone: it needs matching, or adversarial on images"
        if stage.adversarial and stage.adversarial.real != "images":
            yield (
                "adversarial.real: milestones is the target of a distance, and method: simulation has none: take "
                "real: images"
            )
