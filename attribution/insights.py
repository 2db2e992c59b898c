"""Who prefers which tag: screening of all segment × tag pairs, a joint model of what is found, honest intervals.

The method "statistics", and the result types of all methods. docs/attribution.md says why each step is as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.sparse import csc_array
from scipy.special import log_ndtr, logit
from threadpoolctl import threadpool_limits

from attribution.cells import REPLICATES, Cells, t_quantile
from attribution.coding import Coded, Segment, Tag, UserField, code
from attribution.logistic import Fit, Projection, Sums, among, fit, products
from kaleidoscope.log import Codes, Floats, Log, combine, factorise, sums

LEVEL = 0.95
Q = 0.05
MIN_EXPECTED = 10.0  # clicks, and exposures without a click, in the pair and in the rest of its segment
MIN_INFORMATION = 1e-3  # of a pair's own, that main effects have to leave
TWINS = 0.999  # |correlation| of what is left of two pairs, from which on they are one
LEAST_LEFT = 0.01  # of that, that the other pairs of a joint model have to leave
MAX_CANDIDATES = 250  # pairs that the joint model is chosen from
RELATED = 0.15  # correlation of field values × of tags, from which on one family may look like another
MAX_ROUNDS = 12
ADDED = 8  # pairs that enter the joint model before it is fitted anew
POOLED_CLICKS = 200.0  # as if so many clicks said that a pair's design effect is that of all
LEAST_DESIGN_EFFECT = 0.8
STATISTICS = "statistics"

# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pair:
    """A segment and a tag: {field: value} and {dimension: value}."""

    segment: Mapping[str, str]
    tag: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """As `explained_by` of summary.json holds it."""
        return {"segment": dict(self.segment), "tag": dict(self.tag)}


@dataclass(frozen=True)
class Insight:
    """A segment's preference for a tag, relative to how everybody takes it."""

    segment: Mapping[str, str]
    tag: Mapping[str, str]
    effect: float  # exp(γ) − 1, γ of the joint model
    preference: float | None  # [CTR(tag, segment)/CTR(segment)] / [CTR(tag)/CTR] within strata
    ci_low: float  # of `effect`, given that it was selected
    ci_high: float
    q_value: float
    n: int  # exposures of the segment to the tag
    methods: tuple[str, ...] = (STATISTICS,)
    explained_by: tuple[Pair, ...] = ()  # pairs that are significant alone, and not once this one is in
    importance: Mapping[str, float] = field(default_factory=dict)  # method → on its own scale

    @property
    def sentence(self) -> str:
        """It in words, with its interval: that odds differ, and no more; where the interval holds 0, that it does."""
        who = " and ".join(_who(name, label) for name, label in self.segment.items())
        tag = " and ".join(f"{dimension}={value}" for dimension, value in self.tag.items())
        together = " (never shown apart)" if len(self.tag) > 1 else ""
        q = "q < 0.001" if self.q_value < 0.001 else f"q = {self.q_value:.2g}"
        way = "higher" if self.effect > 0 else "lower"
        if self.ci_low < 0 < self.ci_high:
            interval = f"{_size(self.ci_low)} lower to {_size(self.ci_high)} higher, {q}: how much is hardly known"
        else:
            near, far = sorted((self.ci_low, self.ci_high), key=abs)
            interval = f"{_size(near)} to {_size(far)}, {q}"
        return (
            f"Users with {who}: the odds of a click on {tag}{together} are {_size(self.effect)} {way} than these users"
            f" and this tag would have by themselves (beside the other insights; 95 % interval {interval})."
        )

    def to_json(self) -> dict[str, object]:
        """As summary.json holds it."""
        return {
            "segment": dict(self.segment),
            "tag": dict(self.tag),
            "effect": self.effect,
            "preference": self.preference,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "q_value": self.q_value,
            "n": self.n,
            "methods": list(self.methods),
            "explained_by": [pair.to_json() for pair in self.explained_by],
        }


def ends_of(label: str) -> tuple[float, float] | None:
    """From and below which numbers a segment is, `[lo, hi)`; None where it is of a text or missing."""
    found = re.fullmatch(r"\[(-inf|-?[\d.]+(?:e[-+]?\d+)?), (inf|-?[\d.]+(?:e[-+]?\d+)?)\)", label)
    return None if found is None else (float(found[1]), float(found[2]))


def _who(name: str, label: str) -> str:
    ends = ends_of(label)
    if ends is None:
        return f"{name}={label}"
    low, high = ends
    # The label's own digits, which tell the edges apart.
    below, start = label[:-1].split(", ")[1], label[1:].split(", ")[0]
    words = ([f"from {start}"] if np.isfinite(low) else []) + ([f"below {below}"] if np.isfinite(high) else [])
    return f"{name} {' to '.join(words)}"


def _size(effect: float) -> str:
    """Of an effect without its sign, in whole percent from ten on."""
    percent = 100 * abs(effect)
    return f"{percent:,.0f} %" if percent >= 9.95 else f"{percent:.1f} %"


