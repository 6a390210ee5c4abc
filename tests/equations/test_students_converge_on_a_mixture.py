"""Trained by our own loop, a small network becomes the true map: teacher, store, draws, loss, phases, sampler.

The stages `trajectories` and `distill` run whole; only the teacher is replaced (`toy.py`) by an exact one, so that an
error here is a wrong formula, draw or setting. Every test runs under the variance-preserving schedule and under
rectified flow. Distances are in units of the data's standard deviation. On the line the teacher itself, taking K steps,
is off by 0.09, 0.21, 0.46 and 0.80 for K = 8, 4, 2 and 1 (VP), and by 0.09, 0.19, 0.40 and 0.88 (flow): an
untrained student starts there.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from equations import toy
from equations.gaussian import LineMixture, Mixture, mixture_1d, mixture_2d
from equations.toy import SCHEDULES, Denoiser, Network
from mlcm_rl.data import training_points
from mlcm_rl.data.training_points import Batch, Draw, StoredStates
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.equations import consistency
from mlcm_rl.equations.segments import milestones, sampling_times
from mlcm_rl.models.perceptual import Distances
from mlcm_rl.recipe import Distill
from mlcm_rl.stages import distill
from mlcm_rl.stages.distill import PhaseSettings

NUM_STEPS = 500  # of a phase on the line
EITHER = [pytest.param("vp", marks=pytest.mark.slow), "flow"]


@dataclass(frozen=True)
class Line:
    """The one-dimensional experiment under one schedule: shared by the tests, changed by none."""

    schedule: str
    teacher: LineMixture
    store: Path
    held_out: Tensor  # (1024, 49, 1, 1, 1)
    start: Network


@pytest.fixture(scope="module", params=EITHER)
def line(request, tmp_path_factory) -> Line:
    schedule, teacher = request.param, mixture_1d()
    store = toy.store_of(teacher, schedule, 4096, 1024, tmp_path_factory.mktemp("line"))
    start = toy.network_like(teacher, schedule, width=64, num_steps=1500, seed=0)
    return Line(schedule, teacher, store, toy.held_out(store), start)


def errors(student: Denoiser, line: Line, num_segments: int) -> tuple[float, float]:
    """Of the whole chain of K jumps, and of the worst jump above the last segment (0 for K = 1), on held-out noise."""
    *upper, _ = toy.jump_errors(student, line.held_out, num_segments)
    return toy.chain_error(student, line.held_out, num_segments, num_segments), max(upper, default=0.0)


# For the chain and for its upper jumps. Measured under VP, the worse of both targets: (.027, .0038), (.032, .0086),
# (.056, .016), (.052, 0), and (.039, .0059) at K = 8 from two other seeds; the least of the mistakes below is
# (.042, .0094) at K = 8. Under flow, the worst of three seeds and both targets: (.012, .0060), (.017, .0072),
# (.025, .011), (.058, 0); the least mistake is (.030, .0068) at K = 8.
BOUNDS = {
    "vp": {8: (0.06, 0.008), 4: (0.06, 0.014), 2: (0.07, 0.03), 1: (0.09, 0.0)},
    "flow": {8: (0.02, 0.012), 4: (0.03, 0.014), 2: (0.04, 0.025), 1: (0.09, 0.0)},
}


def within_bounds(student: Denoiser, line: Line, num_segments: int) -> bool:
    chain, upper = BOUNDS[line.schedule][num_segments]
    chain_error, upper_error = errors(student, line, num_segments)
    return chain_error <= chain and upper_error <= upper


@pytest.mark.parametrize("target", ["consistency", pytest.param("trajectory", marks=pytest.mark.slow)])
def test_progressive_training_reaches_the_true_map_of_each_phase(line, tmp_path, target):
    """K = 8, 4, 2, 1 in turn, each checked at its own boundaries, against the teacher and against the exact flow."""
    noise, end = line.held_out[:, 0], line.held_out[:, -1]
    times = torch.full((len(noise),), 999), torch.zeros(len(noise), dtype=torch.int64)
    exact = line.teacher.flow(noise.flatten(1).double(), *times, SCHEDULES[line.schedule]).float().view_as(end)
    assert toy.distance(end, exact) < 0.02  # what 48 steps of DDIM leave

    pair = "random" if target == "consistency" else "next"
    students = toy.distilled(line.start, line.store, tmp_path, num_steps=NUM_STEPS, target=target, pair=pair)
    bounds = BOUNDS[line.schedule]
    assert [student.num_segments for student in students] == list(bounds)
    for student, (num_segments, (bound, _)) in zip(students, bounds.items(), strict=True):
        true_error = toy.distance(toy.ends(student.denoiser, noise, sampling_times(num_segments)), exact)
        chain, upper = errors(student.denoiser, line, num_segments)
        print(f"{target} K={num_segments}: chain {chain:.4f}, upper jumps {upper:.4f}, exact {true_error:.4f}")
        assert within_bounds(student.denoiser, line, num_segments)
        assert true_error < bound + 0.02


def start_of_the_segment_above(t: Tensor, num_segments: int) -> Tensor:
    """Wrong: t in [t^k, t^(k+1)), so that a milestone is its own start."""
    ends = milestones(num_segments)
    return ends[(torch.searchsorted(ends, t, right=True) - 1).clamp(max=num_segments - 1)]


def start_of_eight(t: Tensor, num_segments: int) -> Tensor:
    """Wrong: K is ignored."""
    return milestones(8)[(torch.searchsorted(milestones(8), t) - 1).clamp(min=0)]


def no_transfer(x_r: Tensor, x0: Tensor, r: Tensor, s: Tensor, schedule) -> Tensor:
    """Wrong: the target is the pair's second point itself."""
    return x_r


