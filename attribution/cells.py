"""The log as sums: what was shown to whom and clicked, by stratum, user value, tag and replicate. Sums add.

Shards, days and scenes merge exactly: `a + b` is what one pass over both would have given. The 64 replicates part the
units, so that errors by unit are there without the units (delete-a-group jackknife, Kott 2001).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import csr_array, hstack

from attribution.coding import Coded
from kaleidoscope.log import Codes, Floats, factorise, sums

REPLICATES = 64
EVERYONE = ("", "")  # the user value of a cell that all users are in
ANYTHING: tuple[tuple[str, str], ...] = ()  # the tag of a cell that all variants are in
SUMS = ("n", "clicks", "weight", "weighted_clicks", "squared_weight", "squared_weight_clicks")


@dataclass(frozen=True, eq=False)
class Cells:
    """K cells that are not empty. `value`, `tag`, `stratum` are positions in the names; replicates are 0..63."""

    strata: tuple[str, ...]
    values: tuple[tuple[str, str], ...]  # (field, base value); EVERYONE first
    tags: tuple[tuple[tuple[str, str], ...], ...]  # (dimension, value) of each tag that varies; ANYTHING first
    stratum: Codes  # (K,)
    replicate: Codes  # (K,)
    value: Codes  # (K,)
    tag: Codes  # (K,)
    sums: Floats  # (K, 6) named in SUMS

    @classmethod
    def of(cls, coded: Coded, replicate: Codes | None = None) -> Cells:
        """The sums of coded exposures; `replicate` (n,) is hash(unit) % 64 where the caller has a hash that other
        shards share, otherwise units (without them exposures) are dealt by their number in this log."""
        if replicate is None:
            coded, replicate = dealt(coded)
        every = csr_array(np.ones((coded.carried.shape[0], 1)))
        carried = csr_array(hstack([every, coded.carried], format="csr"))
        place = coded.stratum * REPLICATES + replicate
        parts, start = [_sums(coded, place, np.zeros(len(coded), np.int64), 1, carried, 0)], 1
        values = [EVERYONE]
        for field, codes in zip(coded.fields, coded.codes, strict=True):
            parts.append(_sums(coded, place, codes, len(field.labels), carried, start))
            values += [(field.name, label) for label in field.labels]
            start += len(field.labels)
        place, value, tag, totals = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        names = (ANYTHING, *(tag.parts for tag in coded.tags))
        return cls(coded.strata, tuple(values), names, place // REPLICATES, place % REPLICATES, value, tag, totals)

    def __add__(self, other: Cells) -> Cells:
        """The cells of both logs. Names of either may be missing in the other; bins of numbers have to be the same."""
        strata = _union(self.strata, other.strata)
        values = _union(self.values, other.values)
        tags = _union(self.tags, other.tags)
        sides = [
            (_places(c.strata, strata)[c.stratum], c.replicate, _places(c.values, values)[c.value],
             _places(c.tags, tags)[c.tag]) for c in (self, other)
        ]  # fmt: skip
        stratum, replicate, value, tag = (np.concatenate(pair) for pair in zip(*sides, strict=True))
        keys, code = factorise(((stratum * REPLICATES + replicate) * len(values) + value) * len(tags) + tag)
        both = np.concatenate([self.sums, other.sums])
        totals = np.stack([sums(code, column, size=len(keys)) for column in both.T], axis=1)
        rest, tag = keys // len(tags), keys % len(tags)
        place, value = rest // len(values), rest % len(values)
        return Cells(strata, values, tags, place // REPLICATES, place % REPLICATES, value, tag, totals)

    def __len__(self) -> int:
        return len(self.value)

    def table(self, name: str = "weighted_clicks") -> Floats:
        """(values, tags) one of the SUMS, over strata and replicates."""
        shape = (len(self.values), len(self.tags))
        totals = sums(self.value * shape[1] + self.tag, self.sums[:, SUMS.index(name)], size=shape[0] * shape[1])
        return np.asarray(totals.reshape(shape))

    def by_stratum(self, name: str, value: NDArray[Any] | None = None) -> Floats:
        """(strata, tags) one of the SUMS of the users with one of these base values (positions), by default of all."""
        rows = np.flatnonzero(self.value == 0 if value is None else np.isin(self.value, value))
        shape = (len(self.strata), len(self.tags))
        key = self.stratum[rows] * shape[1] + self.tag[rows]
        totals = sums(key, self.sums[rows, SUMS.index(name)], size=shape[0] * shape[1])
        return np.asarray(totals.reshape(shape))

    def preference(self, value: NDArray[Any]) -> Floats:
        """(tags,) [CTR(tag, segment) / CTR(segment)] / [CTR(tag) / CTR] of the segment of these base values, each ratio
        observed over expected within strata (indirect standardisation); NaN where a tag has no clicks."""

        def ratio(value: NDArray[Any] | None) -> Floats:
            shown, clicks = self.by_stratum("weight", value), self.by_stratum("weighted_clicks", value)
            rate = np.divide(clicks[:, 0], shown[:, 0], out=np.zeros(len(shown)), where=shown[:, 0] > 0)
            expected = rate @ shown
            return _ratio(clicks.sum(axis=0), expected)

        return _ratio(ratio(value), ratio(None))

    def log_ratios(self) -> tuple[Floats, Floats]:
        """(tags,) the logarithm of the Mantel–Haenszel ratio of CTRs, with the tag over without it, within strata, and
        its standard error by unit; NaN where it cannot be known. The first, of ANYTHING, always is."""
        every = np.flatnonzero(self.value == 0)
        place = (self.stratum * REPLICATES + self.replicate)[every]
        size = len(self.strata) * REPLICATES

        def with_tag(t: int, name: str) -> Floats:
            rows = self.tag[every] == t
            amount = self.sums[every[rows], SUMS.index(name)]
            return np.asarray(sums(place[rows], amount, size=size).reshape(-1, REPLICATES))

        all_shown, all_clicks = with_tag(0, "weight"), with_tag(0, "weighted_clicks")
        estimate, error = np.full(len(self.tags), np.nan), np.full(len(self.tags), np.nan)
        for t in range(1, len(self.tags)):
            shown, clicks = with_tag(t, "weight"), with_tag(t, "weighted_clicks")
            whole, without = _mantel_haenszel(shown, clicks, all_shown - shown, all_clicks - clicks)
            if np.isfinite(whole):
                estimate[t] = whole
                spread = without - without.mean()
                error[t] = np.sqrt((REPLICATES - 1) / REPLICATES * (spread**2).sum())
        return estimate, error


def t_quantile(level: float) -> float:
    """How many standard errors from replicates a two-sided interval of this level reaches."""
    return float(stats.t.isf((1 - level) / 2, REPLICATES - 1))


def dealt(coded: Coded) -> tuple[Coded, Codes]:
    """The exposures and their replicates: all of a unit in one; without units exposures one by one, so that a row of
    many identical ones becomes several rows."""
    if coded.unit is not None:
        return coded, _hash(coded.unit) % REPLICATES
    replicate = _hash(np.arange(len(coded))) % REPLICATES
    many = coded.count > 1
    if not many.any():
        return coded, replicate
    share = np.zeros((len(coded), REPLICATES))
    share[np.flatnonzero(~many), replicate[~many]] = coded.count[~many]
    rng = np.random.default_rng(0)
    share[many] = rng.multinomial(coded.count[many].astype(np.int64), np.full(REPLICATES, 1 / REPLICATES))
    row, replicate = np.nonzero(share)
    return replace(coded.take(row), count=share[row, replicate]), replicate


def _hash(codes: Codes) -> Codes:
    """A well-mixed number of each code (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = codes.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _sums(
    coded: Coded, place: Codes, codes: Codes, width: int, carried: csr_array, start: int
) -> tuple[Codes, Codes, Codes, Floats]:
    """Place, value, tag and the six sums of the cells of one field that are not empty."""
    keys, row = factorise(place * width + codes)
    shape = (len(keys), carried.shape[0])

    def total(amount: Floats) -> Any:
        return csr_array((amount, (row, coded.variant)), shape=shape) @ carried

    n, clicks = total(coded.count), total(coded.count * coded.reward)
    columns = [n, clicks, n, clicks, n, clicks]
    if coded.weighted:
        once, twice = coded.size, coded.size * coded.weight
        columns[2:] = [total(a) for a in (once, once * coded.reward, twice, twice * coded.reward)]
    key, tag = n.nonzero()
    found = np.stack([np.asarray(column[key, tag]).ravel() for column in columns], axis=1)
    return keys[key] // width, keys[key] % width + start, tag.astype(np.int64), found


def _mantel_haenszel(shown: Floats, clicks: Floats, other: Floats, other_clicks: Floats) -> tuple[float, Floats]:
    """The log ratio from (strata, replicates) sums of those with and without a tag, and (replicates,) without each."""

    def log_ratio(without: int | None) -> float:
        n1, a, n0, b = (
            x.sum(axis=1) - (0 if without is None else x[:, without]) for x in (shown, clicks, other, other_clicks)
        )
        n = n1 + n0
        share = np.divide(1.0, n, out=np.zeros_like(n), where=n > 0)
        top, bottom = float((a * n0 * share).sum()), float((b * n1 * share).sum())
        return float(np.log(top / bottom)) if top > 0 and bottom > 0 else np.nan

    whole = log_ratio(None)
    if not np.isfinite(whole):
        return whole, np.full(REPLICATES, np.nan)
    return whole, np.array([log_ratio(r) for r in range(REPLICATES)])


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.divide(a, b, out=np.full(len(b), np.nan), where=b > 0))


def _union(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return a if a == b else tuple(dict.fromkeys((*a, *b)))


def _places(names: tuple[Any, ...], among: tuple[Any, ...]) -> Codes:
    at = {name: i for i, name in enumerate(among)}
    return np.array([at[name] for name in names], dtype=np.int64)
