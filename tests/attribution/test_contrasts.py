"""Ratios of rates and their slopes, balance within strata, and the rating of variants, against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.special import expit

from attribution.contrasts import (
    Arms,
    Rating,
    association,
    holm,
    jackknife_error,
    slopes,
    standardised_difference,
)

REPLICATES = 100


def test_the_slope_of_the_log_ratio_is_estimated_without_bias() -> None:
    rng = np.random.default_rng(0)
    at, rate = np.repeat(np.arange(20.0), 3), np.exp(rng.normal(-3, 0.5, 60))  # strata of which each has few clicks
    slope = []
    for _ in range(60):
        n1, n0 = (rng.poisson(8.0, (60, 10)).astype(float) for _ in range(2))
        c1 = rng.poisson(n1 * (rate * np.exp(0.1 + 0.05 * (at - 10)))[:, None])
        arms = Arms(n1, c1.astype(float), n0, rng.poisson(n0 * rate[:, None]).astype(float))
        slope.append(slopes(arms, at)[0])
    assert abs(np.mean(slope) - 0.05) < 3 * np.std(slope) / np.sqrt(60)


def test_the_error_of_a_mean_by_replicates_is_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(REPLICATES, 40))
    total, n = groups.sum(), groups.size
    without = (total - groups.sum(axis=1)) / (n - 40)
    assert jackknife_error(np.array([total / n, *without])) == pytest.approx(groups.std() / n**0.5, rel=0.2)


def test_the_test_of_association_has_its_level_within_strata_that_confound() -> None:
    rng = np.random.default_rng(0)
    p = []
    for _ in range(300):
        stratum = rng.integers(0, 8, 600)
        bucket = (rng.random(600) < 0.1 + 0.1 * stratum).astype(np.int64)
        category = np.minimum(rng.poisson(0.3 * stratum), 3)
        found = association(stratum, bucket, category, np.ones(600))
        assert found is not None
        p.append(found)
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.085
    assert association(np.zeros(9, np.int64), np.zeros(9, np.int64), np.arange(9), np.ones(9)) is None


def test_standardised_differences_are_taken_within_strata() -> None:
    rng = np.random.default_rng(0)
    stratum = rng.integers(0, 2, 20_000)
    treated = rng.random(20_000) < 0.2 + 0.6 * stratum
    values = 3.0 * stratum + rng.normal(size=20_000) + 0.2 * treated
    smd, se = standardised_difference(stratum, treated, ~treated, values, np.ones(20_000))
    assert abs(smd * values.std() - 0.2) < 4 * se * values.std()
    assert np.isnan(standardised_difference(stratum, treated, ~treated, np.ones(20_000), np.ones(20_000))[0])


def test_p_values_are_adjusted_one_after_the_other() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_rating_of_variants_learns_from_tags_and_from_the_variants_themselves() -> None:
    rng = np.random.default_rng(0)
    tags = csr_array((rng.random((200, 6)) < 0.4).astype(float))
    truth = expit(-3 + tags @ np.array([0.5, -0.5, 0.3, 0.0, 0.0, 0.2])) * rng.gamma(25, 1 / 25, 200)
    variant = rng.integers(0, 200, 60_000)
    rating = Rating.fit(variant, np.ones(60_000), rng.random(60_000) < truth[variant], tags)
    raw = np.bincount(variant, rng.random(60_000) < truth[variant]) / np.bincount(variant)
    error = [np.abs(np.log((rate + 1e-4) / truth)).mean() for rate in (rating.rate, raw)]
    assert error[0] < error[1] / 1.5 and 0.005 < rating.spread < 0.1
    inside = (rating.draws() < truth).mean(axis=0)
    assert ((inside > 0.025) & (inside < 0.975)).mean() > 0.85
