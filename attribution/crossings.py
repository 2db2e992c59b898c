"""Crossings: products of a user field or two and a tag dimension or two, and tests of what they say beyond their parts.

A crossing's parts are all products of its axes but one, each with a free parameter for every cell; what is left of an
indicator beside them is tested against click probabilities that others have fitted. All is done on sums by cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, groupby, product
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.linalg import cho_factor, cho_solve
from scipy.special import logit

from attribution.coding import Coded, Segment, UserField
from attribution.discoveries import Examined
from attribution.logistic import Fit, Sums, fit
from attribution.screening import MIN_EXPECTED, MIN_INFORMATION, pooled_design_effect
from kaleidoscope.log import Codes, Floats, combine, sums

MIN_SHARE = 0.05  # of the exposures, of a value that is crossed with others
MOST_VALUES = {4: 6, 2: 3}  # of a text that are crossed, where numbers are cut in so many; the rest is one level
MOST_LEVELS = 12  # combinations of a dimension's values; where there are more each value is on its own
MOST_CROSSINGS = 200  # of each shape (2 × 1, 1 × 2, 2 × 2) that are looked at: those whose pairs say most
MOST_WORK = 2e10  # multiplications for each shape: a few seconds
FAR = 2.5  # |z| from which on its tails are worked out
TILTS = 12  # Newton steps of that


class Item(NamedTuple):
    """A cell: segments of one or two fields (field number, segment), and tags of one or two dimensions."""

    segments: tuple[tuple[int, Segment], ...]
    tags: tuple[int, ...]

    @property
    def order(self) -> int:
        """How many segments and tags."""
        return len(self.segments) + len(self.tags)

    @property
    def parts(self) -> list[Item]:
        """The products with fewer of its segments and tags, at least one of each."""
        users = [c for k in range(1, len(self.segments) + 1) for c in combinations(self.segments, k)]
        tags = [c for k in range(1, len(self.tags) + 1) for c in combinations(self.tags, k)]
        return [Item(s, t) for s in users for t in tags if len(s) + len(t) < self.order]


@dataclass(frozen=True, eq=False)
class Axis:
    """A partition of the users or of the variants into K levels, and the segments or tags that are unions of them."""

    name: frozenset[str]  # the field, the dimensions
    field: int  # its number; −1 of tags
    what: tuple[Any, ...]  # segments; positions of tags
    member: Floats  # (len(what), K)
    codes: Codes  # (n,) level of each row; (N,) of each variant

    @property
    def levels(self) -> int:
        """K."""
        return int(self.member.shape[1])


@dataclass(frozen=True, eq=False)
class Crossing:
    """One or two user axes and one or two tag axes, three at least."""

    users: tuple[Axis, ...]
    tags: tuple[Axis, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Of users, then of tags."""
        return (*self.users, *self.tags)

    @property
    def family(self) -> tuple[frozenset[str], frozenset[str]]:
        """The fields and the dimensions."""
        fields, dimensions = (frozenset[str]().union(*(a.name for a in axes)) for axes in (self.users, self.tags))
        return fields, dimensions

    @cached_property
    def items(self) -> list[Item]:
        """A segment or tag of every axis, in every combination."""
        users = product(*([(a.field, s) for s in a.what] for a in self.users))
        tags = list(product(*(a.what for a in self.tags)))
        return [Item(s, t) for s in users for t in tags]

    @cached_property
    def indicators(self) -> Floats:
        """(cells, items) 1 where a cell of the axes' levels is of the item."""
        return _kron([axis.member.T for axis in self.axes])

    def corners(self, table: Floats) -> Floats:
        """(items,) the smallest sum of a table (cells,) among the 2^axes corners inside and outside of an item."""
        sides = [(axis.member.T, 1 - axis.member.T) for axis in self.axes]
        return np.asarray(np.min([table @ _kron(corner) for corner in product(*sides)], axis=0))

    def columns(self, margins: Sequence[Sequence[int]]) -> Floats:
        """(cells, columns) one where a cell is of a level of a margin; a margin is some of the axes."""
        place = np.indices([axis.levels for axis in self.axes]).reshape(len(self.axes), -1)
        found = []
        for margin in margins:
            shape = [self.axes[i].levels for i in margin]
            found.append(np.eye(int(np.prod(shape)))[np.ravel_multi_index([place[i] for i in margin], shape)])
        return np.concatenate(found, axis=1)

    @property
    def lower(self) -> list[list[int]]:
        """The margins of its parts: all axes but one."""
        return [[i for i in range(len(self.axes)) if i != out] for out in range(len(self.axes))]

    @property
    def work(self) -> float:
        """How many multiplications a test of its items takes."""
        levels = np.array([axis.levels for axis in self.axes], dtype=np.float64)
        cells = float(np.prod(levels))
        return cells * float((cells / levels).sum()) ** 2

    def rows(self, axes: Sequence[int], variant: Codes) -> Codes:
        """(n,) the level of each row in some of its axes."""
        code = np.zeros(len(variant), np.int64)
        for i in axes:
            axis = self.axes[i]
            code = code * axis.levels + (axis.codes if axis.field >= 0 else axis.codes[variant])
        return code


