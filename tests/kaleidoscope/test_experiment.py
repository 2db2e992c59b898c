from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import product

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, stats
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_effectsize

from kaleidoscope.errors import InputError
from kaleidoscope.experiment import (
    EXPECTED_LIFT,
    Arms,
    ArmSums,
    Cohort,
    Traffic,
    cumulative,
    lift,
    measure,
    minimum_detectable_effect,
    power,
    ratio,
    required_units,
    srm,
    srm_of,
    sure_drop,
)
from kaleidoscope.release import Guardrail, Health
from kaleidoscope.vocabulary import Bucket

Floats = NDArray[np.float64]
COUNTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=20)


def bernoulli(units: int, events: int) -> ArmSums:
    """An arm whose units were exposed once."""
    return ArmSums(units, events, events, units, units, events)


def sums_of(clicks: Floats, exposures: Floats) -> Floats:
    """(6, tests) the fields of ArmSums, from (tests, units) totals."""
    seen = (exposures > 0).sum(1)
    squares = (clicks**2).sum(1), (exposures**2).sum(1), (clicks * exposures).sum(1)
    return np.array([seen, clicks.sum(1), squares[0], exposures.sum(1), squares[1], squares[2]], np.float64)


def people(rng: np.random.Generator, shape: tuple[int, ...], ctr: float = 0.06) -> tuple[Floats, Floats]:
    """Click rates that differ much between units (Beta, sd about ctr), and how active they are (Gamma)."""
    return rng.beta(0.8, 0.8 / ctr - 0.8, shape), rng.gamma(0.7, 1 / 0.7, shape)


def sampled_arms(rng: np.random.Generator, tests: int, units: int, true_lift: float = 0.0) -> Floats:
    """(6, tests) sums of arms whose units come with all their exposures."""
    rate, activity = people(rng, (tests, units))
    exposures = 1 + rng.poisson(3 * activity)
    clicks = rng.binomial(exposures, np.minimum(rate * (1 + true_lift), 1))
    return sums_of(clicks.astype(float), exposures.astype(float))


