"""What else differs between the buckets of a log: people, hours, products, who changed sides; and lifts without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from attribution.bucket_comparison import BLOCKS, DAY_S, HOUR_S, LEVEL, SECONDS_FROM, Exposures, Measured, joined
from attribution.coding import UserField
from attribution.contrasts import (
    association,
    jackknife_error,
    mantel_haenszel,
    standardised_difference,
    without_each,
)
from kaleidoscope.experiment import MIN_EVENTS
from kaleidoscope.log import Codes, Floats, combine, factorise, first_rows, sums

MAX_CATEGORIES = 20  # of a feature or of the products; rarer ones count as one
MIN_CATEGORY = 10  # units, of a value that is compared by itself
UNITS_A_STRATUM = 50  # about as many units come for the first time in a stratum of the comparison of features


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


def first_exposures(e: Exposures) -> Codes:
    """The row of every unit's first exposure since all buckets were there (of every exposure, without units)."""
    rows = e.rows(*e.buckets)
    window = e.window(*e.buckets)
    if e.log.time is not None and window is not None:
        rows = e.within(rows, window)
        rows = rows[np.argsort(e.log.time[rows], kind="stable")]
    if e.log.unit is None:
        return rows
    _, unit = factorise(e.unit[rows])
    return rows[first_rows(unit)]