def inside_of(coded: Coded, item: Item) -> tuple[Any, Any]:
    """(n,) whether a row is of the item's segments, and (n,) whether what it shows carries all of its tags."""
    inside = np.ones(len(coded), bool)
    for f, segment in item.segments:
        of_value = np.zeros(len(coded.fields[f].labels), bool)
        of_value[list(segment.values)] = True
        inside &= of_value[coded.codes[f]]
    shown = (coded.carried[:, list(item.tags)].toarray() > 0).all(axis=1)
    return inside, shown[coded.variant]


# ── what is looked at ───────────────────────────────────────────────────────────────────────────────────────────────


def crossings_of(coded: Coded, single: Examined) -> list[Crossing]:
    """Those to be looked at, by shape: the ones whose single pairs say most, whatever the crossing itself says.

    A crossing's score beside its parts is independent of theirs, so that this choice costs no correction.
    """
    fine = [axis for axis in (_user_axis(coded, f, 4) for f in range(len(coded.fields))) if axis is not None]
    coarse = [axis for axis in (_user_axis(coded, f, 2) for f in range(len(coded.fields))) if axis is not None]
    tags = _tag_axes(coded)
    apart = [(a, b) for a, b in combinations(tags, 2) if not a.name & b.name]
    shapes = [
        [Crossing((a, b), (t,)) for a, b in combinations(fine, 2) for t in tags],
        [Crossing((a,), pair) for a in fine for pair in apart],
        [Crossing((a, b), pair) for a, b in combinations(coarse, 2) for pair in apart],
    ]
    strength: dict[tuple[str, frozenset[str]], float] = {}
    p = 2 * stats.norm.sf(np.abs(single.z))
    for key, rows in _by_family(coded, single).items():
        own = np.sort(p[rows])
        strength[key] = -float(np.log(max((own * len(own) / np.arange(1, len(own) + 1)).min(), 1e-300)))

    def evidence(crossing: Crossing) -> float:
        return sum(strength.get((next(iter(u.name)), t.name), 0.0) for u in crossing.users for t in crossing.tags)

    chosen = [_affordable(sorted(of_shape, key=evidence, reverse=True)[:MOST_CROSSINGS]) for of_shape in shapes]
    return [crossing for of_shape in chosen for crossing in _in_order(of_shape)]


def _affordable(crossings: Sequence[Crossing]) -> list[Crossing]:
    """The first ones, as many as can be tested in reasonable time."""
    work = np.cumsum([crossing.work for crossing in crossings])
    return list(crossings[: max(int((work <= MOST_WORK).sum()), 1)])


def _in_order(crossings: Sequence[Crossing]) -> list[Crossing]:
    """With those of the same users one after the other: they share their sums."""
    return sorted(crossings, key=lambda c: ([a.field for a in c.users], [a.what for a in c.tags]))


def _by_family(coded: Coded, single: Examined) -> dict[tuple[str, frozenset[str]], list[int]]:
    out: dict[tuple[str, frozenset[str]], list[int]] = {}
    for i, (segment, tag) in enumerate(zip(single.segments, single.tags, strict=True)):
        out.setdefault((segment.field, coded.tags[tag].dimensions), []).append(i)
    return out


