from collections import Counter

import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler
from hypothesis import given
from hypothesis import strategies as st

from mlcm_rl.equations.segments import (
    PAPER_GRIDS,
    draw_jumps,
    draw_steps,
    milestones,
    paper_times,
    phase_at,
    pressed_times,
    remaining_times,
    sampling_times,
    segment_start,
    time_grid,
)

EIGHT = [0, 124, 249, 374, 499, 624, 749, 874, 999]


def test_milestones_are_those_of_the_paper():
    assert milestones(8).tolist() == EIGHT
    assert milestones(4).tolist() == EIGHT[::2]
    assert milestones(2).tolist() == EIGHT[::4]
    assert milestones(1).tolist() == [0, 999]


@pytest.mark.parametrize("num_segments", [1, 2, 4, 8])
def test_every_milestone_is_on_the_stored_grid(num_segments):
    grid = time_grid(48)
    assert set(milestones(num_segments).tolist()) <= set(grid)
    assert grid[:: 48 // num_segments] == milestones(num_segments).flip(0).tolist()


def test_the_grid_is_the_line_from_999_to_0_truncated():
    grid = time_grid(48)
    assert grid[:4] == [999, 978, 957, 936]
    assert grid[-3:] == [41, 20, 0]
    assert grid == [int(time) for time in torch.linspace(999, 0, 49, dtype=torch.float64)]
    assert len(set(grid)) == 49


def test_rounding_the_grid_would_miss_the_milestones():
    rounded = torch.linspace(999, 0, 49, dtype=torch.float64).round().long().tolist()
    assert {375, 250, 125} <= set(rounded)
    assert not {374, 249, 124} & set(rounded)


def test_segment_start_by_hand():
    t = torch.tensor([0, 1, 124, 125, 249, 250, 499, 500, 873, 874, 875, 999])
    assert segment_start(t, 8).tolist() == [0, 0, 0, 124, 124, 249, 374, 499, 749, 749, 874, 874]
    assert segment_start(t, 2).tolist() == [0, 0, 0, 0, 0, 0, 0, 499, 499, 499, 499, 499]
    assert segment_start(t, 1).tolist() == [0] * 12


@pytest.mark.parametrize("num_segments", [1, 2, 4, 8])
def test_a_milestone_belongs_to_the_segment_below(num_segments):
    ends = milestones(num_segments)
    assert segment_start(ends[1:], num_segments).tolist() == ends[:-1].tolist()


@given(t=st.integers(0, 999), num_segments=st.sampled_from([1, 2, 4, 8]))
def test_segment_start_is_the_last_milestone_strictly_below(t, num_segments):
    below = [end for end in milestones(num_segments).tolist() if end < t]
    assert segment_start(torch.tensor([t]), num_segments).item() == max(below, default=0)


@given(t=st.integers(1, 999))
def test_segments_nest(t):
    """Halving K merges pairs of segments, so starts only move down: what progressive training relies on."""
    starts = [segment_start(torch.tensor([t]), k).item() for k in (8, 4, 2, 1)]
    assert starts == sorted(starts, reverse=True)
    for start, num_segments in zip(starts, (8, 4, 2, 1), strict=True):
        assert start in milestones(num_segments).tolist()


def test_phases_by_hand():
    lengths = [3, 1, 2]
    assert [phase_at(step, lengths) for step in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    with pytest.raises(IndexError, match="6"):
        phase_at(6, lengths)


@pytest.mark.parametrize("num_steps", range(1, 9))
@pytest.mark.parametrize("stock_class", [LCMScheduler, TCDScheduler])
def test_default_sampling_times_are_the_stock_ones(stock_class, num_steps):
    """With 8 in the scheduler's configuration: TCD's `set_timesteps` argument of that name means another grid."""
    stock = stock_class(original_inference_steps=8)
    stock.set_timesteps(num_steps)
    assert sampling_times(num_steps) == stock.timesteps.tolist()


def test_sampling_times_by_hand():
    assert sampling_times(1) == [999]
    assert sampling_times(2) == [999, 499]
    assert sampling_times(3) == [999, 749, 374]
    assert sampling_times(4) == [999, 749, 499, 249]
    assert sampling_times(8) == EIGHT[:0:-1]
    assert sampling_times(3, 2) == [999, 749, 499]  # two steps in the noisier half
    assert sampling_times(6, 4) == [999, 874, 749, 624, 499, 249]
    assert sampling_times(3, 8) == sampling_times(3)  # too few steps to hold all boundaries
    assert sampling_times(3, 4) == [999, 749, 374]


@given(num_steps=st.integers(1, 8), num_segments=st.sampled_from([1, 2, 4, 8]))
def test_sampling_times_hold_every_boundary_of_the_student(num_steps, num_segments):
    times = sampling_times(num_steps, num_segments)
    assert len(times) == num_steps
    assert times[0] == 999
    assert times == sorted(set(times), reverse=True)
    assert set(times) <= set(EIGHT[1:])
    if num_steps >= num_segments:
        assert set(milestones(num_segments)[1:].tolist()) <= set(times)


def test_pressed_times_by_hand():
    assert pressed_times([999, 759, 499, 259], 0.5) == [499, 379, 249, 129]
    assert pressed_times([999, 759, 499, 259], 1.0) == [999, 759, 499, 259]
    for strength in (0.0, 1.5, 0.005):  # of the last, three times are 2
        with pytest.raises(ValueError, match="strength is"):
            pressed_times([999, 500, 499, 498], strength)


def test_remaining_times_by_hand():
    assert remaining_times(4, 0.5) == [499, 374, 249, 124]
    assert remaining_times(3, 0.3) == [299, 224, 112]  # 0.3 of 8/8, 6/8, 3/8
    assert remaining_times(4, 0.75, 2) == [749, 624, 499, 249]  # two steps in each half, one of which is cut
    assert remaining_times(1, 0.75, 2) == [749]  # too few to stop at the boundary
    assert remaining_times(8, 0.6, 8) == [599, 549, 499, 437, 374, 312, 249, 124]  # five segments left, three have two


@given(num_steps=st.integers(1, 8), num_segments=st.sampled_from([1, 2, 4, 8]), thousandths=st.integers(10, 1000))
def test_remaining_times_start_at_the_strength_and_stop_at_boundaries(num_steps, num_segments, thousandths):
    times = remaining_times(num_steps, thousandths / 1000, num_segments)
    assert len(times) == num_steps
    assert times == sorted(set(times), reverse=True)
    assert times[0] == thousandths * 999 // 1000
    assert times[-1] > 0
    boundaries = {t for t in milestones(num_segments)[1:-1].tolist() if t < times[0]}
    if num_steps > len(boundaries):
        assert boundaries <= set(times)
    if thousandths == 1000:
        assert times == sampling_times(num_steps, num_segments)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, 0.004])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength is"):
        remaining_times(8, strength)


