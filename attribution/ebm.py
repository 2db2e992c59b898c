"""The method "ebm": an explainable boosting machine on user fields × tag dimensions, and one of a network's logits.

It discovers on one half of the units; effects, intervals and q come from the statistics of the other half. Its own
shapes and heat maps are logits with bands by unit. How it is fast is in docs/attribution.md, how fast in
benchmarks/ebm.py.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from threadpoolctl import threadpool_limits

from attribution.cells import dealt
from attribution.coding import Coded, Segment
from attribution.insights import Candidate, Diagnostics, Insight, confirm, halves
from attribution.logistic import Projection, Sums, fit
from attribution.scoring import auc_of
from kaleidoscope.errors import LogError
from kaleidoscope.log import FEW_UNITS, Codes, Floats, combine, factorise, sums
from kaleidoscope.vocabulary import Method

OUTER_BAGS = 8
LEVEL = 0.95
SUSPECTED = 0.1  # p-value (Simes) of a field × dimension's strongest segment × tag, up to which the pair is boosted:
# far from significant, and yet few, because the noise of many pairs ends boosting before a small log has said anything
MOST_PAIRS = 24
BACKFITS = 2
TIED = 5.0  # of log p, within which the weaker of two correlated pairs may be the true one
LEAST_INFORMATION = 5.0  # about as many clicks with the tag inside the segment, and without it outside
MOST_COMBINATIONS = 24  # of a dimension's values on one variant; from there on each value is a feature of its own
COMPRESSED = 0.75  # share of the rows that identical ones have to come down to for weights to be worth it
FEWEST_CLICKS = 40  # and exposures without one, below which there is nothing to learn
NETWORK_ROWS = 50_000  # of a network's answers, which have no noise: more say the same
NETWORK_ROUNDS = 400  # at the library's learning rate, of which each leaves 1.5 % of what it found
LEAST_VARIANCE = 1e-3  # of a network's logits, that a pair has to explain to be boosted
PURIFICATIONS = 100
NEAR = 0.5  # of the strongest z of a pair that is boosted, from which on a segment × tag is a candidate
NONE = "none"  # the variants that carry none of a dimension's values that vary


# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Shape:
    """What each value of a user field or a dimension does to the logit, relative to the average exposure."""

    name: str
    labels: tuple[str, ...]  # B values that occur
    effect: Floats  # (B,)
    low: Floats  # (B,) 95 % band by unit, of the smoothed shape
    high: Floats
    n: Floats  # (B,) exposures

    def to_json(self) -> dict[str, object]:
        """As `models` of summary.json holds it, in logits."""
        columns = zip(*map(_plain, (self.effect, self.low, self.high, self.n)), strict=True)
        names = ("logit", "low", "high", "n")
        return {"name": self.name, "values": [
            {"value": label, **dict(zip(names, row, strict=True))}
            for label, row in zip(self.labels, columns, strict=True)
        ]}  # fmt: skip


@dataclass(frozen=True, eq=False)
class HeatMap:
    """What the values of a user field and of a dimension do to the logit together, beyond what each does alone."""

    field: str
    dimension: str
    rows: tuple[str, ...]  # R values of the field
    columns: tuple[str, ...]  # C values of the dimension
    effect: Floats  # (R, C); NaN where nobody was shown it
    low: Floats
    high: Floats
    n: Floats  # (R, C) exposures
    importance: float  # mean |effect| of an exposure

    def to_json(self) -> dict[str, object]:
        """As `models` of summary.json holds it, in logits; null where nobody was shown it."""
        shown = {"logit": self.effect, "low": self.low, "high": self.high, "n": self.n}
        return {
            "field": self.field, "dimension": self.dimension, "importance": self.importance,
            "rows": list(self.rows), "columns": list(self.columns),
            **{name: [_plain(row) for row in values] for name, values in shown.items()},
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class EbmResult:
    """What `ebm` returns."""

    insights: list[Insight]
    diagnostics: Diagnostics  # of the confirmation
    shapes: tuple[Shape, ...]
    heat_maps: tuple[HeatMap, ...]  # of the pairs that were boosted, the most important first
    auc: float | None  # of the other half's units; None where there is nothing to learn or to rank
    seconds: float
    candidates: tuple[Candidate, ...] = ()

    def to_json(self) -> dict[str, object]:
        """As `models` of summary.json holds it; its insights are under `methods`."""
        return {"auc": self.auc} | _pictures(self.shapes, self.heat_maps)


@dataclass(frozen=True)
class Fidelity:
    """How much of a network's logits an EBM says, on units it was not fitted to."""

    r2: float | None  # None where the logits do not vary
    r2_main: float | None  # of the shapes alone, without the heat maps
    interaction_share: float  # of the EBM's own variance, that its heat maps are
    rows: int  # fitted to

    @property
    def of_the_rest(self) -> float | None:
        """Share of what the shapes leave that the heat maps explain."""
        if self.r2 is None or self.r2_main is None or self.r2_main >= 1:
            return None
        return 1 - (1 - self.r2) / (1 - self.r2_main)

    def to_json(self) -> dict[str, object]:
        """As `models` of summary.json holds it."""
        return asdict(self) | {"of_the_rest": self.of_the_rest}


