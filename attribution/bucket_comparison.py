"""The buckets of a log compared, by unit: trends of lifts, what else differs between buckets, and variants.

What is measured; what it says of the doubts about a lift is in effectiveness.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import csr_array

from attribution.coding import UserField
from attribution.contrasts import (
    Arms,
    Rating,
    association,
    jackknife_error,
    mantel_haenszel,
    slopes,
    standardised_difference,
    without_each,
)
from kaleidoscope import experiment
from kaleidoscope.experiment import MIN_EVENTS, MIN_UNITS
from kaleidoscope.exposure import logging_policy
from kaleidoscope.log import Codes, Floats, Log, combine, factorise, first_rows, sums
from kaleidoscope.policy_value import LoggedRows, Weighting, choose_weighting, dr_scores, estimate, policy_weights
from kaleidoscope.vocabulary import Bucket

REPLICATES = 100  # groups of units that errors are estimated from (delete-a-group jackknife, Kott 2001)
LEVEL = 0.95
MIN_CLICKS = 30  # of either bucket, for a trend or a split; a slice of one needs MIN_EVENTS
NTH = ("1", "2", "3-4", "5-8", "9+")  # exposures of a unit: each range begins at twice the one before
WIDE = math.log(2)  # a change of the ratio by this factor, from the first to the last, would be a different story
SLICES = 6  # of the time, that are shown
BLOCKS = 200  # of the time, at most, that exposures are compared within
HOUR_S, DAY_S = 3_600.0, 86_400.0
SECONDS_FROM = 1e8  # times from here on (1973) are seconds since 1970; smaller ones are a column's own numbers
MAX_CATEGORIES = 20  # of a feature or of the products; rarer ones count as one
MIN_CATEGORY = 10  # units, of a value that is compared by itself
UNITS_A_STRATUM = 50  # about as many units come for the first time in a stratum of the comparison of features
FOLDS = 5
LISTED = 200  # variants, at most

# ── what is measured ──────────────────────────────────────────────────────────────────────────────────────────────────


class Direction(StrEnum):
    """What happens to a lift along time or exposures; `no_trend`: none is seen, which is not "there is none"."""

    SHRINKS = "shrinks"
    GROWS = "grows"
    NO_TREND = "no_trend"


@dataclass(frozen=True)
class Measured:
    """An estimate with its 95 % interval by unit, and the p-value of its being 0 where that is a question."""

    value: float
    ci_low: float
    ci_high: float
    p_value: float | None = None


@dataclass(frozen=True)
class Slice:
    """A piece of time, or an nth exposure: the rates of both buckets and the lift. None: too few units or clicks."""

    label: str
    exposures: int
    control_exposures: int
    ctr: Measured | None
    control_ctr: Measured | None
    lift: Measured | None  # within equal times, products and groups


@dataclass(frozen=True)
class Trend:
    """How the ratio of a bucket's CTR to control's changes, per `step`, as a share of itself."""

    bucket: str
    over: str  # "time" or "exposures"
    step: str  # "day", "hour", "tenth of the log", or "doubling of exposures"
    steps: float  # from the first to the last
    change: Measured  # −0.02: the ratio falls by 2 % per step
    p_adjusted: float  # Holm over all trends looked at
    direction: Direction
    clear: bool  # whether a doubling or halving from the first to the last lies outside the interval
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Balance:
    """Whether a feature is distributed alike in all buckets, over units at their first exposure."""

    feature: str
    role: str  # "user", "context" or "time"
    p_value: float
    p_adjusted: float | None  # Holm over everything compared; None: not tested, without units or with changed shares
    bucket: str  # that differs most from the reference
    value: str | None  # of a text: the value that differs most; None: the mean of a number
    smd: Measured  # the difference in standard deviations


@dataclass(frozen=True)
class Products:
    """Which products the buckets showed: shares of exposures by bucket and product."""

    shares: Mapping[str, Mapping[str, float]]
    p_value: float | None  # that shares differ from the reference's, Holm over products; None: there is only one
    p_adjusted: float | None
    held_fixed: bool


@dataclass(frozen=True)
class Moved:
    """Units that were in several buckets."""

    units: int
    share: float
    exposures_share: float  # of the exposures, that are of such units
    returned_share: float | None  # of the units: came back to a bucket that they had left; None: times are not known


@dataclass(frozen=True)
class BucketLift:
    """A bucket's lift over control as it is, and with what else might differ held fixed (Mantel–Haenszel)."""

    bucket: str
    crude: Measured
    held_fixed: Mapping[str, Measured]  # "time", "time and product", … → the lift within equal ones


@dataclass(frozen=True)
class VariantCtr:
    """A variant where the model chose it, and where it was shown at random."""

    variant_id: str
    exposures: int
    share: float  # of what the model chose
    random_exposures: int
    ctr: Measured | None
    random_ctr: Measured | None
    lift: Measured | None  # chosen over random, at the model's time
    q_value: float | None


@dataclass(frozen=True)
class Split:
    """The lift of the model, as the part that one variant for everybody brings, and the rest: they add up."""

    over: str  # control; or random, where the log has no control
    lift: Measured
    best_single: Measured
    personalisation: Measured
    regret: float  # what of `best_single` the best variant may have over the one that the log makes one pick
    best_variant: str  # that the random bucket would have one choose
    weighting: str  # how exposures were matched to it
    own_time: (
        bool  # whether the random bucket was there in the model's time; else its earlier ratio to control is taken
    )


@dataclass(frozen=True)
class Concentration:
    """How many variants carry half of what the model's bucket shows, and half of its lift."""

    variants: int
    half_of_exposures: int
    half_of_lift: int | None


