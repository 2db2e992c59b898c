"""`report.html`: who prefers what, how sure that is, and why it works, in one self-contained page.

The page is report.html.j2, its pictures are attribution.pictures. Nothing is estimated here, and nothing is left out
without a word: what does not fit the page is counted, and stands in the files beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from scipy import stats

from attribution.consensus import UNTESTED
from attribution.discoveries import LEVEL
from attribution.doubts import doubts
from attribution.found import METHODS, Found, Key, called, key_of, log_ratio, rank_of
from attribution.insights import Diagnostics, Insight
from attribution.pictures import (
    LESS,
    MORE,
    Axis,
    Bar,
    Colours,
    Heat,
    HeatRow,
    forest,
    heat_map,
    interval,
    name,
    narrow,
    prose,
    relative,
    share,
    text,
    value_of,
    what,
    who,
)
from attribution.portrait_map import COLUMNS, IN_ROW, ROWS, portrait_map, rate_maps
from kaleidoscope.vocabulary import Level, Method

if TYPE_CHECKING:
    from attribution.analysis import Analysis, Facts
    from attribution.consensus import Agreement
    from attribution.ebm import HeatMap, Shape

SENTENCES, CROSSINGS = 4, 2  # of the summary, about insights of one field and tag, and of several
FORESTS, MORE_FORESTS = 12, 60  # segments with a forest plot: unfolded, and at most
REST = 5  # muted rows of a forest plot
SHAPES, MORE_SHAPES, BINS = 6, 40, 20
MAPS, MORE_MAPS = 4, 24
TABLE_ROWS, MORE_ROWS = 25, 300
PAIRS = 12  # of a model's contributions
CAUTION = "⚠"
DETECTED = 0.8  # power at which an effect counts as one that would have been found


def render(analysis: Analysis) -> str:
    """The report as one HTML page without anything from outside it; the same input gives the same page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "name": name, "text": text, "prose": prose, "share": share, "who": who, "what": what, "size": _size_of,
    }  # fmt: skip
    environment.globals["interval"] = interval
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    found = Found.of(analysis)
    return template.render(
        a=analysis,
        title=text(analysis.scene or analysis.log_name),
        facts=_facts(analysis.facts),
        methods=METHODS,
        summary=_Summary.of(analysis),
        lacking=_lacking(analysis),
        portrait=portrait_map(analysis, found),
        forests=_forests(analysis, found),
        ebm=None if analysis.ebm is None else _learned(analysis.ebm.shapes, analysis.ebm.heat_maps),
        network=None if analysis.network_ebm is None
        else _learned(analysis.network_ebm.shapes, analysis.network_ebm.heat_maps),
        grid=_crossings(analysis, found),
        doubts=None if analysis.effectiveness is None else doubts(analysis.effectiveness, analysis.variants),
        contributions=_contributions(analysis),
        agreement=_agreement(analysis),
        main=_main_effects(analysis),
        limits=_Limits.of(analysis),
        checks={level: [check for check in analysis.checks if check.level == level] for level in Level},
        not_done=_not_done(analysis),
    )  # fmt: skip


# ── what was looked at, and the summary ─────────────────────────────────────────────────────────────────────────────


def _facts(facts: Facts) -> list[tuple[str, Markup | str]]:
    period = "unknown" if facts.since is None or facts.until is None else f"{facts.since[:10]} to {facts.until[:10]}"
    total = max(sum(facts.buckets.values()), 1)
    buckets = Markup(", ").join(
        Markup("{} {:,}{}").format(name(b), n, f" ({share(n / total, 0)})" if len(facts.buckets) > 1 else "")
        for b, n in sorted(facts.buckets.items(), key=lambda item: -item[1])[:8]
    )
    return [
        ("Exposures", f"{facts.exposures:,}"),
        ("Units (users)", "unknown" if facts.units is None else f"{facts.units:,}"),
        ("Variants", f"{facts.variants:,}"),
        ("Click rate", share(facts.positive_rate)),
        ("Period (UTC)", period),
        ("Buckets", buckets or "not named in the log"),
    ]


