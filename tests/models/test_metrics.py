"""Metrics against scikit-learn and against the plainest possible loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from models.metrics import AucSums, LogLossSums, calibration, grouped_auc

Array = np.ndarray[Any, np.dtype[Any]]
rows = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0]), st.integers(0, 3), st.integers(0, 4)),
    min_size=2,
    max_size=40,
)  # few distinct scores, so that there are ties; weights may be 0; units


def unpack(drawn: list[tuple[int, float, int, int]]) -> tuple[Array, Array, Array, Array]:
    score, reward, weight, unit = (np.array(x) for x in zip(*drawn, strict=True))
    return score / 7, reward, weight.astype(float), unit


def expected_auc(score: Array, reward: Array, weight: Array) -> float | None:
    if not (weight @ reward > 0 and weight @ (1 - reward) > 0):
        return None
    return float(roc_auc_score(reward, score, sample_weight=weight))


@given(rows)
def test_auc_is_that_of_sklearn_with_ties_and_weights(drawn: list[tuple[int, float, int, int]]) -> None:
    score, reward, weight, _ = unpack(drawn)
    assert AucSums.of(score, reward, weight).value == pytest.approx(expected_auc(score, reward, weight))


@given(rows, st.integers(0, 40))
def test_auc_of_shards_adds_up_to_that_of_the_whole(drawn: list[tuple[int, float, int, int]], cut: int) -> None:
    score, reward, weight, _ = unpack(drawn)
    parts = [AucSums.of(score[s], reward[s], weight[s]) for s in (slice(cut), slice(cut, None))]
    assert (parts[0] + parts[1]).value == AucSums.of(score, reward, weight).value


def test_auc_is_unknown_without_both_outcomes() -> None:
    assert AucSums.of(np.array([0.1, 0.2]), np.ones(2)).value is None
    assert grouped_auc(np.array([0.1, 0.2]), np.array([0.0, 1.0]), np.array([0, 1])) is None


def test_log_loss_is_that_of_sklearn_and_adds() -> None:
    rng = np.random.default_rng(0)
    p, weight = rng.uniform(0.01, 0.99, 500), rng.uniform(0, 2, 500)
    reward = (rng.random(500) < p).astype(float)
    whole = LogLossSums.of(p, reward, weight)
    assert whole.value == pytest.approx(log_loss(reward, p, sample_weight=weight))
    halves = LogLossSums.of(p[:200], reward[:200], weight[:200]) + LogLossSums.of(p[200:], reward[200:], weight[200:])
    assert halves.value == pytest.approx(whole.value)
    assert np.isfinite(LogLossSums.of(np.array([0.0, 1.0]), np.array([1.0, 0.0])).value)


def test_reliability_curve_of_a_known_case() -> None:
    curve = calibration(
        np.array([0.1, 0.1, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0]), np.array([3.0, 1.0, 2.0, 2.0]), bins=2
    )
    assert curve.predicted == pytest.approx([0.1, 0.9])
    assert curve.observed == pytest.approx([0.25, 1.0])
    assert curve.weight.tolist() == [4.0, 4.0]
    assert curve.error == pytest.approx(0.5 * 0.15 + 0.5 * 0.1)


def test_equal_predictions_share_a_bin_whatever_their_order() -> None:
    reward = np.repeat([0.0, 1.0], [60, 40])
    for order in (np.arange(100), np.random.default_rng(0).permutation(100)):
        curve = calibration(np.full(100, 0.4), reward[order])
        assert curve.weight.tolist() == [100.0]
        assert curve.error == pytest.approx(0.0)


def test_calibration_error_is_small_for_the_truth_and_large_for_a_shift() -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(1, 9, 50_000)
    reward = (rng.random(50_000) < p).astype(float)
    curve = calibration(p, reward)
    assert len(curve.weight) == 10
    assert curve.weight == pytest.approx(5_000, abs=1)
    assert curve.error < 0.005
    assert calibration(np.minimum(p + 0.1, 1), reward).error == pytest.approx(0.1, abs=0.01)


@given(rows)
def test_grouped_auc_is_that_of_a_loop_over_users(drawn: list[tuple[int, float, int, int]]) -> None:
    score, reward, weight, unit = unpack(drawn)
    total, mass = 0.0, 0.0
    for u in range(5):
        mine = unit == u
        auc = expected_auc(score[mine], reward[mine], weight[mine])
        if auc is not None:
            total, mass = total + auc * weight[mine].sum(), mass + weight[mine].sum()
    assert grouped_auc(score, reward, unit, weight) == pytest.approx(total / mass if mass else None)
