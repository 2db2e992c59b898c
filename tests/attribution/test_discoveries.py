"""What counts as found among many, and intervals given that it was."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from attribution.coding import Segment
from attribution.discoveries import Examined, benjamini_hochberg, conditional_interval, conditional_intervals


@pytest.mark.parametrize("mean", [0.0, 1.5, 3.0, 4.5])
def test_intervals_hold_given_the_selection(mean: float) -> None:
    z = np.random.default_rng(1).normal(mean, 1, 60_000)
    for selected in (np.abs(z) >= 3, np.abs(z) < 3):
        some = z[selected][:1_000]
        if len(some) < 100:
            continue
        held = [low <= mean <= high for low, high in (conditional_interval(float(x), 3.0) for x in some)]
        assert np.mean(held) == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / len(some)) ** 0.5)


def test_far_from_the_threshold_the_interval_is_the_usual_one() -> None:
    reach = stats.norm.isf(0.025)
    assert conditional_interval(12.0, 3.0) == pytest.approx((12 - reach, 12 + reach), abs=1e-6)
    assert conditional_interval(-1.0, np.inf) == pytest.approx((-1 - reach, -1 + reach))
    near = conditional_interval(3.6, 3.0)
    assert near[0] < 3.6 - reach and near[1] < 3.6 + reach
    assert conditional_interval(-3.6, 3.0) == pytest.approx((-near[1], -near[0]), abs=1e-4)


def test_intervals_of_many_are_those_of_each() -> None:
    rng = np.random.default_rng(3)
    z, threshold = rng.normal(0, 3, 200), rng.uniform(2.5, 5.5, 200)
    threshold[:5] = np.inf
    low, high = conditional_intervals(z, threshold)
    one_by_one = np.array([conditional_interval(float(a), float(b)) for a, b in zip(z, threshold, strict=True)])
    reached = (np.abs(one_by_one) < 100).all(axis=1)  # ends beyond are where the search for them was given up
    assert reached.mean() > 0.9
    assert low[reached] == pytest.approx(one_by_one[reached, 0], abs=1e-5)
    assert high[reached] == pytest.approx(one_by_one[reached, 1], abs=1e-5)


def test_benjamini_hochberg_is_that_of_scipy() -> None:
    p = np.random.default_rng(0).uniform(0, 0.2, 50)
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))


def test_a_second_pair_of_a_family_is_held_to_more_than_the_echo_of_the_first() -> None:
    """All pairs of a family are significant once one is: the next has to be so as one of all of them."""
    z = np.array([9.0, 8.5, 8.0, 7.5, *np.linspace(0.1, 1.5, 36)])
    segments = tuple(Segment("age", str(i), (i,)) for i in range(40))
    p = 2 * stats.norm.sf(z)
    family = np.array([0] * 20 + [1] * 20)
    examined = Examined(segments, tuple(range(40)), z, np.ones(40), z, benjamini_hochberg(p), family)
    search = examined.search
    assert search.families == 1
    assert search.factor[0] == pytest.approx(10)  # 20 pairs × 2 families, 4 found; as 40 pairs and 4 found
    assert search.further[0] == pytest.approx(20)  # two found at most
