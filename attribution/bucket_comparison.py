"""The buckets of a log compared, by unit: rates, ratios within equal times, products and groups, and their errors.

lift_trends.py, bucket_balance.py and variant_lifts.py measure with it; what that says of the doubts about a lift is in
effectiveness.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attribution.contrasts import (
    Arms,
    jackknife_error,
    mantel_haenszel,
    without_each,
)
from kaleidoscope.experiment import MIN_EVENTS, MIN_UNITS
from kaleidoscope.log import Codes, Floats, Log, combine, first_rows, sums
from kaleidoscope.vocabulary import Bucket

REPLICATES = 100  # groups of units that errors are estimated from (delete-a-group jackknife, Kott 2001)
LEVEL = 0.95
MIN_CLICKS = 30  # of either bucket, for a trend or a split; a slice of one needs MIN_EVENTS
SLICES = 6  # of the time, that are shown
BLOCKS = 200  # of the time, at most, that exposures are compared within
HOUR_S, DAY_S = 3_600.0, 86_400.0
SECONDS_FROM = 1e8  # times from here on (1973) are seconds since 1970; smaller ones are a column's own numbers

# ── what is measured ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measured:
    """An estimate with its 95 % interval by unit, and the p-value of its being 0 where that is a question."""

    value: float
    ci_low: float
    ci_high: float
    p_value: float | None = None


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
