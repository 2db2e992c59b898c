"""The method "grid": users by two fields at once, tags by two dimensions at once, and what only a crossing says.

A crossing is what a product of a user field or two and a tag dimension or two says beyond all products with fewer of
them. docs/attribution.md says how they are found; here is only that, single pairs are those of `insights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.sparse import csc_array, csr_array, hstack
from threadpoolctl import threadpool_limits

from attribution.coding import Coded, Segment, Tag, UserField
from attribution.crossings import Crossing, Item, beside, combinations_of, crossings_of, inside_of, score_tests
from attribution.discoveries import LEVEL, Examined, Q, Search, benjamini_hochberg, conditional_interval
from attribution.insights import Attribution, Diagnostics, Insight, Pair, attribute_coded
from attribution.insights import without_noise as pairs_without_noise
from attribution.joint import LEAST_LEFT, TWINS
from attribution.logistic import LEAST_DESIGN_EFFECT, Fit, Sums, fit
from attribution.screening import POOLED_CLICKS
from kaleidoscope.log import Codes, Floats, factorise, sums
from kaleidoscope.vocabulary import Method

BLOCKS = 3  # crossings of two fields and two dimensions whose cells are listed
MIN_CLICKS = 10  # and exposures without one, of a cell whose CTR is told

# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GridCell:
    """Users of two fields' values shown two dimensions' values (of one field or dimension where there are no two).

    With fewer than MIN_CLICKS clicks, or exposures without one, nothing but the counts is known. `effect` is that of
    the crossing beyond its parts; None too where the log has too little around the cell to part it from them.
    """

    segment: Mapping[str, str]
    tag: Mapping[str, str]
    n: int
    clicks: int
    ctr: float | None  # weighted as the exposures are
    ctr_low: float | None  # 95 %, by unit
    ctr_high: float | None
    effect: float | None  # exp(γ) − 1, γ to first order
    ci_low: float | None
    ci_high: float | None
    q_value: float | None  # over the whole search


@dataclass(frozen=True, eq=False)
class GridResult:
    """What `grid` returns. Examined pairs of the diagnostics are named by `names`; tags count in `tags`."""

    insights: tuple[Insight, ...]
    diagnostics: Diagnostics
    cells: tuple[GridCell, ...]  # block by block, the most interesting first
    names: tuple[Pair, ...]  # (m,) of the examined
    tags: tuple[Tag, ...]  # the log's, then their products
    products: tuple[tuple[int, ...], ...]  # the log's tags that each of `tags` is the product of
    plan: _Plan = field(repr=False)


@dataclass(frozen=True, eq=False)
class Looked(Examined):
    """Single pairs, then crossings.

    Everything is corrected for the whole search; and crossings, besides, for their own, as if there were no pairs: many
    clear pairs do not make a false crossing likelier.
    """

    single: int  # pairs, that come first

    @cached_property
    def search(self) -> Search:
        """The thresholds when all families with something significant are counted."""
        return self.counting(None, None)

    def counting(self, families: int | None, crossed: int | None) -> Search:
        """The thresholds where so many families count, and so many of crossings; None: as many as are significant."""
        whole, m = Search.of(self, families), self.single
        if m == len(self.z):
            return whole
        p, family = 2 * stats.norm.sf(np.abs(self.z[m:])), factorise(self.family[m:])[1]
        own = Search.of(
            Examined(
                self.segments[m:], self.tags[m:], self.gamma[m:], self.se[m:], self.z[m:], benjamini_hochberg(p), family
            ),
            crossed,
        )  # fmt: skip
        factor, further = (
            np.concatenate([ours[:m], np.maximum(ours[m:], theirs)])
            for ours, theirs in ((whole.factor, own.factor), (whole.further, own.further))
        )
        return replace(whole, threshold=stats.norm.isf(Q / factor / 2), factor=factor, further=further)


_Rate = tuple[float, float, float | None, float | None, float | None]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What was looked at and what was found, so that it can be looked at again with other outcomes."""

    crossings: tuple[Crossing, ...]
    kept: tuple[Codes, ...]  # which of each crossing's items were examined
    held: tuple[Codes, ...]  # × (n,): partitions with a free parameter each
    columns: tuple[Item, ...]  # of the joint model
    reported: tuple[int, ...]  # places of the insights among them


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def grid(coded: Coded, statistics: Attribution | None = None) -> GridResult:
    """Single pairs and crossings that say more than their parts, corrected for having looked at all of them; and the
    cells of the most interesting crossings of two fields and two dimensions.

    `statistics` is what `attribute_coded` returns for this log, where it is there already.
    """
    single = attribute_coded(coded) if statistics is None else statistics
    with threadpool_limits(1, "blas"):
        return _Search(coded, single).result()


