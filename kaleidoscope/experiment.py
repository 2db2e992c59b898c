"""Whether a bucket does better than another: lift with intervals, sample ratio, power, and what guardrails watch.

Pure statistics on sums by unit; where the sums come from is for the caller. An interval is *fixed-horizon* (right for
one look, at a size settled beforehand) or *always-valid* (right at every look at once). The page for readers is
docs/experiments.md.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import chdtrc, gammaln, log_ndtr, ndtr, ndtri

from kaleidoscope.errors import InputError

# Below these an arm has no interval: an error estimated from so little is not to be relied on.
MIN_UNITS = 30
MIN_EVENTS = 10
MIN_EXPECTED = 5  # units in a bucket, for the chi-square of its share
MIN_REQUESTS = 100  # for a rate of errors, and for the 99th of 100 latencies

ALPHA = 0.05
SRM_ALPHA = 0.001
# Always-valid intervals are right whatever this is, and narrowest where the standard error is about a third of it.
EXPECTED_LIFT = 0.2
# What the sequential test of shares expects of a fault: that it moves a share of ½ by about half a per cent (as sd).
SRM_CONCENTRATION = 10_000.0

Name = TypeVar("Name", bound=Hashable)


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ArmSums:
    """An arm as sums over its units, of a numerator y and a denominator x per unit (clicks and exposures).

    Sums of counts are exact below 2⁵³. Those of two arms, shards or cohorts may be added where no unit is in both: the
    totals of a unit that came on two days are to be added before they are squared (`cumulative` does).
    """

    units: int = 0
    y: float = 0.0
    yy: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, numerator: ArrayLike, denominator: ArrayLike) -> ArmSums:
        """The sums of (n,) totals by unit; a unit whose denominator is 0 was not exposed and does not count."""
        y, x = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
        if y.shape != x.shape or y.ndim != 1:
            raise ValueError(f"numerator has shape {y.shape}, denominator {x.shape}; give one value a unit of each")
        if not (np.isfinite(y).all() and np.isfinite(x).all() and (x >= 0).all()):
            raise ValueError("totals must be finite, and denominators not negative")
        y, x = y[x > 0], x[x > 0]
        return cls(len(x), float(y.sum()), float(y @ y), float(x.sum()), float(x @ x), float(x @ y))

    def __add__(self, other: ArmSums) -> ArmSums:
        return ArmSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def cumulative(unit: ArrayLike, period: ArrayLike, numerator: ArrayLike, denominator: ArrayLike) -> dict[int, ArmSums]:
    """The sums of an arm as of the end of each period, in order, from (rows,) arrays with any number of rows per unit.

    `unit` and `period` (a day's number) are integers. A unit that comes again is one unit, with what it did so far.
    """
    of_unit, code = np.unique(np.asarray(unit), return_inverse=True)
    of_row = np.asarray(period)
    y, x = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    totals = np.zeros((2, len(of_unit)))
    series = {}
    for now in np.unique(of_row):
        rows = of_row == now
        totals += [np.bincount(code[rows], values[rows], len(of_unit)) for values in (y, x)]
        series[int(now)] = ArmSums.of(*totals)
    return series


# ── rates and lifts ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ratio:
    """A rate Σy/Σx of an arm, with its error by unit and fixed-horizon interval.

    `variance` is the variance by unit: se² = variance / units. Power is planned with it. What is not known is None: the
    rate without exposures, the rest with fewer than 30 units or 10 events.
    """

    units: int
    rate: float | None
    variance: float | None = None
    se: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class Interval:
    """Where a lift lies, and the p-value of there being none."""

    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Lift:
    """How much higher a rate is in the treatment than in control, as a share of control's: 0.1 is 10 % more."""

    lift: float
    fixed: Interval  # for one look, at a size that was settled beforehand
    always_valid: Interval  # for every look at once; stop when you like


def ratio(arm: ArmSums, alpha: float = ALPHA) -> Ratio:
    """The rate of an arm. Its variance is the delta method's (Deng, Knoblich & Lu 2018, section 3), by unit.

    The interval is made for the rate's logarithm, so that it stays above 0.
    """
    if arm.x <= 0:
        return Ratio(arm.units, None)
    rate = arm.y / arm.x
    relative = _relative_variance(arm)
    if relative is None:
        return Ratio(arm.units, rate)
    variance = relative * rate**2 * arm.units
    factor = math.exp(_z(alpha) * math.sqrt(relative))
    return Ratio(arm.units, rate, variance, rate * math.sqrt(relative), rate / factor, rate * factor)


def lift(
    treatment: ArmSums, control: ArmSums, *, alpha: float = ALPHA, expected_lift: float = EXPECTED_LIFT
) -> Lift | None:
    """The treatment's lift over control with 1 − alpha intervals; None with under 30 units or 10 events in an arm.

    Both intervals are made for the logarithm of the ratio of the rates, whose variance is the sum of the arms' relative
    variances (Deng, Knoblich & Lu 2018). The always-valid one is Robbins' normal mixture (Howard et al. 2021;
    Johari et al. 2017) with effects of sd `expected_lift`, asymptotic as in Waudby-Smith et al. 2021.
    """
    effect = _effect(treatment, control)
    if effect is None:
        return None
    log_ratio, variance = effect
    se = math.sqrt(variance)
    always_p = min(1.0, math.exp(-_log_mixture(log_ratio, variance, expected_lift)))
    return Lift(
        math.expm1(log_ratio),
        _interval(log_ratio, _z(alpha) * se, 2 * float(ndtr(-abs(log_ratio) / se))),
        _interval(log_ratio, _mixture_radius(variance, expected_lift, alpha), always_p),
    )


def sure_drop(
    candidate: ArmSums, control: ArmSums, *, alpha: float = ALPHA, expected_lift: float = EXPECTED_LIFT
) -> float | None:
    """How far the candidate's rate is at least below control's, as a share of it; 0 where that is not sure.

    A one-sided lower bound at level 1 − alpha, valid at every look at once (the one-sided normal mixture of Howard et
    al. 2021). None: too little is known, but for a candidate whose events are so few that it is sure
    nevertheless, reckoned as if there were 10 of them.
    """
    if min(candidate.units, control.units) < MIN_UNITS or control.y < MIN_EVENTS or candidate.x <= 0:
        return None
    known = candidate.y >= MIN_EVENTS
    effect = _effect(candidate if known else _with_min_events(candidate), control)
    if effect is None:
        return None
    log_ratio, variance = effect
    drop = max(0.0, -math.expm1(log_ratio + _one_sided_radius(variance, expected_lift, alpha)))
    return drop if known or drop > 0 else None


def _with_min_events(arm: ArmSums) -> ArmSums:
    """The arm as if it had had the fewest events that count, spread over its units at random.

    More events make a drop smaller: what is sure of this arm is sure of the real one. A candidate that nobody clicks
    must not go unnoticed because of it.
    """
    y = float(MIN_EVENTS)
    rate = y / arm.x
    yy = y + rate**2 * arm.xx  # of Poisson numbers of events at this rate
    return ArmSums(arm.units, y, max(yy, arm.yy), arm.x, arm.xx, rate * arm.xx)


def _effect(treatment: ArmSums, control: ArmSums) -> tuple[float, float] | None:
    """The logarithm of the ratio of the rates, and its variance."""
    variances = [_relative_variance(arm) for arm in (treatment, control)]
    if variances[0] is None or variances[1] is None or variances[0] + variances[1] <= 0:
        return None
    return math.log(treatment.y / treatment.x) - math.log(control.y / control.x), variances[0] + variances[1]


def _relative_variance(arm: ArmSums) -> float | None:
    """The variance of the rate over its square, which is that of its logarithm."""
    if arm.units < MIN_UNITS or arm.y < MIN_EVENTS or arm.x <= 0:
        return None
    rate = arm.y / arm.x
    residual = arm.yy - 2 * rate * arm.xy + rate**2 * arm.xx  # Σ (y − rate·x)², whose sum is 0
    return max(0.0, residual) * arm.units / (arm.units - 1) / arm.y**2


def _interval(log_ratio: float, radius: float, p_value: float) -> Interval:
    return Interval(math.expm1(log_ratio - radius), math.expm1(log_ratio + radius), p_value)


def _z(alpha: float) -> float:
    return float(-ndtri(alpha / 2))


def _log_mixture(distance: float, variance: float, sd: float) -> float:
    """The logarithm of the likelihood ratio of effects N(0, sd²) against none, at an estimate this far from none."""
    return 0.5 * (
        math.log(variance / (variance + sd**2)) + distance**2 * sd**2 / (variance * (variance + sd**2))
    )  # fmt: skip


def _mixture_radius(variance: float, sd: float, alpha: float) -> float:
    """The distance at which that ratio is 1/alpha."""
    return math.sqrt(
        variance * (variance + sd**2) / sd**2 * (math.log((variance + sd**2) / variance) - 2 * math.log(alpha))
    )


def _one_sided_radius(variance: float, sd: float, alpha: float) -> float:
    """The same for effects to one side only: |N(0, sd²)|. It is the smaller one."""

    def excess(distance: float) -> float:
        mean_over_sd = distance * sd / math.sqrt(variance * (variance + sd**2))  # of the effect, given the estimate
        one_sided = _log_mixture(distance, variance, sd) + math.log(2) + float(log_ndtr(mean_over_sd))
        return one_sided + math.log(alpha)

    return float(brentq(excess, 0.0, _mixture_radius(variance, sd, alpha), xtol=1e-10))


# ── sample ratio ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Srm:
    """Whether units fell into buckets as their shares say; if not, no comparison of the buckets can be trusted."""

    units: int
    p_value: float | None  # chi-square, for one look; None where a bucket expects fewer than 5 units
    always_valid_p: float  # for every look at once
    flagged: bool


@dataclass(frozen=True)
class Cohort(Generic[Name]):
    """Units that were assigned by the same shares: those seen in a release, say."""

    name: str
    units: Mapping[Name, int]  # distinct ones, by bucket
    shares: Mapping[Name, float]  # as designed; they need not sum to 1
    new: Mapping[Name, int] | None = None  # those of them that no earlier cohort has; None: all

    @property
    def expected(self) -> dict[Name, float]:
        """Units by bucket if they had fallen exactly as designed."""
        total, n = math.fsum(self.shares.values()), sum(self.units.values())
        return {name: n * share / total for name, share in self.shares.items() if share > 0}


def srm(
    counts: Mapping[Name, int],
    shares: Mapping[Name, float],
    *,
    sequential: bool = True,
    alpha: float = SRM_ALPHA,
) -> Srm | None:
    """The sample-ratio check of distinct units by bucket, since the shares were last changed.

    `always_valid_p` is 1 over the Bayes factor of Dirichlet-distributed shares against those designed, each unit
    counted at its first exposure (Lindon & Malek 2022); it may be watched for ever. With `sequential` it decides what
    is flagged, else the chi-square does (where it is known). None: fewer than two buckets have a share, or nobody came.

    Raises InputError for counts that are negative, or shares that are or that sum to nothing.
    """
    return srm_of([Cohort("", counts, shares)], sequential=sequential, alpha=alpha)


def srm_of(cohorts: Iterable[Cohort[Name]], *, sequential: bool = True, alpha: float = SRM_ALPHA) -> Srm | None:
    """The sample-ratio check where shares were changed: each cohort is held against its own. With one it is `srm`.

    Of new units, each of which is in one cohort, the p-value is twice the smaller one of two: the sum of the cohorts'
    chi-squares, which sees a fault of any of them, and the chi-square of observed − expected summed over all, which
    sees a small one that all have (both of cohorts and buckets that expect 5 units); Bayes factors multiply. Where
    units come again, each cohort is checked as a whole too, and that, times their number, counts as a second look. It
    sees what is lost of units that were known, and where one bucket's come back more often.
    """
    seen = [cohort for cohort in cohorts if _checked(cohort) and sum(cohort.units.values()) > 0]
    units = sum(sum(cohort.units.values()) for cohort in seen)
    if any(n > 0 and not cohort.shares.get(name, 0) > 0 for cohort in seen for name, n in cohort.units.items()):
        return Srm(units, 0.0, 0.0, True)  # somebody is where nobody can be
    seen = [cohort for cohort in seen if len(cohort.expected) > 1]
    if not seen:
        return None
    looks = [_disjoint([cohort if cohort.new is None else replace(cohort, units=cohort.new) for cohort in seen])]
    if len(seen) > 1 and any(cohort.new is not None for cohort in seen):
        looks.append(_least([_disjoint([cohort]) for cohort in seen]))
    p_value, always_valid_p = _least(looks)
    decides = always_valid_p if sequential or p_value is None else p_value
    return Srm(units, p_value, always_valid_p, decides < alpha)


def _disjoint(cohorts: Sequence[Cohort[Name]]) -> tuple[float | None, float]:
    """The p-values, for one look and for every look, of cohorts that no unit is in two of."""
    cohorts = [cohort for cohort in cohorts if sum(cohort.units.values()) > 0]
    if not cohorts:
        return None, 1.0
    both = [p for p in (_stratified_p(cohorts), _summed_p(cohorts)) if p is not None]
    p_value = (both[0] if len(cohorts) == 1 else min(1.0, 2 * min(both))) if both else None
    return p_value, min(1.0, math.exp(min(0.0, -math.fsum(map(_log_bayes_factor, cohorts)))))


def _least(looks: Sequence[tuple[float | None, float]]) -> tuple[float | None, float]:
    """The smallest p-values of several looks, with their number counted against them (Bonferroni)."""
    known = [p for p, _ in looks if p is not None]
    p_value = min(1.0, len(known) * min(known)) if known else None
    return p_value, min(1.0, len(looks) * min(p for _, p in looks))


def _checked(cohort: Cohort[Name]) -> bool:
    if any(n < 0 for n in (*cohort.units.values(), *(cohort.new or {}).values())) or any(
        not share >= 0 for share in cohort.shares.values()
    ):
        raise InputError("srm: a count or a share is negative. Give units and shares by bucket, 0 or more.")
    if not 0 < math.fsum(cohort.shares.values()) < math.inf:
        raise InputError("srm: no bucket has a share. Give the shares that the units were assigned by.")
    return True


def _stratified_p(cohorts: Sequence[Cohort[Name]]) -> float | None:
    """Of the sum of chi-squares; None where every cohort has a bucket that expects fewer than 5 units."""
    chi_square, freedom = 0.0, 0
    for cohort in cohorts:
        if min(cohort.expected.values()) >= MIN_EXPECTED:
            chi_square += sum((cohort.units.get(name, 0) - e) ** 2 / e for name, e in cohort.expected.items())
            freedom += len(cohort.expected) - 1
    return float(chdtrc(freedom, chi_square)) if freedom else None


def _summed_p(cohorts: Sequence[Cohort[Name]]) -> float | None:
    """Of observed − expected over all cohorts, whose covariance is the sum of the multinomial ones; None where a bucket
    expects fewer than 5 units."""
    names = list(dict.fromkeys(name for cohort in cohorts for name in cohort.expected))
    apart, total, covariance = np.zeros(len(names)), np.zeros(len(names)), np.zeros((len(names), len(names)))
    for cohort in cohorts:
        expected = np.array([cohort.expected.get(name, 0.0) for name in names])
        apart += np.array([cohort.units.get(name, 0) for name in names]) - expected
        covariance += np.diag(expected) - np.outer(expected, expected) / expected.sum()
        total += expected
    if total.min() < MIN_EXPECTED:
        return None
    scale = 1 / np.sqrt(total)  # of about 1, so that it shows which directions have no variance
    values, vectors = np.linalg.eigh(covariance * np.outer(scale, scale))
    free = values > 1e-9
    return float(chdtrc(int(free.sum()), float((((apart * scale) @ vectors[:, free]) ** 2 / values[free]).sum())))


def _log_bayes_factor(cohort: Cohort[Name]) -> float:
    designed = np.array(list(cohort.expected.values()))
    share = designed / designed.sum()
    seen = np.array([cohort.units.get(name, 0) for name in cohort.expected], np.float64)
    prior = SRM_CONCENTRATION * share
    return float(
        gammaln(prior.sum()) - gammaln(prior.sum() + seen.sum())
        + (gammaln(prior + seen) - gammaln(prior) - seen * np.log(share)).sum()
    )  # fmt: skip


# ── power ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def power(
    lift: float, rate: float, variance: float, *, treatment_units: float, control_units: float, alpha: float = ALPHA
) -> float:
    """The chance that the fixed-horizon interval excludes 0 if the true lift is `lift` (two-sided z-test).

    `rate` and `variance` (by unit) are control's, as `ratio` has them; for one exposure a unit the variance is
    rate·(1 − rate). Both arms are taken to have it, which is right for small lifts; a treatment that makes everybody
    click 20 % more varies more too, and needs up to a fifth more units than planned.
    """
    z = lift * rate / _difference_se(rate, variance, treatment_units, control_units)
    return float(ndtr(z - _z(alpha)) + ndtr(-z - _z(alpha)))


