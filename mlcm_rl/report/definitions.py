"""Definitions of a report's columns."""

from dataclasses import dataclass

from ..data.scenes import RELATIONS


@dataclass(frozen=True)
class Metric:
    """The meaning of a key of a row's metrics."""

    label: str
    lower_is_better: bool
    definition: str


def metric(key: str) -> Metric:
    """Return the metric of `key`: of METRICS, reward/<name>, geneval@<task>; r@<k>, right@<what>, maybe /<language>."""
    name, _, rest = key.partition("/")
    if name == "reward":
        return Metric(rest, False, f"Reward model `{rest}` (see its card in reward_models/), higher is better.")
    if name.startswith("r@"):
        return Metric(f"R@{name[2:]} {rest}".strip(), False, RETRIEVAL.format(k=name[2:]))
    if name.startswith("right@"):
        what = name.removeprefix("right@")
        return Metric(f"Right: {what.replace('in_', 'in ')} {rest}".strip(), False, QUESTIONS[what])
    if name.startswith("geneval@"):
        task = name.removeprefix("geneval@")
        return Metric(f"GenEval: {task}", False, f"Share of right pictures, of the prompts of GenEval's task `{task}`.")
    return METRICS[name]


DISTRIBUTION = ("teacher_kid", "teacher_fid", "teacher_patch_kid", "teacher_patch_fid")  # to the reference's pictures
BY_LANGUAGE = ("r@", "right@")  # beginnings of the metrics that are given for each language too
RIGHT = "right@all"
GENEVAL = "geneval"


def is_detail(key: str) -> bool:
    """Return whether a metric is a part of what RIGHT or GENEVAL sums up, which has a table of its own."""
    return key.startswith((f"{GENEVAL}@", "right@")) and key.partition("/")[0] != RIGHT


RETRIEVAL = (
    "Share of pictures whose concept is among the {k} nearest of the judge's prototypes, by cosine; a tie counts "
    "against the picture. Language enters through the prompt alone: the judge reads none."
)
QUESTIONS = {
    "all": "Share of pictures on which a judge of scenes sees everything that the prompt asks for, and nothing else.",
    "objects": "Share of pictures on which the judge sees the things that the prompt names, and no others.",
    "count": "Share of pictures with as many objects as the prompt asks for.",
    "relation": "Share of pictures on which two things stand as the prompt asks, of the prompts that ask for it.",
    "style": "Share of pictures with all objects in the style asked for, of the prompts that name one.",
    "background": "Share of pictures with the background asked for, of the prompts that name one.",
    **{
        f"in_{relation}": f"Share of pictures with everything right, of the prompts of the kind {relation}."
        for relation in RELATIONS
    },
}
TO_TEACHER = (
    "Between the reference's pictures of the same prompts and these, by features of the judge where there is one, else "
    "of Inception."
)
PATCHES = (
    "The same on crops at full resolution (half a side, at most 299 pixels; the same places in every row): of "
    "sharpness and texture, not of composition."
)
METRICS = {
    "distance": Metric(
        "Distance",
        True,
        "Mean squared difference, per latent value, to the guided teacher's sample from the same noise; both are the "
        "x0 of the last step.",
    ),
    "kid": Metric(
        "KID (judge features)",
        True,
        "Kernel distance (Binkowski et al.) between the judge's features of these pictures and of real ones: unbiased, "
        "so it can be negative; kernel (x.y + 1)^3 on unit-length features, mean over disjoint subsets of the prompts; "
        "not comparable with a KID on Inception features.",
    ),
    "diversity": Metric(
        "Diversity",
        False,
        "Mean distance between the features of the pictures of one prompt, higher is more varied: the judge's where "
        "there is one, else Inception's.",
    ),
    "fid": Metric(
        "FID",
        True,
        "Frechet distance (Heusel et al.) between Inception features of these pictures and "
        "of the real ones, which are cropped to their central square and resized to the teacher's resolution. Biased "
        "upwards for few pictures: it compares rows of equal numbers, by the same network file and real pictures.",
    ),
    "inception_kid": Metric(
        "KID (Inception features)",
        True,
        "Kernel distance (Binkowski et al.) between Inception features of these pictures and of the real ones: "
        "unbiased, so it can be negative; kernel (x.y / D + 1)^3, mean over disjoint subsets of the prompts.",
    ),
    "teacher_kid": Metric(
        "KID to the teacher",
        True,
        f"{TO_TEACHER} Kernel distance, unbiased, so it can be negative: 0 where the pictures could be the teacher's "
        "own. The distance asks for the teacher's very picture of the same noise, this for one that it might draw.",
    ),
    "teacher_patch_kid": Metric(
        "KID to the teacher, patches",
        True,
        f"{PATCHES} Kernel distance: a blurred picture is near in Distance and far in this.",
    ),
    "teacher_fid": Metric(
        "FID to the teacher",
        True,
        f"{TO_TEACHER} Frechet distance, the field's FID-T: biased upwards for few pictures, so that it compares rows "
        "of equal numbers, by one network.",
    ),
    "teacher_patch_fid": Metric(
        "FID to the teacher, patches",
        True,
        f"{PATCHES} Frechet distance, the field's patch FID-T: biased upwards for few pictures.",
    ),
    "geneval": Metric(
        "GenEval",
        False,
        "Mean over GenEval's tasks (Ghosh et al.) of the shares of pictures on which an object detector sees what the "
        "prompt asks for: objects, their number, colours (by the recipe's CLIP) and places. The detector is the "
        "recipe's, without GenEval's masks, so rows compare, not published figures.",
    ),
    "clip": Metric(
        "CLIP score",
        False,
        "100 max(cos, 0) of picture and prompt (Hessel et al.) by the CLIP that the recipe names, higher is better.",
    ),
}
LATENCY = (
    "Milliseconds a picture: sampling and decoding, the prompt already encoded; median over batches, \u00b1 the "
    "standard error of that median by resampling the batches (none where there is one batch)."
)
TRAINING = (
    "Network evaluations that the student's training took in all: forward passes of a denoiser for one sample, a "
    "guided one counting two. In parentheses, for each training sample drawn: the teacher's (its stored trajectories, "
    "solved once, over all samples drawn from them; or its passes online) + the student's and its target's. With "
    "guidance the paper's Algorithm 1 is 11 + 2, LCM 2 + 2. A chain of stages is summed, a snapshot counted up to its "
    "own step; the teacher's own training and what only looks (held-out losses, guards, sample grids) are not counted."
)
WIN_RATE = (
    "Share of pictures of the tuned student that a reward scores higher than the distilled student's from the same "
    "noise; ties count half. A prompt with several pictures counts once, so the standard error is over prompts."
)
GAIN = (
    "(mean score - the distilled student's mean) / the deviation of the distilled student's scores, over the guard's "
    "fixed prompts and noise; several rewards are summed by their weights. 0 is the student as it was distilled."
)
