"""Trends of a bucket's lift over control: over time (novelty) and over a unit's exposures (fatigue)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from attribution.bucket_comparison import BLOCKS, MIN_CLICKS, Exposures, Measured, Window
from attribution.contrasts import Arms, mantel_haenszel, slopes
from kaleidoscope.experiment import MIN_EVENTS, MIN_UNITS
from kaleidoscope.log import Codes, Floats, combine, sums

NTH = ("1", "2", "3-4", "5-8", "9+")  # exposures of a unit: each range begins at twice the one before
WIDE = math.log(2)  # a change of the ratio by this factor, from the first to the last, would be a different story


class Direction(StrEnum):
    """What happens to a lift along time or exposures; `no_trend`: none is seen, which is not "there is none"."""

    SHRINKS = "shrinks"
    GROWS = "grows"
    NO_TREND = "no_trend"


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


def trend(e: Exposures, bucket: str, over: str) -> Trend | str:
    """The trend of a bucket's ratio to control over time or exposures; why not, where it cannot be known."""
    if e.log.time is None:
        return f"Whether a lift lasts, and which exposure of a unit is the first, is not known. {e.lack_of_time}"
    if over == "exposures":
        if e.log.unit is None:
            return "The log names no unit: who comes back is not known. Name the user's column in `unit`."
        if (e.log.count != 1).any():
            return "Rows stand for several exposures: which one was a unit's first is not known. Log each exposure."
    window = e.window(bucket, e.control)
    if window is None:
        return (
            f"{bucket} and {e.control} were never shown at the same time. Let both have a share of the traffic at once."
        )
    rows = e.within(e.rows(bucket, e.control), window)
    time = e.log.time[rows]
    if over == "time":
        piece, labels = window.slices(time)
        stratum = combine([piece, e.blocks(rows, window)], len(rows))
        at, step = (time - window.start) / window.step_s, window.step
    else:
        piece, labels = (
            np.minimum(np.ceil(np.log2(nth(e, window)[rows])), len(NTH) - 1).astype(np.int64),
            list(NTH),
        )
        stratum = combine([piece, e.blocks(rows, window, BLOCKS // 4)], len(rows))
        at, step = piece.astype(np.float64), "doubling of exposures"
    if not e.enough(rows, bucket, MIN_CLICKS):
        return (
            f"{bucket} or {e.control} has fewer than {MIN_UNITS} units or {MIN_CLICKS} clicks while both were"
            " shown. Log on."
        )
    arms, example = e.arms(rows, stratum, bucket)
    of_row = np.zeros(len(e.bucket), np.int64)
    of_row[rows] = np.arange(len(rows))
    place = of_row[example]
    known = (arms.c1 + arms.c0).sum(axis=1) > 0
    middle = sums(stratum, at)[stratum[place]] / sums(stratum)[stratum[place]] if len(place) else at[:0]
    if len(np.unique(piece[place[known]])) < 2:
        what = "time" if over == "time" else "nth exposure"
        return f"{bucket} and {e.control} were both shown at one {what} only. Log on."
    slope = slopes(arms.of(known), middle[known])
    found = e.measured(slope)
    if found is None:
        return f"The clicks of {bucket} and {e.control} are too few for a trend. Log on."
    steps = float(np.ptp(middle[known]))
    far = max(abs(math.log1p(found.ci_low)), abs(math.log1p(found.ci_high))) * steps
    slices = tuple(
        slice_of(e, label, rows[piece == i], arms.of(piece[place] == i), bucket) for i, label in enumerate(labels)
    )
    return Trend(bucket, over, step, steps, found, 1.0, Direction.NO_TREND, far <= WIDE, slices)


def nth(e: Exposures, window: Window) -> Floats:
    """(n,) which exposure of its unit each is, of all buckets, from the start of a window on; before it 1.

    Counted over all buckets: at the same moment and the same nth exposure who is in which bucket is left to chance,
    also where shares changed. The nth *in a bucket* begins anew for those who are moved into it, and they are the
    ones who come often.
    """
    assert e.log.time is not None
    out = np.ones(len(e.bucket))
    rows = np.flatnonzero(e.log.time >= window.start)
    order = rows[np.lexsort((e.log.time[rows], e.unit[rows]))]
    unit = e.unit[order]
    begins = np.flatnonzero(np.diff(unit, prepend=-1))
    out[order] = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order))) + 1
    return out


def slice_of(e: Exposures, label: str, rows: Codes, arms: Arms, bucket: str) -> Slice:
    """The rates and the lift in some of the rows; `arms` are their strata."""
    treated = e.is_of(rows, bucket)
    lift = e.measured(mantel_haenszel(arms)) if e.enough(rows, bucket, MIN_EVENTS) else None
    parts = rows[treated], rows[~treated]
    here, there = (round(float(e.log.count[part].sum())) for part in parts)
    return Slice(label, here, there, e.rate(parts[0]), e.rate(parts[1]), lift)