@dataclass(frozen=True)
class MainEffect:
    """How everybody takes a tag: the Mantel–Haenszel ratio of CTRs with it over without it, minus 1."""

    tag: Mapping[str, str]
    effect: float
    ci_low: float
    ci_high: float
    q_value: float
    n: int  # exposures with the tag

    def to_json(self) -> dict[str, object]:
        """As summary.json holds it."""
        return {
            "tag": dict(self.tag),
            "effect": self.effect,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "q_value": self.q_value,
            "n": self.n,
        }


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
        threshold = self.search.threshold
        found = [conditional_interval(g / s, c, level) for g, s, c in zip(self.gamma, self.se, threshold, strict=True)]
        low, high = np.array(found).reshape(-1, 2).T
        return low * self.se, high * self.se


@dataclass(frozen=True, eq=False)
class Search:
    """From which |z| on a pair is significant, corrected for everything that was looked at, twice.

    Among families, (user field, tag dimension), false ones are at most a share Q of those found: Benjamini–Hochberg
    over Simes' p-values, then within each at that level (Benjamini & Bogomolov 2014, doi:10.1111/rssb.12028). And a
    pair has to pass Benjamini–Hochberg over all pairs. Pairs that others explain are no discoveries, so families that
    are left with none do not count (Katsevich, Sabatti & Bogomolov 2023, doi:10.1080/01621459.2021.1906684).
    """

    threshold: Floats  # (m,)
    factor: Floats  # (m,) p times this is the q-value
    families: int  # that count

    @classmethod
    def of(cls, examined: Examined, families: int | None = None) -> Search:
        """The thresholds where so many `families` count; None: as many as Benjamini–Hochberg finds."""
        p, family = 2 * stats.norm.sf(np.abs(examined.z)), examined.family
        m, size = len(p), sums(family)
        if not m:
            return cls(np.zeros(0), np.zeros(0), 0)
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
        return cls(stats.norm.isf(Q / factor / 2), factor, families)


@dataclass(frozen=True)
class Diagnostics:
    """What stands behind the insights, for the report and for tests."""

    examined: Examined
    too_few: int  # pairs with too little to be looked at
    strata: int
    effective_share: float  # Kish's effective number of exposures, of all
    clipped: float  # share of the exposures whose weight was clipped
    selected: tuple[tuple[Segment, int], ...]  # (segment, position of the tag), in the order of the insights
    gamma: Floats  # (K,) of the joint model, and its standard errors
    se: Floats


_NONE = np.zeros(0)
_NOTHING = Examined((), (), _NONE, _NONE, _NONE, _NONE, np.zeros(0, np.int64))


class Attribution(NamedTuple):
    """What `attribute` returns."""

    insights: list[Insight]
    main_effects: list[MainEffect]
    diagnostics: Diagnostics


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def attribute(log: Log, *, dependent: bool | None = None) -> Attribution:
    """Insights (strongest first), main effects (of every tag that varies), and what stands behind them.

    `dependent` is what `exposure_independence` said of the log; None asks it. Raises LogError where exposure depended
    on the user with unknown propensities, or without a propensity floor.
    """
    return attribute_coded(code(log, dependent=dependent))


def attribute_coded(coded: Coded) -> Attribution:
    """As `attribute`, of exposures that are coded already."""
    with threadpool_limits(1, "blas"):  # many small products
        cells = Cells.of(coded)
        screened = _screen(coded) if coded.fields and coded.tags else None
        if screened is None:
            found, chosen = list[Insight](), list[int]()
            gammas, ses, examined, too_few = _NONE, _NONE, _NOTHING, 0
        else:
            examined, too_few = screened.examined, screened.too_few
            joint, chosen, explained, search = _joint(screened)
            gammas, ses = joint.pairs, np.sqrt(np.diag(joint.covariance))
            found = _insights(screened, cells, search, gammas, ses, chosen, explained)
        order = sorted(range(len(found)), key=lambda i: (found[i].q_value, -abs(gammas[i] / ses[i])))
    size, square = coded.size.sum(), (coded.count * coded.weight**2).sum()
    diagnostics = Diagnostics(
        examined=examined,
        too_few=too_few,
        strata=len(coded.strata),
        effective_share=float(size**2 / square / coded.count.sum()),
        clipped=coded.clipped,
        selected=tuple((examined.segments[chosen[i]], examined.tags[chosen[i]]) for i in order),
        gamma=gammas[order],
        se=ses[order],
    )
    return Attribution([found[i] for i in order], main_effects(cells), diagnostics)


def without_noise(coded: Coded, probability: Floats, found: Diagnostics) -> tuple[Floats, Floats]:
    """What the coefficients estimate, where the click probabilities (n,) of the exposures are known: (m,) of the
    examined pairs (NaN where too little is expected), and (K,) of the selected ones in their joint model."""
    with threadpool_limits(1, "blas"):
        expected = _screen(replace(coded, reward=probability))
        at = {pair: i for i, pair in enumerate(zip(expected.examined.segments, expected.examined.tags, strict=True))}
        pairs = zip(found.examined.segments, found.examined.tags, strict=True)
        alone = np.array([expected.examined.gamma[at[pair]] if pair in at else np.nan for pair in pairs])
        places = np.array([at.get(pair, -1) for pair in found.selected], dtype=np.int64)
        known = places >= 0
        joint = np.full(len(places), np.nan)
        if known.all() and len(places):
            joint = fit(expected.data, probability, expected.indicators(places), expected.null).pairs
    return alone, joint


