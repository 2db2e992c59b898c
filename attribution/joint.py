"""The joint model: which of the significant pairs stay so beside each other, and which are explained by others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import csc_array
from scipy.special import logit

from attribution.coding import Segment, UserField
from attribution.discoveries import Q, Search
from attribution.logistic import Fit, among, fit, products
from attribution.screening import Screened, z_given
from attribution.strata_effects import patterns_of
from kaleidoscope.log import Codes, Floats, factorise, sums

TWINS = 0.999  # |correlation| of what is left of two pairs, from which on they are one
LEAST_LEFT = 0.01  # of that, that the other pairs of a joint model have to leave
MAX_CANDIDATES = 250  # pairs that the joint model is chosen from
RELATED = 0.15  # correlation of field values × of tags, from which on one family may look like another
MAX_ROUNDS = 12
ADDED = 8  # pairs that enter the joint model before it is fitted anew


@dataclass(frozen=True, eq=False)
class Joint:
    """The model of the K pairs that stay significant beside each other."""

    model: Fit
    pairs: tuple[int, ...]  # K positions among the examined
    explained: Mapping[int, Sequence[int]]  # by each, positions too
    threshold: Floats  # (K,) of |z| that each passed
    factor: Floats  # (K,) p times this is the q-value


def joint_model(screened: Screened, eligible: Collection[tuple[Segment, int]] | None = None) -> Joint:
    """The model of the pairs that stay significant beside each other; if given, only `eligible` ones enter.

    Forward by conditional score tests, backward by Wald tests; the model is fitted anew after every few pairs. The
    thresholds count only the families that are left.
    """
    examined, coded = screened.examined, screened.coded
    search = examined.search
    names = [(s.field, s.label, coded.tags[t].parts) for s, t in zip(examined.segments, examined.tags, strict=True)]
    significant = np.flatnonzero(np.abs(examined.z) >= search.threshold)
    if eligible is not None:
        pairs = list(zip(examined.segments, examined.tags, strict=True))
        significant = np.array([m for m in significant if pairs[m] in eligible], dtype=np.int64)
    ranked = sorted(significant, key=lambda m: (-round(abs(float(examined.z[m])), 6), examined.z[m] < 0, names[m]))
    candidates = np.array(ranked[:MAX_CANDIDATES], dtype=np.int64)
    z = screened.indicators(candidates)
    information = _information_of(screened, z)
    model, chosen, bars = screened.null, list[int](), _Bars.of(search, examined.family, candidates, set())
    refuted, known = set[int](), dict[tuple[int, ...], float]()
    while len(candidates):
        bars = _Bars.of(search, examined.family, candidates, refuted)
        model, chosen = _selected(screened, candidates, z, information, bars, model, chosen)
        model, chosen = _sparser(screened, candidates, z, information, bars, model, chosen)
        families = examined.family[candidates[chosen]]
        strength = np.abs(model.pairs / np.sqrt(np.diag(model.covariance)))
        more = _refuted(screened, search, candidates[chosen], strength, known)
        refuted |= more
        if more:
            continue
        if not chosen or len(np.unique(families)) >= search.families:
            break
        search = Search.of(examined, len(np.unique(families)))
    explained: dict[int, list[int]] = {int(candidates[k]): [] for k in chosen}
    strength = np.abs(model.pairs / np.sqrt(np.diag(model.covariance)))
    if chosen:
        own = np.diag(information)
        for k in np.setdiff1d(np.arange(len(candidates)), chosen):
            link = np.abs(information[k, chosen]) / np.sqrt(np.maximum(own[k] * own[chosen], 1e-12))
            explained[int(candidates[chosen[int(np.argmax(link * strength))]])].append(int(candidates[k]))
    kept = candidates[chosen]
    factor = np.where(bars.firsts(chosen, strength), search.factor[kept], search.further[kept])
    return Joint(model, tuple(kept.tolist()), explained, bars.among(chosen, strength), factor)


@dataclass(frozen=True, eq=False)
class _Bars:
    """From which |z| on each of K candidates is significant; inf for those that may not enter."""

    first: Floats  # (K,)
    further: Floats  # (K,) beside a stronger one of its family
    family: Codes  # (K,)

    @classmethod
    def of(cls, search: Search, families: Codes, candidates: Codes, refuted: Collection[int]) -> _Bars:
        """The thresholds of a search, without the refuted families."""
        first, family = search.threshold[candidates], families[candidates]
        # Alone a candidate has passed the first thresholds, which is enough of that: beside the others it may be clear.
        out = np.isin(family, [*refuted])
        further = stats.norm.isf(Q / search.further[candidates] / 2)
        return cls(np.where(out, np.inf, first), np.where(out, np.inf, further), family)

    def without(self, shut: Sequence[int]) -> _Bars:
        """Some candidates may not enter."""
        first, further = self.first.copy(), self.further.copy()
        first[list(shut)] = further[list(shut)] = np.inf
        return replace(self, first=first, further=further)

    def beside(self, chosen: Sequence[int]) -> Floats:
        """(K,) once these are in the model."""
        return np.where(np.isin(self.family, self.family[list(chosen)]), self.further, self.first)

    def firsts(self, chosen: Sequence[int], strength: Floats) -> NDArray[np.bool_]:
        """(len(chosen),) which of a model's candidates, of these |z|, are the strongest of their family."""
        family = self.family[list(chosen)]
        order = np.argsort(-strength, kind="stable")
        out = np.zeros(len(family), bool)
        out[order[np.unique(family[order], return_index=True)[1]]] = True
        return out

    def among(self, chosen: Sequence[int], strength: Floats) -> Floats:
        """(len(chosen),) of a model's candidates of these |z|."""
        return np.where(self.firsts(chosen, strength), self.first[list(chosen)], self.further[list(chosen)])


