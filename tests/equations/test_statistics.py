"""Intervals of shares, the unit of a reward, wins."""

import math

import pytest
import torch

from mlcm_rl.equations.statistics import deviation, wilson_interval, wins


@pytest.mark.parametrize(("won", "count"), [(0, 5), (3, 8), (8, 8), (50, 100)])
def test_the_ends_of_a_shares_interval_are_those_that_the_share_is_z_deviations_from(won, count):
    share = won / count
    for end in wilson_interval(share, count, 1.96):
        assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count, abs=1e-12)


def test_all_of_eight_is_not_certain():
    low, high = wilson_interval(1.0, 8)
    assert low == pytest.approx(8 / (8 + 1.96**2))  # 0.676
    assert high == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("scores", "unit"),
    [
        ([1.0, 3.0], math.sqrt(2.0)),
        ([1.0, math.nan, 3.0, math.nan], math.sqrt(2.0)),  # a reward of one language on prompts of two
        ([5.0, 5.0, math.nan], 0.05),  # a hundredth of the largest
        ([-2.0], 0.02),
        ([0.0, 0.0], 0.0),
        ([math.nan], 0.0),
        ([], 0.0),
    ],
)
def test_a_unit_is_of_the_prompts_that_a_reward_reads(scores, unit):
    assert deviation(torch.tensor(scores)) == pytest.approx(unit)


def test_a_tie_is_half_a_win_and_what_was_not_read_is_none():
    scores, others = torch.tensor([2.0, 1.0, 1.0, math.nan, 1.0]), torch.tensor([1.0, 2.0, 1.0, 1.0, math.nan])
    won = wins(scores, others)
    assert won[:3].tolist() == [1.0, 0.0, 0.5]
    assert won[3:].isnan().all()
