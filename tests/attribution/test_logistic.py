"""The logistic model on codes is the one statsmodels fits to the rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.sparse import csc_array

from attribution.coding import Coded, code
from attribution.logistic import STRATA_RIDGE, Projection, Sums, fit, products
from tests.attribution.logs import TAGS, Array, log_of


def example(n: int = 3_000, *, weighted: bool = False, rows_per_unit: int = 1) -> tuple[Coded, Array]:
    """A log with two strata and two fields, and the indicators of women × loud and b × flat."""
    rng = np.random.default_rng(2)
    unit = np.arange(n) // rows_per_unit
    gender, city = rng.choice(["f", "m"], n)[unit], rng.choice(["a", "b", "c"], n)[unit]
    hour, variant = rng.choice(["am", "pm"], n), rng.integers(0, 6, n)
    loud, flat = np.isin(variant, (2, 3)), variant % 2 == 0
    logit = -1 + 0.5 * (gender == "f") * loud + 0.4 * (city == "b") + 0.3 * (hour == "am") - 0.2 * flat
    logit = logit + rng.normal(0, 1.0 if rows_per_unit > 1 else 0.0, n)[unit]
    log = log_of(
        {"gender": gender.tolist(), "city": city.tolist()}, TAGS, variant, rng.random(n) < 1 / (1 + np.exp(-logit)),
        context={"hour": hour.tolist()}, unit=unit, weight=rng.uniform(0.5, 2, n) if weighted else np.ones(n),
    )  # fmt: skip
    coded = replace(code(log, dependent=False), held=())
    return coded, np.stack([(gender == "f") & loud, (city == "b") & flat], axis=1).astype(float)


def design(coded: Coded, z: Array) -> Array:
    """The same model as a matrix of full rank."""
    gender, city = coded.codes
    carried = coded.carried.toarray()[coded.variant]
    names = [tag.parts[0][1] for tag in coded.tags]
    columns = [np.ones(len(coded)), coded.stratum == 1, gender == 1, city == 1, city == 2]
    columns += [carried[:, names.index(name)] for name in ("loud", "plain", "real")]
    return np.column_stack([*columns, z]).astype(float)


def test_coefficients_and_errors_are_those_of_statsmodels() -> None:
    coded, z = example()
    found = fit(Sums(coded), coded.reward, csc_array(z))
    reference = sm.Logit(coded.reward, design(coded, z)).fit(disp=0)
    assert found.pairs == pytest.approx(reference.params[-2:], abs=2e-4)
    assert found.covariance == pytest.approx(reference.cov_params()[-2:, -2:], rel=2e-3)
    assert found.probability == pytest.approx(reference.predict(), abs=2e-4)


def test_errors_by_unit_are_the_sandwich_of_statsmodels() -> None:
    coded, z = example(rows_per_unit=5)
    found = fit(Sums(coded), coded.reward, csc_array(z))
    reference = sm.GLM(coded.reward, design(coded, z), family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": coded.unit, "use_correction": False}
    )
    assert found.pairs == pytest.approx(reference.params[-2:], abs=2e-4)
    assert found.covariance == pytest.approx(reference.cov_params()[-2:, -2:], rel=0.01, abs=1e-5)


def test_weights_of_rows_are_weights_of_the_score() -> None:
    coded, z = example(weighted=True)
    found = fit(Sums(coded), coded.reward, csc_array(z))
    reference = sm.GLM(coded.reward, design(coded, z), family=sm.families.Binomial(), var_weights=coded.weight).fit(
        cov_type="HC0"
    )
    assert found.pairs == pytest.approx(reference.params[-2:], abs=3e-4)
    assert found.covariance == pytest.approx(reference.cov_params()[-2:, -2:], rel=0.01, abs=1e-5)


def test_identical_exposures_on_one_row_are_as_good_as_rows() -> None:
    coded, z = example()
    once = replace(coded, unit=None)
    rows = np.repeat(np.arange(len(coded)), 3)
    counted = fit(Sums(replace(once, count=np.full(len(coded), 3.0))), coded.reward, csc_array(z))
    written = fit(Sums(once.take(rows)), coded.reward[rows], csc_array(z[rows]))
    assert counted.pairs == pytest.approx(written.pairs, abs=1e-6)
    assert counted.covariance == pytest.approx(written.covariance, rel=1e-6)


def test_values_without_a_click_do_not_break_the_fit() -> None:
    coded, z = example()
    reward = np.where(coded.codes[1] == 2, 0.0, coded.reward)
    found = fit(Sums(coded), reward, csc_array(z))
    assert np.isfinite(found.pairs).all()
    assert found.probability[coded.codes[1] == 2].max() < 1e-3


def test_thousands_of_strata_are_eliminated() -> None:
    coded, z = example(6_000)
    rng = np.random.default_rng(0)
    many = replace(coded, stratum=rng.integers(0, 2_000, 6_000), strata=tuple(map(str, range(2_000))))
    data = Sums(many)
    weight = rng.uniform(0.1, 0.3, 6_000)
    columns, strata = products(data, csc_array(z), weight)
    a, b = Projection.of(data.gram(weight)).coefficients(columns, strata)
    left = z - data.linear(a, b)
    back = data.gradient(weight * left[:, 0])
    assert np.abs(back[0]).max() < 0.01
    assert back[1] == pytest.approx(STRATA_RIDGE * b[:, 0], abs=1e-6)


def test_thousands_of_small_strata_do_not_overstate_odds_ratios() -> None:
    """Two rows to a stratum, the logits of strata normal with sd .5: free parameters would double the logarithm."""
    rng = np.random.default_rng(3)
    n, strata = 60_000, 30_000
    stratum, woman, variant = rng.integers(0, strata, n), rng.random(n) < 0.5, rng.integers(0, 6, n)
    liked = woman & np.isin(variant, (2, 3))
    logit = rng.normal(-1, 0.5, strata)[stratum] + 0.8 * liked
    page = [f"p{i}" for i in stratum]
    log = log_of(
        {"gender": np.where(woman, "f", "m").tolist()}, TAGS, variant, rng.random(n) < 1 / (1 + np.exp(-logit)),
        context={"page": page}, unit=np.arange(n),
    )  # fmt: skip
    found = fit(Sums(code(log, dependent=False)), log.reward.astype(float), csc_array(liked[:, None].astype(float)))
    assert found.pairs[0] == pytest.approx(0.8, abs=3 * found.covariance[0, 0] ** 0.5)