def _refuted(
    screened: Screened, search: Search, chosen: Codes, strength: Floats, known: dict[tuple[int, ...], float]
) -> set[int]:
    """The families of the chosen pairs (m) that others explain: those that it is correlated with, in full.

    A few chosen pairs leave something of what their family does, which a correlated field or tag then seems to do. So a
    family has to be significant (Simes) beside main effects and a free parameter for every cell of the related ones;
    the weakest in the joint model (`strength` is its |z|) is asked first, and no longer explains others once it is
    refuted. `known` remembers the answers.
    """
    examined = screened.examined
    size = sums(examined.family)
    strongest: dict[int, int] = {}  # family → its strongest pair
    for pair in chosen[np.argsort(strength, kind="stable")].tolist():
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


def _related(screened: Screened, a: int, b: int) -> bool:
    """Whether two pairs' families go together: the correlation of their fields' values times that of their tags."""
    tags, examined = screened.coded.tags, screened.examined
    ours, theirs = (
        [t for t, tag in enumerate(tags) if tag.dimensions & tags[examined.tags[pair]].dimensions] for pair in (a, b)
    )
    of_tags = float(screened.tag_correlation[np.ix_(ours, theirs)].max())
    return bool(screened.field_correlation[screened.field_of[a], screened.field_of[b]] * of_tags > RELATED)


def _crossed(screened: Screened, pair: int) -> tuple[UserField, Codes]:
    """A pair's field × all combinations of its dimensions' values, as a field without segments, and each row's code."""
    coded, examined = screened.coded, screened.examined
    f, dimensions = int(screened.field_of[pair]), coded.tags[examined.tags[pair]].dimensions
    columns = [t for t, tag in enumerate(coded.tags) if tag.dimensions & dimensions]
    pattern, patterns = patterns_of(coded.carried, columns, coded.variant)
    keys, codes = factorise(coded.codes[f] * patterns + pattern)
    return UserField(coded.fields[f].name, tuple(map(str, keys)), ()), codes


def _beside(screened: Screened, pairs: Codes, related: Sequence[int]) -> Floats:
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
    z, left = z_given(beside, logit(screened.null.probability))
    z = np.where(left > LEAST_LEFT, z, 0.0).reshape(-1)
    return np.asarray(z[screened.place[pairs]] / np.sqrt(screened.factor[pairs]))