# ── the log, by bucket and unit ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Window:
    """When two buckets were both shown, cut into blocks in which they are compared."""

    start: float
    end: float
    step_s: float  # what changes are given per
    step: str

    def blocks(self, time: Floats, most: int) -> Codes:
        """(n,) which block a moment is in: at most so many, and of an hour at least."""
        span = self.end - self.start
        shortest = HOUR_S if self.start >= SECONDS_FROM else 0.0
        width = max(shortest, span / most, 1e-9)
        return np.minimum((time - self.start) / width, most - 1).astype(np.int64)

    def slices(self, time: Floats) -> tuple[Codes, list[str]]:
        """(n,) which of a few slices of whole steps a moment is in, and what they are called."""
        steps = max(1, math.ceil((self.end - self.start) / self.step_s - 1e-9))
        edges = np.unique(np.round(np.linspace(0, steps, min(SLICES, steps) + 1)).astype(int))
        unit = self.step.split()[0]
        labels = [f"{unit} {a + 1}" if b == a + 1 else f"{unit} {a + 1}-{b}" for a, b in pairwise(edges.tolist())]
        place = np.searchsorted(edges[1:-1], (time - self.start) / self.step_s, side="right")
        return place.astype(np.int64), labels


@dataclass(frozen=True)
class Exposures:
    """n exposures as this page compares them: rows that weigh nothing or have no bucket are left out."""

    log: Log
    control: str
    names: tuple[str, ...]  # code of a bucket → name
    bucket: Codes  # (n,)
    buckets: tuple[str, ...]  # those with units enough
    unit: Codes  # (n,) without units every exposure is one
    replicate: Codes  # (n,)
    replicates: int
    size: Floats  # (n,)
    clicks: Floats  # (n,)
    held: Codes  # (n,) group × product
    lack_of_time: str  # why there are no times, and what to do; empty where there are

    @classmethod
    def of(cls, log: Log, control: str) -> Exposures:
        """The log's exposures, with units dealt into replicates."""
        names = [] if log.buckets is None else log.buckets.to_pylist()
        kept = log.weight > 0
        if log.bucket is not None:
            kept &= np.array([name is not None for name in names], bool)[log.bucket]
        log = log if kept.all() else log.take(kept)
        lack_of_time = _lack_of_time(log)
        if lack_of_time:  # those there are tell as much as none
            log = replace(log, time=None)
        replicates = max(2, min(REPLICATES, log.n_units))
        if log.unit is None and (log.count == 1).all():
            replicate = np.random.default_rng(0).permutation(len(log)) % replicates
        else:
            log, replicate = log.folds(replicates, 0)
        unit = np.arange(len(log)) if log.unit is None else log.unit
        bucket = np.zeros(len(log), np.int64) if log.bucket is None else log.bucket
        size = log.count * log.weight
        held = combine([codes for codes in (log.group, log.product) if codes is not None], len(log))
        e = cls(
            log, control, tuple(str(name) for name in names), bucket, (), unit, replicate, replicates, size,
            size * log.reward, held, lack_of_time,
        )  # fmt: skip
        if log.bucket is None:
            return e
        units = {name: e.units(np.flatnonzero(bucket == code)) for code, name in enumerate(e.names)}
        order = [control, *(one.value for one in Bucket), *sorted(units)]
        return replace(e, buckets=tuple(b for b in dict.fromkeys(order) if units.get(b, 0) >= MIN_UNITS))

    # ── what there is ──

    @property
    def lack_of_buckets(self) -> str:
        """Why buckets cannot be compared."""
        if self.log.bucket is None:
            return (
                "The log does not say which bucket an exposure is of. Name the column in `bucket`; its values are"
                " control, random, model or challenger."
            )
        return (
            f"Fewer than two buckets have at least {MIN_UNITS} units (the log has {self._found}): nothing can be"
            " compared. Give control and random a share of the traffic."
        )

    @property
    def _shown(self) -> list[str]:
        counts = np.bincount(self.bucket, minlength=len(self.names))
        return [name for name, n in zip(self.names, counts.tolist(), strict=True) if n]

    @property
    def _found(self) -> str:
        return joined(self._shown) or "none"

    def lack(self, *needed: str) -> str | None:
        """Why these buckets cannot be compared; None where they can."""
        if self.log.bucket is None:
            return self.lack_of_buckets
        absent = joined([name for name in needed if name not in self.buckets])
        if absent:
            own_names = self.control in needed and not set(Bucket).issuperset(self._shown)
            which = " If another bucket is control, name it: `--control NAME`." if own_names else ""
            return (
                f"The log has too little of {absent}: fewer than {MIN_UNITS} units (it has {self._found})."
                f" Give {absent} a share of the traffic.{which}"
            )
        return self.lack_of_buckets if len(self.buckets) < 2 else None

    def units(self, rows: Codes) -> int:
        """Different units of these rows."""
        if self.log.unit is None:
            return round(float(self.log.count[rows].sum()))
        return int((np.bincount(self.unit[rows]) > 0).sum()) if len(rows) else 0

    def rows(self, *names: str) -> Codes:
        """The rows of these buckets."""
        return np.flatnonzero(np.isin(self.bucket, [self.names.index(name) for name in names]))

    def is_of(self, rows: Codes, name: str) -> NDArray[np.bool_]:
        """Which of the rows are of a bucket."""
        return np.asarray(self.bucket[rows] == self.names.index(name))

    def window(self, *names: str) -> Window | None:
        """When all of these buckets were shown; None where times are not known or never common."""
        time = self.log.time
        if time is None:
            return None
        of = [time[rows][np.isfinite(time[rows])] for rows in (self.rows(name) for name in names)]
        if not all(len(x) for x in of):
            return None
        start, end = max(float(x.min()) for x in of), min(float(x.max()) for x in of)
        if end <= start:
            return None
        for step, step_s in (("day", DAY_S), ("hour", HOUR_S)):
            if start >= SECONDS_FROM and end - start >= 2 * step_s:
                return Window(start, end, step_s, step)
        return Window(start, end, (end - start) / 10, "tenth of the log")

    def within(self, rows: Codes, window: Window) -> Codes:
        """Those of the rows that are in a window."""
        assert self.log.time is not None
        time = self.log.time[rows]
        return np.asarray(rows[(time >= window.start) & (time <= window.end)])  # no unknown one is

    # ── two buckets compared ──

    def arms(self, rows: Codes, stratum: Codes, bucket: str) -> tuple[Arms, Codes]:
        """Sums of a bucket and of all others among the rows, in the strata that have both; and a row of each."""
        treated = self.is_of(rows, bucket)
        n_strata = int(stratum.max(initial=-1)) + 1
        both = (np.bincount(stratum[treated], minlength=n_strata) > 0) & (
            np.bincount(stratum[~treated], minlength=n_strata) > 0
        )
        kept = both[stratum]
        rows, stratum, treated = rows[kept], (np.cumsum(both) - 1)[stratum[kept]], treated[kept]
        n_strata, r = int(both.sum()), self.replicates
        place = stratum * r + self.replicate[rows]

        def total(part: NDArray[np.bool_], amount: Floats) -> Floats:
            return sums(place[part], amount[rows[part]], size=n_strata * r).reshape(n_strata, r)

        found = Arms(
            total(treated, self.size), total(treated, self.clicks), total(~treated, self.size),
            total(~treated, self.clicks),
        )  # fmt: skip
        return found, rows[first_rows(stratum)] if len(rows) else rows

    def blocks(self, rows: Codes, window: Window, most: int = BLOCKS) -> Codes:
        """(rows,) the block of time × group × product of each."""
        assert self.log.time is not None
        most = max(1, min(most, 20_000 // (int(self.held.max(initial=0)) + 1)))
        return combine([window.blocks(self.log.time[rows], most), self.held[rows]], len(rows))

    def ratio(self, bucket: str, over: str, after: float | None = None) -> Floats | None:
        """(1 + R,) the log ratio of a bucket's rate to another's within equal times, products and groups, with all
        units and without each replicate; `after`: from this moment on. None where there is too little."""
        rows, window = self.rows(bucket, over), self.window(bucket, over)
        if self.log.time is not None:
            if window is None:
                return None
            if after is not None:
                window = replace(window, start=max(window.start, after))
            rows = self.within(rows, window)
        if not self.enough(rows, bucket, MIN_CLICKS):
            return None
        stratum = self.held[rows] if window is None else self.blocks(rows, window)
        found = mantel_haenszel(self.arms(rows, combine([stratum], len(rows)), bucket)[0])
        return found if np.isfinite(found).all() else None

    def enough(self, rows: Codes, bucket: str, clicks: float) -> bool:
        """Whether both the bucket and all others among the rows have units and clicks enough."""
        treated = self.is_of(rows, bucket)
        return all(
            self.units(part) >= MIN_UNITS and float(self.clicks[part].sum()) >= clicks
            for part in (rows[treated], rows[~treated])
        )

    # ── trends ──

    def trend(self, bucket: str, over: str) -> Trend | str:
        """The trend of a bucket's ratio to control over time or exposures; why not, where it cannot be known."""
        if self.log.time is None:
            return f"Whether a lift lasts, and which exposure of a unit is the first, is not known. {self.lack_of_time}"
        if over == "exposures":
            if self.log.unit is None:
                return "The log names no unit: who comes back is not known. Name the user's column in `unit`."
            if (self.log.count != 1).any():
                return "Rows stand for several exposures: which one was a unit's first is not known. Log each exposure."
        window = self.window(bucket, self.control)
        if window is None:
            return (
                f"{bucket} and {self.control} were never shown at the same time. Let both have a share of the traffic"
                " at once."
            )
        rows = self.within(self.rows(bucket, self.control), window)
        time = self.log.time[rows]
        if over == "time":
            piece, labels = window.slices(time)
            stratum = combine([piece, self.blocks(rows, window)], len(rows))
            at, step = (time - window.start) / window.step_s, window.step
        else:
            piece, labels = (
                np.minimum(np.ceil(np.log2(self.nth(window)[rows])), len(NTH) - 1).astype(np.int64),
                list(NTH),
            )
            stratum = combine([piece, self.blocks(rows, window, BLOCKS // 4)], len(rows))
            at, step = piece.astype(np.float64), "doubling of exposures"
        if not self.enough(rows, bucket, MIN_CLICKS):
            return (
                f"{bucket} or {self.control} has fewer than {MIN_UNITS} units or {MIN_CLICKS} clicks while both were"
                " shown. Log on."
            )
        arms, example = self.arms(rows, stratum, bucket)
        of_row = np.zeros(len(self.bucket), np.int64)
        of_row[rows] = np.arange(len(rows))
        place = of_row[example]
        known = (arms.c1 + arms.c0).sum(axis=1) > 0
        middle = sums(stratum, at)[stratum[place]] / sums(stratum)[stratum[place]] if len(place) else at[:0]
        if len(np.unique(piece[place[known]])) < 2:
            what = "time" if over == "time" else "nth exposure"
            return f"{bucket} and {self.control} were both shown at one {what} only. Log on."
        slope = slopes(arms.of(known), middle[known])
        found = self.measured(slope)
        if found is None:
            return f"The clicks of {bucket} and {self.control} are too few for a trend. Log on."
        steps = float(np.ptp(middle[known]))
        far = max(abs(math.log1p(found.ci_low)), abs(math.log1p(found.ci_high))) * steps
        slices = tuple(
            self.slice(label, rows[piece == i], arms.of(piece[place] == i), bucket) for i, label in enumerate(labels)
        )
        return Trend(bucket, over, step, steps, found, 1.0, Direction.NO_TREND, far <= WIDE, slices)

    def nth(self, window: Window) -> Floats:
        """(n,) which exposure of its unit each is, of all buckets, from the start of a window on; before it 1.

        Counted over all buckets: at the same moment and the same nth exposure who is in which bucket is left to chance,
        also where shares changed. The nth *in a bucket* begins anew for those who are moved into it, and they are the
        ones who come often.
        """
        assert self.log.time is not None
        out = np.ones(len(self.bucket))
        rows = np.flatnonzero(self.log.time >= window.start)
        order = rows[np.lexsort((self.log.time[rows], self.unit[rows]))]
        unit = self.unit[order]
        begins = np.flatnonzero(np.diff(unit, prepend=-1))
        out[order] = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order))) + 1
        return out

    def slice(self, label: str, rows: Codes, arms: Arms, bucket: str) -> Slice:
        """The rates and the lift in some of the rows; `arms` are their strata."""
        treated = self.is_of(rows, bucket)
        lift = self.measured(mantel_haenszel(arms)) if self.enough(rows, bucket, MIN_EVENTS) else None
        parts = rows[treated], rows[~treated]
        here, there = (round(float(self.log.count[part].sum())) for part in parts)
        return Slice(label, here, there, self.rate(parts[0]), self.rate(parts[1]), lift)

    def rate(self, rows: Codes) -> Measured | None:
        """The CTR of some rows."""
        if self.units(rows) < MIN_UNITS or float(self.clicks[rows].sum()) < MIN_EVENTS:
            return None
        n, c = (
            without_each(sums(self.replicate[rows], x[rows], size=self.replicates)) for x in (self.size, self.clicks)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            log_rate = np.log(c / n)
        return self.measured(log_rate, minus=0.0, tested=False)

    def measured(self, log_ratio: Floats, minus: float = 1.0, *, tested: bool = True) -> Measured | None:
        """exp − `minus` of a (1 + R,) logarithm, with the interval by replicates; None where it is not known."""
        if not np.isfinite(log_ratio).all():
            return None
        value, se = float(log_ratio[0]), jackknife_error(log_ratio)
        half = se * float(stats.t.isf((1 - LEVEL) / 2, self.replicates - 1))
        low, middle, high = (math.exp(min(x, 700.0)) - minus for x in (value - half, value, value + half))
        return Measured(middle, low, high, self.p(value, se) if tested else None)

    def difference(self, value: Floats) -> Measured:
        """A (1 + R,) number that is no logarithm, with its interval by replicates."""
        se = jackknife_error(value)
        half = se * float(stats.t.isf((1 - LEVEL) / 2, self.replicates - 1))
        whole = float(value[0])
        return Measured(whole, whole - half, whole + half, self.p(whole, se))

    def p(self, value: float, se: float) -> float:
        """The p-value of an estimate's being 0."""
        if se < 1e-12:
            return 1.0 if abs(value) < 1e-9 else 0.0
        return 2 * float(stats.t.sf(abs(value) / se, self.replicates - 1))

    # ── what else differs ──

    def first_exposures(self) -> Codes:
        """The row of every unit's first exposure since all buckets were there (of every exposure, without units)."""
        rows = self.rows(*self.buckets)
        window = self.window(*self.buckets)
        if self.log.time is not None and window is not None:
            rows = self.within(rows, window)
            rows = rows[np.argsort(self.log.time[rows], kind="stable")]
        if self.log.unit is None:
            return rows
        _, unit = factorise(self.unit[rows])
        return rows[first_rows(unit)]

    def _strata_of(self, first: Codes) -> Codes:
        """(units,) strata of about UNITS_A_STRATUM units who came at about the same time, within their group."""
        parts = [] if self.log.group is None else [self.log.group[first]]
        if self.log.time is not None:
            n = max(1, min(BLOCKS, len(first) // UNITS_A_STRATUM))
            rank = np.empty(len(first), np.int64)
            rank[np.argsort(self.log.time[first], kind="stable")] = np.arange(len(first))
            parts.append(rank * n // max(1, len(first)))
        return combine(parts, len(first))

    def split_p(self, first: Codes) -> float | None:
        """The p-value of the buckets' shares of new units having been the same all the time."""
        if self.log.time is None or len(first) < 2 * UNITS_A_STRATUM:
            return None
        rank = np.argsort(np.argsort(self.log.time[first], kind="stable"), kind="stable")
        piece = rank * min(20, len(first) // UNITS_A_STRATUM) // len(first)
        return association(np.zeros(len(first), np.int64), self.bucket[first], piece, self.log.count[first])

    def balance(self, first: Codes, *, hours: bool) -> list[Balance]:
        """How each feature is distributed over the buckets, among units at their first exposure."""
        stratum = self._strata_of(first)
        count = self.log.count[first] if self.log.unit is None else np.ones(len(first))
        found = []
        for role, names in (("user", self.log.schema.user), ("context", self.log.schema.context)):
            for name in names:
                column = self.log.columns[name].take(pa.array(first))
                field = UserField.fit(name, column, count)
                numbers = None
                if not pa.types.is_dictionary(column.type):
                    numbers = column.to_numpy(zero_copy_only=False).astype(np.float64)
                one = self._compare(name, role, first, stratum, field.codes(column), field.labels, count, numbers)
                if one is not None:
                    found.append(one)
        time = self.log.time
        if hours and time is not None and len(first) and time[first].min() >= SECONDS_FROM:
            hour = (time[first] // (4 * HOUR_S) % 6).astype(np.int64)
            day = combine([(time[first] // DAY_S).astype(np.int64)], len(first))
            labels = [f"{4 * i:02d}-{4 * i + 4:02d} h" for i in range(6)]
            one = self._compare("hour of the day (UTC)", "time", first, day, hour, labels, count, None)
            if one is not None:
                found.append(one)
        return found

    def _compare(
        self, name: str, role: str, first: Codes, stratum: Codes, code: Codes, labels: Sequence[str], count: Floats,
        numbers: Floats | None,
    ) -> Balance | None:  # fmt: skip
        bucket = self.bucket[first]
        code, labels = _with_rare_as_one(code, labels, count)
        p = association(stratum, bucket, code, count)
        if p is None:
            return None
        reference = self.control if self.control in self.buckets else self.buckets[0]
        best: tuple[float, str, str | None, float, float] | None = None
        for other in (b for b in self.buckets if b != reference):
            of = [bucket == self.names.index(b) for b in (other, reference)]
            columns: list[tuple[str | None, Floats]] = [(label, (code == i) * 1.0) for i, label in enumerate(labels)]
            if numbers is not None:
                columns = [(None, numbers), *((label, one) for label, one in columns if label == "missing")]
            for label, values in columns:
                smd, se = standardised_difference(stratum, of[0], of[1], values, count)
                if np.isfinite(smd) and (best is None or abs(smd) / se > best[0]):
                    best = abs(smd) / se, other, label, smd, se
        if best is None:
            return None
        _, other, value, smd, se = best
        half = float(stats.norm.isf((1 - LEVEL) / 2)) * se
        return Balance(name, role, p, None, other, value, Measured(smd, smd - half, smd + half))

    def products(self) -> Products | None:
        """The buckets' shares of the products, and whether they differ within equal times."""
        if self.log.product is None or self.log.products is None:
            return None
        names = [str(name) for name in self.log.products.to_pylist()]
        count = sums(self.log.product, self.log.count, size=len(names))
        order = np.argsort(-count, kind="stable")
        kept = [int(i) for i in order[:MAX_CATEGORIES] if count[i] >= 0.01 * count.sum()]
        labels = [names[i] for i in kept]
        of_product = np.full(len(names), len(kept))
        of_product[kept] = np.arange(len(kept))
        if (count[of_product == len(kept)] > 0).any():
            labels.append("others")
        code = of_product[self.log.product]
        shares = {}
        for bucket in self.buckets:
            rows = self.rows(bucket)
            shown = sums(code[rows], self.size[rows], size=len(labels))
            shares[bucket] = dict(zip(labels, (shown / shown.sum()).tolist(), strict=True))
        if len(labels) == 1:
            return Products(shares, None, None, True)
        reference = self.control if self.control in self.buckets else self.buckets[0]
        p = [
            x
            for other in self.buckets
            if other != reference
            for x in self._share_tests(other, reference, code, len(labels))
        ]
        return Products(shares, min(1.0, min(p) * len(p)) if p else 1.0, None, True)

    def _share_tests(self, bucket: str, over: str, code: Codes, n_codes: int) -> list[float]:
        """The p-values of the differences between two buckets' shares of each code, within equal times."""
        rows, window = self.rows(bucket, over), self.window(bucket, over)
        stratum = np.zeros(len(rows), np.int64)
        if window is not None and self.log.time is not None:
            rows = self.within(rows, window)
            stratum = combine([window.blocks(self.log.time[rows], BLOCKS)], len(rows))
        treated, r = self.is_of(rows, bucket), self.replicates
        n_strata = int(stratum.max(initial=-1)) + 1

        def total(part: NDArray[np.bool_]) -> Floats:
            place = stratum[part] * r + self.replicate[rows[part]]
            return without_each(sums(place, self.size[rows[part]], size=n_strata * r).reshape(n_strata, r))

        n1, n0, found = total(treated), total(~treated), []
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.nan_to_num(n1 * n0 / (n1 + n0))
            for i in range(n_codes):
                inside = code[rows] == i
                apart = np.nan_to_num(total(treated & inside) / n1 - total(~treated & inside) / n0)
                difference = (weight * apart).sum(axis=0) / weight.sum(axis=0)
                if np.isfinite(difference).all():
                    found.append(self.p(float(difference[0]), jackknife_error(difference)))
        return found

    def moved(self) -> Moved | None:
        """The units that were in several buckets."""
        if self.log.unit is None:
            return None
        n_units = self.log.n_units
        pairs, _ = factorise(self.unit * len(self.names) + self.bucket)
        different = np.bincount(pairs // len(self.names), minlength=n_units)
        several = different > 1
        returned = None
        if self.log.time is not None:
            order = np.lexsort((self.log.time, self.unit))
            unit, bucket = self.unit[order], self.bucket[order]
            changes = (np.diff(bucket) != 0) & (np.diff(unit) == 0)
            runs = 1 + np.bincount(unit[1:][changes], minlength=n_units)
            returned = float((runs > different)[different > 0].mean())
        exposures = float(self.log.count[several[self.unit]].sum() / self.log.count.sum())
        return Moved(int(several.sum()), float(several[different > 0].mean()), exposures, returned)

    def lifts(self, feature: str | None) -> tuple[tuple[BucketLift, ...], dict[str, str]]:
        """Every bucket's lift over control, as it is and with time, product and a feature held fixed; and why not."""
        if self.control not in self.buckets:
            return (), {"lifts": self.lack(self.control) or ""}
        found, missing = [], {}
        for bucket in (b for b in self.buckets if b != self.control):
            rows = self.rows(bucket, self.control)
            crude = None
            if self.enough(rows, bucket, MIN_EVENTS):
                crude = self.measured(mantel_haenszel(self.arms(rows, np.zeros(len(rows), np.int64), bucket)[0]))
            if crude is None:
                missing[f"lift of {bucket}"] = (
                    f"{bucket} or {self.control} has fewer than {MIN_EVENTS} clicks: its lift is not known. Log on."
                )
                continue
            fixed: dict[str, Measured] = {}
            window, parts, names = self.window(bucket, self.control), list[Codes](), list[str]()
            if window is not None and self.log.time is not None:
                rows = self.within(rows, window)
                parts.append(window.blocks(self.log.time[rows], BLOCKS))
                names.append("time")
                self._hold(fixed, names, rows, parts, bucket)
            for name, codes in (("group", self.log.group), ("product", self.log.product)):
                if codes is not None and int(codes.max(initial=0)) > 0:
                    parts.append(codes[rows])
                    names.append(name)
                    self._hold(fixed, names, rows, parts, bucket)
            if feature is not None:
                column = self.log.columns[feature].take(pa.array(rows))
                parts.append(UserField.fit(feature, column, self.log.count[rows]).codes(column))
                names.append(feature)
                self._hold(fixed, names, rows, parts, bucket)
            found.append(BucketLift(bucket, crude, fixed))
            if window is None and self.log.time is not None:
                missing[f"lift of {bucket} within equal times"] = (
                    f"{bucket} and {self.control} were never shown at the same time."
                )
            absent = [n for n in (joined(names[: i + 1]) for i in range(len(names))) if n not in fixed]
            if absent:
                missing[f"lift of {bucket} within equal {absent[0]}"] = (
                    f"{bucket} and {self.control} have nothing in common within equal {absent[0]}: what they are to be"
                    " compared on has to be shown in both."
                )
        return tuple(found), missing

    def _hold(self, found: dict[str, Measured], names: list[str], rows: Codes, parts: list[Codes], bucket: str) -> None:
        arms, _ = self.arms(rows, combine(parts, len(rows)), bucket)
        if float(arms.c1.sum()) < MIN_EVENTS or float(arms.c0.sum()) < MIN_EVENTS:
            return
        measured = self.measured(mantel_haenszel(arms))
        if measured is not None:
            found[joined(names)] = measured

    # ── variants ──

    def chosen(self) -> Codes:
        """The rows of the model's bucket whose variant the model chose, as far as propensities tell: what was drawn at
        random has the least propensity, and less than uniform."""
        rows = self.rows(Bucket.MODEL.value)
        if self.log.propensity is None or not len(rows):
            return rows
        p = self.log.propensity[rows]
        at_random = len(np.unique(self.log.variant[self.rows(Bucket.RANDOM.value)]))
        return rows[p > min(2 * float(p.min()), 1 / max(1, at_random))]

    def variants(self) -> tuple[tuple[VariantCtr, ...], Measured | None, bool]:
        """The variants that the model chose most, their rates when chosen over when shown at random, all together and
        each; and whether the two are compared at the same time."""
        chosen, at_random = self.chosen(), self.rows(Bucket.RANDOM.value)
        shift = self._shift(chosen, at_random)
        timed = shift is not None
        shift = np.zeros(self.replicates + 1) if shift is None else shift
        n_variants, variant = self.log.n_variants, self.log.variant
        shown = sums(variant[chosen], self.log.count[chosen], size=n_variants)
        arms = [self._by_variant(rows) for rows in (chosen, at_random)]
        shift_variance = jackknife_error(shift) ** 2
        ids = self.log.variants["variant_id"].to_pylist()
        listed = []
        for v in [int(v) for v in np.argsort(-shown, kind="stable")[:LISTED] if shown[v] > 0]:
            here, there = (experiment.ratio(of(v)) for of in arms)
            lift = None
            if here.se is not None and there.se is not None and here.rate and there.rate:
                log_ratio = math.log(here.rate / there.rate) - float(shift[0])
                se = math.sqrt((here.se / here.rate) ** 2 + (there.se / there.rate) ** 2 + shift_variance)
                half = float(stats.norm.isf((1 - LEVEL) / 2)) * se
                middle, low, high = (math.expm1(log_ratio + x) for x in (0.0, -half, half))
                lift = Measured(middle, low, high, 2 * float(stats.norm.sf(abs(log_ratio) / se)) if se > 0 else 1.0)
            listed.append(
                VariantCtr(
                    str(ids[v]), round(shown[v]), float(shown[v] / shown.sum()), round(arms[1](v).x), _rate_of(here),
                    _rate_of(there), lift, None,
                )
            )  # fmt: skip
        tested = [i for i, one in enumerate(listed) if one.lift is not None]
        if tested:
            q = stats.false_discovery_control([_known(one.lift.p_value) for one in listed if one.lift is not None])
            for i, q_value in zip(tested, q.tolist(), strict=True):
                listed[i] = replace(listed[i], q_value=q_value)
        return tuple(listed), self._targeting(chosen, at_random, shown, shift), timed

    def _by_variant(self, rows: Codes) -> Callable[[int], experiment.ArmSums]:
        """The sums by unit of a variant among the rows."""
        n, variant = self.log.n_variants, self.log.variant[rows]
        count, y, x = self.log.count[rows], self.clicks[rows], self.size[rows]
        if self.log.unit is None:  # every exposure is one: count identical ones of the row's weight
            w = self.log.weight[rows]
            columns = [count, y, y * w, x, x * w, y * w]
        else:
            pairs, pair = factorise(self.unit[rows] * n + variant)
            variant, y, x = pairs % n, sums(pair, y), sums(pair, x)
            columns = [np.ones(len(pairs)), y, y * y, x, x * x, x * y]
        table = np.stack([sums(variant, column, size=n) for column in columns], axis=1)
        return lambda v: experiment.ArmSums(int(table[v, 0]), *table[v, 1:].tolist())

    def _targeting(self, chosen: Codes, at_random: Codes, shown: Floats, shift: Floats) -> Measured | None:
        """Clicks of what was chosen over those that the same variants would have got at random, at the same time."""
        seen = sums(self.log.variant[at_random], self.size[at_random], size=self.log.n_variants) > 0
        both = np.flatnonzero((shown > 0) & seen)
        place = np.full(self.log.n_variants, -1)
        place[both] = np.arange(len(both))

        def total(rows: Codes, amount: Floats) -> Floats:
            rows = rows[place[self.log.variant[rows]] >= 0]
            key = place[self.log.variant[rows]] * self.replicates + self.replicate[rows]
            size = len(both) * self.replicates
            return without_each(sums(key, amount[rows], size=size).reshape(len(both), self.replicates))

        n, c = total(chosen, self.size), total(chosen, self.clicks)
        n0, c0 = total(at_random, self.size), total(at_random, self.clicks)
        if min(c[:, 0].sum(), c0[:, 0].sum()) < MIN_CLICKS:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.log(np.where(n0 > 0, c, 0).sum(axis=0) / np.nan_to_num(n * c0 / n0).sum(axis=0)) - shift
        return self.measured(log_ratio)

    def _shift(self, chosen: Codes, at_random: Codes) -> Floats | None:
        """(1 + R,) by how much (as a logarithm) the random bucket's rate, at the times of what was chosen, differs from
        its rate over all; None where too little is known."""
        window = self.window(Bucket.MODEL.value, Bucket.RANDOM.value)
        if window is None or self.log.time is None:
            return None
        here, there = self.within(chosen, window), self.within(at_random, window)
        if self.units(there) < MIN_UNITS or float(self.clicks[there].sum()) < MIN_CLICKS or not len(here):
            return None
        most = 24

        def total(rows: Codes, amount: Floats) -> Floats:
            place = window.blocks(self.log.time[rows], most) * self.replicates + self.replicate[rows]  # type: ignore[index]
            return without_each(sums(place, amount[rows], size=most * self.replicates).reshape(most, self.replicates))

        shown, n, c = total(here, self.size), total(there, self.size), total(there, self.clicks)
        whole = [
            without_each(sums(self.replicate[at_random], x[at_random], size=self.replicates))
            for x in (self.clicks, self.size)
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.nan_to_num(shown * c / n).sum(axis=0) / np.where(n > 0, shown, 0.0).sum(axis=0)
            out = np.log(rate) - np.log(whole[0] / whole[1])
        return np.asarray(out) if np.isfinite(out).all() else None

    def split(self) -> Split | str:
        """The model's lift as what the best single variant brings and the rest; why not, where it cannot be known."""
        model, at_random = Bucket.MODEL.value, Bucket.RANDOM.value
        over = self.control if self.control in self.buckets else at_random
        lift = self.ratio(model, over)
        few = "{0} and {1} have too few units or clicks in common time (at least {2} and {3}). Log on."
        if lift is None:
            return few.format(model, over, MIN_UNITS, MIN_CLICKS)
        variety, own_time = np.zeros(self.replicates + 1), True
        if over != at_random:
            window = self.window(model, over)
            of_its_time = self.ratio(at_random, over, None if window is None else window.start)
            found = self.ratio(at_random, over) if of_its_time is None else of_its_time
            if found is None:
                return few.format(at_random, over, MIN_UNITS, MIN_CLICKS)
            variety, own_time = found, of_its_time is not None
        best = self._best_single()
        if best is None:
            return (
                "The random bucket has too few exposures or clicks of what the best single variant shows (200 and 30)."
                " Log on at random, or show fewer variants."
            )
        single = variety + best.gain
        return Split(
            over,
            _sure(self.measured(lift)),
            _sure(self.measured(single)),
            self.difference(np.exp(lift) - np.exp(single)),
            float(math.exp(float(variety[0])) * best.regret),
            best.variant_id,
            best.weighting.value,
            own_time,
        )

    def _best_single(self) -> _Best | None:
        """The best single variant over random, cross-fitted: picked on four fifths of the units, valued on the last.

        That is what the picked variants bring, without the winner's curse. What the best one, whichever it is, has over
        them is added: the posterior mean of it, given all of the bucket. Where the pick is open, the folds' values hang
        together, which widens the error (the factor is that of `policy_value.gain`).
        """
        rows = self.rows(Bucket.RANDOM.value)
        log = self.log.take(rows)
        support = logging_policy(log, context=())
        logged = LoggedRows(
            log.reward.astype(np.float64), log.variant, support.propensity, log.count, log.weight, log.unit, support
        )
        tags = _tags(log)
        weighting = choose_weighting(logged, tags)
        fold, size = self.replicate[rows] % FOLDS, log.count * log.weight
        menus = [support.variant[a:b] for a, b in pairwise(support.indptr)]
        share = sums(support.choice_set, size, size=len(menus)) / size.sum()
        chosen, q_chosen, q_logged = np.empty(len(log), np.int64), np.empty(len(log)), np.empty(len(log))
        picks = []
        for f in range(FOLDS):
            mine = fold == f
            rate = Rating.fit(log.variant[~mine], size[~mine], log.reward[~mine], tags).rate
            picks.append(np.array([menu[rate[menu].argmax()] for menu in menus], np.int64))
            chosen[mine] = picks[f][support.choice_set[mine]]
            q_chosen[mine], q_logged[mine] = rate[chosen[mine]], rate[log.variant[mine]]
        scores = dr_scores(policy_weights(logged, chosen, weighting, tags), q_chosen, q_logged)
        if estimate(scores) is None:
            return None
        value, base = (
            without_each(sums(self.replicate[rows], size * x, size=self.replicates)) for x in (scores.value, log.reward)
        )
        if not ((value > 0).all() and (base > 0).all()):
            return None
        total = without_each(sums(self.replicate[rows], size, size=self.replicates))
        by_tags = weighting is not Weighting.MATCHED
        rating = Rating.fit(log.variant, size, log.reward, tags, cautious=by_tags)
        draws, picked = rating.draws(), np.array(picks)  # (D, N), (FOLDS, sets)
        regret = is_open = 0.0
        for s, menu in enumerate(menus):
            most = draws[:, menu].max(axis=1, keepdims=True)
            regret += float(share[s]) * float((most - draws[:, picked[:, s]]).mean())
            is_open += float(share[s]) * float((most > draws[:, picked[:, s]]).mean())
        gain = np.log((value / total + regret) / (base / total))
        widened = math.sqrt(1 + is_open * (FOLDS - 1) * 2 / (math.pi * math.sqrt(2 * FOLDS - 3)))
        if by_tags:  # what the picked variant has beside its tags is not in the value
            widened = math.hypot(widened, math.sqrt(rating.spread) / max(jackknife_error(gain), 1e-9))
        gain = gain[0] + widened * (gain - gain[0])
        best = [int(menu[rating.rate[menu].argmax()]) for menu in menus]
        variant = best[int(share.argmax())]
        more = regret * float(total[0] / base[0])
        return _Best(gain, more, str(log.variants["variant_id"][variant].as_py()), weighting)

    def concentration(self, lift: Measured | None) -> Concentration:
        """How many variants carry half of the model's exposures, and half of its lift."""
        rows = self.rows(Bucket.MODEL.value)
        n_variants = self.log.n_variants
        half = self.replicate[rows] % 2
        n, c = (
            sums(self.log.variant[rows] * 2 + half, x[rows], size=2 * n_variants).reshape(-1, 2)
            for x in (self.size, self.clicks)
        )
        shown = np.sort(n.sum(axis=1))[::-1]
        many = int(np.searchsorted(np.cumsum(shown), shown.sum() / 2 * (1 - 1e-12))) + 1
        carry = None
        if lift is not None and lift.ci_low > 0:
            more = c - n * (c.sum() / n.sum() / (1 + lift.value))  # (N, 2) clicks beyond those at the other rate
            # Variants are put in order by one half of the units and counted on the other: luck would look like a star.
            needed = [_until_half(more[np.argsort(-more[:, a], kind="stable"), 1 - a]) for a in (0, 1)]
            if all(k is not None for k in needed):
                carry = math.ceil(sum(k for k in needed if k is not None) / 2)
        return Concentration(int((shown > 0).sum()), many, carry)


class _Best(NamedTuple):
    """The best single variant: the logarithm of its rate over random's, (1 + R,); and what of random's rate
    it may have over those that were picked."""

    gain: Floats
    regret: float
    variant_id: str
    weighting: Weighting


def _tags(log: Log) -> csr_array:
    """(N, T) 1 where a variant carries a tag that varies."""
    row, column, columns = list[Codes](), list[Codes](), 0
    for dimension in log.schema.variant:
        owners: dict[str, list[int]] = {}
        for i, values in enumerate(log.variants[dimension].to_pylist()):
            for value in dict.fromkeys(values or ()):
                owners.setdefault(value, []).append(i)
        for value in sorted(owners):
            if len(owners[value]) < log.n_variants:
                row.append(np.array(owners[value], np.int64))
                column.append(np.full(len(owners[value]), columns))
                columns += 1
    of = [np.concatenate(x) if x else np.zeros(0, np.int64) for x in (row, column)]
    return csr_array((np.ones(len(of[0])), (of[0], of[1])), shape=(log.n_variants, columns))


def _with_rare_as_one(code: Codes, labels: Sequence[str], count: Floats) -> tuple[Codes, list[str]]:
    """Codes 0..k-1 of the most frequent values, all others as one more."""
    total = sums(code, count, size=len(labels))
    order = [int(i) for i in np.argsort(-total, kind="stable")[:MAX_CATEGORIES] if total[i] >= MIN_CATEGORY]
    place = np.full(len(labels), len(order))
    place[order] = np.arange(len(order))
    return place[code], [*(labels[i] for i in order), "others"]


def _until_half(amount: Floats) -> int | None:
    """How many of the first it takes to half of the sum; None where the sum is not positive."""
    total = float(amount.sum())
    if total <= 0:
        return None
    return int(np.argmax(np.cumsum(amount) >= total / 2)) + 1


def _known(p: float | None) -> float:
    return 1.0 if p is None else p


def _sure(found: Measured | None) -> Measured:
    assert found is not None  # the logarithms it is made of are finite
    return found


def _rate_of(found: experiment.Ratio) -> Measured | None:
    if found.rate is None or found.ci_low is None or found.ci_high is None:
        return None
    return Measured(found.rate, found.ci_low, found.ci_high)


def _lack_of_time(log: Log) -> str:
    """Why the times of a log are as good as none, and what to do; empty where they are not."""
    column = log.schema.time
    known = np.zeros(0) if log.time is None else log.time[np.isfinite(log.time)]
    if len(known) and known.min() < known.max():
        return ""
    if column is None:
        return "The log has no times. Name the column of the time in `time`."
    if len(known):
        return f"All times of column {column!r} are the same one. Log when each exposure was."
    return (
        f"No time of column {column!r} can be read as a moment. Write times like 2026-10-01T05:00:00Z, or as seconds"
        " since 1970."
    )


def joined(names: Sequence[str]) -> str:
    """The names as a sentence lists them: a, b and c."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