def without_noise(coded: Coded, probability: Floats, found: GridResult) -> tuple[Floats, Floats]:
    """What the coefficients estimate, where the click probabilities (n,) are known: (m,) of everything examined (NaN
    where too little is expected), and (K,) of the insights in their joint model."""
    plan, expected = found.plan, replace(coded, reward=probability)
    alone, _ = pairs_without_noise(coded, probability, replace(found.diagnostics, **_singles(found)))
    with threadpool_limits(1, "blas"):
        null = fit(Sums(expected), probability)
        tests = score_tests(expected, beside(expected, null, plan.held), plan.crossings)
        more = [test.gamma[kept] for test, kept in zip(tests, plan.kept, strict=True)]
        joint = _joint(expected, plan.columns).pairs if plan.columns else np.zeros(0)
    return np.concatenate([alone, *more]), joint[list(plan.reported)]


def _singles(found: GridResult) -> dict[str, Any]:
    """The diagnostics of single pairs only."""
    examined = found.diagnostics.examined
    m = len(examined.segments) - sum(map(len, found.plan.kept))
    columns = {k: getattr(examined, k)[:m] for k in ("segments", "tags", "gamma", "se", "z", "q", "family")}
    return {"examined": Examined(**columns), "selected": (), "gamma": np.zeros(0), "se": np.zeros(0)}


