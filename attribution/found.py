"""What all methods found, each preference once, for the report: how sure it is, and how methods are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.insights import STATISTICS, Insight

if TYPE_CHECKING:
    from attribution.analysis import Analysis

METHODS = {
    STATISTICS: "Statistics",
    "ebm": "EBM",
    "grid": "Grid (2 × 2)",
    "preference": "Standardised preference",
    "contributions": "LightGBM contributions",
    "network": "Network contributions",
}

Key = tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Found:
    """The insights of all methods, each segment × tag once, with what the first of METHODS that found it says."""

    insights: Mapping[Key, Insight]  # of one field and one tag (or tags never shown apart)
    crossed: Mapping[Key, Insight]  # of several that work together
    methods: Mapping[Key, tuple[str, ...]]
    held: frozenset[Key]  # of `insights`, as the consensus holds them; others say the same of a neighbouring segment
    unsure: frozenset[Key]  # of `insights`, that the consensus does not hold

    @classmethod
    def of(cls, analysis: Analysis) -> Found:
        """What the methods of an analysis found."""
        found: dict[Key, Insight] = {}
        methods: dict[Key, tuple[str, ...]] = {}
        by_method = analysis.by_method
        for method in sorted(by_method, key=rank_of):
            for insight in by_method[method]:
                key = key_of(insight.segment, insight.tag)
                found.setdefault(key, insight)
                methods[key] = (*methods.get(key, ()), method)
        single = {key: i for key, i in found.items() if not i.crossed and len(i.segment) == 1}
        holds = {key_of(a.insight.segment, a.insight.tag): a.holds for a in analysis.agreements}
        held = frozenset(key for key in single if holds.get(key))
        unsure = frozenset(key for key in single if not holds.get(key, True))
        crossed = {key: i for key, i in found.items() if key not in single}
        return cls(single, crossed, methods, held, unsure)

    def strength(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """(user field, tag dimensions) → the largest |logarithm of an odds ratio| that the consensus holds there."""
        out: dict[tuple[str, tuple[str, ...]], float] = {}
        for insight in map(self.insights.__getitem__, self.held):
            for field in insight.segment:
                family = field, tuple(insight.tag)
                out[family] = max(out.get(family, 0.0), abs(log_ratio(insight.effect)))
        return out


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