def minimum_detectable_effect(
    rate: float,
    variance: float,
    *,
    treatment_units: float,
    control_units: float,
    alpha: float = ALPHA,
    at_power: float = 0.8,
) -> float:
    """The smallest lift that is found with a chance of `at_power`: (z₁₋α/₂ + z_power) · se / rate."""
    se = _difference_se(rate, variance, treatment_units, control_units)
    return (_z(alpha) + _z_power(alpha, at_power)) * se / rate


def required_units(
    lift: float,
    rate: float,
    variance: float,
    *,
    treatment_share: float = 0.5,
    alpha: float = ALPHA,
    at_power: float = 0.8,
) -> int:
    """How many units both arms need together for a chance of `at_power` to find this lift."""
    if not 0 < treatment_share < 1 or lift == 0:
        raise InputError(
            f"required_units: for a lift of {lift:g} and a treatment share of {treatment_share:g} there is no such"
            " number. Give a lift other than 0, and a share between 0 and 1."
        )
    one_unit = _difference_se(rate, variance, treatment_share, 1 - treatment_share)
    return math.ceil(((_z(alpha) + _z_power(alpha, at_power)) * one_unit / (lift * rate)) ** 2)


def _difference_se(rate: float, variance: float, treatment_units: float, control_units: float) -> float:
    if not (rate > 0 and variance > 0 and treatment_units > 0 and control_units > 0):
        raise InputError(
            f"power: a rate of {rate:g} with variance {variance:g} in {treatment_units:g} and {control_units:g} units"
            " shows nothing. Give numbers above 0."
        )
    return math.sqrt(variance * (1 / treatment_units + 1 / control_units))