@dataclass(frozen=True, eq=False)
class NetworkEbm:
    """What a network learned, as far as user fields, dimensions and their pairs can say it."""

    shapes: tuple[Shape, ...]
    heat_maps: tuple[HeatMap, ...]
    fidelity: Fidelity

    def to_json(self) -> dict[str, object]:
        """As `models` of summary.json holds it."""
        return {"fidelity": self.fidelity.to_json()} | _pictures(self.shapes, self.heat_maps)


def _pictures(shapes: Sequence[Shape], heat_maps: Sequence[HeatMap]) -> dict[str, object]:
    return {"shapes": [s.to_json() for s in shapes], "heat_maps": [m.to_json() for m in heat_maps]}


def _plain(values: Floats) -> list[float | None]:
    """Numbers for JSON, which knows no NaN."""
    return [float(value) if np.isfinite(value) else None for value in values]


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def ebm(coded: Coded, *, seed: int = 0, outer_bags: int = OUTER_BAGS) -> EbmResult:
    """What an EBM discovers on half of the units, as the statistics of the other half see it; and its pictures."""
    start = time.perf_counter()
    discovery, confirmation = halves(coded)
    model, candidates, auc = None, tuple[Candidate, ...](), None
    if _worthwhile(discovery):
        with threadpool_limits(1, "blas"):
            model = boosted(discovery, seed=seed, outer_bags=outer_bags)
        candidates = tuple(_candidates(model))
        auc = auc_of(confirmation, model.logit(confirmation))
    found = confirm(confirmation, candidates, Method.EBM)
    return EbmResult(
        insights=found.insights,
        diagnostics=found.diagnostics,
        shapes=() if model is None else model.shapes,
        heat_maps=() if model is None else model.heat_maps,
        auc=auc,
        seconds=time.perf_counter() - start,
        candidates=candidates,
    )


def ebm_of_network(coded: Coded, logit: Floats, *, seed: int = 0) -> NetworkEbm:
    """The EBM of a network's logits (n,) of these exposures: half of the units are fitted, the others judge it.

    A network may know more than user fields and dimensions: what `fidelity` lacks is not in the pictures.
    """
    learned, held_out = halves(replace(coded, reward=np.asarray(logit, np.float64)))
    if len(learned) > NETWORK_ROWS:
        rows = np.random.default_rng(seed).choice(len(learned), NETWORK_ROWS, replace=False)
        learned = learned.take(np.sort(rows))
    with threadpool_limits(1, "blas"):
        model = _boosted_logits(learned, seed)
    size, truth = held_out.size, held_out.reward
    main, pairs = model.parts(held_out)

    def variance(values: Floats) -> float:
        return float(np.average((values - np.average(values, weights=size)) ** 2, weights=size))

    def r2(predicted: Floats) -> float | None:
        whole = variance(truth)
        return None if whole <= 0 else 1 - float(np.average((truth - predicted) ** 2, weights=size)) / whole

    total = variance(main + pairs)
    share = variance(pairs) / total if total > 0 else 0.0
    return NetworkEbm(model.shapes, model.heat_maps, Fidelity(r2(main + pairs), r2(main), share, len(learned)))