def watched_arms(rng: np.random.Generator, tests: int, units: int, looks: int, *, return_often: bool) -> Floats:
    """(6, tests, looks) sums as of each look; units come anew between looks, or come again as long as it lasts."""
    if not return_often:
        fresh = [sampled_arms(rng, tests, units // looks) for _ in range(looks)]
        return np.cumsum(np.stack(fresh, axis=2), axis=2)
    rate, activity = people(rng, (tests, units))
    first = rng.integers(0, looks // 2, (tests, units))
    clicks, exposures = np.zeros((2, tests, units))
    series = []
    for look in range(looks):
        now = np.where(first <= look, rng.poisson(0.2 * activity) + (first == look), 0)
        exposures += now
        clicks += rng.binomial(now, rate)
        series.append(sums_of(clicks, exposures))
    return np.stack(series, axis=2)


def arm(sums: Floats) -> ArmSums:
    units, *rest = sums.tolist()
    return ArmSums(int(units), *rest)


def false_alarms(rng: np.random.Generator, tests: int, units: int, *, return_often: bool) -> dict[str, float]:
    """The share of A/A tests that any of 50 looks calls different."""
    looks = 50
    left, right = (watched_arms(rng, tests, units, looks, return_often=return_often) for _ in range(2))
    alarmed = dict.fromkeys(("fixed", "always", "narrow", "wide", "drop"), 0)
    for test in range(tests):
        pairs = [(arm(left[:, test, look]), arm(right[:, test, look])) for look in range(looks)]
        known = [found for found in (lift(*pair) for pair in pairs) if found is not None]
        assert known
        for name, interval in (("fixed", "fixed"), ("always", "always_valid")):
            at = [getattr(found, interval) for found in known]
            alarmed[name] += any(i.low > 0 or i.high < 0 for i in at)
        for name, expected in (("narrow", 0.05), ("wide", 0.8)):
            found = [lift(*pair, expected_lift=expected) for pair in pairs[::5]]
            alarmed[name] += any(f is not None and f.always_valid.p_value < 0.05 for f in found)
        alarmed["drop"] += any((sure_drop(*pair) or 0) > 0 for pair in pairs[::5])
    return {name: count / tests for name, count in alarmed.items()}


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(COUNTS, COUNTS)
def test_sums_of_disjoint_units_add_exactly(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    def of(totals: list[tuple[int, int]]) -> ArmSums:
        return ArmSums.of([y for y, _ in totals], [x for _, x in totals])

    assert of(left) + of(right) == of(left + right)
    assert of(left) + ArmSums() == of(left)


def test_units_that_were_not_exposed_do_not_count() -> None:
    assert ArmSums.of([1, 0, 5], [2, 0, 0]) == ArmSums(1, 1, 1, 2, 4, 2)


@pytest.mark.parametrize(
    ("y", "x"), [([1, 2], [1]), ([math.nan], [1]), ([1], [-1]), ([[1]], [[1]])], ids=["shape", "nan", "negative", "2d"]
)
def test_refuses_totals_that_are_none(y: list[float], x: list[float]) -> None:
    with pytest.raises(ValueError, match=r"totals|shape"):
        ArmSums.of(y, x)


def test_a_series_counts_a_unit_that_comes_again_once() -> None:
    rng = np.random.default_rng(0)
    unit, day = rng.integers(0, 40, 500), rng.integers(3, 9, 500)
    x = rng.integers(0, 4, 500)
    y = rng.binomial(x, 0.3)
    series = cumulative(unit, day, y, x)
    assert list(series) == [3, 4, 5, 6, 7, 8]
    for now, sums in series.items():
        totals = [[int(v[(unit == u) & (day <= now)].sum()) for u in range(40)] for v in (y, x)]
        assert sums == ArmSums.of(*totals)
    assert series[8].units == 40


# ── rates and lifts ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_error_of_a_rate_is_the_cluster_robust_one_of_statsmodels() -> None:
    rng = np.random.default_rng(1)
    unit = np.repeat(np.arange(300), 1 + rng.poisson(4, 300))
    clicks = rng.binomial(1, rng.beta(1, 9, 300)[unit]).astype(float)
    found = ratio(ArmSums.of(np.bincount(unit, clicks), np.bincount(unit)))
    fit = sm.OLS(clicks, np.ones(len(unit))).fit(cov_type="cluster", cov_kwds={"groups": unit})
    assert found.rate == pytest.approx(clicks.mean())
    assert found.se == pytest.approx(fit.bse[0], rel=1e-9)
    assert found.variance == pytest.approx(300 * fit.bse[0] ** 2, rel=1e-9)
    naive = math.sqrt(found.rate * (1 - found.rate) / len(unit))
    assert found.se is not None
    assert found.se > 1.1 * naive  # clicks of a unit go together, and the error says so


def test_the_fixed_interval_is_the_log_ratio_one_of_statsmodels() -> None:
    found = lift(bernoulli(20_000, 1_100), bernoulli(30_000, 1_500))
    low, high = confint_proportions_2indep(1_100, 20_000, 1_500, 30_000, method="log", compare="ratio")
    assert found is not None
    assert found.lift == pytest.approx(0.1)
    assert (1 + found.fixed.low, 1 + found.fixed.high) == pytest.approx((low, high), rel=1e-4)


@pytest.mark.parametrize("true_lift", [0.0, 0.25])
def test_fixed_intervals_cover_the_truth_as_often_as_they_say(true_lift: float) -> None:
    rng = np.random.default_rng(2)
    tests = 2_000
    treated, control = sampled_arms(rng, tests, 800, true_lift), sampled_arms(rng, tests, 500)
    found = [lift(arm(treated[:, i]), arm(control[:, i])) for i in range(tests)]
    # Rates are cut off at 1, which takes something from the planted lift; its truth is what very many units show.
    many = [sampled_arms(np.random.default_rng(3), 1, 2_000_000, planted)[:, 0] for planted in (true_lift, 0.0)]
    truth = (many[0][1] / many[0][3]) / (many[1][1] / many[1][3]) - 1
    assert all(f is not None for f in found)
    covered = np.mean([f.fixed.low <= truth <= f.fixed.high for f in found if f is not None])
    assert 0.93 <= covered <= 0.97
    always = np.mean([f.always_valid.low <= truth <= f.always_valid.high for f in found if f is not None])
    assert always >= covered


def test_rates_intervals_cover_the_truth() -> None:
    arms = sampled_arms(np.random.default_rng(4), 2_000, 600)
    many = sampled_arms(np.random.default_rng(5), 1, 2_000_000)[:, 0]
    truth = many[1] / many[3]
    found = [ratio(arm(arms[:, i])) for i in range(2_000)]
    covered = [f.ci_low <= truth <= f.ci_high for f in found if f.ci_low is not None and f.ci_high is not None]
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize(
    ("tests", "units", "return_often"),
    [
        (1_000, 1_000, False),
        (1_000, 200, True),
        pytest.param(4_000, 3_000, False, marks=pytest.mark.slow),
        pytest.param(4_000, 1_000, True, marks=pytest.mark.slow),
    ],
)
def test_fifty_looks_raise_no_more_false_alarms_than_one_is_allowed(tests: int, units: int, return_often: bool) -> None:
    alarms = false_alarms(np.random.default_rng(6), tests, units, return_often=return_often)
    allowed = 0.05 + 2 * math.sqrt(0.05 * 0.95 / tests)
    assert alarms["fixed"] > 0.12  # what looking fifty times does to an interval for one look
    assert {name: share for name, share in alarms.items() if name != "fixed" and share > allowed} == {}
    assert alarms["wide"] > 0  # not for never alarming


def test_the_always_valid_p_value_is_one_over_the_mixed_likelihood_ratio() -> None:
    treated, control = bernoulli(5_000, 330), bernoulli(5_000, 250)
    found, variance = lift(treated, control), log_variance(treated, control)
    assert found is not None
    assert found.always_valid.p_value == pytest.approx(1 / mixed(math.log1p(found.lift), variance), rel=1e-6)


@pytest.mark.parametrize("scale", [1, 10, 1_000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_always_valid_interval_ends_where_the_mixed_likelihood_ratio_is_one_over_alpha(
    scale: int, alpha: float
) -> None:
    treated, control = bernoulli(1_000 * scale, 66 * scale), bernoulli(1_000 * scale, 50 * scale)
    found, variance = lift(treated, control, alpha=alpha), log_variance(treated, control)
    assert found is not None
    for end in (found.always_valid.low, found.always_valid.high):
        assert mixed(math.log1p(found.lift) - math.log1p(end), variance) == pytest.approx(1 / alpha, rel=1e-6)


def test_a_sure_drop_ends_where_the_one_sided_likelihood_ratio_is_one_over_alpha() -> None:
    candidate, control = bernoulli(20_000, 700), bernoulli(20_000, 1_000)
    drop, variance = sure_drop(candidate, control), log_variance(candidate, control)
    assert drop is not None
    assert 0 < drop < 0.3
    assert mixed(math.log1p(-drop) - math.log(0.7), variance, one_sided=True) == pytest.approx(20, rel=1e-6)
    found = lift(candidate, control)
    assert found is not None
    assert drop > -found.always_valid.high  # one side is sure of more than two


def log_variance(*arms: ArmSums) -> float:
    rates = [ratio(a) for a in arms]
    return sum((r.se / r.rate) ** 2 for r in rates if r.se is not None and r.rate is not None)


def mixed(distance: float, variance: float, *, one_sided: bool = False) -> float:
    """The likelihood ratio of effects N(0, EXPECTED_LIFT²), integrated by brute force."""

    def integrand(effect: float) -> float:
        density = stats.norm.pdf(effect, scale=EXPECTED_LIFT) * (2 if one_sided else 1)
        return float(density * math.exp((effect * distance - effect**2 / 2) / variance))

    peak, width = distance, 12 * math.sqrt(variance)
    low = max(0.0, peak - width) if one_sided else peak - width
    return float(integrate.quad(integrand, low, peak + width, points=[peak], limit=200)[0])


@pytest.mark.parametrize("events", [300, 380, 420, 470, 520])
def test_intervals_exclude_zero_exactly_where_p_is_below_alpha(events: int) -> None:
    found = lift(bernoulli(8_000, events), bernoulli(8_000, 400))
    assert found is not None
    for interval in (found.fixed, found.always_valid):
        assert (interval.low > 0 or interval.high < 0) == (interval.p_value < 0.05)
        assert interval.low < found.lift < interval.high
    assert found.always_valid.low < found.fixed.low
    assert found.always_valid.high > found.fixed.high


def test_a_lift_turned_round_is_its_reciprocal() -> None:
    one, other = bernoulli(8_000, 480), bernoulli(6_000, 300)
    there, back = lift(one, other), lift(other, one)
    assert there is not None
    assert back is not None
    assert (1 + there.lift) * (1 + back.lift) == pytest.approx(1)
    assert (1 + there.always_valid.high) * (1 + back.always_valid.low) == pytest.approx(1)


@pytest.mark.parametrize("few", [ArmSums(), bernoulli(29, 15), bernoulli(1_000, 9)], ids=["nobody", "units", "events"])
def test_too_few_units_or_events_are_unknown_not_zero(few: ArmSums) -> None:
    plenty = bernoulli(10_000, 400)
    assert lift(few, plenty) is None
    assert lift(plenty, few) is None
    assert sure_drop(plenty, few) is None
    found = ratio(few)
    assert found.rate == (few.y / few.x if few.x else None)
    assert (found.se, found.variance, found.ci_low, found.ci_high) == (None, None, None, None)


def test_units_without_any_variance_have_no_error() -> None:
    assert lift(bernoulli(100, 100), bernoulli(100, 100)) is None


# ── sample ratio ────────────────────────────────────────────────────────────────────────────────────────────────────

SHARES = {Bucket.CONTROL: 0.1, Bucket.RANDOM: 0.1, Bucket.MODEL: 0.8}


def test_the_one_look_p_value_is_the_chi_square_of_scipy() -> None:
    counts = {Bucket.CONTROL: 1_050, Bucket.RANDOM: 970, Bucket.MODEL: 7_980}
    found = srm(counts, SHARES)
    assert found is not None
    assert found.p_value == pytest.approx(stats.chisquare(list(counts.values()), [1_000, 1_000, 8_000]).pvalue)


def test_the_always_valid_p_value_is_one_over_the_bayes_factor() -> None:
    counts = {Bucket.CONTROL: 1_300, Bucket.MODEL: 7_700}
    found = srm(counts, {Bucket.CONTROL: 0.1, Bucket.MODEL: 0.9})
    against = stats.betabinom(9_000, 1_000, 9_000).logpmf(1_300) - stats.binom(9_000, 0.1).logpmf(1_300)
    assert found is not None
    assert found.always_valid_p == pytest.approx(math.exp(-against), rel=1e-6)
    assert found.flagged


def test_sample_ratio_checks_are_calibrated() -> None:
    rng = np.random.default_rng(7)
    tests, looks = 2_000, 50
    shares = np.array(list(SHARES.values()))
    counts = np.cumsum(rng.multinomial(60, shares, (tests, looks)), axis=1)
    one_look, any_look, often = 0, 0, 0
    for test in range(tests):
        found = [srm(dict(zip(SHARES, row, strict=True)), SHARES, alpha=0.05) for row in counts[test].tolist()]
        p = [f.p_value for f in found if f is not None and f.p_value is not None]
        assert len(p) == looks
        one_look += p[-1] < 0.05
        often += min(p) < 0.05
        any_look += any(f.flagged for f in found if f is not None)
    assert 0.04 <= one_look / tests <= 0.06
    assert often / tests > 0.15
    assert any_look / tests <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / tests)


def test_a_sample_ratio_that_is_off_by_two_per_cent_is_flagged() -> None:
    off = {Bucket.CONTROL: 51_000, Bucket.MODEL: 49_000}
    even = {Bucket.CONTROL: 0.5, Bucket.MODEL: 0.5}
    for sequential in (True, False):
        found = srm(off, even, sequential=sequential)
        assert found is not None
        assert found.flagged
        assert found.always_valid_p < 1e-6


def test_the_chosen_test_decides_what_is_flagged() -> None:
    counts, even = {"a": 5_180, "b": 4_820}, {"a": 1, "b": 1}
    one_look, any_look = srm(counts, even, sequential=False), srm(counts, even)
    assert one_look is not None
    assert any_look is not None
    assert one_look.p_value == any_look.p_value
    assert one_look.p_value is not None
    assert one_look.p_value < 0.001 < one_look.always_valid_p
    assert (one_look.flagged, any_look.flagged) == (True, False)


def test_units_where_no_share_sends_them_are_flagged() -> None:
    found = srm({Bucket.CONTROL: 500, Bucket.CHALLENGER: 1}, {Bucket.CONTROL: 1.0, Bucket.CHALLENGER: 0.0})
    assert found is not None
    assert (found.p_value, found.flagged) == (0.0, True)


def test_sample_ratio_is_unknown_where_it_cannot_be_judged() -> None:
    assert srm({Bucket.CONTROL: 500}, {Bucket.CONTROL: 1.0}) is None
    assert srm({}, SHARES) is None
    few = srm({Bucket.MODEL: 20}, SHARES, sequential=False)
    assert few is not None
    assert (few.p_value, few.flagged) == (None, False)


@pytest.mark.parametrize(("counts", "shares"), [({"a": -1}, {"a": 1}), ({"a": 1}, {"a": -1}), ({"a": 1}, {"a": 0})])
def test_refuses_counts_and_shares_that_are_none(counts: dict[str, int], shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="srm"):
        srm(counts, shares)


OLD, NEW = {"control": 0.2, "random": 0.8}, {"control": 0.15, "random": 0.1, "model": 0.75}


def cohorts(
    rng: np.random.Generator, *, kept: Mapping[str, float] | None = None, releases: int = 6
) -> list[Cohort[str]]:
    """Units of releases of two designs in turn; of a bucket only `kept` of its units are seen."""
    found = []
    for i in range(releases):
        shares = (OLD, NEW)[i % 2]
        drawn = rng.multinomial(rng.integers(2_000, 6_000), list(shares.values()))
        units = {name: int(rng.binomial(n, (kept or {}).get(name, 1.0))) for name, n in zip(shares, drawn, strict=True)}
        found.append(Cohort(f"release {i + 1}", units, shares))
    return found


def test_one_cohort_is_checked_as_ever() -> None:
    counts = {"control": 190, "random": 110, "model": 700}
    for sequential in (True, False):
        assert srm_of([Cohort("all", counts, NEW)], sequential=sequential) == srm(counts, NEW, sequential=sequential)


def test_shares_that_changed_are_flagged_no_more_often_than_said() -> None:
    rng = np.random.default_rng(11)
    found = [srm_of(cohorts(rng), sequential=False, alpha=0.05) for _ in range(400)]
    flagged = np.mean([one is not None and one.flagged for one in found])
    assert 0 < flagged <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5
    pooled = cohorts(rng)
    total = {name: sum(c.units.get(name, 0) for c in pooled) for name in NEW}
    last = srm(total, NEW, sequential=False)
    assert last is not None and last.flagged  # as if all had been assigned by the last design


def test_units_that_all_releases_lose_are_found_though_none_of_them_shows_it() -> None:
    rng, found, seen_alone = np.random.default_rng(12), 0, 0
    for _ in range(20):
        lost = cohorts(rng, kept={"random": 0.92}, releases=10)
        checks = [srm_of([one], sequential=False) for one in lost]
        whole = srm_of(lost, sequential=False)
        assert whole is not None and whole.p_value is not None
        found += whole.flagged
        seen_alone += sum(one is not None and one.flagged for one in checks)
    assert found >= 18 and seen_alone <= 0.1 * 200


def test_faults_of_two_releases_that_cancel_out_are_found() -> None:
    shares = {"control": 0.5, "random": 0.5}
    there = [Cohort("release 1", {"control": 2_200, "random": 1_800}, shares)]
    back = [Cohort("release 2", {"control": 1_800, "random": 2_200}, shares)]
    found = srm_of(there + back, sequential=False)
    assert found is not None and found.flagged and found.units == 8_000
    assert found.always_valid_p < 0.001


def test_units_that_come_again_are_checked_in_every_release_and_counted_once_where_releases_are_added() -> None:
    rng, flagged = np.random.default_rng(13), 0
    for _ in range(300):  # the same people in two releases: what differs by chance differs in both
        place = rng.random(4_000)
        old, new = place < 0.2, np.digitize(place, [0.15, 0.9])  # control | random; control | model | random
        again = rng.random(4_000) < 0.8
        there = rng.random(4_000) < 0.9
        units, fresh = (
            {name: int(((new == i) & of).sum()) for i, name in enumerate(("control", "model", "random"))}
            for of in (there, there & ~again)
        )
        first = Cohort("release 1", {"control": int((old & again).sum()), "random": int((~old & again).sum())}, OLD)
        found = srm_of([first, Cohort("release 2", units, NEW, fresh)], sequential=False, alpha=0.05)
        assert found is not None
        flagged += found.flagged
    assert flagged / 300 <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5
    # Those who come again are lost: nobody new shows it.
    lost = Cohort(
        "release 2", {"control": 540, "model": 2_100, "random": 360}, NEW, {"control": 60, "model": 300, "random": 40}
    )
    whole = srm_of([first, lost], sequential=False)
    new_alone = srm_of([first, Cohort("release 2", lost.new or {}, NEW)], sequential=False)
    assert whole is not None and whole.flagged and new_alone is not None and not new_alone.flagged


def test_somebody_where_a_release_sends_nobody_is_a_mismatch() -> None:
    lone = Cohort("release 1", {"control": 500, "model": 1}, {"control": 1.0})
    found = srm_of([lone, Cohort("release 2", {"control": 150, "random": 100, "model": 750}, NEW)])
    assert found is not None and found.flagged and found.p_value == 0
    assert srm_of([Cohort("release 1", {"control": 500}, {"control": 1.0})]) is None
    assert srm_of([Cohort("release 1", {}, NEW)]) is None


# ── power ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PLANS = list(product((0.02, 0.1, -0.08), (0.04, 0.3), (0.5, 0.8), (0.05, 0.01)))


@pytest.mark.parametrize(("true_lift", "rate", "share", "alpha"), PLANS)
def test_power_is_that_of_statsmodels(true_lift: float, rate: float, share: float, alpha: float) -> None:
    variance, total = rate * (1 - rate), 40_000
    ours = power(
        true_lift, rate, variance, treatment_units=share * total, control_units=(1 - share) * total, alpha=alpha
    )
    size = true_lift * rate / math.sqrt(variance)
    theirs = NormalIndPower().power(size, share * total, alpha, ratio=(1 - share) / share)
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(("true_lift", "rate", "share", "alpha"), PLANS)
def test_required_units_and_detectable_effect_are_those_of_statsmodels(
    true_lift: float, rate: float, share: float, alpha: float
) -> None:
    variance = rate * (1 - rate)
    units = required_units(true_lift, rate, variance, treatment_share=share, alpha=alpha, at_power=0.9)
    size = abs(true_lift) * rate / math.sqrt(variance)
    first = NormalIndPower().solve_power(size, None, alpha, 0.9, ratio=(1 - share) / share)
    assert units == pytest.approx(first / share, rel=1e-4, abs=1)
    found = minimum_detectable_effect(
        rate, variance, treatment_units=share * units, control_units=(1 - share) * units, alpha=alpha, at_power=0.9
    )
    assert found == pytest.approx(abs(true_lift), rel=1e-3)


def test_required_units_are_near_those_of_the_arcsine_effect_size() -> None:
    size = proportion_effectsize(0.042, 0.04)
    theirs = 2 * NormalIndPower().solve_power(size, None, 0.05, 0.8)
    assert required_units(0.05, 0.04, 0.04 * 0.96) == pytest.approx(theirs, rel=0.04)


def test_the_planned_power_is_what_a_simulation_finds() -> None:
    rng = np.random.default_rng(8)
    tests, units, true_lift = 1_000, 6_000, 0.1
    pilot = ratio(arm(sampled_arms(rng, 1, 500_000)[:, 0]))
    assert pilot.rate is not None
    assert pilot.variance is not None
    planned = power(true_lift, pilot.rate, pilot.variance, treatment_units=units, control_units=units)
    assert 0.5 < planned < 0.9
    treated, control = sampled_arms(rng, tests, units, true_lift), sampled_arms(rng, tests, units)
    found = [lift(arm(treated[:, i]), arm(control[:, i])) for i in range(tests)]
    assert np.mean([f is not None and f.fixed.low > 0 for f in found]) == pytest.approx(planned, abs=0.05)


@pytest.mark.parametrize(
    "plan",
    [
        {"lift": 0.0, "rate": 0.1, "variance": 0.1},
        {"lift": 0.1, "rate": 0.0, "variance": 0.1},
        {"lift": 0.1, "rate": 0.1, "variance": 0.0},
        {"lift": 0.1, "rate": 0.1, "variance": 0.1, "treatment_share": 1.0},
        {"lift": 0.1, "rate": 0.1, "variance": 0.1, "at_power": 1.0},
        {"lift": 0.1, "rate": 0.1, "variance": 0.1, "at_power": 0.2},
    ],
)
def test_refuses_plans_that_no_number_of_units_can_serve(plan: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"Give|Ask"):
        required_units(**plan)


# ── guardrails ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_drop_is_never_surer_than_it_is_large() -> None:
    control = bernoulli(50_000, 2_000)
    drops = [sure_drop(bernoulli(50_000, events), control) for events in (2_400, 2_000, 1_900, 1_600, 1_000, 100)]
    known = [drop for drop in drops if drop is not None]
    assert known == sorted(known)
    assert known[:3] == [0, 0, 0]
    assert [drop < 1 - events / 2_000 for drop, events in zip(known[3:], (1_600, 1_000, 100), strict=True)] == [
        True
    ] * 3
    assert known[4] > 0.35


@pytest.mark.parametrize("events", [0, 1, 9])
def test_a_candidate_that_hardly_anybody_clicks_is_a_sure_drop(events: int) -> None:
    control = bernoulli(5_000, 200)
    drop, with_ten = sure_drop(bernoulli(5_000, events), control), sure_drop(bernoulli(5_000, 10), control)
    assert drop is not None
    assert with_ten is not None
    assert 0.7 < drop <= with_ten + 1e-3
    assert sure_drop(bernoulli(100, events), control) is None  # as yet nobody can say


def test_clicks_that_all_come_from_one_unit_do_not_count_as_many() -> None:
    control = bernoulli(5_000, 100)
    one_fan = ArmSums.of([0] * 4_999 + [9], [1] * 4_999 + [9])
    nine_fans = ArmSums.of([0] * 4_991 + [1] * 9, [1] * 5_000)
    sure, unsure = sure_drop(nine_fans, control), sure_drop(one_fan, control)
    assert sure is not None
    assert sure > 0
    assert unsure is None or unsure < sure


def traffic(latencies: list[float], errors: int = 0, fallbacks: int = 0) -> Traffic:
    return Traffic.of(latencies, (1, 2, 5, 10, 20, 50), errors=errors, fallbacks=fallbacks)


def test_latency_quantiles_are_interpolated_within_their_bounds() -> None:
    exact = np.random.default_rng(9).gamma(4, 1.5, 20_000)
    counted = Traffic.of(exact, np.geomspace(0.1, 100, 60), errors=0, fallbacks=0)
    for q in (0.5, 0.9, 0.99):
        assert counted.latency_quantile_ms(q) == pytest.approx(np.quantile(exact, q), rel=0.03)


def test_a_quantile_above_every_bound_is_the_last_one() -> None:
    assert traffic([3.0] * 100 + [9_999.0] * 10).latency_quantile_ms(0.99) == 50


def test_a_latency_on_a_bound_is_within_it() -> None:
    assert traffic([1.0, 5.0, 5.1]).latency_ms == {1: 1, 2: 0, 5: 1, 10: 1, 20: 0, 50: 0, math.inf: 0}


def test_traffic_adds() -> None:
    one, other = [0.5, 3.0, 7.0], [60.0, 1.0]
    assert traffic(one, 1, 2) + traffic(other, 3, 4) == traffic(one + other, 4, 6)
    with pytest.raises(ValueError, match="different bounds"):
        traffic(one) + Traffic.of(one, (1, 2), errors=0, fallbacks=0)


def test_measures_every_metric_that_a_guardrail_may_bound() -> None:
    control, candidate = bernoulli(50_000, 2_000), bernoulli(50_000, 1_500)
    measured = measure(
        clicks=Arms(candidate, control),
        conversions=Arms(control, control),
        units={Bucket.CONTROL: 50_000, Bucket.MODEL: 50_000},
        shares={Bucket.CONTROL: 0.5, Bucket.MODEL: 0.5},
        traffic=traffic([3.0] * 1_000, errors=5, fallbacks=20),
    )
    assert measured["ctr_drop"] == sure_drop(candidate, control)
    assert measured == {
        "ctr_drop": pytest.approx(0.2, abs=0.05),
        "cvr_drop": 0.0,
        "srm_p": 1.0,
        "error_rate": 0.005,
        "fallback_rate": 0.02,
        "p99_ms": pytest.approx(5, abs=0.1),
    }


def test_what_was_not_measured_is_unknown() -> None:
    nothing = measure()
    assert set(nothing.values()) == {None}
    assert set(measure(traffic=traffic([3.0] * 99, errors=50)).values()) == {None}
    assert set(measure(clicks=Arms(ArmSums(), ArmSums()), units={}, shares=SHARES).values()) == {None}
    assert set(nothing) == {"ctr_drop", "cvr_drop", "srm_p", "error_rate", "fallback_rate", "p99_ms"}


@pytest.mark.parametrize(("events", "healthy"), [(2_050, True), (1_950, True), (1_000, False), (0, False)])
def test_a_guardrail_fails_once_a_drop_beyond_its_margin_is_sure(events: int, healthy: bool) -> None:
    rails = [Guardrail(metric="ctr_drop", max=0.02), Guardrail(metric="srm_p", min=0.001)]
    measured = measure(
        clicks=Arms(bernoulli(50_000, events), bernoulli(50_000, 2_000)),
        units={Bucket.CONTROL: 50_000, Bucket.MODEL: 50_010},
        shares={Bucket.CONTROL: 0.5, Bucket.MODEL: 0.5},
    )
    assert Health.judge(rails, measured, datetime(2030, 1, 1, tzinfo=UTC)).ok == healthy