@dataclass(frozen=True)
class _Summary:
    """What the sentences at the top say."""

    found: int  # that the consensus holds
    by_several: int  # of those, found by more than one method
    methods: int  # that were done and test what they say
    strongest: list[tuple[Insight, int, int, bool]]  # with how many found it, of how many, and whether the network
    # says the opposite
    contradicted: int  # that the consensus holds, and the network says the opposite of
    alone: int  # that single methods found, and the consensus does not hold
    explained: int  # that crossings explain
    crossed: int  # that only show in several fields or dimensions at once, and the consensus holds
    crossings: list[Insight]  # the strongest of those
    disputed: int
    examined: int
    pairs: int
    smallest: str | None  # the difference that would have been found in the typical pair
    errors: list[str]  # of the log
    warnings: int

    @classmethod
    def of(cls, analysis: Analysis) -> _Summary:
        held = [a for a in analysis.agreements if a.holds and not a.insight.crossed]
        held.sort(key=lambda a: (-len(a.finders), -_surely(a.insight), a.insight.q_value, -a.insight.n))
        strongest: dict[tuple[frozenset[str], frozenset[str]], tuple[Insight, int, int, bool]] = {}
        for a in held:  # one of each user field × tag dimension
            family = frozenset(a.insight.segment), frozenset(a.insight.tag)
            strongest.setdefault(family, (a.insight, len(a.finders), a.looked, a.disagree))
        smallest = _smallest(analysis.attribution.diagnostics)
        disputed = sum(a.disputed for a in analysis.agreements)
        explained = sum(a.explained is not None and not a.disputed for a in analysis.agreements)
        crossings = [a.insight for a in analysis.agreements if a.holds and a.insight.crossed]
        crossings.sort(key=lambda insight: (-_surely(insight), insight.q_value))
        d = analysis.attribution.diagnostics
        return cls(
            found=len(held),
            by_several=sum(len(a.finders) > 1 for a in held),
            methods=len(analysis.by_method.keys() - UNTESTED),
            strongest=list(strongest.values())[:SENTENCES],
            contradicted=sum(a.disagree for a in held),
            alone=len(analysis.agreements) - len(held) - len(crossings) - explained - disputed,
            explained=explained,
            crossed=len(crossings),
            crossings=crossings[:CROSSINGS],
            disputed=disputed,
            examined=len(d.examined.gamma),
            pairs=d.too_few + len(d.examined.gamma),
            smallest=None if smallest is None else _either_way(smallest[1]),
            errors=[check.message for check in analysis.checks if check.level is Level.ERROR],
            warnings=sum(check.level is Level.WARNING for check in analysis.checks),
        )


def _lacking(analysis: Analysis) -> str | None:
    """Why nobody's preferences can be told apart in any log like this one; None where they can."""
    if not analysis.facts.user:
        return "The log names no user fields"
    if not analysis.tags:
        return "No tag varies among the variants that were shown"
    diagnostics = analysis.attribution.diagnostics
    if not diagnostics.too_few and not len(diagnostics.examined.gamma):
        return "No user field tells users apart"
    return None


def _surely(insight: Insight) -> float:
    """How far from none the near end of the interval is."""
    low, high = log_ratio(insight.ci_low), log_ratio(insight.ci_high)
    return max(low, -high, 0.0)


def _size_of(effect: float) -> str:
    """How much the odds differ, without a sign."""
    return relative(abs(effect)).lstrip("+")


def _either_way(gamma: float) -> str:
    """How far the odds are from the same, upwards and downwards alike."""
    return f"{_size_of(math.expm1(gamma))} higher or {_size_of(math.expm1(-gamma))} lower"


def _smallest(d: Diagnostics) -> tuple[float, float] | None:
    """The smallest logarithms of odds ratios that would have been found with power DETECTED: in the best tenth of the
    pairs looked at, and in the median one."""
    if not len(d.examined.se):
        return None
    reach = (d.examined.search.threshold + stats.norm.isf(1 - DETECTED)) * d.examined.se
    reach = reach[np.isfinite(reach)]
    return (float(np.quantile(reach, 0.1)), float(np.median(reach))) if len(reach) else None


# ── per segment ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Forest:
    segment: Markup
    picture: Markup
    left_out: int  # tags that were looked at and are not drawn


@dataclass(frozen=True)
class _Forests:
    first: list[_Forest]
    rest: list[_Forest]
    left_out: int  # segments