def boosted(coded: Coded, *, seed: int = 0, outer_bags: int = OUTER_BAGS) -> Boosted:
    """An EBM of clicks: all shapes, and heat maps of the pairs that score tests suspect.

    It starts from the model of main effects and strata; exposures count with their weights, and each unit is held out
    for early stopping in one of the bags. Raises ValueError where nothing, or everything, was clicked, LogError where
    there are too few units to hold some out.
    """
    if not 0 < coded.reward.mean() < 1:
        raise ValueError("there have to be exposures with and without a click to fit an EBM")
    rows, fold = _dealt(coded, outer_bags)
    data, axes = Sums(rows), _axes(coded)
    null = fit(data, rows.reward)
    q = null.probability
    residual, weight = rows.size * (rows.reward - q), rows.size * q * (1 - q)
    start = _Start.of(data, Projection.of(data.gram(weight)), residual, null.columns, null.strata, fold)
    spread = float((rows.count * rows.weight**2).sum() / rows.size.sum())  # the variance of a weighted score is more

    def worth(user: Axis, dimension: Axis, score: Floats, own: Floats) -> float:
        return _suspicion(_tested(user, dimension, score, own, spread))

    pairs = _forward(rows, axes, residual, weight, worth, TIED)
    model = _fitted(rows, axes, [*pairs], start, {"objective": "log_loss"}, seed)
    z = (_tested(axes[i], axes[j], score, own, spread) for (i, j), (score, own) in pairs.items())
    return replace(model, z=tuple(z))


def _boosted_logits(coded: Coded, seed: int) -> Boosted:
    """An EBM of a network's logits, which are the rewards of these exposures."""
    rows, fold = _dealt(coded, OUTER_BAGS)
    data, axes = Sums(rows), _axes(coded)
    mean = float(np.average(rows.reward, weights=rows.size))
    projection = Projection.of(data.gram(rows.size))
    columns, strata = data.gradient(rows.size * (rows.reward - mean))
    beta, of_strata = (found[:, 0] for found in projection.coefficients(columns[:, None], strata[:, None]))
    residual = rows.reward - mean - data.linear(beta, of_strata)
    start = _Start.of(data, projection, rows.size * residual, beta, of_strata + mean, fold)
    total = float(rows.size @ (rows.reward - mean) ** 2)
    chosen = _forward(
        rows, axes, rows.size * residual, rows.size, lambda _a, _b, score, own: _explained(score, own, total), 0.0
    )
    settings = {"objective": "rmse", "max_rounds": NETWORK_ROUNDS}
    return _fitted(rows, axes, [*chosen], start, settings, seed)


def _worthwhile(coded: Coded) -> bool:
    clicks = float((coded.count * coded.reward).sum())
    units = len(np.unique(coded.unit)) if coded.unit is not None else FEW_UNITS
    enough = min(clicks, float(coded.count.sum()) - clicks) >= FEWEST_CLICKS and units >= FEW_UNITS
    return bool(coded.tags) and enough


# ── features ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Axis:
    """A feature of the EBM: a user field by its base values, or a dimension by the values a variant carries."""

    name: str
    labels: tuple[str, ...]  # V values
    source: int | Codes  # position of the user field; or (N,) the value of each variant
    missing: int | None  # of a number, the value that has no place among the others; None: values have no order
    parts: tuple[tuple[Any, NDArray[np.bool_]], ...]  # a Segment or the position of a tag, and (V,) who belongs to it

    @property
    def of_user(self) -> bool:
        """Whether it is a user field."""
        return isinstance(self.source, int)

    def codes(self, coded: Coded) -> Codes:
        """(n,) the value of each exposure."""
        return coded.codes[self.source] if isinstance(self.source, int) else self.source[coded.variant]


