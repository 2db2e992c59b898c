"""Who prefers which tag: screening of all segment × tag pairs, a joint model of what is found, honest intervals.

The method "statistics", and the result types of all methods. docs/attribution.md says why each step is as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy import stats
from threadpoolctl import threadpool_limits

from attribution.cells import Cells, t_quantile
from attribution.coding import Coded, Segment, Tag, code, require_units
from attribution.discoveries import LEVEL, NOTHING, Examined, benjamini_hochberg, conditional_interval
from attribution.joint import Joint, joint_model
from attribution.logistic import fit
from attribution.replicates import REPLICATES
from attribution.screening import Screened, screen
from kaleidoscope.log import Floats, Log
from kaleidoscope.vocabulary import Method
from kaleidoscope.wording import insight_sentence

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
    methods: tuple[str, ...] = (Method.STATISTICS,)
    explained_by: tuple[Pair, ...] = ()  # pairs that are significant alone, and not once this one is in
    # Method → what it says itself, on its own scale: above 0 where the segment takes to the tag more than others do.
    importance: Mapping[str, float] = field(default_factory=dict)
    crossed: bool = False  # its values work together; otherwise several tags are those never shown apart
    clicks: int | None = None  # of the `n` exposures
    ctr: float | None = None  # of those, weighted

    @property
    def sentence(self) -> str:
        """It in words, with its interval: that odds differ, and no more; where the interval holds 0, that it does."""
        return insight_sentence(
            self.segment, self.tag, self.effect, self.ci_low, self.ci_high, self.q_value, crossed=self.crossed
        )

    def direction(self, method: str) -> int:
        """+1 or −1: what this method itself says of the pair; the sign of the effect for those that have no scale."""
        return 1 if (self.importance.get(method) or self.effect) > 0 else -1

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
            "clicks": self.clicks,
            "ctr": self.ctr,
            "methods": list(self.methods),
            "explained_by": [pair.to_json() for pair in self.explained_by],
            "importance": dict(self.importance),
            "crossed": self.crossed,
        }


@dataclass(frozen=True)
class Candidate:
    """A segment × tag pair that a method proposes, having seen the discovery half only."""

    segment: Segment
    tag: int  # position in the coded log's tags
    importance: float | None  # on the method's own scale, with its sign; None: too near to 0 to have one


@dataclass(frozen=True)
class MainEffect:
    """How everybody takes a tag: the Mantel–Haenszel ratio of CTRs with it over without it, minus 1."""

    tag: Mapping[str, str]
    effect: float
    ci_low: float
    ci_high: float
    q_value: float
    n: int  # exposures with the tag
    clicks: int  # of those
    ctr: float  # of those, weighted
    share: float | None = None  # of everything, as it counts: what would be with the tag, were all variants shown alike
    independent: float | None = None  # as how many independent exposures `n` count (Kish 1965)

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
    clipped_uniform: float = 0.0  # of main effects: the share of the exposures whose weight was clipped,
    lost_uniform: float = 0.0  # and the share of all that they stand for which is lost by it
    certain: float = 0.0  # exposures left out, because nothing else could have been shown


class Attribution(NamedTuple):
    """What `attribute` returns."""

    insights: list[Insight]
    main_effects: list[MainEffect]
    diagnostics: Diagnostics


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def attribute(log: Log, *, dependent: bool | None = None) -> Attribution:
    """Insights (strongest first), main effects (of every tag that varies), and what stands behind them.

    `dependent` is what `exposure_independence` said of the log; None asks it. Raises LogError where exposure depended
    on the user with unknown propensities, without a propensity floor, or in a log of a few units only.
    """
    require_units(log)
    return attribute_coded(code(log, dependent=dependent))


def attribute_coded(coded: Coded) -> Attribution:
    """As `attribute`, of exposures that are coded already."""
    return _attribution(coded, None)


def halves(coded: Coded) -> tuple[Coded, Coded]:
    """A half of the units to discover with and one to confirm with, dealt the same way every time.

    Without units exposures are dealt one by one: a row of many identical ones may become two.
    """
    rng = np.random.default_rng(0)
    if coded.unit is not None:
        second = (rng.permutation(int(coded.unit.max(initial=-1)) + 1) % 2)[coded.unit] == 1
        return coded.take(np.flatnonzero(~second)), coded.take(np.flatnonzero(second))
    first = np.zeros(len(coded))
    single = coded.count == 1
    first[single] = rng.permutation(int(single.sum())) % 2
    first[~single] = rng.binomial(coded.count[~single].astype(np.int64), 0.5)
    sides = [(np.flatnonzero(count > 0), count) for count in (first, coded.count - first)]
    discovery, confirmation = (replace(coded.take(rows), count=count[rows]) for rows, count in sides)
    return discovery, confirmation


def confirm(coded: Coded, candidates: Sequence[Candidate], method: str) -> Attribution:
    """What the statistics of this half of the units say of `candidates` that `method` discovered in the other half.

    Only they and their families are looked at and corrected for: screening, joint model, refutation and intervals are
    those of `attribute`. Insights name the method, and have its importance where it says what its sign is.
    """
    own = {(c.segment, c.tag): {} if c.importance is None else {method: c.importance} for c in candidates}
    found = _attribution(coded, own.keys())
    insights = [
        replace(insight, methods=(method,), importance=own[pair])
        for insight, pair in zip(found.insights, found.diagnostics.selected, strict=True)
    ]
    return found._replace(insights=insights)


def _attribution(coded: Coded, only: Collection[tuple[Segment, int]] | None) -> Attribution:
    """Of all pairs, or of `only` these."""
    with threadpool_limits(1, "blas"):  # many small products
        screened = screen(coded, only) if coded.fields and coded.tags and (only is None or only) else None
        insights, diagnostics = joint_insights(coded, Cells.of(coded), screened)
        return Attribution(insights, main_effects(Cells.of(coded.evenly)), diagnostics)


def joint_insights(
    coded: Coded, cells: Cells, screened: Screened | None, eligible: Collection[tuple[Segment, int]] | None = None
) -> tuple[list[Insight], Diagnostics]:
    """What the joint model of the screened pairs says (None: there are none), of `eligible` ones only if given.

    The correction for the search counts all that were screened.
    """
    found, chosen = list[Insight](), list[int]()
    gammas, ses, examined, too_few = np.zeros(0), np.zeros(0), NOTHING, 0
    if screened is not None:
        examined, too_few = screened.examined, screened.too_few
        joint = joint_model(screened, eligible)
        chosen, gammas, ses = list(joint.pairs), joint.model.pairs, np.sqrt(np.diag(joint.model.covariance))
        found = _insights(screened, cells, joint)
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
        clipped_uniform=coded.clipped_uniform,
        lost_uniform=coded.lost_uniform,
        certain=coded.certain,
    )
    return [found[i] for i in order], diagnostics


def without_noise(coded: Coded, probability: Floats, found: Diagnostics) -> tuple[Floats, Floats]:
    """What the coefficients estimate, where the click probabilities (n,) of the exposures are known: (m,) of the
    examined pairs (NaN where too little is expected), and (K,) of the selected ones in their joint model."""
    with threadpool_limits(1, "blas"):
        expected = screen(replace(coded, reward=probability))
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
    n, clicks, weight, weighted, square = (
        cells.by_stratum(name).sum(axis=0) for name in ("n", "clicks", "weight", "weighted_clicks", "squared_weight")
    )
    return [
        MainEffect(
            tag=Tag(cells.tags[t]).names,
            effect=float(np.expm1(estimate[t])),
            ci_low=float(np.expm1(estimate[t] - reach * error[t])),
            ci_high=float(np.expm1(estimate[t] + reach * error[t])),
            q_value=float(q[i]),
            n=round(float(n[t])),
            clicks=round(float(clicks[t])),
            ctr=float(weighted[t] / weight[t]),
            share=float(weight[t] / weight[0]),
            independent=float(weight[t] ** 2 / square[t]),
        )
        for i, t in enumerate(known)
    ]


def _insights(screened: Screened, cells: Cells, joint: Joint) -> list[Insight]:
    """The pairs of a joint model, in its order."""
    gammas, ses = joint.model.pairs, np.sqrt(np.diag(joint.model.covariance))
    examined, coded = screened.examined, screened.coded
    at = {name: i for i, name in enumerate(cells.values)}
    n, clicks, weight, weighted = map(cells.table, ("n", "clicks", "weight", "weighted_clicks"))

    def pair(k: int) -> Pair:
        segment = examined.segments[k]
        return Pair({segment.field: segment.label}, coded.tags[examined.tags[k]].names)

    found = []
    for k, gamma, se, threshold, factor in zip(joint.pairs, gammas, ses, joint.threshold, joint.factor, strict=True):
        segment, tag = examined.segments[k], examined.tags[k] + 1
        values = np.array([at[(segment.field, coded.fields[screened.field_of[k]].labels[v])] for v in segment.values])
        preference = float(cells.preference(values)[tag])
        low, high = conditional_interval(float(gamma / se), float(threshold))
        joint_p = 2 * stats.norm.sf(abs(gamma / se))
        found.append(
            Insight(
                segment=pair(k).segment,
                tag=pair(k).tag,
                effect=float(np.expm1(gamma)),
                preference=preference if np.isfinite(preference) else None,
                # Given the selection, a barely selected effect may lie outside its interval: then it is the end.
                ci_low=float(np.expm1(min(low * se, gamma))),
                ci_high=float(np.expm1(max(high * se, gamma))),
                q_value=min(float(joint_p * factor), 1.0),
                n=round(float(n[values, tag].sum())),
                clicks=round(float(clicks[values, tag].sum())),
                ctr=float(weighted[values, tag].sum() / weight[values, tag].sum()),
                explained_by=tuple(pair(j) for j in joint.explained[k]),
            )
        )
    return found