def _forests(analysis: Analysis, found: Found) -> _Forests:
    """A plot per segment with an insight: its insights, and what else was looked at of it, muted."""
    of_segment: dict[frozenset[tuple[str, str]], list[Key]] = defaultdict(list)
    for key in found.insights:
        of_segment[key[0]].append(key)

    def first(segment: frozenset[tuple[str, str]]) -> tuple[bool, float, float, list[tuple[str, str]]]:
        insights = [found.insights[key] for key in of_segment[segment]]
        held = any(key not in found.unsure for key in of_segment[segment])
        return not held, min(i.q_value for i in insights), -max(map(_surely, insights)), sorted(segment)

    order = sorted(of_segment, key=first)
    examined = analysis.attribution.diagnostics.examined
    looked: dict[frozenset[tuple[str, str]], list[int]] = defaultdict(list)
    for k, segment in enumerate(examined.segments):
        looked[frozenset({(segment.field, segment.label)})].append(k)
    explained = {
        key_of(pair.segment, pair.tag): insight for insight in found.insights.values() for pair in insight.explained_by
    }
    drawn = []
    for of in order[: FORESTS + MORE_FORESTS]:
        keys = of_segment[of]
        named = {tag for _, tag in keys}
        others = [k for k in looked[of] if frozenset(analysis.tags[examined.tags[k]].names.items()) not in named]
        others.sort(key=lambda k: -abs(examined.z[k]))
        marked = [replace(_bar(found.insights[key], found.note(key)), unsure=key in found.unsure) for key in keys]
        muted = [_muted(analysis, k, explained) for k in others[:REST]]
        bars = [bar for part in (marked, muted) for bar in sorted(part, key=lambda bar: -(bar.value or 0.0))]
        title = who(found.insights[keys[0]].segment)
        drawn.append(_Forest(title, forest(bars), len(others) - len(muted)))
    return _Forests(drawn[:FORESTS], drawn[FORESTS:], len(order) - len(drawn))


def _bar(insight: Insight, note: str) -> Bar:
    apart = "" if insight.crossed or len(insight.tag) < 2 else Markup(' <span class="soft">never shown apart</span>')
    value, low, high = map(log_ratio, (insight.effect, insight.ci_low, insight.ci_high))
    return Bar(what(insight.tag) + apart, value, low, high, insight.n, marked=True, note=note)


def _muted(analysis: Analysis, k: int, explained: Mapping[Key, Insight]) -> Bar:
    """A pair that was looked at and is no insight, in a model of its own, with the plain interval."""
    examined = analysis.attribution.diagnostics.examined
    segment, tag = examined.segments[k], analysis.tags[examined.tags[k]].names
    gamma, reach = float(examined.gamma[k]), float(stats.norm.isf((1 - LEVEL) / 2) * examined.se[k])
    by = explained.get(key_of({segment.field: segment.label}, tag))
    note = "" if by is None else Markup("explained by {} × {}").format(who(by.segment), what(by.tag))
    return Bar(what(tag), gamma, gamma - reach, gamma + reach, note=note)


# ── the grid ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Crossings:
    insights: Markup | None  # that only several fields or dimensions together show
    left_out: int
    legend: Markup
    blocks: list[tuple[Markup, list[Markup]]]  # title, tables of click rates


def _crossings(analysis: Analysis, found: Found) -> _Crossings | None:
    if analysis.grid is None:
        return None
    bars = []
    keys = sorted(found.crossed, key=lambda key: found.crossed[key].q_value)
    for key in keys[:TABLE_ROWS]:
        insight = found.crossed[key]
        label = Markup("{}: {}").format(who(insight.segment), what(insight.tag))
        bars.append(replace(_bar(insight, found.note(key)), label=label))
    colours = Colours.of(log_ratio(cell.effect) for cell in analysis.grid.cells if cell.effect is not None)
    return _Crossings(
        forest(bars, head="Segment and tags", value="Odds beyond the parts") if bars else None,
        len(keys) - len(bars),
        colours.legend,
        rate_maps(analysis.grid.cells, found, colours) if any(c.ctr is not None for c in analysis.grid.cells) else [],
    )


# ── EBM, and what the network learned ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Learned:
    shapes: list[tuple[Markup, Markup]]  # title, picture
    more_shapes: list[tuple[Markup, Markup]]
    maps: list[tuple[Markup, Markup]]
    more_maps: list[tuple[Markup, Markup]]
    legend: Markup
    left_out: int