def _axes(coded: Coded) -> list[Axis]:
    """User fields that vary, then dimensions; those that say the same of every variant are one."""
    axes = []
    for f, field in enumerate(coded.fields):
        if field.segments:
            missing = len(field.labels) - 1 if field.edges is not None else None
            member = field.membership > 0
            axes.append(Axis(field.name, field.labels, f, missing, tuple(zip(field.segments, member, strict=True))))
    names: dict[bytes, list[str]] = {}
    found: dict[bytes, Axis] = {}
    for dimension in dict.fromkeys(d for tag in coded.tags for d, _ in tag.parts):
        for axis in _dimension(coded, dimension):
            assert not isinstance(axis.source, int)
            key = axis.source.tobytes()
            names.setdefault(key, []).append(axis.name)
            found.setdefault(key, axis)
    return axes + [replace(axis, name=" & ".join(names[key])) for key, axis in found.items()]


def _dimension(coded: Coded, dimension: str) -> list[Axis]:
    """One axis of the combinations of a dimension's values on a variant; or, of too many, one of each value."""
    tags = [t for t, tag in enumerate(coded.tags) if dimension in tag.dimensions]
    names = [coded.tags[t].names[dimension] for t in tags]
    carried = coded.carried[:, tags].toarray() > 0
    combinations, code = np.unique(carried, axis=0, return_inverse=True)
    code = np.asarray(code, np.int64).ravel()
    if len(combinations) > MOST_COMBINATIONS:
        return [
            Axis(f"{dimension}={name}", (NONE, name), carried[:, i].astype(np.int64), None,
                 ((t, np.array([False, True])),))
            for i, (t, name) in enumerate(zip(tags, names, strict=True))
        ]  # fmt: skip
    labels = tuple("|".join(name for name, has in zip(names, row, strict=True) if has) or NONE for row in combinations)
    return [Axis(dimension, labels, code, None, tuple(zip(tags, combinations.T, strict=True)))]


Worth = Callable[[Axis, Axis, Floats, Floats], float]


def _forward(
    coded: Coded, axes: Sequence[Axis], residual: Floats, weight: Floats, worth: Worth, tie: float
) -> dict[tuple[int, int], tuple[Floats, Floats]]:
    """Pairs of a user field and a dimension that are worth boosting, each beside those before it, the best first; and
    those that came within `tie` of one of them, because which of two correlated ones it is the other half has to say.
    With what `worth` saw of each when it was last worth it.

    residual (n,) is the score, weight (n,) the information of the exposures; `worth` sees their sums (V, K) by the
    cells of a pair, and is positive where the pair may be something. Unlike the rank of pairs one by one, this does
    not name all that a correlated field or dimension seems to do.
    """
    codes = [axis.codes(coded).astype(np.int32) for axis in axes]
    residual = residual.copy()
    left = [(i, j) for i, a in enumerate(axes) for j, b in enumerate(axes) if a.of_user and not b.of_user]
    tied, seen = dict[tuple[int, int], None](), dict[tuple[int, int], tuple[Floats, Floats]]()
    chosen = dict[tuple[int, int], tuple[Any, Floats]]()  # pair → (n,) cell of each exposure, (V, K) information

    def cells(pair: tuple[int, int]) -> Any:
        return codes[pair[0]] * len(axes[pair[1]].labels) + codes[pair[1]]

    def table(pair: tuple[int, int], key: Any, amount: Floats) -> Floats:
        shape = len(axes[pair[0]].labels), len(axes[pair[1]].labels)
        return np.asarray(np.bincount(key, amount, shape[0] * shape[1]).reshape(shape))

    information = {pair: table(pair, cells(pair), weight) for pair in left}
    while left and len(chosen) < MOST_PAIRS:
        found = {}
        for pair in left:
            of = table(pair, cells(pair), residual), information[pair]
            value = worth(axes[pair[0]], axes[pair[1]], *of)
            if value > 0:
                found[pair], seen[pair] = value, of
        if not found:
            break
        best = max(found, key=lambda pair: found[pair])
        tied |= dict.fromkeys(pair for pair in found if found[best] - found[pair] < tie)
        chosen[best] = cells(best), information[best]
        left = [pair for pair in found if pair != best]
        for _ in range(BACKFITS):
            for pair, (key, own) in reversed(chosen.items()):
                step = table(pair, key, residual) / np.maximum(own, 1e-300)
                residual -= weight * _purified(step[None], own)[0].reshape(-1)[key]
    kept = [*chosen, *(pair for pair in tied if pair not in chosen)][:MOST_PAIRS]
    return {pair: seen[pair] for pair in kept}


