"""Where methods agree: who found the same preference, with which sign, who looked and did not find it.

The sign is what a method itself says, where it has a scale of its own (`Insight.direction`), and not that of the
effect, which all but the grid take from the statistics: signs of one number could not differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attribution.insights import Insight
from kaleidoscope.vocabulary import Method
from kaleidoscope.wording import ends_of

if TYPE_CHECKING:
    from attribution.coding import Coded

CALLED: Mapping[str, str] = {
    Method.STATISTICS: "the statistics",
    Method.EBM: "the EBM",
    Method.GRID: "the grid",
    Method.PREFERENCE: "the standardised preferences",
    Method.CONTRIBUTIONS: "the trees' contributions",
    Method.NETWORK: "the network's terms",
}
ON_HALF = frozenset({Method.EBM, Method.CONTRIBUTIONS})  # confirmed by one test on one half of the units: one voice
UNTESTED = frozenset({Method.NETWORK})  # learned from the same exposures, and nothing is left to confirm it on
AT_LEAST = 2  # voices, where the statistics are not among them

EQUAL, WITHIN, MIRRORED, OTHER_TAG = range(4)  # how near two insights are


@dataclass(frozen=True)
class TwoValued:
    """The user fields and tag dimensions of just two values: what is said of one is the opposite of the other.

    Of more values, that men take to something less does not say that women take to it more: others may, or both.
    """

    fields: frozenset[str] = frozenset()
    dimensions: frozenset[str] = frozenset()

    @classmethod
    def of(cls, coded: Coded) -> TwoValued:
        """Those of a log."""
        shown = np.unique(coded.variant)
        carried = coded.carried[shown].toarray() if len(coded.tags) else np.zeros((len(shown), 0))
        dimensions = set[str]()
        for dimension in {d for tag in coded.tags for d in tag.dimensions}:
            columns = [t for t, tag in enumerate(coded.tags) if dimension in tag.dimensions]
            if len(columns) == 2 and bool((carried[:, columns].sum(axis=1) == 1).all()):
                dimensions.add(dimension)
        fields = (
            user.name for user, codes in zip(coded.fields, coded.codes, strict=True) if len(np.unique(codes)) == 2
        )
        return cls(frozenset(fields), frozenset(dimensions))


@dataclass(frozen=True)
class Agreement:
    """An insight, and what each method says of it."""

    insight: Insight  # as the first of the methods found it
    found_by: Mapping[str, int]  # method → what it says itself of this segment × tag, +1 or −1
    not_found_by: tuple[str, ...]  # that looked at such pairs
    explained: Insight | None = None  # the crossing that this pair is a part of, and says nothing beside

    @property
    def finders(self) -> tuple[str, ...]:
        """The methods that found it, with its sign and by a test."""
        return tuple(method for method in self.found_by if method not in {*self.opposed, *UNTESTED})

    @property
    def opposed(self) -> tuple[str, ...]:
        """The methods that say the opposite."""
        sign = 1 if self.insight.effect > 0 else -1
        return tuple(method for method, said in self.found_by.items() if said != sign)

    @property
    def looked(self) -> int:
        """How many methods could have found it by a test."""
        return len({*self.found_by, *self.not_found_by} - UNTESTED)

    @property
    def disagree(self) -> bool:
        """Whether any method says the opposite."""
        return bool(self.opposed)

    @property
    def disputed(self) -> bool:
        """Whether a method that tests what it says does. The network does not: its word is told and decides nothing."""
        return bool(set(self.opposed) - UNTESTED)

    @property
    def holds(self) -> bool:
        """Whether it belongs to the consensus: found by the statistics or by two others, disputed by nobody, and no
        crossing explains it. Only the grid looks at crossings: one holds if the grid found it.

        Methods that are confirmed on the same half of the units count as one: their mistakes are the same.
        """
        found = set(self.finders)
        voices = len(found - ON_HALF) + bool(found & ON_HALF)
        enough = Method.STATISTICS in found or voices >= AT_LEAST or self.insight.crossed
        return not self.disputed and self.explained is None and enough

    @property
    def strength(self) -> float:
        """The end of the interval that is nearer to no effect, as |log odds|; 0 where the interval holds 0."""
        low, high = self.insight.ci_low, self.insight.ci_high
        return 0.0 if low <= 0 <= high else float(min(abs(np.log1p(low)), abs(np.log1p(high))))

    @property
    def sentence(self) -> str:
        """Who found it, who did not, who says the opposite; and what the network makes of it."""
        found, looked = self.finders, self.looked
        if not found:
            said = "found by no method with this sign"
        elif len(found) < looked:
            said = f"found by {len(found)} of {looked} methods"
            said += " with the same sign" if len(found) > 1 else f" ({_names(found)})"
        elif looked > 1:
            said = f"found by all {looked} methods with the same sign"
        else:
            said = f"found by {_names(found)} alone"
        for methods, verb in (
            ([m for m in self.opposed if m not in UNTESTED], "found the opposite"),
            ([m for m in self.not_found_by if m not in UNTESTED], "did not find it"),
            ([m for m in self.found_by if m in UNTESTED and m not in self.opposed], "say the same"),
            ([m for m in self.opposed if m in UNTESTED], "say the opposite"),
            ([m for m in self.not_found_by if m in UNTESTED], "do not say it"),
        ):
            said += f"; {_names(methods)} {verb}" if methods else ""
        if self.explained is not None:
            whole = {**self.explained.segment, **self.explained.tag}
            both = " and ".join(f"{name}={value}" for name, value in whole.items())
            said += f"; the grid explains it by {both} together"
        return said[0].upper() + said[1:] + "."

    def to_json(self) -> dict[str, object]:
        """As summary.json holds it."""
        return {
            "insight": self.insight.to_json(),
            "found_by": dict(self.found_by),
            "not_found_by": list(self.not_found_by),
            "disagree": self.disagree,
            "consensus": self.holds,
            "sentence": self.sentence,
        }


def consensus(by_method: Mapping[str, Sequence[Insight]], two: TwoValued = TwoValued()) -> list[Agreement]:
    """The agreements that hold, strongest first."""
    return [agreement for agreement in agreements(by_method, two) if agreement.holds]


def agreements(by_method: Mapping[str, Sequence[Insight]], two: TwoValued = TwoValued()) -> list[Agreement]:
    """Everything that any method found, once, with what each says of it; strongest first.

    `by_method` has an entry, perhaps empty, for every method that was done. Two insights speak of the same preference
    where they share a user field and a tag dimension, and either their segments overlap and their tags are the same, or
    one is the mirror of the other: the young like it, the others do not; of fields and dimensions of just `two` values,
    women like it, men do not; women like it, and like its alternative less.
    """
    order = sorted(by_method, key=lambda method: method != Method.STATISTICS)
    named: list[tuple[str, Insight]] = []
    for method in order:
        others = [insight for other, insight in named if other != method]
        new = (
            one for one in by_method[method] if not any(_relation(a, one, one.direction(method), two) for a in others)
        )
        named += [(method, one) for one in new]
    crossings = [one for one in by_method.get(Method.GRID, ()) if one.crossed]
    found = [_agreement(insight, by_method, order, crossings, two) for _, insight in named]
    return sorted(found, key=lambda one: (-one.strength, one.insight.q_value))


def _agreement(
    insight: Insight, by_method: Mapping[str, Sequence[Insight]], order: Sequence[str], crossings: Sequence[Insight],
    two: TwoValued,
) -> Agreement:  # fmt: skip
    sign, signs = 1 if insight.effect > 0 else -1, dict[str, int]()
    for method in order:
        relations = [(_relation(insight, one, one.direction(method), two), one) for one in by_method[method]]
        related = [(found, one) for found, one in relations if found is not None]
        if related:  # the nearest speaks for the method, of several as near the strongest
            (_, same), _ = min(related, key=lambda pair: (pair[0][0], -abs(np.log1p(pair[1].effect))))
            signs[method] = sign if same else -sign
    missing = tuple(m for m in order if m not in signs and (m == Method.GRID) == insight.crossed)
    explained = next((one for one in crossings if not insight.crossed and _explains(one, insight)), None)
    return Agreement(insight, signs, missing, explained)


def _explains(crossing: Insight, pair: Insight) -> bool:
    """Whether the pair was significant alone, and no longer beside the crossing, in the grid's model."""
    return any(
        dict(part.segment) == dict(pair.segment) and dict(part.tag) == dict(pair.tag) for part in crossing.explained_by
    )