def _z_power(alpha: float, at_power: float) -> float:
    # From a power of one half the other side of the two-sided test no longer matters (under 5·10⁻⁵ at alpha .05).
    if not 0 < alpha < 1 or not 0.5 <= at_power < 1:
        raise InputError(
            f"power: {at_power:g} at level {alpha:g} cannot be planned. Ask for a power from 0.5 to below 1."
        )
    return float(ndtri(at_power))


# ── guardrails ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Traffic:
    """How decisions were answered, as counts that add. `latency_ms`: upper bounds of a histogram to what fell below.

    Each answer is in one entry of `latency_ms` (not in all above it, as Prometheus writes them); the last bound may be
    infinite.
    """

    requests: int
    errors: int
    fallbacks: int
    latency_ms: Mapping[float, int]

    @classmethod
    def of(cls, latencies_ms: Iterable[float], bounds_ms: Iterable[float], *, errors: int, fallbacks: int) -> Traffic:
        """The counts of single answers; slower ones than the last bound are counted under infinity."""
        bounds = [*sorted(bounds_ms), math.inf]
        values = np.fromiter(latencies_ms, np.float64)
        counts = np.bincount(np.searchsorted(bounds, values, side="left"), minlength=len(bounds))
        return cls(len(values), errors, fallbacks, dict(zip(bounds, counts.tolist(), strict=True)))

    def __add__(self, other: Traffic) -> Traffic:
        if set(self.latency_ms) != set(other.latency_ms):
            raise ValueError("latencies were counted under different bounds; they do not add")
        latency = {bound: count + other.latency_ms[bound] for bound, count in self.latency_ms.items()}
        return Traffic(
            self.requests + other.requests, self.errors + other.errors, self.fallbacks + other.fallbacks, latency
        )

    def latency_quantile_ms(self, q: float) -> float | None:
        """The q-quantile of the latency, interpolated within its bound; the last finite bound where it lies above it.

        None with fewer than 100 answers.
        """
        bounds = sorted(self.latency_ms)
        counts = np.array([self.latency_ms[bound] for bound in bounds], np.float64)
        if counts.sum() < MIN_REQUESTS:
            return None
        rank = q * counts.sum()
        place = int(np.searchsorted(np.cumsum(counts), rank, side="left"))
        below = bounds[place - 1] if place else 0.0
        if math.isinf(bounds[place]):
            return below
        within = (rank - counts[:place].sum()) / counts[place]
        return float(below + within * (bounds[place] - below))