def _tested(user: Axis, dimension: Axis, score: Floats, own: Floats, spread: float) -> Floats:
    """(segments, tags) z of the score tests of a pair; NaN where there is too little to be told."""
    inside = np.array([member for _, member in user.parts], dtype=float)
    carrying = np.array([member for _, member in dimension.parts], dtype=float).T
    total = own.sum()
    a, b = inside @ own.sum(axis=1) / total, own.sum(axis=0) @ carrying / total
    at_random = total * np.outer(a * (1 - a), b * (1 - b))
    z = (inside @ score @ carrying) / np.sqrt(np.maximum(at_random, 1e-12) * spread)
    return np.where(at_random >= LEAST_INFORMATION, z, np.nan)


def _suspicion(z: Floats) -> float:
    """By how much (log) the p-value (Simes) of a pair's segments × tags is below SUSPECTED."""
    log_p = np.sort(np.log(2) + stats.norm.logsf(np.abs(z[np.isfinite(z)])))
    if not len(log_p):
        return -np.inf
    return float(np.log(SUSPECTED) - (log_p + np.log(len(log_p) / np.arange(1, len(log_p) + 1))).min())


def _explained(score: Floats, own: Floats, total: float) -> float:
    """What the cells of a pair explain of numbers without noise, beyond the least that is worth it."""
    cell = _purified((score / np.maximum(own, 1e-300))[None], own)[0][0]
    return float((own * cell**2).sum()) - LEAST_VARIANCE * total


# ── where boosting starts ───────────────────────────────────────────────────────────────────────────────────────────


def _dealt(coded: Coded, outer_bags: int) -> tuple[Coded, Codes]:
    """The exposures, and which bag does without each: all of a unit in one."""
    if outer_bags < 2:
        raise ValueError(f"outer_bags is {outer_bags}; bands by unit need 2 or more")
    rows, replicate = dealt(replace(coded, held=()))  # shapes are over all strata; the other half judges with them
    folds, fold = factorise(replicate % outer_bags)
    if len(folds) < 2:
        raise LogError("an EBM has to hold some units out, and this log has too few; attribute a log of more units")
    return rows, fold