def main_effects(cells: Cells) -> list[MainEffect]:
    """The main effect of every tag, in the order of the tags; those that cannot be known are left out."""
    estimate, error = cells.log_ratios()
    known = np.flatnonzero(np.isfinite(estimate) & (error > 0))
    p = 2 * stats.t.sf(np.abs(estimate[known] / error[known]), REPLICATES - 1)
    q, reach = benjamini_hochberg(p), t_quantile(LEVEL)
    n = cells.by_stratum("n").sum(axis=0)
    return [
        MainEffect(
            tag=Tag(cells.tags[t]).names,
            effect=float(np.expm1(estimate[t])),
            ci_low=float(np.expm1(estimate[t] - reach * error[t])),
            ci_high=float(np.expm1(estimate[t] + reach * error[t])),
            q_value=float(q[i]),
            n=round(float(n[t])),
        )
        for i, t in enumerate(known)
    ]


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


def _between(a: float, b: float) -> float:
    """log P(a ≤ N(0,1) ≤ b)."""
    if a > 0:
        a, b = -b, -a
    high, low = float(log_ndtr(b)), float(log_ndtr(a))
    return high + float(np.log1p(-np.exp(min(low - high, -1e-300))))


# ── screening ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Screened:
    """The null model, and per examined pair what the joint model needs."""

    data: Sums
    null: Fit
    projection: Projection
    examined: Examined
    field_of: Codes  # (m,)
    place: Codes  # (m,) among all segment × tag pairs of the field, also those with too little
    factor: Floats  # (m,) the variance of a pair's score over its information: weights, units
    tails: Floats  # (m,) z of the likelihood ratio over z of the score
    too_few: int

    @cached_property
    def coded(self) -> Coded:
        return self.data.coded

    @cached_property
    def tag_correlation(self) -> Floats:
        """(T, T) |correlation| of the tags over exposures."""
        by_variant = sums(self.coded.variant, self.coded.size, size=self.data.n_variants)
        product, total = self.data.tags_by_tag(by_variant), by_variant.sum()
        share = np.diag(product) / total
        sd = np.sqrt(np.maximum(share * (1 - share), 1e-12))
        return np.asarray(np.abs(product / total - np.outer(share, share)) / np.outer(sd, sd))

    @cached_property
    def field_correlation(self) -> Floats:
        """(F, F) the largest |correlation| of a segment of one field and one of another."""
        fields, coded = self.coded.fields, self.coded
        out = np.eye(len(fields))
        split = [i for i, field in enumerate(fields) if field.segments]
        for i, j in combinations(split, 2):
            width = self.data.widths[j]
            table = sums(coded.codes[i] * width + coded.codes[j], coded.size, size=self.data.widths[i] * width)
            table = table.reshape(-1, width) / coded.size.sum()
            a, b = fields[i].membership @ table.sum(axis=1), fields[j].membership @ table.sum(axis=0)
            both = fields[i].membership @ table @ fields[j].membership.T
            sd = np.sqrt(np.maximum(np.outer(a * (1 - a), b * (1 - b)), 1e-12))
            out[i, j] = out[j, i] = (np.abs(both - np.outer(a, b)) / sd).max()
        return out

    def indicators(self, pairs: Codes) -> csc_array:
        """(n, K) 1 where a row is of the pair's segment and carries its tag."""
        carried = self.coded.carried.tocsc()
        found = []
        for m in pairs:
            inside = np.zeros(self.data.widths[self.field_of[m]], bool)
            inside[list(self.examined.segments[m].values)] = True
            tag, shown = self.examined.tags[m], np.zeros(carried.shape[0], bool)
            shown[carried.indices[carried.indptr[tag] : carried.indptr[tag + 1]]] = True
            found.append(np.flatnonzero(shown[self.coded.variant] & inside[self.coded.codes[self.field_of[m]]]))
        ends = np.cumsum([0, *map(len, found)])
        rows = np.concatenate(found) if found else np.zeros(0, np.int64)
        return csc_array((np.ones(len(rows)), rows, ends), shape=(len(self.coded), len(pairs)))


@dataclass(frozen=True, eq=False)
class _Counts:
    """Sums of pairs (segments, tags), of their segments (segments, 1), of tags (tags,), and of all."""

    pair: Floats
    segment: Floats
    tag: Floats
    all: float