def _strata_of(e: Exposures, first: Codes) -> Codes:
    """(units,) strata of about UNITS_A_STRATUM units who came at about the same time, within their group."""
    parts = [] if e.log.group is None else [e.log.group[first]]
    if e.log.time is not None:
        n = max(1, min(BLOCKS, len(first) // UNITS_A_STRATUM))
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(e.log.time[first], kind="stable")] = np.arange(len(first))
        parts.append(rank * n // max(1, len(first)))
    return combine(parts, len(first))


def split_p(e: Exposures, first: Codes) -> float | None:
    """The p-value of the buckets' shares of new units having been the same all the time."""
    if e.log.time is None or len(first) < 2 * UNITS_A_STRATUM:
        return None
    rank = np.argsort(np.argsort(e.log.time[first], kind="stable"), kind="stable")
    piece = rank * min(20, len(first) // UNITS_A_STRATUM) // len(first)
    return association(np.zeros(len(first), np.int64), e.bucket[first], piece, e.log.count[first])


def balance(e: Exposures, first: Codes, *, hours: bool) -> list[Balance]:
    """How each feature is distributed over the buckets, among units at their first exposure."""
    stratum = _strata_of(e, first)
    count = e.log.count[first] if e.log.unit is None else np.ones(len(first))
    found = []
    for role, names in (("user", e.log.schema.user), ("context", e.log.schema.context)):
        for name in names:
            column = e.log.columns[name].take(pa.array(first))
            field = UserField.fit(name, column, count)
            numbers = None
            if not pa.types.is_dictionary(column.type):
                numbers = column.to_numpy(zero_copy_only=False).astype(np.float64)
            one = _compare(e, name, role, first, stratum, field.codes(column), field.labels, count, numbers)
            if one is not None:
                found.append(one)
    time = e.log.time
    if hours and time is not None and len(first) and time[first].min() >= SECONDS_FROM:
        hour = (time[first] // (4 * HOUR_S) % 6).astype(np.int64)
        day = combine([(time[first] // DAY_S).astype(np.int64)], len(first))
        labels = [f"{4 * i:02d}-{4 * i + 4:02d} h" for i in range(6)]
        one = _compare(e, "hour of the day (UTC)", "time", first, day, hour, labels, count, None)
        if one is not None:
            found.append(one)
    return found


def _compare(
    e: Exposures, name: str, role: str, first: Codes, stratum: Codes, code: Codes, labels: Sequence[str], count: Floats,
    numbers: Floats | None,
) -> Balance | None:  # fmt: skip
    bucket = e.bucket[first]
    code, labels = _with_rare_as_one(code, labels, count)
    p = association(stratum, bucket, code, count)
    if p is None:
        return None
    reference = e.control if e.control in e.buckets else e.buckets[0]
    best: tuple[float, str, str | None, float, float] | None = None
    for other in (b for b in e.buckets if b != reference):
        of = [bucket == e.names.index(b) for b in (other, reference)]
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


def products(e: Exposures) -> Products | None:
    """The buckets' shares of the products, and whether they differ within equal times."""
    if e.log.product is None or e.log.products is None:
        return None
    names = [str(name) for name in e.log.products.to_pylist()]
    count = sums(e.log.product, e.log.count, size=len(names))
    order = np.argsort(-count, kind="stable")
    kept = [int(i) for i in order[:MAX_CATEGORIES] if count[i] >= 0.01 * count.sum()]
    labels = [names[i] for i in kept]
    of_product = np.full(len(names), len(kept))
    of_product[kept] = np.arange(len(kept))
    if (count[of_product == len(kept)] > 0).any():
        labels.append("others")
    code = of_product[e.log.product]
    shares = {}
    for bucket in e.buckets:
        rows = e.rows(bucket)
        shown = sums(code[rows], e.size[rows], size=len(labels))
        shares[bucket] = dict(zip(labels, (shown / shown.sum()).tolist(), strict=True))
    if len(labels) == 1:
        return Products(shares, None, None, True)
    reference = e.control if e.control in e.buckets else e.buckets[0]
    p = [x for other in e.buckets if other != reference for x in _share_tests(e, other, reference, code, len(labels))]
    return Products(shares, min(1.0, min(p) * len(p)) if p else 1.0, None, True)


def _share_tests(e: Exposures, bucket: str, over: str, code: Codes, n_codes: int) -> list[float]:
    """The p-values of the differences between two buckets' shares of each code, within equal times."""
    rows, window = e.rows(bucket, over), e.window(bucket, over)
    stratum = np.zeros(len(rows), np.int64)
    if window is not None and e.log.time is not None:
        rows = e.within(rows, window)
        stratum = combine([window.blocks(e.log.time[rows], BLOCKS)], len(rows))
    treated, r = e.is_of(rows, bucket), e.replicates
    n_strata = int(stratum.max(initial=-1)) + 1

    def total(part: NDArray[np.bool_]) -> Floats:
        place = stratum[part] * r + e.replicate[rows[part]]
        return without_each(sums(place, e.size[rows[part]], size=n_strata * r).reshape(n_strata, r))

    n1, n0, found = total(treated), total(~treated), []
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.nan_to_num(n1 * n0 / (n1 + n0))
        for i in range(n_codes):
            inside = code[rows] == i
            apart = np.nan_to_num(total(treated & inside) / n1 - total(~treated & inside) / n0)
            difference = (weight * apart).sum(axis=0) / weight.sum(axis=0)
            if np.isfinite(difference).all():
                found.append(e.p(float(difference[0]), jackknife_error(difference)))
    return found


def moved(e: Exposures) -> Moved | None:
    """The units that were in several buckets."""
    if e.log.unit is None:
        return None
    n_units = e.log.n_units
    pairs, _ = factorise(e.unit * len(e.names) + e.bucket)
    different = np.bincount(pairs // len(e.names), minlength=n_units)
    several = different > 1
    returned = None
    if e.log.time is not None:
        order = np.lexsort((e.log.time, e.unit))
        unit, bucket = e.unit[order], e.bucket[order]
        changes = (np.diff(bucket) != 0) & (np.diff(unit) == 0)
        runs = 1 + np.bincount(unit[1:][changes], minlength=n_units)
        returned = float((runs > different)[different > 0].mean())
    exposures = float(e.log.count[several[e.unit]].sum() / e.log.count.sum())
    return Moved(int(several.sum()), float(several[different > 0].mean()), exposures, returned)


def lifts(e: Exposures, feature: str | None) -> tuple[tuple[BucketLift, ...], dict[str, str]]:
    """Every bucket's lift over control, as it is and with time, product and a feature held fixed; and why not."""
    if e.control not in e.buckets:
        return (), {"lifts": e.lack(e.control) or ""}
    found, missing = [], {}
    for bucket in (b for b in e.buckets if b != e.control):
        rows = e.rows(bucket, e.control)
        crude = None
        if e.enough(rows, bucket, MIN_EVENTS):
            crude = e.measured(mantel_haenszel(e.arms(rows, np.zeros(len(rows), np.int64), bucket)[0]))
        if crude is None:
            missing[f"lift of {bucket}"] = (
                f"{bucket} or {e.control} has fewer than {MIN_EVENTS} clicks: its lift is not known. Log on."
            )
            continue
        fixed: dict[str, Measured] = {}
        window, parts, names = e.window(bucket, e.control), list[Codes](), list[str]()
        if window is not None and e.log.time is not None:
            rows = e.within(rows, window)
            parts.append(window.blocks(e.log.time[rows], BLOCKS))
            names.append("time")
            _hold(e, fixed, names, rows, parts, bucket)
        for name, codes in (("group", e.log.group), ("product", e.log.product)):
            if codes is not None and int(codes.max(initial=0)) > 0:
                parts.append(codes[rows])
                names.append(name)
                _hold(e, fixed, names, rows, parts, bucket)
        if feature is not None:
            column = e.log.columns[feature].take(pa.array(rows))
            parts.append(UserField.fit(feature, column, e.log.count[rows]).codes(column))
            names.append(feature)
            _hold(e, fixed, names, rows, parts, bucket)
        found.append(BucketLift(bucket, crude, fixed))
        if window is None and e.log.time is not None:
            missing[f"lift of {bucket} within equal times"] = (
                f"{bucket} and {e.control} were never shown at the same time."
            )
        absent = [n for n in (joined(names[: i + 1]) for i in range(len(names))) if n not in fixed]
        if absent:
            missing[f"lift of {bucket} within equal {absent[0]}"] = (
                f"{bucket} and {e.control} have nothing in common within equal {absent[0]}: what they are to be"
                " compared on has to be shown in both."
            )
    return tuple(found), missing


def _hold(
    e: Exposures, found: dict[str, Measured], names: list[str], rows: Codes, parts: list[Codes], bucket: str
) -> None:
    arms, _ = e.arms(rows, combine(parts, len(rows)), bucket)
    if float(arms.c1.sum()) < MIN_EVENTS or float(arms.c0.sum()) < MIN_EVENTS:
        return
    measured = e.measured(mantel_haenszel(arms))
    if measured is not None:
        found[joined(names)] = measured


def _with_rare_as_one(code: Codes, labels: Sequence[str], count: Floats) -> tuple[Codes, list[str]]:
    """Codes 0..k-1 of the most frequent values, all others as one more."""
    total = sums(code, count, size=len(labels))
    order = [int(i) for i in np.argsort(-total, kind="stable")[:MAX_CATEGORIES] if total[i] >= MIN_CATEGORY]
    place = np.full(len(labels), len(order))
    place[order] = np.arange(len(order))
    return place[code], [*(labels[i] for i in order), "others"]
