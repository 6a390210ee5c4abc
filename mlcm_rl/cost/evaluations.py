"""Network evaluations a stage: forward passes of a denoiser on one sample; a guided pass counts two."""

from ..recipe import (
    Distill,
    Dpo,
    Evaluate,
    Feedback,
    Policy,
    Recipe,
    Stage,
    TrainReward,
    TrainTeacher,
    Trajectories,
    Tuning,
)
from ..recipe.experiment import STUDENTS
from .flops import Passes

MEAN_ONLINE_STEPS = 4.5  # of Algorithm 1: 1 to 8 steps, segments drawn evenly


def network_evaluations(stage: Stage, recipe: Recipe) -> int:
    """Forward passes of a denoiser that `stage` takes, samples times passes."""
    taken = passes_of(stage, recipe)
    return round(taken.teacher + taken.student + taken.trained)


def passes_of(stage: Stage, recipe: Recipe) -> Passes:
    """How often `stage` takes each kind of pass."""
    guided = 1 if recipe.teacher.guidance_scale == 1.0 else 2
    if isinstance(stage, TrainReward):
        return Passes()
    if isinstance(stage, TrainTeacher):
        return Passes(trained=stage.num_steps * stage.batch_size)
    if isinstance(stage, Trajectories):
        return Passes(teacher=(stage.num_trajectories + stage.num_held_out) * stage.num_steps * guided)
    if isinstance(stage, Distill):
        teacher, target, student = map(sum, zip(*evaluations_per_phase(stage, guided), strict=True))
        return Passes(teacher=teacher, student=target, trained=student)
    if isinstance(stage, Feedback | Dpo | Policy):
        return _passes_of_tuning(stage)
    num_pictures = stage.num_prompts * stage.images_per_prompt
    by_teacher, by_students = rows_of_teacher(stage, recipe), rows_of_students(stage, recipe)
    return Passes(
        teacher=num_pictures * sum(by_teacher),
        student=num_pictures * sum(by_students),
        decoded=num_pictures * (len(by_teacher) + len(by_students)),
    )


def _passes_of_tuning(stage: Feedback | Dpo | Policy) -> Passes:
    samples = stage.num_steps * stage.batch_size
    looks = -(-stage.num_steps // stage.guard.every) + 1  # and one at the reference
    watched = looks * stage.guard.num_prompts
    trained = samples * evaluations_with_gradient(stage)
    evaluations = round(samples * evaluations_per_sample(stage)) + watched * stage.sampling_steps
    scored = graded = 0
    if isinstance(stage, Feedback):
        graded = samples * (stage.num_copies if stage.gradient == "low_variance" else 1)
    elif isinstance(stage, Policy):
        scored = samples
    elif not stage.pairs:
        scored = samples * stage.num_generations
    return Passes(student=evaluations - trained, trained=trained, scored=scored, graded=graded, watched=watched)


def evaluations_per_phase(stage: Distill, guided: int) -> list[tuple[float, float, float]]:
    """Evaluations of teacher, target and student in each phase. `guided` is what a teacher pass counts, 1 or 2."""
    if stage.method == "inter_segment":
        teacher = stage.num_teacher_steps * guided
        extra = stage.num_student_steps if stage.renoise == "student" else 0
    else:
        teacher = {"trajectories": 0, "online": (MEAN_ONLINE_STEPS + 1) * guided, "data": guided}[stage.source]
        extra = 0
    costs = []
    for steps, target in zip(stage.per_phase("num_steps"), stage.per_phase("target"), strict=True):
        samples = steps * stage.batch_size
        with_target = stage.method == "inter_segment" or target == "consistency"
        costs.append((samples * teacher, samples * (with_target + extra), samples))
    return costs


def evaluations_per_sample(stage: Feedback | Dpo | Policy) -> float:
    """Evaluations that one sample of a tuning step takes, one pair for dpo; those of the reference are counted."""
    steps = stage.sampling_steps
    if isinstance(stage, Dpo):
        measured = {"endpoint": steps, "diffusion_dpo": 1, "pso": steps - 1}[stage.form]
        sampled = 0 if stage.pairs else stage.num_generations * steps
        return sampled + measured * 2 * 2
    if isinstance(stage, Policy):
        return steps + (steps - 1) * (2 + stage.num_iterations)
    copies = stage.num_copies if stage.gradient == "low_variance" else 1
    sampled = {
        "last": steps,
        "random": steps - (stage.num_grad_steps - 1) / 2,
        "low_variance": steps + copies,
    }[stage.gradient]
    return sampled + copies * (stage.anchor > 0) + (steps + 2) * (stage.kl > 0) + (stage.consistency > 0)


def evaluations_with_gradient(stage: Feedback | Dpo | Policy) -> int:
    """Evaluations of those that carry gradient to what is trained."""
    steps = stage.sampling_steps
    if isinstance(stage, Dpo):
        return 2 * {"endpoint": steps, "diffusion_dpo": 1, "pso": steps - 1}[stage.form]
    if isinstance(stage, Policy):
        return (steps - 1) * stage.num_iterations
    of_sample = {"last": stage.num_grad_steps, "random": 1, "low_variance": stage.num_copies}[stage.gradient]
    return of_sample + (stage.kl > 0) + (stage.consistency > 0)


def evaluations_per_row(stage: Evaluate, recipe: Recipe) -> list[int]:
    """Evaluations that a picture of each row takes, at most: rows that would be equal are drawn once.

    Students are those of `also` and the recipe's own; the snapshots of `also` are not known before it is read.
    """
    return rows_of_teacher(stage, recipe) + rows_of_students(stage, recipe)


def rows_of_teacher(stage: Evaluate, recipe: Recipe) -> list[int]:
    """Evaluations a picture of the references' rows and of the undistilled teacher's."""
    guided = 1 if recipe.teacher.guidance_scale == 1.0 else 2
    references = [guided * n for n in stage.teacher_steps]
    undistilled = [n for n in stage.num_steps for _ in range(2 if guided == 2 and n % 2 == 0 else 1)]
    return references + undistilled * len(stage.teacher_solvers)


def rows_of_students(stage: Evaluate, recipe: Recipe) -> list[int]:
    """Evaluations a picture of the students' rows."""
    num_students = len(stage.also) + len({one.kind for one in recipe.stages} & set(STUDENTS))
    students = stage.num_steps * len(stage.gammas) * len(stage.grids) * num_students
    tuned = {one.kind: tuned_gamma(one, recipe) for one in recipe.stages if isinstance(one, Tuning)}
    unlisted = [gamma for gamma in tuned.values() if gamma not in stage.gammas]
    at_own_gamma = len(unlisted) + len(set(unlisted))  # tuned ones, and the distilled one beside them
    distilled = [one for one in recipe.stages if isinstance(one, Distill)]
    if stage.students == "snapshots" and distilled:
        at_own_gamma += len(distilled[-1].segments) - 1
    return students + stage.num_steps * len(stage.grids) * at_own_gamma


def tuned_gamma(stage: Tuning, recipe: Recipe) -> float:
    """The gamma that `stage` tunes under: its own, or what suits the student that the recipe distils."""
    if stage.gamma is not None:
        return stage.gamma
    distilled = [one for one in recipe.stages if isinstance(one, Distill)][-1]
    return distilled.default_gamma