class Arms(NamedTuple):
    """Two arms to compare."""

    candidate: ArmSums
    control: ArmSums


def measure(
    *,
    clicks: Arms | None = None,
    conversions: Arms | None = None,
    units: Mapping[Name, int] | None = None,
    shares: Mapping[Name, float] | None = None,
    traffic: Traffic | None = None,
    alpha: float = ALPHA,
) -> dict[str, float | None]:
    """What a release's guardrails may bound, by metric; None: not known (yet). `Health.judge` compares it.

    `ctr_drop`, `cvr_drop`: `sure_drop` of clicks and of conversions, so that `max: 0.02` fails once it is sure, at
    whatever look, that the candidate's rate is more than 2 % below control's. `srm_p`: the always-valid p-value of the
    units' shares (`min: 0.001`). `error_rate`, `fallback_rate`: shares of the answers; `p99_ms`.

    The drops and `srm_p` are valid at every look only on sums that begin with the candidate and grow, not over a
    sliding window.
    """
    ratio_check = srm(units, shares) if units is not None and shares is not None else None
    enough = traffic is not None and traffic.requests >= MIN_REQUESTS
    return {
        "ctr_drop": None if clicks is None else sure_drop(*clicks, alpha=alpha),
        "cvr_drop": None if conversions is None else sure_drop(*conversions, alpha=alpha),
        "srm_p": None if ratio_check is None else ratio_check.always_valid_p,
        "error_rate": traffic.errors / traffic.requests if traffic is not None and enough else None,
        "fallback_rate": traffic.fallbacks / traffic.requests if traffic is not None and enough else None,
        "p99_ms": None if traffic is None else traffic.latency_quantile_ms(0.99),
    }