def _user_axis(coded: Coded, f: int, cuts: int) -> Axis | None:
    """A field with its ranges of a number down to one of so many `cuts`, or its commonest texts; None where there are
    no two of them."""
    user, codes = coded.fields[f], coded.codes[f]
    share = sums(codes, coded.size, size=len(user.labels)) / coded.size.sum()
    segments = [s for s in user.segments if share[list(s.values)].sum() >= MIN_SHARE]
    if user.edges is None:
        segments = sorted(segments, key=lambda s: -share[list(s.values)].sum())[: MOST_VALUES[cuts]]
        segments.sort(key=lambda s: s.values)
    else:
        bins = len(user.labels) - 1
        segments = [s for s in segments if s.values == (bins,) or len(s.values) * cuts >= bins]
    membership = np.zeros((len(segments), len(user.labels)))
    for i, segment in enumerate(segments):
        membership[i, list(segment.values)] = 1.0
    # Base values that no segment parts are one level.
    occurring = share > 0
    distinct, level = np.unique(membership[:, occurring], axis=1, return_inverse=True)
    if len(segments) < 1 or distinct.shape[1] < 2:
        return None
    of_value = np.zeros(len(user.labels), np.int64)
    of_value[occurring] = level.ravel()
    return Axis(frozenset([user.name]), f, tuple(segments), distinct, of_value[codes])


def _tag_axes(coded: Coded) -> list[Axis]:
    """The dimensions with all combinations of their values; a dimension with too many, value by value."""
    groups: dict[frozenset[str], list[int]] = {}
    for t, tag in enumerate(coded.tags):
        groups.setdefault(tag.dimensions, []).append(t)
    out = []
    for name, own in groups.items():
        columns = [t for t, tag in enumerate(coded.tags) if tag.dimensions & name]
        levels, codes = combinations_of(coded, columns)
        if len(levels) <= MOST_LEVELS:
            out.append(Axis(name, -1, tuple(own), levels.T[[columns.index(t) for t in own]], codes))
            continue
        for t in own:
            levels, codes = combinations_of(coded, [t])
            out.append(Axis(name, -1, (t,), levels.T, codes))
    return out


def _kron(matrices: Sequence[Floats]) -> Floats:
    """The Kronecker product of some matrices."""
    out = np.ones((1, 1))
    for matrix in matrices:
        out = np.asarray(np.kron(out, matrix), dtype=np.float64)
    return out


def combinations_of(coded: Coded, columns: Sequence[int]) -> tuple[Floats, Codes]:
    """(K, tags) the combinations of some tags that variants carry, and (N,) which one each variant has."""
    carried = coded.carried[:, list(columns)].toarray()
    levels, codes = np.unique(carried, axis=0, return_inverse=True)
    return levels, codes.ravel()


# ── tests ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Tests:
    """Of the items of a crossing, beyond its parts."""

    z: Floats  # score test, with the tails of a likelihood ratio
    gamma: Floats  # the coefficient, to first order
    se: Floats
    ok: Any  # whether there is enough
    score: Floats
    factor: Floats  # variance of the score over its information
    tails: Floats
    left: Floats | None  # (items, items) information beside the parts


def beside(coded: Coded, null: Fit, held: Sequence[Codes]) -> Floats:
    """(n,) click probabilities of the null model and a free parameter for each code of the partitions held."""
    if not held:
        return null.probability
    codes = [combine([code], len(coded)) for code in held]
    fields = [UserField(str(i), tuple(map(str, range(int(code.max()) + 1))), ()) for i, code in enumerate(codes)]
    beside = replace(coded, fields=tuple(fields), codes=tuple(codes))
    return fit(Sums(beside), coded.reward, offset=logit(null.probability)).probability