def _learned(shapes: Iterable[Shape], maps: Iterable[HeatMap]) -> _Learned:
    """The shapes that move the odds most, and the pairs that matter most, first."""
    shapes = sorted(shapes, key=_moves, reverse=True)
    maps = sorted(maps, key=lambda m: -m.importance)
    shown = maps[: MAPS + MORE_MAPS]
    colours = Colours.of(float(v) for m in shown for v in np.asarray(m.effect).ravel() if math.isfinite(v))
    drawn_shapes = [(name(s.name), _shape(s)) for s in shapes[: SHAPES + MORE_SHAPES]]
    drawn = [(Markup("{} × {}").format(name(m.field), name(m.dimension)), _drawn(m, colours)) for m in shown]
    left_out = len(shapes) - len(drawn_shapes) + len(maps) - len(drawn)
    return _Learned(drawn_shapes[:SHAPES], drawn_shapes[SHAPES:], drawn[:MAPS], drawn[MAPS:], colours.legend, left_out)


def _moves(shape: Shape) -> float:
    """The spread of a shape's effect over the exposures."""
    n, effect = np.asarray(shape.n, float), np.asarray(shape.effect, float)
    if not n.sum():
        return 0.0
    return float(np.sqrt(n @ (effect - n @ effect / n.sum()) ** 2 / n.sum()))


def _shape(shape: Shape) -> Markup:
    kept = [i for i in range(len(shape.labels)) if shape.n[i] > 0]
    if len(kept) > BINS:
        kept = sorted(sorted(kept, key=lambda i: -shape.n[i])[:BINS])
    bars = [
        Bar(value_of(shape.labels[i]), float(shape.effect[i]), float(shape.low[i]), float(shape.high[i])) for i in kept
    ]
    more = sum(n > 0 for n in shape.n) - len(kept)
    picture = forest(bars, Axis.of(bars, narrow=True), head="Value", even=True)
    return picture + Markup('<p class="soft">And {} values with fewer exposures.</p>').format(more) if more else picture


def _drawn(m: HeatMap, colours: Colours) -> Markup:
    effect, n = np.asarray(m.effect, float), np.asarray(m.n, float)
    low, high = np.asarray(m.low, float), np.asarray(m.high, float)

    def cell(r: int, c: int) -> Heat:
        if not math.isfinite(effect[r, c]):
            return Heat(None)
        band = interval(math.expm1(low[r, c]), math.expm1(high[r, c]))
        firm = bool(low[r, c] > 0 or high[r, c] < 0)
        return Heat(float(effect[r, c]), firm=firm, title=f"{band}, {n[r, c]:,.0f} exposures")

    rows = [r for r in range(len(m.rows)) if n[r].sum() > 0]
    columns = [c for c in range(len(m.columns)) if n[:, c].sum() > 0]
    rows = sorted(sorted(rows, key=lambda r: -n[r].sum())[:ROWS])
    columns = sorted(sorted(columns, key=lambda c: -n[:, c].sum())[:COLUMNS])
    body = [HeatRow(value_of(m.rows[r], IN_ROW), [cell(r, c) for c in columns]) for r in rows]
    return heat_map(narrow(m.field), [(narrow(m.dimension), [narrow(m.columns[c]) for c in columns])], body, colours)


# ── contributions ───────────────────────────────────────────────────────────────────────────────────────────────────


def _contributions(analysis: Analysis) -> list[tuple[str, float | None, list[tuple[Markup, str, str]]]]:
    """Of each model: its name, its AUC, and the pairs it leans on most (name, mean size, percent of the first's)."""
    found = []
    for method, result in ((Method.CONTRIBUTIONS, analysis.contributions), (Method.NETWORK, analysis.network)):
        if result is None:
            continue
        top = max((size for _, _, size in result.importance), default=0.0)
        rows = [
            (Markup("{} × {}").format(name(field), name(dimension)), f"{size:.3g}", f"{100 * size / top:.0f}")
            for field, dimension, size in result.importance[:PAIRS]
            if size > 0
        ]
        found.append((called(method), result.auc, rows))
    return found