def _screen(coded: Coded) -> _Screened:
    """Score tests of all pairs against the model of main effects and strata.

    The variance of a score is its information, times what weights and units of several rows make of it; its tails are
    those of the likelihood ratio of the 2 × 2 table of clicks with and without the tag inside the segment, because with
    few clicks a score has the tails of a Poisson.
    """
    data = Sums(coded)
    null = fit(data, coded.reward)
    q = null.probability
    weight = coded.size * q * (1 - q)
    residual = coded.size * (coded.reward - q)
    projection = Projection.of(data.gram(weight))
    amounts = _amounts(coded, q)
    parts: dict[str, list[Floats]] = {k: [] for k in ("z", "gamma", "se", "factor", "tails", "ok")}
    segments: list[Segment] = []
    fields: list[int] = []
    places: list[int] = []
    pooled = _pooled_design_effect(data, residual, amounts["hc"])
    for f, user in enumerate(coded.fields):
        if not user.segments:
            continue
        counts = _counts(data, f, amounts)
        information = _information(data, projection, f, weight, counts["weight"].pair)
        share = counts["weight"].tag / counts["weight"].all
        effect = np.ones_like(information)
        if not coded.one_row_per_unit:
            effect = _design_effect(data, f, residual, counts, share, pooled)
        factor = effect * _centred(counts["variance"], share) / np.maximum(_centred(counts["weight"], share), 1e-12)
        found = _tests(counts, information, factor)
        for name, values in found.items():
            parts[name].append(values.reshape(-1))
        parts["factor"].append(factor.reshape(-1))
        segments += [s for s in user.segments for _ in range(data.n_tags)]
        fields += [f] * information.size
        places += range(information.size)
    if not segments:
        return _Screened(data, null, projection, _NOTHING, *(np.zeros(0, np.int64),) * 2, *(np.zeros(0),) * 2, 0)
    column = {name: np.concatenate(values) for name, values in parts.items()}
    kept = np.flatnonzero(column["ok"])
    z = column["z"][kept]
    tags = tuple(int(i % data.n_tags) for i in kept)
    families = [f"{segments[i].field}\0{sorted(coded.tags[t].dimensions)}" for i, t in zip(kept, tags, strict=True)]
    examined = Examined(
        tuple(segments[i] for i in kept), tags, column["gamma"][kept], column["se"][kept], z,
        benjamini_hochberg(2 * stats.norm.sf(np.abs(z))), factorise(np.array(families, dtype=object))[1],
    )  # fmt: skip
    return _Screened(
        data, null, projection, examined, np.array(fields)[kept], np.array(places)[kept],
        column["factor"][kept], column["tails"][kept], len(segments) - len(kept),
    )  # fmt: skip


def _amounts(coded: Coded, q: Floats) -> dict[str, Floats]:
    """What is summed over rows, for fitted probabilities q (n,)."""
    square = coded.count * coded.weight**2
    return {
        "n": coded.size, "clicks": coded.size * coded.reward, "expected": coded.size * q,
        "weight": coded.size * q * (1 - q), "square": square, "variance": square * q * (1 - q),
        "hc": square * (coded.reward - q) ** 2,
    }  # fmt: skip


def _counts(data: Sums, f: int, amounts: Mapping[str, Floats]) -> dict[str, _Counts]:
    """The sums of the pairs of field f."""
    codes, size, member = data.coded.codes[f], data.widths[f], data.coded.fields[f].membership
    out = {}
    for name, amount in amounts.items():
        by_tag, alone = data.by_tag(codes, size, amount), sums(codes, amount, size=size)
        out[name] = _Counts(member @ by_tag, (member @ alone)[:, None], by_tag.sum(axis=0), alone.sum())
    return out


def _centred(of: _Counts, share: Floats) -> Floats:
    """(segments, tags) Σ a·(1[tag] − share)² over the segment, from sums of a."""
    return np.asarray(of.pair * (1 - 2 * share) + share**2 * of.segment)


def _information(data: Sums, projection: Projection, f: int, weight: Floats, own: Floats) -> Floats:
    """(segments, tags) what main effects and strata leave of the information of each pair of field f."""
    coded, size = data.coded, data.widths[f]
    member, codes = coded.fields[f].membership, coded.codes[f]
    g, t = own.shape
    columns = np.zeros((g, t, data.n_columns))
    for other, other_codes in enumerate(coded.codes):
        width, at = data.widths[other], slice(data.starts[other], data.starts[other + 1])
        if other == f:
            table = data.by_tag(codes, size, weight)  # (V, T)
            columns[:, :, at] = (member[:, None, :] * table.T[None, :, :]).reshape(g, t, size)
        else:
            table = data.by_tag(codes * width + other_codes, size * width, weight).reshape(size, width, t)
            columns[:, :, at] = np.tensordot(member, table, 1).transpose(0, 2, 1)
    by_variant = data.by_variant(codes, size, weight)
    for i, row in enumerate(np.asarray(member @ by_variant)):
        columns[i, :, data.n_user :] = data.tags_by_tag(row)
    left = np.empty_like(own)
    for i in range(g):  # one by one: of thousands of strata all segments at once would not fit
        rows = np.flatnonzero(member[i][codes] > 0)
        outer = data.by_tag(coded.stratum[rows], data.n_strata, weight[rows], coded.variant[rows])  # (S, T)
        a, b = projection.coefficients(columns[i].T, outer)
        left[i] = own[i] - (columns[i].T * a).sum(axis=0) - (outer * b).sum(axis=0)
    return left


def _by_unit(data: Sums, f: int, residual: Floats) -> tuple[Any, Any, Any]:
    """Scores by unit and base value: the base value (K,), sums by tag (K, T), and over all tags (K,)."""
    coded = data.coded
    assert coded.unit is not None
    pair = combine([coded.unit, coded.codes[f]], len(coded))
    n = int(pair.max()) + 1
    value = np.zeros(n, np.int64)
    value[pair] = coded.codes[f]
    return value, data.by_tag(pair, n, residual), sums(pair, residual, size=n)