def transfer_without_anchor(x_r: Tensor, x0: Tensor, r: Tensor, s: Tensor, schedule) -> Tensor:
    """Wrong: at r = s the network's own x0 is taken."""
    at_start = (r == s)[:, None, None, None]
    return torch.where(at_start, x0, consistency.transfer(x_r, x0, r, s, schedule))


def of_the_first_phase(stage: Distill, phase: int) -> PhaseSettings:
    """Wrong: every phase is trained as the first."""
    return PhaseSettings(stage, 0)


class EndsAbove(StoredStates):
    """Wrong: jumps end one stored state above the segment's start."""

    def draw_for(self, *arguments: object) -> Draw:
        draw = super().draw_for(*arguments)
        return replace(draw, s=self.times[self._positions(draw.s) - 1])


def one_early(point: str) -> type[StoredStates]:
    """Wrong: the state at `point`, which is r or s, is the stored one before it."""

    class OneEarly(StoredStates):
        def realise(self, draw: Draw) -> Batch:
            before = self.times[self._positions(getattr(draw, point)) - 1]
            early = super().realise(replace(draw, **{point: before}))
            return replace(super().realise(draw), **{f"x_{point}": getattr(early, f"x_{point}")})

    return OneEarly


def with_transfer(mutant: Callable[..., Tensor]) -> SimpleNamespace:
    """The equations as the loop sees them, the target's transfer being `mutant`: the loss keeps its own."""
    return SimpleNamespace(**vars(consistency) | {"transfer": mutant})


