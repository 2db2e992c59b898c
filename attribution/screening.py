"""Score tests of every segment × tag pair against the model of main effects and strata."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats
from scipy.sparse import csc_array

from attribution.coding import Coded, Segment
from attribution.discoveries import NOTHING, Examined, benjamini_hochberg
from attribution.logistic import LEAST_DESIGN_EFFECT, Fit, Projection, Sums, fit
from kaleidoscope.log import Codes, Floats, combine, factorise, sums

MIN_EXPECTED = 10.0  # clicks, and exposures without a click, in the pair and in the rest of its segment
MIN_INFORMATION = 1e-3  # of a pair's own, that main effects have to leave
POOLED_CLICKS = 200.0  # as if so many clicks said that a pair's design effect is that of all


@dataclass(frozen=True, eq=False)
class Screened:
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

    @property
    def coded(self) -> Coded:
        """The exposures."""
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


def screen(coded: Coded, only: Collection[tuple[Segment, int]] | None = None) -> Screened:
    """Score tests of all pairs, or of `only` these, against the model of main effects and strata.

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
    tags_of: list[int] = []
    fields: list[int] = []
    places: list[int] = []
    pooled = pooled_design_effect(data, residual, amounts["hc"])
    for f, user in enumerate(coded.fields):
        if not user.segments or (only is not None and user.name not in {segment.field for segment, _ in only}):
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
        tags_of += list(range(data.n_tags)) * len(user.segments)
        fields += [f] * information.size
        places += range(information.size)
    if not segments:
        return Screened(data, null, projection, NOTHING, *(np.zeros(0, np.int64),) * 2, *(np.zeros(0),) * 2, 0)
    column = {name: np.concatenate(values) for name, values in parts.items()}
    wanted = np.ones(len(segments), bool)
    if only is not None:
        wanted = np.array([pair in only for pair in zip(segments, tags_of, strict=True)], dtype=bool)
    kept = np.flatnonzero(wanted & column["ok"])
    z = column["z"][kept]
    tags = tuple(tags_of[i] for i in kept)
    families = [f"{segments[i].field}\0{sorted(coded.tags[t].dimensions)}" for i, t in zip(kept, tags, strict=True)]
    examined = Examined(
        tuple(segments[i] for i in kept), tags, column["gamma"][kept], column["se"][kept], z,
        benjamini_hochberg(2 * stats.norm.sf(np.abs(z))), factorise(np.array(families, dtype=object))[1],
    )  # fmt: skip
    return Screened(
        data, null, projection, examined, np.array(fields)[kept], np.array(places)[kept],
        column["factor"][kept], column["tails"][kept], int(wanted.sum()) - len(kept),
    )  # fmt: skip


def z_given(coded: Coded, offset: Floats) -> tuple[Floats, Floats]:
    """(segments, tags) z of every pair of the first field beside the main effects of `coded` and an offset (n,) of the
    logit, and the share of the pair's information that the main effects leave; weights and units are not counted."""
    data = Sums(coded)
    q = fit(data, coded.reward, offset=offset).probability
    weight = coded.size * q * (1 - q)
    counts = _counts(data, 0, _amounts(coded, q))
    information = _information(data, Projection.of(data.gram(weight)), 0, weight, counts["weight"].pair)
    found = _tests(counts, np.maximum(information, 1e-12), np.ones_like(information))
    return found["z"], information / np.maximum(counts["weight"].pair, 1e-12)


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
    for other, other_codes in enumerate(data.codes):
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


def pooled_design_effect(data: Sums, residual: Floats, hc: Floats) -> float:
    """The design effect of the scores of tags, over all users.

    Not below LEAST_DESIGN_EFFECT: the score of a unit that has most of the rows is about 0 where the model is fitted,
    which looks as if nothing varied.
    """
    coded = data.coded
    if coded.one_row_per_unit or coded.unit is None:
        return 1.0
    n_units = int(coded.unit.max()) + 1
    share = sums(coded.variant, coded.size, size=data.n_variants) @ coded.carried.toarray() / coded.size.sum()
    by_tag = data.by_tag(coded.unit, n_units, residual) - sums(coded.unit, residual, size=n_units)[:, None] * share
    one = data.by_tag(np.zeros(len(coded), np.int64), 1, hc)[0]
    by_exposure = float((one * (1 - 2 * share) + share**2 * hc.sum()).sum())
    return max(float((by_tag**2).sum()) / max(by_exposure, 1e-12), LEAST_DESIGN_EFFECT)


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