def _design_effect(
    data: Sums, f: int, residual: Floats, counts: Mapping[str, _Counts], share: Floats, pooled: float
) -> Floats:
    """(segments, tags) the variance of a pair's score by unit over that by exposure, drawn to the pooled one."""
    member = data.coded.fields[f].membership
    value, by_tag, alone = _by_unit(data, f, residual)
    squares = (by_tag - alone[:, None] * share) ** 2
    by_value = np.stack([sums(value, column, size=data.widths[f]) for column in squares.T], axis=1)
    by_exposure = np.maximum(_centred(counts["hc"], share), 1e-12)
    clicks = counts["clicks"].pair
    own = member @ by_value / by_exposure
    return np.maximum((clicks * own + POOLED_CLICKS * pooled) / (clicks + POOLED_CLICKS), LEAST_DESIGN_EFFECT)


def _pooled_design_effect(data: Sums, residual: Floats, hc: Floats) -> float:
    """The design effect of the scores of tags, over all users."""
    coded = data.coded
    if coded.one_row_per_unit or coded.unit is None:
        return 1.0
    n_units = int(coded.unit.max()) + 1
    share = sums(coded.variant, coded.size, size=data.n_variants) @ coded.carried.toarray() / coded.size.sum()
    by_tag = data.by_tag(coded.unit, n_units, residual) - sums(coded.unit, residual, size=n_units)[:, None] * share
    one = data.by_tag(np.zeros(len(coded), np.int64), 1, hc)[0]
    return float((by_tag**2).sum() / (one * (1 - 2 * share) + share**2 * hc.sum()).sum())


def _tests(counts: Mapping[str, _Counts], information: Floats, factor: Floats) -> dict[str, Floats]:
    """z, gamma and its standard error of every pair, and whether there is enough to look at it."""
    n, clicks, expected, weight = (counts[name] for name in ("n", "clicks", "expected", "weight"))
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = n.pair / counts["square"].pair
        rest = n.segment - n.pair, clicks.segment - clicks.pair, expected.segment - expected.pair
        quarters = [
            (clicks.pair, expected.pair), (n.pair - clicks.pair, n.pair - expected.pair),
            (rest[1], rest[2]), (rest[0] - rest[1], rest[0] - rest[2]),
        ]  # fmt: skip
        least = np.minimum.reduce([e for _, e in quarters]) * effective
        ok = (least >= MIN_EXPECTED) & (information > MIN_INFORMATION * weight.pair)
        score = (clicks.pair - expected.pair) / np.sqrt(information * factor)
        local = (clicks.pair - expected.pair) * np.sqrt(sum(1 / e for _, e in quarters))
        # Where the table's margins are off what was expected (other strata), only the excess within it counts.
        deviance = sum(o * np.log(np.maximum(o, 1e-12) / e) - (o - e) for o, e in quarters)
        tails = np.sqrt(np.maximum(2 * deviance, 0)) / np.abs(local)
        tails = np.where(np.isfinite(tails) & (np.abs(local) > 1e-3), tails, 1.0)
        groups = [
            (n.pair, clicks.pair, expected.pair, weight.pair),
            (*rest, weight.segment - weight.pair),
            (n.tag - n.pair, clicks.tag - clicks.pair, expected.tag - expected.pair, weight.tag - weight.pair),
        ]
        last = [c.all - c.segment - c.tag + c.pair for c in (n, clicks, expected, weight)]
        gamma, fitted, null = (np.zeros_like(information) for _ in range(3))
        for sign, (_, o, e, w) in zip((1, -1, -1, 1), [*groups, tuple(last)], strict=True):
            rate = 1 - w / e  # of as many exposures that all have one probability and the same e and w
            size = e / rate
            o = np.clip(o, 0.5, size - 0.5)
            gamma = gamma + sign * (np.log(o / (size - o)) - np.log(rate / (1 - rate)))
            fitted, null = fitted + size / (o * (size - o)), null + 1 / w
        se = np.sqrt(fitted / null * factor / information)
        ok &= np.isfinite(gamma) & np.isfinite(se) & np.isfinite(score)
    return {"z": np.where(ok, score * tails, 0.0), "gamma": gamma, "se": se, "tails": tails, "ok": ok}


# ── the joint model ─────────────────────────────────────────────────────────────────────────────────────────────────