@dataclass(frozen=True, eq=False)
class _Start:
    """Main effects and strata without each of G folds: where the bag that holds a fold out starts, and its shapes."""

    columns: Floats  # (P, G)
    strata: Floats  # (S,) of all folds
    logit: Floats  # (n,) of each exposure, from all folds but its own
    fold: Codes  # (n,)

    @classmethod
    def of(
        cls, data: Sums, projection: Projection, residual: Floats, columns: Floats, strata: Floats, fold: Codes
    ) -> _Start:
        """From a fitted model, its `residual` (n,) (with what exposures count) and curvature: one step each."""
        g = int(fold.max()) + 1
        scores = [data.gradient(residual[rows], rows) for rows in (np.flatnonzero(fold == k) for k in range(g))]
        left = 1 - sums(fold, data.coded.size, size=g) / data.coded.size.sum()
        step, strata_step = projection.coefficients(*(np.stack(part, axis=1) for part in zip(*scores, strict=True)))
        without = columns[:, None] - step / left
        logit = np.empty(len(fold))
        for k in range(g):
            rows = fold == k
            logit[rows] = data.linear(without[:, k], strata - strata_step[:, k] / left[k])[rows]
        return cls(without, strata, logit, fold)

    def of_axes(self, data: Sums, axes: Sequence[Axis]) -> list[Floats]:
        """Axes × (G, V) what the main effects are, by the values of the axes."""
        found, told = [], set[int]()
        for axis in axes:
            if isinstance(axis.source, int):
                at = data.starts[axis.source]
                found.append(self.columns[at : at + len(axis.labels)].T)
                continue
            scores = np.zeros((self.columns.shape[1], len(axis.labels)))
            for tag, carrying in axis.parts:
                if tag not in told:  # a tag that two dimensions share is said once
                    told.add(tag)
                    scores += self.columns[data.n_user + tag][:, None] * carrying
            found.append(scores)
        return found


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Boosted:
    """A fitted EBM by the values of its axes; G bags, each without another part of the units."""

    axes: tuple[Axis, ...]
    intercept: float
    strata: Floats  # (S,) offsets, of mean 0
    main: tuple[Floats, ...]  # axes × (G, V)
    pairs: tuple[tuple[int, int], ...]  # positions of a user field and a dimension among the axes
    joint: tuple[Floats, ...]  # pairs × (G, V, K), without what their margins say
    n: tuple[Floats, ...]  # axes × (V,) exposures
    joint_n: tuple[Floats, ...]  # pairs × (V, K)
    z: tuple[Floats, ...] = ()  # pairs × (segments, tags) of the score tests that chose them; of clicks only

    def parts(self, coded: Coded) -> tuple[Floats, Floats]:
        """(n,) of the logit: intercept, strata and shapes; and heat maps."""
        codes = [axis.codes(coded) for axis in self.axes]
        main = self.intercept + self.strata[coded.stratum]
        for code, scores in zip(codes, self.main, strict=True):
            main = main + scores.mean(axis=0)[code]
        joint = np.zeros(len(coded))
        for (i, j), scores in zip(self.pairs, self.joint, strict=True):
            joint += scores.mean(axis=0)[codes[i], codes[j]]
        return np.asarray(main), joint

    def logit(self, coded: Coded) -> Floats:
        """(n,) of exposures that are coded in the same way."""
        main, joint = self.parts(coded)
        return main + joint

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of every axis, by the values that occur."""
        found = []
        for axis, scores, n in zip(self.axes, self.main, self.n, strict=True):
            seen = np.flatnonzero(n > 0)
            effect, low, high = _band(scores[:, seen])
            found.append(Shape(axis.name, tuple(axis.labels[v] for v in seen), effect, low, high, n[seen]))
        return tuple(found)

    @cached_property
    def heat_maps(self) -> tuple[HeatMap, ...]:
        """Of every pair, by the values that occur, the most important first."""
        found = []
        for (i, j), scores, n in zip(self.pairs, self.joint, self.joint_n, strict=True):
            rows, columns = (np.flatnonzero(n.sum(axis=axis) > 0) for axis in (1, 0))
            at = np.ix_(rows, columns)
            effect, low, high = (np.where(n[at] > 0, a[at], np.nan) for a in _band(scores))
            a, b = self.axes[i], self.axes[j]
            found.append(HeatMap(
                a.name, b.name, tuple(a.labels[v] for v in rows), tuple(b.labels[v] for v in columns),
                effect, low, high, n[at], float((np.abs(scores.mean(axis=0)) * n).sum() / n.sum()),
            ))  # fmt: skip
        return tuple(sorted(found, key=lambda heat_map: -heat_map.importance))


def _band(scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean over the bags (axis 0) and its 95 % band: every bag is without another part of the units, so that they are
    the replicates of a delete-a-group jackknife (Kott 2001)."""
    bags = len(scores)
    mean = scores.mean(axis=0)
    se = np.sqrt((bags - 1) / bags * ((scores - mean) ** 2).sum(axis=0))
    reach = float(stats.t.isf((1 - LEVEL) / 2, bags - 1)) * se
    return mean, mean - reach, mean + reach