class _Search:
    """One look at a log: what is examined, what is found."""

    def __init__(self, coded: Coded, statistics: Attribution) -> None:
        self.coded, self.single, self.insights = coded, statistics.diagnostics, statistics.insights
        self.number = {user.name: f for f, user in enumerate(coded.fields)}
        self.null = fit(Sums(coded), coded.reward)
        self.pairs = [self._pair(segment, tag) for segment, tag in self.single.selected]
        self.held = [self._cells_of(pair) for pair in self.pairs]
        self.crossings = crossings_of(coded, self.single.examined)
        self.tests = score_tests(coded, beside(coded, self.null, self.held), self.crossings)
        self.kept = [np.flatnonzero(test.ok) for test in self.tests]
        self.examined, self.products = self._examine()
        m = len(self.single.examined.segments)
        self.start = m + np.concatenate([[0], np.cumsum([len(kept) for kept in self.kept])]).astype(int)
        at = {pair: i for i, pair in enumerate(zip(self.examined.segments[:m], self.examined.tags[:m], strict=True))}
        self.pair_at = {pair: at[pair.segments[0][1], pair.tags[0]] for pair in self.pairs}

    def _pair(self, segment: Segment, tag: int) -> Item:
        return Item(((self.number[segment.field], segment),), (tag,))

    def _cells_of(self, pair: Item) -> Codes:
        """(n,) a pair's field × all combinations of its dimensions' values."""
        coded, dimensions = self.coded, self.coded.tags[pair.tags[0]].dimensions
        columns = [t for t, tag in enumerate(coded.tags) if tag.dimensions & dimensions]
        combination = combinations_of(coded, columns)[1]
        return coded.codes[pair.segments[0][0]] * (int(combination.max()) + 1) + combination[coded.variant]

    def _examine(self) -> tuple[Looked, tuple[tuple[int, ...], ...]]:
        """Pairs and crossings in one list, with what its q-values are, and the products of tags it is about."""
        single = self.single.examined
        products: dict[tuple[int, ...], int] = {(t,): t for t in range(len(self.coded.tags))}
        families: dict[Any, int] = {}
        segments, places, family = list(single.segments), list(single.tags), list(single.family)
        first = int(max(family, default=-1)) + 1
        for crossing, kept in zip(self.crossings, self.kept, strict=True):
            if len(kept):
                families.setdefault(crossing.family, first + len(families))
            for item in (crossing.items[i] for i in kept):
                segments.append(_segment(item))
                places.append(products.setdefault(item.tags, len(products)))
                family.append(families[crossing.family])
        z, gamma, se = (
            np.concatenate(
                [getattr(single, k), *(getattr(t, k)[i] for t, i in zip(self.tests, self.kept, strict=True))]
            )
            for k in ("z", "gamma", "se")
        )
        q = benjamini_hochberg(2 * stats.norm.sf(np.abs(z)))
        family_of = np.array(family, dtype=np.int64)
        examined = Looked(tuple(segments), tuple(places), gamma, se, z, q, family_of, len(single.segments))
        return examined, tuple(products)

    # ── finding ──

    def result(self) -> GridResult:
        """Pairs that pass the larger search too and crossings beside them, until the families that count are found."""
        search, counted = self.examined.search, np.array([len(self.examined.z)] * 2)
        while True:
            crossed = self._chosen(search)
            model, columns, reported = self._model(search, crossed)
            # Families that others explain are no discoveries: fewer count, and thresholds rise.
            family = {columns[k]: int(self.examined.family[self._place(columns[k], crossed)]) for k in reported}
            of_crossings = {number for item, number in family.items() if item.order > 2}
            counted = np.minimum(counted, [len(set(family.values())), len(of_crossings)])
            stricter = self.examined.counting(int(counted[0]), int(counted[1]))
            if not reported or (stricter.threshold <= search.threshold).all():
                break
            search = stricter
        found = self._insights(search, crossed, model, columns, reported)
        order = sorted(range(len(found)), key=lambda i: (found[i].q_value, -abs(model.pairs[reported[i]])))
        reported = [reported[i] for i in order]
        gamma, se = model.pairs[reported], np.sqrt(np.diag(model.covariance))[reported]
        places = [self._place(columns[k], crossed) for k in reported]
        diagnostics = replace(
            self.single, examined=self.examined, gamma=gamma, se=se,
            too_few=self.single.too_few + sum(len(t.ok) - int(t.ok.sum()) for t in self.tests),
            selected=tuple((self.examined.segments[i], self.examined.tags[i]) for i in places),
        )  # fmt: skip
        tags = tuple(Tag(tuple(p for t in key for p in self.coded.tags[t].parts)) for key in self.products)
        names = [Pair({s.field: s.label}, tags[t].names)
                 for s, t in zip(self.single.examined.segments, self.single.examined.tags, strict=True)]  # fmt: skip
        for crossing, kept in zip(self.crossings, self.kept, strict=True):
            names += [_name(self.coded, crossing.items[i]) for i in kept]
        plan = _Plan(tuple(self.crossings), tuple(self.kept), tuple(self.held), tuple(columns), tuple(reported))
        insights = tuple(found[i] for i in order)
        cells = self._cells(search, insights)
        return GridResult(insights, diagnostics, cells, tuple(names), tags, self.products, plan)

    def _place(self, item: Item, crossed: Sequence[tuple[int, int]]) -> int:
        """Where an item stands among the examined."""
        if item in self.pair_at:
            return self.pair_at[item]
        c, i = next((c, i) for c, i in crossed if self.crossings[c].items[i] == item)
        return self._at(c, i)

    def _at(self, c: int, i: int) -> int:
        return int(self.start[c] + np.searchsorted(self.kept[c], i))

    def _thresholds(self, search: Search, c: int) -> Floats:
        """(items,) of a crossing; inf for those that were not examined or not significant at first."""
        out = np.full(len(self.crossings[c].items), np.inf)
        own = slice(self.start[c], self.start[c + 1])
        passed = np.abs(self.examined.z[own]) >= search.threshold[own]
        out[self.kept[c][passed]] = search.threshold[own][passed]
        return out

    def _chosen(self, search: Search) -> list[tuple[int, int]]:
        """(crossing, item) of those that are significant beside each other, the strongest first.

        A crossing that is found is held with a free parameter for all of its cells, and so are the pairs; the next has
        to be significant beside that, and beside its own parts in full. In the end each has to be so beside all others.
        """
        thresholds = {c: self._thresholds(search, c) for c in range(len(self.crossings))}
        open_ = {c for c, threshold in thresholds.items() if np.isfinite(threshold).any()}
        found: dict[int, list[int]] = {}
        while open_:
            base = self._beside_all([*found])
            order = sorted(open_)
            tests = score_tests(self.coded, base, [self.crossings[c] for c in order])
            excess = {c: float((np.abs(t.z) - thresholds[c]).max()) for c, t in zip(order, tests, strict=True)}
            open_ = {c for c in order if excess[c] >= 0}
            for c in sorted(open_, key=lambda c: -excess[c]):
                open_.discard(c)
                items = self._items(c, search, [*found])
                if items:
                    found[c] = items
                    break
            else:
                break
        for c in reversed([*found]):  # the last found is the first to go
            others = [other for other in found if other != c]
            items = self._items(c, search, others) if others else found[c]
            found = {**found, c: items} if items else {k: v for k, v in found.items() if k != c}
        return [(c, i) for c, items in found.items() for i in items]

    def _beside_all(self, found: Sequence[int], c: int | None = None) -> Floats:
        """(n,) probabilities of pairs and found crossings in full, and of the parts of crossing c."""
        variant, held = self.coded.variant, list(self.held)
        held += [self.crossings[k].rows(range(len(self.crossings[k].axes)), variant) for k in found]
        if c is not None:
            held += [self.crossings[c].rows(margin, variant) for margin in self.crossings[c].lower]
        return beside(self.coded, self.null, held)

    def _items(self, c: int, search: Search, others: Sequence[int]) -> list[int]:
        """The items of crossing c that are significant beside its parts, the other crossings and each other."""
        crossing, found = self.crossings[c], list[int]()
        threshold, further = self._thresholds(search, c), self._thresholds(search, c)
        further[self.kept[c]] = np.maximum(
            further[self.kept[c]], stats.norm.isf(Q / search.further[self.start[c] : self.start[c + 1]] / 2)
        )
        test = score_tests(self.coded, self._beside_all(others, c), [crossing], whole=True)[0]
        assert test.left is not None
        left, score, whole = test.left.copy(), test.score.copy(), np.diag(test.left)
        raw = self._raw(crossing)
        while True:
            own = np.diag(left)
            z = np.where(own > LEAST_LEFT * whole, score / np.sqrt(np.maximum(own, 1e-12) * test.factor), 0.0)
            z, threshold = np.abs(z) * test.tails, further if found else threshold
            best = int(np.argmax(z - threshold))
            if z[best] < threshold[best]:
                return found
            # Mirrors of each other (young and mobile like it, old and mobile do not) say the same beside their parts:
            # named is the one that alone says most.
            alike = np.abs(left[best]) > TWINS * np.sqrt(np.maximum(left[best, best] * own, 1e-12))
            alike &= z >= threshold
            best = max(np.flatnonzero(alike).tolist(), key=lambda i: (round(abs(float(raw[i])), 6), raw[i] > 0))
            found.append(best)
            column = left[:, best] / left[best, best]
            score, left = score - column * score[best], left - np.outer(column, left[best])

    def _raw(self, crossing: Crossing) -> Floats:
        """(items,) z of each item without its parts: only what all its users and all its tags do is taken out."""
        users = range(len(crossing.users))
        tags = range(len(users), len(crossing.axes))
        related = crossing.family
        held = [
            cells for pair, cells in zip(self.pairs, self.held, strict=True)
            if not (self.coded.fields[pair.segments[0][0]].name in related[0]
                    and self.coded.tags[pair.tags[0]].dimensions & related[1])
        ]  # fmt: skip
        base = beside(self.coded, self.null, held)
        return score_tests(self.coded, base, [crossing], margins=[[*users], [*tags]])[0].z

    # ── the joint model ──

    def _model(self, search: Search, crossed: Sequence[tuple[int, int]]) -> tuple[Fit, list[Item], list[int]]:
        """The joint model of pairs, crossings and the parts of these; its columns, and which of them are reported.

        A pair that is a part of a crossing stays in the model, and is reported if it is significant still.
        """
        threshold = {item: float(stats.norm.isf(Q / f / 2)) for item, f in self._factors(search, crossed).items()}
        pairs = [p for p, at in self.pair_at.items() if abs(self.examined.z[at]) >= threshold[p]]
        crossings = [self.crossings[c].items[i] for c, i in crossed]
        while True:
            columns = [*pairs, *crossings]
            parts = dict.fromkeys(part for item in crossings for part in item.parts if part not in columns)
            columns = _independent(self.coded, [*columns, *parts], len(columns))
            if not columns:
                return self.null, [], []
            model = _joint(self.coded, columns)
            z = np.abs(model.pairs) / np.sqrt(np.maximum(np.diag(model.covariance), 1e-12))
            weak = [k for k, item in enumerate(columns) if item in threshold and z[k] < threshold[item]]
            out = [k for k in weak if not any(self._part(columns[k], item) for item in crossings)]
            if not out:
                kept = [k for k, item in enumerate(columns) if item in threshold and k not in weak]
                return model, columns, kept
            weakest = columns[min(out, key=lambda k: z[k] - threshold[columns[k]])]
            pairs = [p for p in pairs if p != weakest]
            crossings = [item for item in crossings if item != weakest]

    def _factors(self, search: Search, crossed: Sequence[tuple[int, int]]) -> dict[Item, float]:
        """p times this is the q-value of a pair or crossing; more is asked of all of a family but the strongest."""
        places = self.pair_at | {self.crossings[c].items[i]: self._at(c, i) for c, i in crossed}
        out, families = dict[Item, float](), set[int]()
        for item, at in sorted(places.items(), key=lambda place: -abs(float(self.examined.z[place[1]]))):
            family = int(self.examined.family[at])
            out[item] = float((search.further if family in families else search.factor)[at])
            families.add(family)
        return out

    def _part(self, item: Item, of: Item) -> bool:
        """Whether an item is about some of another's fields and dimensions, and not about all of them."""
        tags = self.coded.tags
        fields, whole = ({f for f, _ in i.segments} for i in (item, of))
        dimensions, all_dimensions = (frozenset[str]().union(*(tags[t].dimensions for t in i.tags)) for i in (item, of))
        return item.order < of.order and fields <= whole and dimensions <= all_dimensions

    def _insights(
        self, search: Search, crossed: Sequence[tuple[int, int]], model: Fit, columns: Sequence[Item],
        reported: Sequence[int],
    ) -> list[Insight]:  # fmt: skip
        items, found = [columns[k] for k in reported], list[Insight]()
        before = dict(zip(self.pairs, self.insights, strict=True))
        explained, factors = self._explained(search, items), self._factors(search, crossed)
        for k, item in zip(reported, items, strict=True):
            at, gamma, se = self._place(item, crossed), float(model.pairs[k]), float(np.sqrt(model.covariance[k, k]))
            low, high = conditional_interval(gamma / se, float(stats.norm.isf(Q / factors[item] / 2)))
            # Alone it has passed the first threshold, and beside the others its own: its q-value is the larger of both.
            alone = 2 * stats.norm.sf(abs(float(self.examined.z[at]))) * search.factor[at]
            beside_others = 2 * stats.norm.sf(abs(gamma / se)) * factors[item]
            inside, shown = inside_of(self.coded, item)
            rows, coded = np.flatnonzero(inside & shown), self.coded
            name = _name(self.coded, item)
            known = before[item].explained_by if item in before else ()
            found.append(
                Insight(
                    segment=name.segment,
                    tag=name.tag,
                    effect=float(np.expm1(gamma)),
                    preference=_preference(self.coded, inside, shown),
                    # Given the selection, a barely selected effect may lie outside its interval: then it is the end.
                    ci_low=float(np.expm1(min(low * se, gamma))),
                    ci_high=float(np.expm1(max(high * se, gamma))),
                    q_value=min(float(max(alone, beside_others)), 1.0),
                    n=round(float(coded.count[rows].sum())),
                    clicks=round(float((coded.count * coded.reward)[rows].sum())),
                    ctr=float(np.average(coded.reward[rows], weights=coded.size[rows])),
                    methods=(Method.GRID,),
                    explained_by=(*known, *(_name(self.coded, other) for other in explained[item])),
                    crossed=item.order > 2,
                )
            )
        return found

    def _explained(self, search: Search, items: Sequence[Item]) -> dict[Item, list[Item]]:
        """Pairs and crossings that are significant alone and not reported, each under the one it has most in common
        with; of a crossing's many items the strongest. Those that have nothing in common with any are left out."""
        alone = [pair for pair, at in self.pair_at.items() if abs(self.examined.z[at]) >= search.threshold[at]]
        for c, crossing in enumerate(self.crossings):
            excess = np.abs(self.tests[c].z) - self._thresholds(search, c)
            if len(excess) and excess.max() >= 0 and not any(item in crossing.items for item in items):
                alone.append(crossing.items[int(np.argmax(excess))])

        def names(item: Item) -> set[str]:
            tags = frozenset[str]().union(*(self.coded.tags[t].dimensions for t in item.tags))
            return {f"user {s.field}" for _, s in item.segments} | {f"tag {d}" for d in tags}

        out: dict[Item, list[Item]] = {item: [] for item in items}
        for other in alone:
            if other in out or not out:
                continue
            nearest = max(items, key=lambda item: len(names(item) & names(other)))
            if names(nearest) & names(other):
                out[nearest].append(other)
        return out

    # ── the grid itself ──

    def _cells(self, search: Search, insights: Sequence[Insight]) -> tuple[GridCell, ...]:
        """The cells of the blocks that insights are about, then of those whose crossings are the least by chance."""
        shapes = [len(crossing.axes) for crossing in self.crossings]
        blocks = [c for c, shape in enumerate(shapes) if shape == max(shapes, default=0)]

        def interest(c: int) -> tuple[int, int, float]:
            fields, dimensions = self.crossings[c].family
            about = [i for i in insights if set(i.segment) <= fields and set(i.tag) <= dimensions]
            strongest = float(np.abs(self.tests[c].z).max(initial=0.0))
            return sum(i.crossed for i in about), len(about), strongest

        out = list[GridCell]()
        for c in sorted(blocks, key=interest, reverse=True)[:BLOCKS]:
            out += self._block(search, c)
        return tuple(out)

    def _block(self, search: Search, c: int) -> Iterator[GridCell]:
        coded, crossing, test = self.coded, self.crossings[c], self.tests[c]
        place = crossing.rows(range(len(crossing.axes)), coded.variant)
        rates = _rates(coded, place, crossing.indicators)
        for i, item in enumerate(crossing.items):
            n, clicks, ctr, ctr_low, ctr_high = rates[i]
            effect: dict[str, float | None] = dict.fromkeys(("effect", "ci_low", "ci_high", "q_value"))
            if test.ok[i] and ctr is not None:
                at, gamma, se = self._at(c, i), float(test.gamma[i]), float(test.se[i])
                low, high = conditional_interval(gamma / se, float(search.threshold[at]))
                effect = {
                    "effect": float(np.expm1(gamma)), "ci_low": float(np.expm1(min(low * se, gamma))),
                    "ci_high": float(np.expm1(max(high * se, gamma))),
                    "q_value": min(2 * float(stats.norm.sf(abs(test.z[i])) * search.factor[at]), 1.0),
                }  # fmt: skip
            name = _name(coded, item)
            yield GridCell(name.segment, name.tag, round(n), round(clicks), ctr, ctr_low, ctr_high, **effect)