def _joint(screened: _Screened) -> tuple[Fit, list[int], dict[int, list[int]], Search]:
    """The model of the pairs that stay significant beside each other, those pairs, which others each explains, and the
    thresholds they passed, which count only the families that are left.

    Forward by conditional score tests, backward by Wald tests; the model is fitted anew after every few pairs.
    """
    examined, coded = screened.examined, screened.coded
    search = examined.search
    names = [(s.field, s.label, coded.tags[t].parts) for s, t in zip(examined.segments, examined.tags, strict=True)]
    significant = np.flatnonzero(np.abs(examined.z) >= search.threshold)
    ranked = sorted(significant, key=lambda m: (-round(abs(float(examined.z[m])), 6), examined.z[m] < 0, names[m]))
    candidates = np.array(ranked[:MAX_CANDIDATES], dtype=np.int64)
    z = screened.indicators(candidates)
    information = _information_of(screened, z)
    model, chosen = screened.null, list[int]()  # `chosen`: positions among the candidates
    refuted, known = set[int](), dict[tuple[int, ...], float]()
    while len(candidates):
        threshold = search.threshold[candidates]
        out = (np.abs(examined.z[candidates]) < threshold) | np.isin(examined.family[candidates], [*refuted])
        threshold = np.where(out, np.inf, threshold)
        model, chosen = _selected(screened, candidates, z, information, threshold, model, chosen)
        model, chosen = _sparser(screened, candidates, z, information, threshold, model, chosen)
        families = examined.family[candidates[chosen]]
        more = _refuted(screened, search, candidates[chosen], known)
        refuted |= more
        if more:
            continue
        if not chosen or len(np.unique(families)) >= search.families:
            break
        search = Search.of(examined, len(np.unique(families)))
    explained: dict[int, list[int]] = {int(candidates[k]): [] for k in chosen}
    if chosen:
        own, strength = np.diag(information), np.abs(model.pairs / np.sqrt(np.diag(model.covariance)))
        for k in np.setdiff1d(np.arange(len(candidates)), chosen):
            link = np.abs(information[k, chosen]) / np.sqrt(np.maximum(own[k] * own[chosen], 1e-12))
            explained[int(candidates[chosen[int(np.argmax(link * strength))]])].append(int(candidates[k]))
    return model, [int(candidates[k]) for k in chosen], explained, search


def _refuted(screened: _Screened, search: Search, chosen: Codes, known: dict[tuple[int, ...], float]) -> set[int]:
    """The families of the chosen pairs (m) that others explain: those that it is correlated with, in full.

    A few chosen pairs leave something of what their family does, which a correlated field or tag then seems to do. So a
    family has to be significant (Simes) beside main effects and a free parameter for every cell of the related ones;
    the weakest is asked first, and no longer explains others once it is refuted. `known` remembers the answers.
    """
    examined = screened.examined
    size = sums(examined.family)
    strongest: dict[int, int] = {}  # family → its strongest pair
    for pair in sorted(chosen.tolist(), key=lambda m: abs(float(examined.z[m]))):
        family = int(examined.family[pair])
        strongest.pop(family, None)
        strongest[family] = pair
    level, refuted = Q * search.families / len(size), set[int]()
    for a, pair in strongest.items():
        others = [other for b, other in strongest.items() if b != a and b not in refuted]
        related = [other for other in others if _related(screened, pair, other)]
        if not related:
            continue
        asked = (a, *sorted(int(examined.family[other]) for other in related))
        if asked not in known:
            p = np.sort(2 * stats.norm.sf(np.abs(_beside(screened, np.flatnonzero(examined.family == a), related))))
            known[asked] = float((p * len(p) / np.arange(1, len(p) + 1)).min())
        if known[asked] > level:
            refuted.add(a)
    return refuted


def _related(screened: _Screened, a: int, b: int) -> bool:
    """Whether two pairs' families go together: the correlation of their fields' values times that of their tags."""
    tags, examined = screened.coded.tags, screened.examined
    ours, theirs = (
        [t for t, tag in enumerate(tags) if tag.dimensions & tags[examined.tags[pair]].dimensions] for pair in (a, b)
    )
    of_tags = float(screened.tag_correlation[np.ix_(ours, theirs)].max())
    return bool(screened.field_correlation[screened.field_of[a], screened.field_of[b]] * of_tags > RELATED)


def _crossed(screened: _Screened, pair: int) -> tuple[UserField, Codes]:
    """A pair's field × all combinations of its dimensions' values, as a field without segments, and each row's code."""
    coded, examined = screened.coded, screened.examined
    f, dimensions = int(screened.field_of[pair]), coded.tags[examined.tags[pair]].dimensions
    columns = [t for t, tag in enumerate(coded.tags) if tag.dimensions & dimensions]
    carried = coded.carried[:, columns].toarray()
    combination = np.unique(carried, axis=0, return_inverse=True)[1].ravel()
    key = coded.codes[f] * (int(combination.max()) + 1) + combination[coded.variant]
    keys, codes = factorise(key)
    return UserField(coded.fields[f].name, tuple(map(str, keys)), ()), codes


def _beside(screened: _Screened, pairs: Codes, related: Sequence[int]) -> Floats:
    """z of pairs of one field beside the families of the `related` pairs in full; 0 where these leave nothing of one.

    What the null model says of the user's other fields is held: exposures were random, they have no part in this.
    """
    coded, f = screened.coded, int(screened.field_of[pairs[0]])
    crossed = [_crossed(screened, pair) for pair in related]
    beside = replace(
        coded,
        fields=(coded.fields[f], *(user for user, _ in crossed)),
        codes=(coded.codes[f], *(codes for _, codes in crossed)),
    )
    data = Sums(beside)
    q = fit(data, coded.reward, offset=logit(screened.null.probability)).probability
    weight = coded.size * q * (1 - q)
    counts = _counts(data, 0, _amounts(coded, q))
    information = _information(data, Projection.of(data.gram(weight)), 0, weight, counts["weight"].pair)
    found = _tests(counts, np.maximum(information, 1e-12), np.ones_like(information))
    z = np.where(information > LEAST_LEFT * counts["weight"].pair, found["z"], 0.0).reshape(-1)
    return np.asarray(z[screened.place[pairs]] / np.sqrt(screened.factor[pairs]))


