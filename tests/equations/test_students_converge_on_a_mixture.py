"""Trained by our equations alone, a small network becomes the true map: teacher, store, loss, sampler, end to end.

The teacher is exact, so nothing stands between an error here and a wrong formula. Distances are in units of the data's
standard deviation. On the line the teacher itself, taking K steps, is off by 0.09, 0.21, 0.45 and 0.79 for K = 8, 4, 2
and 1: that is where an untrained student starts.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from equations import toy
from equations.gaussian import LineMixture, Mixture, mixture_1d, mixture_2d
from equations.toy import GRID, SCHEDULE, Phase, Student
from mlcm_rl.equations.consistency import transfer
from mlcm_rl.equations.segments import milestones, sampling_times


@dataclass(frozen=True)
class Line:
    """The one-dimensional experiment: shared by the tests, changed by none."""

    teacher: LineMixture
    states: Tensor  # (4096, 49, 1)
    held_out: Tensor  # (1024, 49, 1)
    start: Student


@pytest.fixture(scope="module")
def line() -> Line:
    teacher = mixture_1d()
    noise = torch.randn(5120, 1, generator=torch.Generator().manual_seed(0))
    states = toy.solve(teacher, noise, GRID)
    start = toy.student_like(teacher, width=64, num_steps=1500, seed=0)
    return Line(teacher, states[:4096], states[4096:], start)


def errors(student: Student, line: Line, num_segments: int) -> tuple[float, float]:
    """Of the whole chain of K jumps, and of the worst jump above the last segment (0 for K = 1), on held-out noise."""
    *upper, _ = toy.jump_errors(student.x0, line.held_out, num_segments)
    return toy.chain_error(student.x0, line.held_out, num_segments, num_segments), max(upper, default=0.0)


# For the chain and for its upper jumps. The worst of three seeds and both targets: (.048, .0067), (.045, .0066),
# (.051, .016), (.065, 0); the least of what the wrong formulas below gave on the same seeds: (.088, .0095) at K = 8.
BOUNDS = {8: (0.06, 0.008), 4: (0.06, 0.014), 2: (0.07, 0.03), 1: (0.09, 0.0)}


def within_bounds(student: Student, line: Line, num_segments: int) -> bool:
    chain, upper = BOUNDS[num_segments]
    chain_error, upper_error = errors(student, line, num_segments)
    return chain_error <= chain and upper_error <= upper


@pytest.mark.parametrize("target", ["consistency", "trajectory"])
def test_progressive_training_reaches_the_true_map_of_each_phase(line, target):
    """K = 8, 4, 2, 1 in turn, each checked at its own boundaries, against the teacher and against the exact flow."""
    student = copy.deepcopy(line.start)
    noise, end = line.held_out[:, 0], line.held_out[:, -1]
    times = torch.full((len(noise),), 999), torch.zeros(len(noise), dtype=torch.int64)
    exact = line.teacher.flow(noise.double(), *times, SCHEDULE).float()
    assert toy.distance(end, exact) < 0.02  # what 48 steps of DDIM leave

    for num_segments, (bound, _) in BOUNDS.items():
        toy.train(student, line.states, Phase(num_segments, 1500, target, "random"), seed=num_segments)
        landed = toy.sample(student.x0, noise, sampling_times(num_segments), 0.0, torch.Generator())
        chain, upper = errors(student, line, num_segments)
        true_error = toy.distance(landed, exact)
        print(f"{target} K={num_segments}: chain {chain:.4f}, upper jumps {upper:.4f}, exact {true_error:.4f}")
        assert within_bounds(student, line, num_segments)
        assert true_error < bound + 0.02


def start_of_the_segment_above(t: Tensor, num_segments: int) -> Tensor:
    """Wrong: t in [t^s, t^(s+1)), so that a milestone is its own start."""
    ends = milestones(num_segments)
    return ends[(torch.searchsorted(ends, t, right=True) - 1).clamp(max=num_segments - 1)]


def start_of_eight(t: Tensor, num_segments: int) -> Tensor:
    """Wrong: K is ignored."""
    return milestones(8)[(torch.searchsorted(milestones(8), t) - 1).clamp(min=0)]


def no_transfer(x_r: Tensor, x0: Tensor, r: Tensor, s: Tensor, schedule) -> Tensor:
    """Wrong: the target is the pair's second point itself."""
    return x_r


def transfer_without_anchor(x_r: Tensor, x0: Tensor, r: Tensor, s: Tensor, schedule) -> Tensor:
    """Wrong: at r = s the network's own word is taken."""
    at_start = (r == s)[:, None]
    return torch.where(at_start, x0, transfer(x_r, x0, r, s, schedule))


@pytest.mark.parametrize(
    ("name", "mutant", "num_segments"),
    [
        ("segment_start", start_of_the_segment_above, 8),
        ("segment_start", start_of_eight, 4),
        ("transfer", no_transfer, 8),
        ("transfer", transfer_without_anchor, 8),
    ],
)
def test_a_wrong_formula_misses_the_bounds(line, monkeypatch, name, mutant, num_segments):
    """The bounds mean something. Measured, chain and upper jumps, with the right formula (.026, .004) at K = 8:

    a milestone that starts its own segment (.039, .0097), K ignored (.114, .040), target not transferred (.088, .026);
    without the anchor training runs away (beyond 1e7).
    """
    student = copy.deepcopy(line.start)
    with monkeypatch.context() as patch:
        patch.setattr(toy, name, mutant)
        toy.train(student, line.states, Phase(num_segments, 1500, "consistency", "random"), seed=num_segments)
    print(f"{mutant.__name__} K={num_segments}: {errors(student, line, num_segments)}")
    assert not within_bounds(student, line, num_segments)