# ── the joint model ─────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(coded: Coded, items: Sequence[Item]) -> csc_array:
    """(n, items) 1 where a row is of an item."""
    rows = [np.flatnonzero(inside & shown) for inside, shown in (inside_of(coded, item) for item in items)]
    ends = np.cumsum([0, *map(len, rows)])
    return csc_array((np.ones(ends[-1]), np.concatenate(rows), ends), shape=(len(coded), len(items)))


def _with_mains(coded: Coded, items: Sequence[Item]) -> Coded:
    """The log with what all users of two segments and all variants of two tags do by themselves, as values and tags."""
    users = dict.fromkeys(i.segments for i in items if len(i.segments) > 1)
    tags = dict.fromkeys(i.tags for i in items if len(i.tags) > 1)
    fields, codes = list(coded.fields), list(coded.codes)
    for segments in users:
        fields.append(UserField(" × ".join(s.field for _, s in segments), ("others", "these"), ()))
        codes.append(inside_of(coded, Item(segments, ()))[0].astype(np.int64))
    carried = [coded.carried, *(coded.carried[:, list(t)].min(axis=1).reshape(-1, 1) for t in tags)]
    names = tuple(Tag(tuple(part for t in key for part in coded.tags[t].parts)) for key in tags)
    return replace(
        coded, fields=tuple(fields), codes=tuple(codes), tags=(*coded.tags, *names),
        carried=csr_array(hstack([csr_array(c) for c in carried], format="csr")),
    )  # fmt: skip


