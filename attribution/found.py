"""What all methods found, each preference once, for the report: how sure it is, and how methods are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.insights import Insight
from kaleidoscope.vocabulary import Method

if TYPE_CHECKING:
    from attribution.analysis import Analysis

METHODS: Mapping[str, str] = {
    Method.STATISTICS: "Statistics",
    Method.EBM: "EBM",
    Method.GRID: "Grid (2 × 2)",
    Method.PREFERENCE: "Standardised preference",
    Method.CONTRIBUTIONS: "LightGBM contributions",
    Method.NETWORK: "Network contributions",
}

# Whose test effect, interval and q-value of a method's insights are. The network has none.
TESTED_BY: Mapping[str, str] = {
    Method.STATISTICS: "statistics",
    Method.EBM: "statistics, on the other half of the units",
    Method.GRID: "grid",
    Method.PREFERENCE: "preference and statistics",
    Method.CONTRIBUTIONS: "statistics, on the other half of the units",
    Method.NETWORK: "statistics, not by the network",
}

Key = tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Found:
    """The insights of all methods, each segment × tag once, with what the first of METHODS that found it says."""

    insights: Mapping[Key, Insight]  # of one field and one tag (or tags never shown apart)
    crossed: Mapping[Key, Insight]  # of several that work together
    methods: Mapping[Key, tuple[str, ...]]
    opposed: Mapping[Key, tuple[str, ...]]  # that say the opposite of that
    held: frozenset[Key]  # of `insights`, as the consensus holds them
    unsure: frozenset[Key]  # of `insights`, the others: also what says in other words what is held already

    @classmethod
    def of(cls, analysis: Analysis) -> Found:
        """What the methods of an analysis found."""
        found: dict[Key, Insight] = {}
        methods, opposed = dict[Key, tuple[str, ...]](), dict[Key, tuple[str, ...]]()
        by_method = analysis.by_method
        for method in sorted(by_method, key=rank_of):
            for insight in by_method[method]:
                key = key_of(insight.segment, insight.tag)
                first = found.setdefault(key, insight)
                said = methods if insight.direction(method) == sign_of(first) else opposed
                said[key] = (*said.get(key, ()), method)
        single = {key: i for key, i in found.items() if not i.crossed and len(i.segment) == 1}
        holds = {key_of(a.insight.segment, a.insight.tag): a.holds for a in analysis.agreements}
        held = frozenset(key for key in single if holds.get(key))
        unsure = frozenset(single.keys() - held)
        crossed = {key: i for key, i in found.items() if key not in single}
        return cls(single, crossed, methods, opposed, held, unsure)

    def strength(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """(user field, tag dimensions) → the largest |logarithm of an odds ratio| that the consensus holds there."""
        out: dict[tuple[str, tuple[str, ...]], float] = {}
        for insight in map(self.insights.__getitem__, self.held):
            for field in insight.segment:
                family = field, tuple(insight.tag)
                out[family] = max(out.get(family, 0.0), abs(log_ratio(insight.effect)))
        return out

    def note(self, key: Key) -> str:
        """Which methods found it, and which say the opposite."""
        same, other = (", ".join(map(called, said.get(key, ()))) for said in (self.methods, self.opposed))
        return "; ".join(part for part in (same, f"the opposite: {other}" if other else "") if part)


def key_of(segment: Mapping[str, str], tag: Mapping[str, str]) -> Key:
    """What tells a segment × tag from others."""
    return frozenset(segment.items()), frozenset(tag.items())


def rank_of(method: str) -> int:
    """Its place in METHODS; unknown ones are last."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def log_ratio(effect: float) -> float:
    """The logarithm of the ratio; an effect of −100 % is drawn as far out as a picture goes."""
    return math.log1p(max(effect, -0.9999))


def sign_of(insight: Insight) -> int:
    """+1 or −1."""
    return 1 if insight.effect > 0 else -1


def called(method: str) -> str:
    """A method's name for people."""
    return METHODS.get(method, method)