def _selected(
    screened: _Screened,
    candidates: Codes,
    z: csc_array,
    information: Floats,
    threshold: Floats,
    model: Fit,
    chosen: list[int],
) -> tuple[Fit, list[int]]:
    """Pairs (positions among the candidates) that are significant beside each other, from `chosen` on, and their model.

    z (n, K) are the candidates' indicators, `information` (K, K) and `threshold` (K,) theirs.
    """
    dropped: set[int] = set()
    model, chosen = _pruned(screened, z, threshold, model, list(chosen), dropped)
    for _ in range(MAX_ROUNDS):
        shut = np.isin(np.arange(len(candidates)), [*chosen, *dropped])
        near = _near(screened, candidates, z, information, np.where(shut, np.inf, threshold), model, chosen)
        added = near.greedy(ADDED)
        if not added:
            break
        chosen = [*chosen, *added]
        model = fit(screened.data, screened.coded.reward, z[:, chosen], model)
        model, chosen = _pruned(screened, z, threshold, model, chosen, dropped)
    return model, chosen


@dataclass(frozen=True, eq=False)
class _Near:
    """The likelihood near a fitted model, quadratic in the coefficients of K candidates that are not in it."""

    left: Floats  # (K, K) information
    score: Floats  # (K,)
    whole: Floats  # (K,) information before any pair was in
    spread: Floats  # (K,) standard deviations of z
    threshold: Floats  # (K,) of |z|; inf for those that may not enter
    order: Codes  # (K,) rank by exposures, the rarest first

    @property
    def z(self) -> Floats:
        """(K,) |z| of each candidate, beside those in the model; 0 where these leave too little of it."""
        own = np.diag(self.left)
        z = np.abs(self.score) / np.sqrt(np.maximum(own, 1e-12)) / self.spread
        return np.where(own > LEAST_LEFT * self.whole, z, 0.0)

    def after(self, k: int) -> _Near:
        """Once candidate k is in the model, with its best coefficient."""
        if self.left[k, k] <= 1e-9 * self.whole[k]:
            return self
        column = self.left[:, k] / self.left[k, k]
        threshold = np.where(np.arange(len(column)) == k, np.inf, self.threshold)
        left, score = self.left - column[:, None] * self.left[k], self.score - column * self.score[k]
        return replace(self, left=left, score=score, threshold=threshold)

    def best(self) -> int | None:
        """The most significant candidate. Of those that are each other's mirror (women like it, men do not) one that
        likes it, and of several such the rarest: the exception is named, not the rule."""
        z = self.z
        k = int(np.argmax(np.round(z - self.threshold, 6)))
        if z[k] < self.threshold[k]:
            return None
        alike = np.abs(self.left[k]) > TWINS * np.sqrt(self.left[k, k] * np.maximum(np.diag(self.left), 0))
        alike &= (z >= self.threshold) & (self.score > 0)
        return int(np.flatnonzero(alike)[np.argmin(self.order[alike])]) if alike.any() else k

    def greedy(self, most: int, first: int | None = None) -> list[int]:
        """At most `most` candidates, each the best one once those before it are in; `first` comes first."""
        taken, near, k = list[int](), self, self.best() if first is None else first
        while k is not None and len(taken) < most:
            taken.append(k)
            near = near.after(k)
            k = near.best()
        return taken

    def fewest(self, most: int) -> list[int] | None:
        """The smallest set of fewer than `most` candidates, each significant when it enters, that leaves none that is;
        every candidate is tried as the first. None where there is no such set."""
        found = []
        for first in np.flatnonzero(self.z >= self.threshold):
            taken = self.greedy(most, int(first))
            if len(taken) < most:
                found.append((len(taken), bool(self.score[first] < 0), int(self.order[first]), taken))
        return min(found)[3] if found else None

    def among(self, rows: Codes) -> _Near:
        """Of some of the candidates only."""
        left, (score, whole, spread, threshold) = (
            self.left[np.ix_(rows, rows)],
            (array[rows] for array in (self.score, self.whole, self.spread, self.threshold)),
        )
        return _Near(left, score, whole, spread, threshold, self.order[rows])


def _near(
    screened: _Screened, candidates: Codes, z: csc_array, information: Floats, threshold: Floats, model: Fit,
    chosen: Sequence[int], freed: Sequence[int] = (),
) -> _Near:  # fmt: skip
    """The likelihood near a model of the chosen candidates, `freed` of them taken out again."""
    coded, own = screened.coded, np.diff(z.indptr)
    at_null = np.maximum(_own_information(screened, z, screened.null), 1e-12)
    scale = np.sqrt(_own_information(screened, z, model) / at_null)
    left = information * scale[:, None] * scale
    score = z.T @ (coded.size * (coded.reward - model.probability))
    score = score + left[:, freed] @ model.pairs[[chosen.index(k) for k in freed]] if freed else score
    near = _Near(
        left, score, np.diag(left).copy(), np.sqrt(screened.factor[candidates]) / screened.tails[candidates],
        threshold, np.argsort(np.argsort(own, kind="stable")),
    )  # fmt: skip
    for k in chosen:
        near = near if k in freed else near.after(k)
    return near