def _joint(coded: Coded, items: Sequence[Item]) -> Fit:
    """The logistic model of these items, with main effects of users and tags, and of their products."""
    return fit(Sums(_with_mains(coded, items)), coded.reward, _columns(coded, items))


def _independent(coded: Coded, items: Sequence[Item], first: int) -> list[Item]:
    """The `first` items, and the others of which those before leave something: the mirror of a pair adds nothing."""
    kept = list(items[:first])
    for item in items[first:]:
        mine = _Partition.of(coded, item)
        if not any(mine.mirrors(_Partition.of(coded, other)) for other in kept):
            kept.append(item)
    return kept


class _Partition(NamedTuple):
    """How an item parts the users and the variants in two."""

    fields: tuple[int, ...]
    inside: Any
    shown: Any

    @classmethod
    def of(cls, coded: Coded, item: Item) -> _Partition:
        inside, shown = inside_of(coded, item)
        return cls(tuple(f for f, _ in item.segments), inside, shown)

    def mirrors(self, other: _Partition) -> bool:
        """Whether both part the users and the exposures alike."""
        return all(
            bool((a == b).all() or (a != b).all())
            for a, b in ((self.inside, other.inside), (self.shown, other.shown))
        )  # fmt: skip


def _segment(item: Item) -> Segment:
    """The segments of an item as one, for a list of what was examined."""
    if len(item.segments) == 1:
        return item.segments[0][1]
    fields, labels = zip(*((s.field, s.label) for _, s in item.segments), strict=True)
    return Segment(" × ".join(fields), " × ".join(labels), ())