@pytest.mark.parametrize("num_segments", [16, 32])
def test_no_sampler_visits_the_boundaries_of_more_segments_than_it_has_steps(num_segments):
    assert [sampling_times(n, num_segments) for n in (1, 4, 8)] == [sampling_times(n) for n in (1, 4, 8)]


def test_steps_are_whole_segments_each_drawn_alike():
    """By hand: 4 segments are 999, 749, 499, 249, 0; 32 begin at 999 32 / 32, 999 31 / 32 rounded down, ..."""
    t, s = draw_steps(4, 4000, torch.Generator().manual_seed(0))
    counts = Counter(zip(t.tolist(), s.tolist(), strict=True))
    assert set(counts) == {(999, 749), (749, 499), (499, 249), (249, 0)}
    assert min(counts.values()) > 900
    t, s = draw_steps(32, 4000, torch.Generator().manual_seed(0))
    assert {(999, 967), (967, 936), (62, 31), (31, 0)} < set(zip(t.tolist(), s.tolist(), strict=True))


@pytest.mark.parametrize(("num_steps", "num_segments"), [(0, 1), (9, 1), (4, 3), (4, 12), (4, 0), (4, -2)])
def test_impossible_sampling_times_are_refused(num_steps, num_segments):
    with pytest.raises(ValueError, match=r"num_steps is|num_segments is"):
        sampling_times(num_steps, num_segments)


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_the_papers_times_are_milestones_from_noise_down(num_steps):
    times = paper_times(num_steps)
    assert len(times) == num_steps
    assert times[0] == 999
    assert times == sorted(set(times), reverse=True)
    assert set(times) <= set(EIGHT)
    assert 124 in times or num_steps < 3


def test_a_step_count_outside_the_papers_is_refused():
    assert list(PAPER_GRIDS) == list(range(1, 9))
    with pytest.raises(ValueError, match="num_steps is 9"):
        paper_times(9)


def test_jumps_are_steps_of_samplers_and_every_budget_has_the_same_share():
    budgets = [2, 4, 8]
    t, s = draw_jumps(budgets, 6_000, torch.Generator().manual_seed(0))
    steps = {n: list(zip(sampling_times(n), [*sampling_times(n)[1:], 0], strict=True)) for n in budgets}
    counts = Counter(zip(t.tolist(), s.tolist(), strict=True))
    expected = Counter()
    for n, jumps in steps.items():
        expected.update(dict.fromkeys(jumps, 6000 / 3 / n))
    assert counts.keys() == expected.keys()
    assert all(abs(counts[jump] - count) < 5 * count**0.5 for jump, count in expected.items())
