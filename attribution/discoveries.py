"""What counts as found among many looked at, and intervals given that it was: no data of a log is read here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr

from attribution.coding import Segment
from kaleidoscope.log import Codes, Floats, sums

LEVEL = 0.95
Q = 0.05


@dataclass(frozen=True, eq=False)
class Examined:
    """The m pairs that were looked at, each in a model of its own: main effects, strata, and this pair alone."""

    segments: tuple[Segment, ...]  # m
    tags: tuple[int, ...]  # m positions in the tags
    gamma: Floats  # (m,)
    se: Floats  # (m,)
    z: Floats  # (m,) of the score test, with the tails of a likelihood ratio
    q: Floats  # (m,) Benjamini–Hochberg over all m
    family: Codes  # (m,) the (user field, tag dimensions) a pair belongs to

    @cached_property
    def search(self) -> Search:
        """The thresholds when all families with something significant are counted."""
        return Search.of(self)

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """(m,) and (m,): intervals of gamma, given whether the pair was selected."""
        low, high = conditional_intervals(self.gamma / self.se, self.search.threshold, level)
        return low * self.se, high * self.se


@dataclass(frozen=True, eq=False)
class Search:
    """From which |z| on a pair is significant, corrected for everything that was looked at, twice.

    Among families, (user field, tag dimension), false ones are at most a share Q of those found: Benjamini–Hochberg
    over Simes' p-values, then within each at that level (Benjamini & Bogomolov 2014, doi:10.1111/rssb.12028). And a
    pair has to pass Benjamini–Hochberg over all pairs. Pairs that others explain are no discoveries, so families that
    are left with none do not count (Katsevich, Sabatti & Bogomolov 2023, doi:10.1080/01621459.2021.1906684). What one
    pair does echoes in most others of its family; that is no evidence for a second one, which is held to `further`.
    """

    threshold: Floats  # (m,)
    factor: Floats  # (m,) p times this is the q-value
    further: Floats  # (m,) the same for a pair beside another one of its family: not more than two of it count as found
    families: int  # that count

    @classmethod
    def of(cls, examined: Examined, families: int | None = None) -> Search:
        """The thresholds where so many `families` count; None: as many as Benjamini–Hochberg finds."""
        p, family = 2 * stats.norm.sf(np.abs(examined.z)), examined.family
        m, size = len(p), sums(family)
        if not m:
            return cls(*(np.zeros(0),) * 3, 0)
        order = np.lexsort((p, family))
        rank = np.arange(m) - (np.cumsum(size) - size)[family[order]] + 1
        simes = np.full(len(size), 1.0)
        scaled = p[order] * size[family[order]] / rank
        np.minimum.at(simes, family[order], scaled)
        if families is None:
            families = int((benjamini_hochberg(simes) <= Q).sum())
        level = Q * max(families, 1) / len(size)
        found = np.zeros(len(size))
        np.maximum.at(found, family[order], np.where(scaled <= level, rank, 0))
        of_family = size * len(size) / np.maximum(found, 1) / max(families, 1)
        of_all = m / max(int((examined.q <= Q).sum()), 1)
        factor = np.maximum(of_family[family], of_all)
        further = np.maximum(factor, (size * len(size) / 2 / max(families, 1))[family])
        return cls(stats.norm.isf(Q / factor / 2), factor, further, families)


NOTHING = Examined((), (), *(np.zeros(0),) * 4, np.zeros(0, np.int64))


def benjamini_hochberg(p: Floats) -> Floats:
    """(m,) the smallest false discovery rate at which each is found (Benjamini & Hochberg 1995)."""
    if not len(p):
        return np.zeros(0)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    out = np.empty(len(p))
    out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out


def conditional_interval(z: float, threshold: float, level: float = LEVEL) -> tuple[float, float]:
    """The equal-tailed interval of the mean of a normal Z with sd 1, given that |Z| ≥ `threshold` where |z| is, or that
    it is below where z is (Weinstein, Fithian & Benjamini 2013, doi:10.1080/01621459.2012.737740)."""
    tail = (1 - level) / 2
    reach = float(stats.norm.isf(tail))
    if abs(abs(z) - threshold) > 2 * reach + 2 or not np.isfinite(threshold):
        return z - reach, z + reach

    def above(mean: float) -> float:
        """P(Z ≥ z | selection) for this mean: rises with it."""
        if abs(z) >= threshold:
            whole = np.logaddexp(log_ndtr(mean - threshold), log_ndtr(-threshold - mean))
            if z > 0:
                return float(np.exp(log_ndtr(mean - z) - whole))
            return float(-np.expm1(log_ndtr(z - mean) - whole))
        inside = _between(-threshold - mean, threshold - mean)
        return float(np.exp(_between(z - mean, threshold - mean) - inside))

    def solve(target: float) -> float:
        low, high = z - reach, z + reach
        while above(low) > target and low > z - 200:
            low -= 2 * reach
        while above(high) < target and high < z + 200:
            high += 2 * reach
        if above(low) > target or above(high) < target:
            return low if above(low) > target else high
        return float(brentq(lambda mean: above(mean) - target, low, high, xtol=1e-6))

    return solve(tail), solve(1 - tail)


def conditional_intervals(z: Floats, threshold: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """(m,) and (m,): `conditional_interval` of many at once, by bisection."""
    tail = (1 - level) / 2
    reach = float(stats.norm.isf(tail))
    low, high = z - reach, z + reach
    near = np.flatnonzero((np.abs(np.abs(z) - threshold) <= 2 * reach + 2) & np.isfinite(threshold))
    z, threshold = z[near], threshold[near]
    selected = np.abs(z) >= threshold
    size, sign = np.abs(z), np.where(z < 0, -1.0, 1.0)

    def above(mean: Floats) -> Floats:
        """P(Z ≥ |z| | selection) for means that are mirrored where z is below 0."""
        whole = np.logaddexp(log_ndtr(mean - threshold), log_ndtr(-threshold - mean))
        top = np.where(selected, threshold, np.maximum(threshold, size))
        inside = _log_between(-top - mean, top - mean)
        return np.exp(np.where(selected, log_ndtr(mean - size) - whole, _log_between(size - mean, top - mean) - inside))

    def solve(target: float) -> Floats:
        bottom, top = size - 200.0, size + 200.0
        for _ in range(60):
            middle = (bottom + top) / 2
            below = above(middle) < target
            bottom, top = np.where(below, middle, bottom), np.where(below, top, middle)
        return (bottom + top) / 2

    ends = np.sort([sign * solve(tail), sign * solve(1 - tail)], axis=0)
    low[near], high[near] = ends
    return low, high


def _log_between(a: Floats, b: Floats) -> Floats:
    """log P(a ≤ N(0,1) ≤ b), −inf where they are equal."""
    low, high = np.where(a > 0, -b, a), np.where(a > 0, -a, b)
    high_log, low_log = log_ndtr(high), log_ndtr(low)
    with np.errstate(divide="ignore"):
        return np.asarray(high_log + np.log1p(-np.exp(np.minimum(low_log - high_log, 0.0))))


def _between(a: float, b: float) -> float:
    """log P(a ≤ N(0,1) ≤ b)."""
    if a > 0:
        a, b = -b, -a
    high, low = float(log_ndtr(b)), float(log_ndtr(a))
    return high + float(np.log1p(-np.exp(min(low - high, -1e-300))))