def _name(coded: Coded, item: Item) -> Pair:
    parts = tuple(part for t in item.tags for part in coded.tags[t].parts)
    return Pair({s.field: s.label for _, s in item.segments}, Tag(parts).names)


def _preference(coded: Coded, inside: Any, shown: Any) -> float | None:
    """[CTR(tags, segment)/CTR(segment)] / [CTR(tags)/CTR], each observed over expected within strata."""

    def ratio(users: Any) -> float:
        n, clicks, with_tags = (
            sums(coded.stratum[rows], amount[rows], size=len(coded.strata))
            for rows, amount in (
                (users, coded.size), (users, coded.size * coded.reward), (users & shown, coded.size),
            )
        )  # fmt: skip
        expected = float((with_tags * np.divide(clicks, n, out=np.zeros_like(n), where=n > 0)).sum())
        return float((coded.size * coded.reward)[users & shown].sum()) / expected if expected > 0 else np.nan

    own, all_users = ratio(inside), ratio(np.ones(len(coded), bool))
    return own / all_users if np.isfinite(own) and all_users > 0 else None


def _rates(coded: Coded, place: Codes, member: Floats) -> list[_Rate]:
    """Exposures, clicks, and the CTR with its interval by unit, of the items that cells (n,) are members of.

    The interval is Wilson's (1927) with the number of independent exposures that would vary as much; how many that is
    is known badly from few clicks, and drawn to what it is for the other cells.
    """
    simple, reach = coded.one_row_per_unit and not coded.weighted, float(stats.norm.isf((1 - LEVEL) / 2))

    def rate(rows: Codes) -> tuple[float, float]:
        """The CTR, and its variance by unit over that of as many independent exposures."""
        weight, reward, n = coded.size[rows], coded.reward[rows], float(coded.count[rows].sum())
        ctr = float((weight * reward).sum() / weight.sum())
        if simple:
            return ctr, 1.0
        if coded.unit is None:
            squares = coded.count[rows] * (coded.weight[rows] * (reward - ctr)) ** 2
        else:
            squares = sums(coded.unit[rows], weight * (reward - ctr)) ** 2
        return ctr, float(squares.sum() / weight.sum() ** 2) * n / max(ctr * (1 - ctr), 1e-12)

    of_item = [np.flatnonzero(column[place] > 0) for column in member.T]
    n = np.array([coded.count[rows].sum() for rows in of_item])
    clicks = np.array([(coded.count * coded.reward)[rows].sum() for rows in of_item])
    known = np.flatnonzero(np.minimum(clicks, n - clicks) >= MIN_CLICKS)
    rates = {int(i): rate(of_item[i]) for i in known}
    pooled = sum(clicks[i] * own for i, (_, own) in rates.items()) / max(float(clicks[known].sum()), 1.0)
    out = list[_Rate]()
    for i in range(len(of_item)):
        if i not in rates:
            out.append((float(n[i]), float(clicks[i]), None, None, None))
            continue
        ctr, own = rates[i]
        drawn = (clicks[i] * own + POOLED_CLICKS * pooled) / (clicks[i] + POOLED_CLICKS)
        size = float(n[i] / max(drawn, LEAST_DESIGN_EFFECT))
        centre, half = ctr + reach**2 / size / 2, reach * np.sqrt(ctr * (1 - ctr) / size + (reach / size / 2) ** 2)
        scale = 1 + reach**2 / size
        out.append((float(n[i]), float(clicks[i]), ctr, float((centre - half) / scale), float((centre + half) / scale)))
    return out