@pytest.mark.parametrize(
    ("module", "name", "mutant", "settings"),
    [
        (training_points, "segment_start", start_of_the_segment_above, {}),
        (training_points, "segment_start", start_of_eight, {"num_segments": [4]}),
        (distill, "consistency", with_transfer(no_transfer), {}),
        (distill, "consistency", with_transfer(transfer_without_anchor), {}),
        (distill, "StoredStates", one_early("r"), {}),
        pytest.param(distill, "StoredStates", one_early("s"), {"target": "trajectory"}, marks=pytest.mark.slow),
        pytest.param(
            *(distill, "PhaseSettings", of_the_first_phase),
            {"num_segments": [8, 4], "num_steps": [1, NUM_STEPS]},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["milestone", "K", "transfer", "anchor", "state at r", "state at s", "phase"],
)
def test_a_mistake_misses_the_bounds(line, tmp_path, monkeypatch, module, name, mutant, settings):
    """The bounds tell a right student from a wrong one. Measured, chain and upper jumps, under VP and under flow:

    without a mistake at K = 8                       (.027, .0036)   (.011, .0059)
    a milestone that starts its own segment          (.042, .0094)   (.030, .0068)
    K ignored                                        (.128, .044)    (.101, .040)
    target not transferred                           (.086, .028)    (.087, .042)
    state before the pair's second point             (.084, .022)    (.083, .041)
    state before the segment's start                 (.057, .014)    (.052, .022)
    phase before                                     (.128, .044)    (.101, .040)

    Without the anchor training diverges (chain beyond 1e7).
    """
    settings = {"num_segments": [8], "num_steps": NUM_STEPS, "target": "consistency"} | settings
    settings |= {"pair": "random"} if settings["target"] == "consistency" else {}
    with monkeypatch.context() as patched:
        patched.setattr(module, name, mutant)
        student = toy.distilled(line.start, line.store, tmp_path, **settings)[-1]
    num_segments = settings["num_segments"][-1]
    print(f"{name} {mutant} K={num_segments}: {errors(student.denoiser, line, num_segments)}")
    assert not within_bounds(student.denoiser, line, num_segments)


# --- without training ---------------------------------------------------------------------------------------------


def test_a_perfect_student_of_k_segments_is_exact_on_its_boundaries(line):
    for num_segments in (8, 4, 2, 1):
        f = toy.perfect(line.teacher, line.schedule, num_segments)
        assert toy.chain_error(f, line.held_out, num_segments, num_segments) < 1e-4


def worst_loss(line: Line, num_segments: int, target: str, pair: str, kind: type[StoredStates] = StoredStates) -> float:
    """The largest loss in a batch that the loop would train a perfect student on."""
    stage = Distill(num_segments=[num_segments], num_steps=1, target=target, pair=pair, batch_size=256)
    settings, student = PhaseSettings(stage, 0), toy.perfect(line.teacher, line.schedule, num_segments)
    base, rt = toy.base_of(student), SimpleNamespace(swapped=lambda weights: nullcontext())
    source = kind(stage, base, Store(line.store), 0)
    draw = source.draw(0, settings.num_segments, settings.pair, torch.Generator().manual_seed(0))
    measure = Distances(stage, base, None, 0).of("l2", 0)
    network = distill.Network(rt, base, student, {})
    return distill.loss(settings, network, source.realise(draw), measure).max().item()


WAYS = [("trajectory", "next"), ("consistency", "next"), ("consistency", "random")]


@pytest.mark.parametrize("num_segments", [8, 4, 2, 1])
def test_a_perfect_student_has_nothing_to_learn(line, num_segments):
    """At any stored time, by either target and any pair; a draw that is off by one stored state has something."""
    for target, pair in WAYS:
        right, above = (worst_loss(line, num_segments, target, pair, kind) for kind in (StoredStates, EndsAbove))
        early = worst_loss(line, num_segments, target, pair, one_early("s" if target == "trajectory" else "r"))
        print(f"K={num_segments} {target} {pair}: {right:.1e}, ends above {above:.1e}, one early {early:.1e}")
        assert right < 1e-9
        assert not any(loss < 1e-5 for loss in (above, early))  # or NaN: a perfect student has no x0 at time 0


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
    schedule: str
    teacher: Mixture
    store: Path
    held_out: Tensor
    fresh: Tensor
    start: Network

    def row(self, name: str, f: Denoiser, conditioned: bool = False) -> Row:
        noise, steps = self.held_out[:, 0], (1, 2, 4, 8)
        error = {n: toy.chain_error(f, self.held_out, n, 1, conditioned) for n in steps}
        samples = {n: toy.ends(f, noise, sampling_times(n), 1.0, n, conditioned) for n in steps}
        row = Row(name, error, {n: toy.sliced_wasserstein(x, self.fresh) for n, x in samples.items()})
        print(row, flush=True)
        return row

    def trained(self, name: str, folder: Path, **settings: object) -> list[Row]:
        """The student after each phase."""
        folder /= name.replace(" ", "-")
        folder.mkdir()
        students = toy.distilled(self.start, self.store, folder, batch_size=192, **settings)
        return [self.row(f"{name}, {one.folder.name}", one.denoiser, one.conditioned) for one in students]


@pytest.fixture(scope="module", params=EITHER)
def plane(request, tmp_path_factory) -> Plane:
    schedule, teacher = request.param, mixture_2d()
    store = toy.store_of(teacher, schedule, 16384, 4096, tmp_path_factory.mktemp("plane"))
    fresh = teacher.sample(4096, torch.Generator().manual_seed(0)).float()
    start = toy.network_like(teacher, schedule, width=128, num_steps=4000, seed=0)
    return Plane(schedule, teacher, store, toy.held_out(store), fresh, start)


@pytest.mark.slow
def test_each_student_is_right_with_its_own_sampler(plane, tmp_path):
    """The main facts on exact data, one table (about five minutes of one core; run with -s to read it).

    The jump to a segment's start is another function for each K. So a perfect student of one segment gets worse with
    deterministic steps and stays exact when it re-noises; an unconditioned student is good at its own K only, and a
    later phase forgets the earlier; one student conditioned on its target is near each dedicated one.
    """
    print("\n| student | deterministic, error at 1 2 4 8 | re-noised, SW at 1 2 4 8 |")
    teacher = plane.row("teacher, N steps", toy.exact(plane.teacher, plane.schedule))
    ideal = plane.row("perfect K=1", toy.perfect(plane.teacher, plane.schedule, 1))

    dedicated = {}
    for k in (8, 4, 2, 1):
        (dedicated[k],) = plane.trained(f"K={k} trajectory", tmp_path, num_segments=[k], num_steps=BUDGET)
    skips = {"num_segments": [1], "num_steps": BUDGET, "target": "consistency"}
    (random_skip,) = plane.trained("random skip", tmp_path, pair="random", **skips)
    (one_step,) = plane.trained("one grid step", tmp_path, **skips)

    snapshots, final = {}, {}
    for target in ("trajectory", "consistency"):
        rows = plane.trained(f"progressive {target}", tmp_path, num_steps=BUDGET // 4, target=target)
        snapshots |= {(target, k): row for k, row in zip((8, 4, 2, 1), rows, strict=True)}
        final[target] = rows[-1]

    settings = {"num_segments": [1], "condition_on_target": True, "distance": "huber"}
    (conditioned,) = plane.trained("told its target", tmp_path, num_steps=BUDGET, **settings)

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
        assert conditioned.error[n] < 1.6 * dedicated[n].error[n]  # VP: 1.50, 1.24, 1.14, 1.02; flow at most 1.16
        assert conditioned.error[n] < max(final["consistency"].error[n], dedicated[8].error[n])