def _relation(a: Insight, b: Insight, sign: int, two: TwoValued) -> tuple[int, bool] | None:
    """How near b is to a, and whether a method that says `sign` of it says the same; None where they speak of different
    things."""
    fields, dimensions = a.segment.keys() & b.segment.keys(), a.tag.keys() & b.tag.keys()
    if not fields or not dimensions or a.crossed != b.crossed:
        return None
    whole = fields == a.segment.keys() == b.segment.keys() and dimensions == a.tag.keys() == b.tag.keys()
    segments = [_segments(a.segment[name], b.segment[name], name in two.fields) for name in fields]
    others = {d for d in dimensions if not set(a.tag[d].split("|")) & set(b.tag[d].split("|"))}
    if None in segments or not others <= two.dimensions:
        return None
    users = max(near for near in segments if near is not None)
    same = ((a.effect > 0) == (sign > 0)) == ((users < MIRRORED) == (not others))
    return OTHER_TAG if others else max(users, EQUAL if whole else WITHIN), same


def _segments(a: str, b: str, only: bool) -> int | None:
    """How near two segments of one field are, that may be the `only` two values of it; None where they are apart."""
    if a == b:
        return EQUAL
    ends, others = ends_of(a), ends_of(b)
    if ends is None or others is None:
        return MIRRORED if only else None
    if max(ends[0], others[0]) < min(ends[1], others[1]):
        return WITHIN
    everybody = {*ends, *others} >= {-np.inf, np.inf} and len({*ends, *others}) == 3
    return MIRRORED if everybody else None


def _names(methods: Sequence[str]) -> str:
    """How they are called in a sentence."""
    names = [CALLED.get(method, method) for method in methods]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