# ── agreement, main effects, limits ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Agreement:
    methods: list[str]
    rows: list[tuple[Markup, Markup, list[str], str]]  # segment, tag, a cell per method, its standing
    more: list[tuple[Markup, Markup, list[str], str]]
    left_out: int
    disputed: int
    contradicted: int  # by the network, which disputes nothing


def _agreement(analysis: Analysis) -> _Agreement:
    methods = sorted(analysis.by_method, key=rank_of)
    order = sorted(analysis.agreements, key=lambda a: (not a.disagree, not a.holds, -len(a.finders), a.insight.q_value))

    def cell(agreement: Agreement, method: str) -> str:
        if method in agreement.found_by:
            return f"{MORE} more" if agreement.found_by[method] > 0 else f"{LESS} less"
        missing = "says little" if method in UNTESTED else "not found"
        return missing if method in agreement.not_found_by else "does not look"

    rows = [
        (who(a.insight.segment), what(a.insight.tag), [cell(a, m) for m in methods], _standing(a))
        for a in order[: TABLE_ROWS + MORE_ROWS]
    ]
    return _Agreement(
        [f"{called(m)} (no test of its own)" if m in UNTESTED else called(m) for m in methods],
        rows[:TABLE_ROWS], rows[TABLE_ROWS:], len(order) - len(rows),
        sum(a.disputed for a in order), sum(a.disagree and not a.disputed for a in order),
    )  # fmt: skip


def _standing(agreement: Agreement) -> str:
    """Whether the consensus holds it, in a word or two."""
    if agreement.disputed:
        return f"{CAUTION} disagree"
    if agreement.disagree:
        return f"{CAUTION} the network says the opposite"
    if agreement.insight.crossed:
        return "two at once"
    return "" if agreement.holds else "alone" if agreement.explained is None else "part of a crossing"


@dataclass(frozen=True)
class _Rows:
    first: Markup
    more: Markup | None
    left_out: int


def _main_effects(analysis: Analysis) -> _Rows | None:
    effects = sorted(analysis.attribution.main_effects, key=lambda e: (e.q_value > 0.05, -abs(log_ratio(e.effect))))
    if not effects:
        return None
    bars = [
        Bar(what(e.tag), log_ratio(e.effect), log_ratio(e.ci_low), log_ratio(e.ci_high), e.n, e.q_value <= 0.05)
        for e in effects[: TABLE_ROWS + MORE_ROWS]
    ]
    axis = Axis.of(bars)
    first, more = bars[:TABLE_ROWS], bars[TABLE_ROWS:]
    return _Rows(
        forest(first, axis, value="Click rate"), forest(more, axis, value="Click rate") if more else None,
        len(effects) - len(bars),
    )  # fmt: skip


@dataclass(frozen=True)
class _Limits:
    """The figures of what this log and these methods leave open."""

    too_few: int
    pairs: int
    smallest: tuple[str, str] | None  # difference that would have been found: in the largest pairs, in the typical one
    unseen: list[Mapping[str, str]]  # tags of which no pair could be looked at
    effective_share: float
    effective: int
    clipped: float
    clipped_uniform: float
    lost_uniform: float
    certain: float
    strata: int

    @classmethod
    def of(cls, analysis: Analysis) -> _Limits:
        d = analysis.attribution.diagnostics
        smallest = _smallest(d)
        return cls(
            too_few=d.too_few,
            pairs=d.too_few + len(d.examined.gamma),
            smallest=None if smallest is None else (_either_way(smallest[0]), _either_way(smallest[1])),
            unseen=_unseen(analysis),
            effective_share=d.effective_share,
            effective=round(d.effective_share * analysis.facts.exposures),
            clipped=d.clipped,
            clipped_uniform=d.clipped_uniform,
            lost_uniform=d.lost_uniform,
            certain=d.certain,
            strata=d.strata,
        )


def _not_done(analysis: Analysis) -> list[tuple[str, str]]:
    """Each reason why methods were not done, with their names."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for method, why in analysis.not_done.items():
        by_reason[why].append(called(method))
    return [(why, ", ".join(names)) for why, names in by_reason.items()]


def _unseen(analysis: Analysis) -> list[Mapping[str, str]]:
    """The tags of which no pair could be looked at."""
    seen = set(analysis.attribution.diagnostics.examined.tags)
    return [tag.names for t, tag in enumerate(analysis.tags) if t not in seen]