def _sparser(
    screened: _Screened, candidates: Codes, z: csc_array, information: Floats, threshold: Floats, model: Fit,
    chosen: list[int],
) -> tuple[Fit, list[int]]:  # fmt: skip
    """The model with the pairs of a family replaced by fewer that say the same: greed may have begun with two that
    together do what one does."""
    family = screened.examined.family[candidates]
    for a in np.unique(family[chosen]):
        own = [k for k in chosen if family[k] == a]
        if len(own) < 2:
            continue
        near = _near(screened, candidates, z, information, threshold, model, chosen, own)
        members = np.flatnonzero(family == a)
        fewer = near.among(members).fewest(len(own))
        if fewer is None:
            continue
        others = [k for k in chosen if family[k] != a]
        instead = [*others, *(int(members[k]) for k in fewer)]
        tried = fit(screened.data, screened.coded.reward, z[:, instead], replace(model, pairs=np.zeros(0)))
        # The likelihood is quadratic only nearby: what has strong effects is believed once it is fitted.
        left = _near(screened, candidates, z, information, threshold, tried, instead).among(members)
        if left.best() is None:
            model, chosen = tried, instead
    return _pruned(screened, z, threshold, model, chosen, set())


def _pruned(
    screened: _Screened, z: csc_array, threshold: Floats, model: Fit, chosen: list[int], dropped: set[int]
) -> tuple[Fit, list[int]]:
    """The model without the pairs that are not significant in it, taken out one by one (the weakest first, the others
    then being what a quadratic likelihood says), until a fit has none."""
    while chosen:
        kept, pairs, covariance = list(range(len(chosen))), model.pairs.copy(), model.covariance.copy()
        while kept:
            excess = (
                np.abs(pairs) / np.sqrt(np.maximum(np.diag(covariance), 1e-12)) - threshold[[chosen[i] for i in kept]]
            )
            weakest = int(np.argmin(excess))
            if excess[weakest] >= 0:
                break
            column = covariance[:, weakest] / covariance[weakest, weakest]
            pairs, covariance = pairs - column * pairs[weakest], covariance - np.outer(column, covariance[weakest])
            pairs, covariance = np.delete(pairs, weakest), np.delete(np.delete(covariance, weakest, 0), weakest, 1)
            dropped.add(chosen[kept.pop(weakest)])
        if len(kept) == len(chosen):
            break
        chosen = [chosen[i] for i in kept]
        start = replace(model, pairs=pairs)
        model = fit(screened.data, screened.coded.reward, z[:, chosen], start) if chosen else screened.null
    return model, chosen


def _own_information(screened: _Screened, z: csc_array, model: Fit) -> Floats:
    """(K,) the weight of each candidate's rows in this model."""
    q = model.probability
    return np.asarray(z.T @ (screened.coded.size * q * (1 - q)))


def _information_of(screened: _Screened, z: csc_array) -> Floats:
    """(K, K) the information of candidates that main effects and strata leave, at the null model."""
    data, q = screened.data, screened.null.probability
    weight = screened.coded.size * q * (1 - q)
    columns, strata = products(data, z, weight)
    a, b = screened.projection.coefficients(columns, strata)
    return np.asarray(among(z, weight) - columns.T @ a - strata.T @ b)


def _insights(
    screened: _Screened,
    cells: Cells,
    search: Search,
    gammas: Floats,
    ses: Floats,
    chosen: Sequence[int],
    explained: Mapping[int, Sequence[int]],
) -> list[Insight]:
    examined, coded = screened.examined, screened.coded
    at = {name: i for i, name in enumerate(cells.values)}
    n = cells.table("n")

    def pair(k: int) -> Pair:
        segment = examined.segments[k]
        return Pair({segment.field: segment.label}, coded.tags[examined.tags[k]].names)

    found = []
    for k, gamma, se in zip(chosen, gammas, ses, strict=True):
        segment, tag = examined.segments[k], examined.tags[k] + 1
        values = np.array([at[(segment.field, coded.fields[screened.field_of[k]].labels[v])] for v in segment.values])
        preference = float(cells.preference(values)[tag])
        low, high = conditional_interval(float(gamma / se), float(search.threshold[k]))
        joint_p = 2 * stats.norm.sf(min(abs(gamma / se), abs(examined.z[k])))
        found.append(
            Insight(
                segment=pair(k).segment,
                tag=pair(k).tag,
                effect=float(np.expm1(gamma)),
                preference=preference if np.isfinite(preference) else None,
                # Given the selection, a barely selected effect may lie outside its interval: then it is the end.
                ci_low=float(np.expm1(min(low * se, gamma))),
                ci_high=float(np.expm1(max(high * se, gamma))),
                q_value=min(float(joint_p * search.factor[k]), 1.0),
                n=round(float(n[values, tag].sum())),
                explained_by=tuple(pair(j) for j in explained[k]),
            )
        )
    return found