def _fitted(
    coded: Coded, axes: Sequence[Axis], pairs: Sequence[tuple[int, int]], start: _Start, settings: Mapping[str, Any],
    seed: int,
) -> Boosted:  # fmt: skip
    """The EBM with these pairs; of clicks where the objective is log loss, of numbers otherwise."""
    codes = [axis.codes(coded) for axis in axes]
    n = tuple(sums(c, coded.count, size=len(axis.labels)) for c, axis in zip(codes, axes, strict=True))
    joint_n = []
    for i, j in pairs:
        shape = len(axes[i].labels), len(axes[j].labels)
        joint_n.append(sums(codes[i] * shape[1] + codes[j], coded.count, size=shape[0] * shape[1]).reshape(shape))
    used = sorted({i for pair in pairs for i in pair})
    place = {i: at for at, i in enumerate(used)}
    model, terms = None, dict[tuple[int, int], Floats]()
    if pairs:
        inner = [(place[i], place[j]) for i, j in pairs]
        model = _fit(coded, codes, axes, used, inner, start, settings, seed)
        terms = dict(zip(model.term_features_, model.bagged_scores_, strict=True))
    main = start.of_axes(Sums(coded), axes)
    by_stratum = sums(coded.stratum, coded.size, size=len(start.strata))
    level = float(np.average(start.strata, weights=by_stratum))
    intercept, joint = level + (0.0 if model is None else float(np.mean(model.bagged_intercept_))), list[Floats]()
    for (i, j), weight in zip(pairs, joint_n, strict=True):
        a, b = place[i], place[j]
        scores = _values(model, b, axes[j], _values(model, a, axes[i], terms[a, b]), at=2)
        pure, rows, columns = _purified(scores, weight)
        main[i], main[j] = main[i] + rows, main[j] + columns
        joint.append(pure)
    means = [np.average(scores, axis=1, weights=weight) for scores, weight in zip(main, n, strict=True)]
    return Boosted(
        tuple(axes),
        intercept + float(sum(mean.mean() for mean in means)),
        start.strata - level,
        tuple(scores - mean[:, None] for scores, mean in zip(main, means, strict=True)),
        tuple(pairs),
        tuple(joint),
        n,
        tuple(joint_n),
    )