def score_tests(
    coded: Coded, q: Floats, crossings: Sequence[Crossing], *, margins: Sequence[Sequence[int]] = (),
    whole: bool = False,
) -> list[Tests]:  # fmt: skip
    """The tests of crossings against click probabilities q (n,); `margins` other than their parts to take out, and
    `whole` with the information of their items among each other."""
    data, out = Sums(coded), list[Tests]()
    square = coded.count * coded.weight**2
    amounts = {
        "n": coded.size, "expected": coded.size * q, "weight": coded.size * q * (1 - q),
        "score": coded.size * (coded.reward - q), "robust": square * (coded.reward - q) ** 2,
    }  # fmt: skip
    if coded.weighted:
        amounts |= {"square": square, "variance": square * q * (1 - q)}
    design_effect = pooled_design_effect(data, amounts["score"], amounts["robust"])
    for users, group in groupby(crossings, key=lambda c: c.users):
        code = np.zeros(len(coded), np.int64)
        for axis in users:
            code = code * axis.levels + axis.codes
        size = int(np.prod([axis.levels for axis in users]))
        by_variant = {name: data.by_variant(code, size, amount) for name, amount in amounts.items()}
        for crossing in group:
            levels = np.zeros(data.n_variants, np.int64)
            for axis in crossing.tags:
                levels = levels * axis.levels + axis.codes
            one_hot = np.eye(int(np.prod([axis.levels for axis in crossing.tags])))[levels]
            table = {name: np.asarray(amount @ one_hot).reshape(-1) for name, amount in by_variant.items()}
            out.append(_scored(coded, crossing, table, margins or crossing.lower, design_effect, whole))
    return out


def _scored(
    coded: Coded, crossing: Crossing, table: Mapping[str, Floats], margins: Sequence[Sequence[int]],
    design_effect: float, whole: bool,
) -> Tests:  # fmt: skip
    items, weight = crossing.indicators, table["weight"]
    parts = crossing.columns(margins)
    weighted = parts * weight[:, None]
    gram = weighted.T @ parts
    gram[np.diag_indices_from(gram)] += 1e-8 * np.trace(gram) / len(gram) + 1e-9
    rest = items - parts @ cho_solve(cho_factor(gram), weighted.T @ items)  # (cells, items) what the parts leave
    information = weight @ rest**2
    factor = np.ones(len(information))
    effective = 1.0
    if coded.weighted:
        factor = (table["variance"] @ rest**2) / np.maximum(information, 1e-12)
        effective = float(table["n"].sum() / table["square"].sum())
    score = table["score"] @ rest
    ok = information > MIN_INFORMATION * (weight @ items)
    factor = factor * design_effect
    expected = np.minimum(crossing.corners(table["expected"]), crossing.corners(table["n"] - table["expected"]))
    ok &= expected * effective >= MIN_EXPECTED
    sd = np.sqrt(np.maximum(information * factor, 1e-12))
    z, tails = score / sd, np.ones(len(score))
    far = np.flatnonzero(ok & (np.abs(z) > FAR))
    if len(far):
        tails[far] = _likelihood_ratio(table, rest[:, far], score[far]) / (
            np.abs(score[far]) / np.sqrt(information[far])
        )
    gamma = score / np.maximum(information, 1e-12)
    se = np.sqrt(table["robust"] @ rest**2 * design_effect) / np.maximum(information, 1e-12)
    left = rest.T @ (weight[:, None] * rest) if whole else None
    return Tests(np.where(ok, z * tails, 0.0), gamma, se, ok, score, factor, tails, left)


def _likelihood_ratio(table: Mapping[str, Floats], rest: Floats, score: Floats) -> Floats:
    """(items,) the root of the likelihood ratio that the score implies: clicks of the cells are binomial, tilted along
    `rest` (cells, items) until they are expected to have this score. With few clicks a score is skewed."""
    expected, weight = table["expected"][:, None], table["weight"][:, None]
    some = expected[:, 0] > 0
    expected, weight, rest = expected[some], weight[some], rest[some]
    rate = 1 - weight / expected
    size = expected / rate
    tilt = score / (weight * rest**2).sum(axis=0)
    for _ in range(TILTS):
        grown = rate * np.exp(np.clip(tilt * rest, -20, 20))
        tilted = grown / (1 - rate + grown)
        gap = score - (size * (tilted - rate) * rest).sum(axis=0)
        slope = (size * tilted * (1 - tilted) * rest**2).sum(axis=0)
        tilt = tilt + np.clip(gap / np.maximum(slope, 1e-12), -1, 1)
    grown = np.log1p(rate * np.expm1(np.clip(tilt * rest, -20, 20)))
    log_ratio = tilt * score - (size * (grown - rate * tilt * rest)).sum(axis=0)
    return np.asarray(np.sqrt(2 * np.maximum(log_ratio, 0.0)))