def _selected(
    screened: Screened,
    candidates: Codes,
    z: csc_array,
    information: Floats,
    bars: _Bars,
    model: Fit,
    chosen: list[int],
) -> tuple[Fit, list[int]]:
    """Pairs (positions among the candidates) that are significant beside each other, from `chosen` on, and their model.

    z (n, K) are the candidates' indicators, `information` (K, K) theirs.
    """
    dropped: set[int] = set()
    model, chosen = _pruned(screened, z, bars, model, list(chosen), dropped)
    for _ in range(MAX_ROUNDS):
        near = _near(screened, candidates, z, information, bars.without([*chosen, *dropped]), model, chosen)
        added = near.greedy(ADDED)
        if not added:
            break
        chosen = [*chosen, *added]
        model = fit(screened.data, screened.coded.reward, z[:, chosen], model)
        model, chosen = _pruned(screened, z, bars, model, chosen, dropped)
    return model, chosen


@dataclass(frozen=True, eq=False)
class _Near:
    """The likelihood near a fitted model, quadratic in the coefficients of K candidates that are not in it."""

    left: Floats  # (K, K) information
    score: Floats  # (K,)
    whole: Floats  # (K,) information before any pair was in
    spread: Floats  # (K,) standard deviations of z
    bars: _Bars
    threshold: Floats  # (K,) which of them hold; inf for those that may not enter
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
        bars = self.bars.without([k])
        threshold = np.where(bars.family == bars.family[k], bars.further, self.threshold)
        left, score = self.left - column[:, None] * self.left[k], self.score - column * self.score[k]
        return replace(self, left=left, score=score, bars=bars, threshold=threshold)

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
        bars = _Bars(self.bars.first[rows], self.bars.further[rows], self.bars.family[rows])
        return _Near(left, score, whole, spread, bars, threshold, self.order[rows])


def _near(
    screened: Screened, candidates: Codes, z: csc_array, information: Floats, bars: _Bars, model: Fit,
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
        bars, bars.beside([k for k in chosen if k not in freed]), np.argsort(np.argsort(own, kind="stable")),
    )  # fmt: skip
    for k in chosen:
        near = near if k in freed else near.after(k)
    return near


def _sparser(
    screened: Screened, candidates: Codes, z: csc_array, information: Floats, bars: _Bars, model: Fit,
    chosen: list[int],
) -> tuple[Fit, list[int]]:  # fmt: skip
    """The model with the pairs of a family replaced by fewer that say the same: greed may have begun with two that
    together do what one does."""
    family = screened.examined.family[candidates]
    for a in np.unique(family[chosen]):
        own = [k for k in chosen if family[k] == a]
        if len(own) < 2:
            continue
        near = _near(screened, candidates, z, information, bars, model, chosen, own)
        members = np.flatnonzero(family == a)
        fewer = near.among(members).fewest(len(own))
        if fewer is None:
            continue
        others = [k for k in chosen if family[k] != a]
        instead = [*others, *(int(members[k]) for k in fewer)]
        tried = fit(screened.data, screened.coded.reward, z[:, instead], replace(model, pairs=np.zeros(0)))
        # The likelihood is quadratic only nearby: what has strong effects is believed once it is fitted.
        left = _near(screened, candidates, z, information, bars, tried, instead).among(members)
        if left.best() is None:
            model, chosen = tried, instead
    return _pruned(screened, z, bars, model, chosen, set())


def _pruned(
    screened: Screened, z: csc_array, bars: _Bars, model: Fit, chosen: list[int], dropped: set[int]
) -> tuple[Fit, list[int]]:
    """The model without the pairs that are not significant in it, taken out one by one (the weakest first, the others
    then being what a quadratic likelihood says), until a fit has none."""
    while chosen:
        kept, pairs, covariance = list(range(len(chosen))), model.pairs.copy(), model.covariance.copy()
        while kept:
            strength = np.abs(pairs) / np.sqrt(np.maximum(np.diag(covariance), 1e-12))
            excess = strength - bars.among([chosen[i] for i in kept], strength)
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


def _own_information(screened: Screened, z: csc_array, model: Fit) -> Floats:
    """(K,) the weight of each candidate's rows in this model."""
    q = model.probability
    return np.asarray(z.T @ (screened.coded.size * q * (1 - q)))


def _information_of(screened: Screened, z: csc_array) -> Floats:
    """(K, K) the information of candidates that main effects and strata leave, at the null model."""
    data, q = screened.data, screened.null.probability
    weight = screened.coded.size * q * (1 - q)
    columns, strata = products(data, z, weight)
    a, b = screened.projection.coefficients(columns, strata)
    return np.asarray(among(z, weight) - columns.T @ a - strata.T @ b)
