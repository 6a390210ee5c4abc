"""Intervals of shares."""

import pytest

from mlcm_rl.equations.statistics import wilson_interval


@pytest.mark.parametrize(("won", "count"), [(0, 5), (3, 8), (8, 8), (50, 100)])
def test_the_ends_of_a_shares_interval_are_those_that_the_share_is_z_deviations_from(won, count):
    share = won / count
    for end in wilson_interval(share, count, 1.96):
        assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count, abs=1e-12)


def test_all_of_eight_is_not_certain():
    low, high = wilson_interval(1.0, 8)
    assert low == pytest.approx(8 / (8 + 1.96**2))  # 0.676
    assert high == pytest.approx(1.0)