def test_a_perfect_student_of_k_segments_is_exact_on_its_boundaries(line):
    for num_segments in (8, 4, 2, 1):
        f = toy.perfect(line.teacher, num_segments)
        assert toy.chain_error(f, line.held_out, num_segments, num_segments) < 1e-4


# --- the whole comparison, in two dimensions ---------------------------------------------------------------------

BUDGET = 4800


@dataclass(frozen=True)
class Row:
    """Error of the deterministic sampler and sliced Wasserstein distance of the re-noising one, at 1, 2, 4, 8 steps."""

    name: str
    error: dict[int, float]
    spread: dict[int, float]

    def __str__(self) -> str:
        cells = [f"{value:.3f}" for value in (*self.error.values(), *self.spread.values())]
        return f"| {self.name:<34} | {' '.join(cells[:4])} | {' '.join(cells[4:])} |"


@dataclass(frozen=True)
class Plane:
    teacher: Mixture
    states: Tensor
    held_out: Tensor
    fresh: Tensor

    def row(self, name: str, f: toy.Sampler) -> Row:
        noise, generator = self.held_out[:, 0], torch.Generator().manual_seed(1)
        error = {n: toy.chain_error(f, self.held_out, n, 1) for n in (1, 2, 4, 8)}
        samples = {n: toy.sample(f, noise, sampling_times(n), 1.0, generator) for n in (1, 2, 4, 8)}
        row = Row(name, error, {n: toy.sliced_wasserstein(x, self.fresh) for n, x in samples.items()})
        print(row, flush=True)
        return row


@pytest.fixture(scope="module")
def plane() -> Plane:
    teacher, generator = mixture_2d(), torch.Generator().manual_seed(0)
    states = toy.solve(teacher, torch.randn(16384 + 4096, 2, generator=generator), GRID)
    return Plane(teacher, states[:16384], states[16384:], teacher.sample(4096, generator).float())


def trained(plane: Plane, start: Student, *phases: Phase) -> Student:
    student = copy.deepcopy(start)
    for index, phase in enumerate(phases):
        toy.train(student, plane.states, phase, seed=index)
    return student


@pytest.mark.slow
def test_each_student_is_right_with_its_own_sampler(plane):
    """The main facts on exact data, one table (about two minutes of one core; run with -s to read it).

    The jump to a segment's start is another function for each K. So a perfect student of one segment gets worse with
    deterministic steps and stays exact when it re-noises; an unconditioned student is good at its own K only, and a
    later phase forgets the earlier; one student that is told its target is near each dedicated one.
    """
    print("\n| student | deterministic, error at 1 2 4 8 | re-noised, SW at 1 2 4 8 |")
    teacher = plane.row("teacher, N steps", lambda x, t, s: plane.teacher.posterior_mean(x, t, SCHEDULE).float())
    ideal = plane.row("perfect K=1", toy.perfect(plane.teacher, 1))

    start = toy.student_like(plane.teacher, width=128, num_steps=4000, seed=0)
    dedicated = {k: plane.row(f"K={k}, trajectory", trained(plane, start, Phase(k, BUDGET)).x0) for k in (8, 4, 2, 1)}
    random_skip = plane.row("K=1, random skip", trained(plane, start, Phase(1, BUDGET, "consistency", "random")).x0)
    one_step = plane.row("K=1, consistency", trained(plane, start, Phase(1, BUDGET, "consistency")).x0)

    snapshots, final = {}, {}
    for target in ("trajectory", "consistency"):
        student = start
        for k in (8, 4, 2, 1):
            student = trained(plane, student, Phase(k, BUDGET // 4, target))
            snapshots[target, k] = plane.row(f"progressive, {target}, after K={k}", student.x0)
        final[target] = snapshots[target, 1]

    told = toy.student_like(plane.teacher, width=128, num_steps=4000, seed=0, conditioned=True)
    told = plane.row("conditioned, huber", trained(plane, told, Phase(None, BUDGET, distance="huber")).x0)

    assert ideal.error[1] < 1e-3  # a perfect map of one segment ...
    assert min(ideal.error[n] for n in (2, 4, 8)) > 0.05  # ... leaves the trajectory when it takes several
    assert max(ideal.spread.values()) < 0.03  # ... and keeps the distribution when it re-noises
    for k in (8, 4, 2, 1):
        assert dedicated[k].error[k] < 0.6 * teacher.error[k]
        assert dedicated[k].error[k] < 1.15 * min(row.error[k] for row in dedicated.values())
    assert dedicated[1].error[1] < random_skip.error[1] + 0.03 < one_step.error[1] + 0.03
    for target in ("trajectory", "consistency"):
        for k in (8, 4, 2):
            assert snapshots[target, k].error[k] < final[target].error[k]  # the last phase forgets
    for n in (1, 2, 4, 8):
        assert told.error[n] < 1.5 * dedicated[n].error[n]
        assert told.error[n] < max(final["consistency"].error[n], dedicated[8].error[n])