def _fit(
    coded: Coded, codes: Sequence[Codes], axes: Sequence[Axis], used: Sequence[int], pairs: Sequence[tuple[int, int]],
    start: _Start, settings: Mapping[str, Any], seed: int,
) -> Any:  # fmt: skip
    """The fitted model of `interpret`, of the used axes and pairs of positions among them. Bags are threads: they share
    the binned rows, which a process each would not, and the library computes without holding the interpreter."""
    from interpret.glassbox import ExplainableBoostingClassifier, ExplainableBoostingRegressor
    from joblib import parallel_config

    clicks, bags = settings["objective"] == "log_loss", start.columns.shape[1]
    first, size = _distinct(coded, codes, start) if clicks else (np.arange(len(coded)), coded.size)
    columns = np.empty((len(first), len(used)), order="F")
    types: list[Any] = []
    for i, (axis, code) in enumerate((axes[a], codes[a]) for a in used):
        columns[:, i] = code[first]
        if axis.missing is not None and axis.missing > 1:
            columns[code[first] == axis.missing, i] = np.nan
            types.append([v + 0.5 for v in range(axis.missing - 1)])
        else:
            types.append("nominal")
    weight = None if np.ptp(size) < 1e-9 else size
    held_out = np.where(start.fold[first, None] == np.arange(bags), -1, 1).astype(np.int8)
    model = (ExplainableBoostingClassifier if clicks else ExplainableBoostingRegressor)(
        feature_names=[f"x{i}" for i in used], feature_types=types, interactions=list(pairs), exclude="mains",
        outer_bags=bags, n_jobs=-1, random_state=seed, **settings,
    )  # fmt: skip
    outcome = coded.reward[first].astype(np.int64) if clicks else coded.reward[first]
    with parallel_config("threading"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing values detected", category=UserWarning)
        model.fit(columns, outcome, weight, held_out, start.logit[first])
    return model


def _distinct(coded: Coded, codes: Sequence[Codes], start: _Start) -> tuple[Codes, Floats]:
    """Rows that stand for all identical ones, and what they count together; where few are, every row for itself."""
    key = combine([*codes, start.fold, coded.stratum, coded.reward.astype(np.int64)], len(coded))
    distinct = int(key.max(initial=-1)) + 1
    if distinct > COMPRESSED * len(coded):
        return np.arange(len(coded)), coded.size
    first = np.zeros(distinct, np.int64)
    first[key[::-1]] = np.arange(len(coded))[::-1]
    return first, sums(key, coded.size, size=distinct)


def _values(model: Any, feature: int, axis: Axis, scores: Floats, at: int = 1) -> Floats:
    """Scores with their axis `at`, which is the library's bins of a feature, by the values of its axis instead."""
    bins = model.bins_[feature][-1]
    values = np.arange(len(axis.labels))
    if isinstance(bins, dict):
        place = np.array([bins.get(str(v), bins.get(str(float(v)), -1)) for v in values])
    else:
        place = np.searchsorted(np.asarray(bins), values, side="right") + 1
        place[axis.missing] = 0
    return np.take(scores, place, axis=at)


def _purified(scores: Floats, n: Floats) -> tuple[Floats, Floats, Floats]:
    """(G, V, K) scores without their weighted margins, and these: (G, V) and (G, K). Cells without exposures are 0
    (Lengerich et al. 2020, "Purifying interaction effects with the functional ANOVA")."""
    scores = np.where(n > 0, scores, 0.0)
    rows, columns = np.zeros(scores.shape[:2]), np.zeros((len(scores), scores.shape[2]))
    of_row, of_column = np.maximum(n.sum(axis=1), 1e-300), np.maximum(n.sum(axis=0), 1e-300)
    for _ in range(PURIFICATIONS):
        mean = (scores * n).sum(axis=2) / of_row
        scores, rows = np.where(n > 0, scores - mean[:, :, None], 0.0), rows + mean
        mean = (scores * n).sum(axis=1) / of_column
        scores, columns = np.where(n > 0, scores - mean[:, None, :], 0.0), columns + mean
        if np.abs(mean).max(initial=0.0) < 1e-9:
            break
    return scores, rows, columns


# ── candidates ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _candidates(model: Boosted) -> list[Candidate]:
    """Segments × tags that the score tests of a boosted pair find strongest; importance is the difference in logits in
    its heat map: of the tag inside the segment over outside of it, and of both without the tag, with its sign.

    The heat map does not propose: early stopping leaves next to nothing of what few clicks say, and blurs where it is.
    """
    found: dict[tuple[Segment, int], float] = {}
    for (i, j), scores, n, z in zip(model.pairs, model.joint, model.joint_n, model.z, strict=True):
        effect, strength = scores.mean(axis=0), np.abs(z)
        for s, t in np.argwhere(strength >= NEAR * np.nanmax(strength)):
            (segment, inside), (tag, carrying) = model.axes[i].parts[s], model.axes[j].parts[t]
            quarters = [np.ix_(a, b) for a in (inside, ~inside) for b in (carrying, ~carrying)]
            count = np.array([n[q].sum() for q in quarters])
            if (count == 0).any():
                continue
            mean = [float((effect[q] * n[q]).sum() / c) for q, c in zip(quarters, count, strict=True)]
            size = mean[0] - mean[1] - mean[2] + mean[3]
            told = size if size * z[s, t] > 0 else 0.0  # a blur that contradicts its own test has no sign to tell
            found[segment, tag] = max(found.get((segment, tag), 0.0), told, key=abs)
    return [Candidate(s, t, size or None) for (s, t), size in sorted(found.items(), key=lambda item: -abs(item[1]))]
