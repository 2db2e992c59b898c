"""What users of every kind do with the values of a dimension, put together from margins."""

from __future__ import annotations

import numpy as np
import pytest

from kaleidoscope.kinds import MOST_KINDS, Grouping, Kinds


def odds(rate: float) -> float:
    return rate / (1 - rate)


@pytest.fixture
def world() -> tuple[Kinds, np.ndarray, np.ndarray]:
    """Two groupings that go together, their kinds' shares and click rates with three values, and what is made of
    their margins."""
    share = np.array([[0.3, 0.1, 0.1], [0.05, 0.15, 0.3]])
    own, other = np.array([0.0, -0.7]), np.array([0.4, 0.0, -0.5])
    likes, also = np.zeros((2, 3)), np.zeros((3, 3))
    likes[0, 1], also[2, 0] = 0.9, -0.6
    value_share, taste = np.array([0.5, 0.3, 0.2]), np.array([-0.2, 0.3, 0.1])
    logit = own[:, None, None] + other[None, :, None] + taste + likes[:, None] + also[None]
    rate = 1 / (1 + np.exp(0.4 - logit))
    everybody = np.einsum("ab,abt->t", share, rate)
    overall = everybody @ value_share
    groupings = [
        Grouping(share.sum(axis=1 - g), np.einsum("ab,abt,t->" + "ab"[g], share, rate, value_share)
                 / share.sum(axis=1 - g) / overall, (likes, also)[g])
        for g in range(2)
    ]  # fmt: skip
    return Kinds.of(value_share, everybody, groupings, joint={(0, 1): share}), share, rate


def test_the_kinds_of_a_population_are_found_from_its_margins(world: tuple[Kinds, np.ndarray, np.ndarray]) -> None:
    """At click rates near a half, where odds and rates are far apart."""
    kinds, share, rate = world
    assert kinds.share == pytest.approx(share.ravel(), abs=1e-6)
    assert kinds.rate == pytest.approx(rate.reshape(6, 3), abs=1e-5)


def test_users_are_compared_with_the_average_over_what_is_not_said(world: tuple[Kinds, np.ndarray, np.ndarray]) -> None:
    kinds, share, rate = world

    def ratio(of: np.ndarray) -> float:
        rates = np.einsum("ab,abt->t", of, rate) / of.sum()
        return float(np.log(odds(rates[1]) / odds((0.5 * rates[0] + 0.2 * rates[2]) / 0.7)))

    first = share * np.array([[1], [0]])
    assert kinds.beside_average(1, {0: 0}) == pytest.approx(ratio(first) - ratio(share), abs=1e-4)
    assert kinds.beside_average(1, {}) == 0.0
    one = first * np.array([0, 0, 1])
    assert kinds.beside_average(1, {0: 0, 1: 2}) == pytest.approx(ratio(one) - ratio(share), abs=1e-4)


def test_averaged_over_the_kinds_click_rates_are_everybodys(world: tuple[Kinds, np.ndarray, np.ndarray]) -> None:
    kinds, _, _ = world
    assert kinds.share @ kinds.rate == pytest.approx(kinds.value_rate, abs=1e-8)
    liking = np.zeros((2, 3))
    liking[0, 1] = 2.0
    other = kinds.where(0, liking)  # whatever the insights are
    assert other.share @ other.rate == pytest.approx(kinds.value_rate, abs=1e-8)
    assert other.beside_average(1, {0: 0}) > kinds.beside_average(1, {0: 0})


def test_of_too_many_kinds_some_are_drawn() -> None:
    share = np.array([0.3, 0.7])
    liking = np.array([[0.0, 0.8], [0.0, 0.0]])
    none = np.zeros((2, 2))
    few = [Grouping(share, np.ones(2), liking if g == 0 else none) for g in range(2)]
    many = [Grouping(share, np.ones(2), liking if g == 0 else none) for g in range(12)]
    values, rates, stated = np.array([0.5, 0.5]), np.array([0.1, 0.1]), {0: 0}
    drawn = Kinds.of(values, rates, many, stated)
    assert len(drawn.share) == MOST_KINDS and drawn.share.sum() == pytest.approx(1)
    exact = Kinds.of(values, rates, few, stated).beside_average(1, stated)
    assert drawn.beside_average(1, stated) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_rates_at_their_ends_stay_numbers(rate: float) -> None:
    grouping = Grouping(np.array([0.5, 0.5]), np.array([0.0, 2.0]), np.array([[25.0, 0.0], [0.0, -25.0]]))
    kinds = Kinds.of(np.array([0.5, 0.5]), np.array([rate, 0.5]), [grouping])
    assert np.isfinite(kinds.beside_average(0, {0: 1})) and np.isfinite(kinds.rate).all()
