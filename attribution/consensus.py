"""Where methods agree: who found the same preference, with which sign, who looked and did not find it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attribution.insights import STATISTICS, Insight
from kaleidoscope.wording import ends_of

EBM, GRID, PREFERENCE, CONTRIBUTIONS, NETWORK = "ebm", "grid", "preference", "contributions", "network"
CALLED = {
    STATISTICS: "the statistics", EBM: "the EBM", GRID: "the grid", PREFERENCE: "the standardised preferences",
    CONTRIBUTIONS: "the trees' contributions", NETWORK: "the network's terms",
}  # fmt: skip
ON_HALF = frozenset({EBM, CONTRIBUTIONS})  # confirmed by the same test on the same half of the units: one voice
AT_LEAST = 2  # voices, where the statistics are not among them

EQUAL, WITHIN, MIRRORED, APART, OTHER_TAG = range(5)  # how near two insights are


@dataclass(frozen=True)
class Agreement:
    """An insight, and what each method says of it."""

    insight: Insight  # as the first of the methods found it
    found_by: Mapping[str, int]  # method → sign, +1 or −1, of this segment × tag
    not_found_by: tuple[str, ...]  # that looked at such pairs
    disagree: bool  # whether signs differ
    explained: Insight | None = None  # the crossing that this pair is a part of, and says nothing beside

    @property
    def holds(self) -> bool:
        """Whether it belongs to the consensus: found by the statistics or by two others, nobody says the opposite, and
        no crossing explains it. Only the grid looks at crossings: one holds if the grid found it.

        Methods that are confirmed on the same half of the units count as one: their mistakes are the same.
        """
        voices = len(self.found_by.keys() - ON_HALF) + bool(self.found_by.keys() & ON_HALF)
        enough = STATISTICS in self.found_by or voices >= AT_LEAST or self.insight.crossed
        return not self.disagree and self.explained is None and enough

    @property
    def strength(self) -> float:
        """The end of the interval that is nearer to no effect, as |log odds|; 0 where the interval holds 0."""
        low, high = self.insight.ci_low, self.insight.ci_high
        return 0.0 if low <= 0 <= high else float(min(abs(np.log1p(low)), abs(np.log1p(high))))

    @property
    def sentence(self) -> str:
        """Who found it, who did not, and who says the opposite."""
        sign = np.sign(self.insight.effect)
        same = [method for method, found in self.found_by.items() if found == sign]
        other = [method for method in self.found_by if method not in same]
        looked = len(self.found_by) + len(self.not_found_by)
        if len(same) == looked:
            said = (
                f"found by all {looked} methods with the same sign" if looked > 1 else f"found by {_names(same)} alone"
            )
        else:
            said = f"found by {len(same)} of {looked} methods"
            said += " with the same sign" if len(same) > 1 else f" ({_names(same)})"
        if other:
            said += f"; {_names(other)} found the opposite"
        if self.not_found_by:
            said += f"; {_names(self.not_found_by)} did not find it"
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


def consensus(by_method: Mapping[str, Sequence[Insight]]) -> list[Agreement]:
    """The agreements that hold, strongest first."""
    return [agreement for agreement in agreements(by_method) if agreement.holds]


def agreements(by_method: Mapping[str, Sequence[Insight]]) -> list[Agreement]:
    """Everything that any method found, once, with what each says of it; strongest first.

    `by_method` has an entry, perhaps empty, for every method that was done. Two insights speak of the same preference
    where they share a user field and a tag dimension, and either their segments overlap and their tags are the same, or
    one is the mirror of the other (women like it, men do not; women like it, and like its alternative less).
    """
    order = sorted(by_method, key=lambda method: method != STATISTICS)
    named: list[tuple[str, Insight]] = []
    for method in order:
        others = [insight for other, insight in named if other != method]
        named += [(method, one) for one in by_method[method] if not any(_relation(a, one) for a in others)]
    crossings = [one for one in by_method.get(GRID, ()) if one.crossed]
    found = [_agreement(insight, by_method, order, crossings) for _, insight in named]
    return sorted(found, key=lambda one: (-one.strength, one.insight.q_value))


def _agreement(
    insight: Insight, by_method: Mapping[str, Sequence[Insight]], order: Sequence[str], crossings: Sequence[Insight]
) -> Agreement:
    sign, signs = int(np.sign(insight.effect)), dict[str, int]()
    for method in order:
        related = [(found, one) for one in by_method[method] if (found := _relation(insight, one)) is not None]
        if related:  # the nearest speaks for the method, of several as near the strongest
            (_, same), _ = min(related, key=lambda pair: (pair[0][0], -abs(np.log1p(pair[1].effect))))
            signs[method] = sign if same else -sign
    missing = tuple(m for m in order if m not in signs and (m == GRID) == insight.crossed)
    explained = next((one for one in crossings if not insight.crossed and _explains(one, insight)), None)
    return Agreement(insight, signs, missing, len(set(signs.values())) > 1, explained)


def _explains(crossing: Insight, pair: Insight) -> bool:
    """Whether the pair was significant alone, and no longer beside the crossing, in the grid's model."""
    return any(
        dict(part.segment) == dict(pair.segment) and dict(part.tag) == dict(pair.tag) for part in crossing.explained_by
    )


def _relation(a: Insight, b: Insight) -> tuple[int, bool] | None:
    """How near b is to a, and whether it says the same; None where they speak of different things."""
    fields, dimensions = a.segment.keys() & b.segment.keys(), a.tag.keys() & b.tag.keys()
    if not fields or not dimensions or a.crossed != b.crossed:
        return None
    whole = fields == a.segment.keys() == b.segment.keys() and dimensions == a.tag.keys() == b.tag.keys()
    users = max(_segments(a.segment[name], b.segment[name]) for name in fields)
    same_tag = all(set(a.tag[d].split("|")) & set(b.tag[d].split("|")) for d in dimensions)
    same = ((a.effect > 0) == (b.effect > 0)) == ((users < MIRRORED) == same_tag)
    near = max(users, EQUAL if whole else WITHIN) if same_tag else OTHER_TAG
    # Some of the others may like it too, or another tag more: only of what a statement is about can it be the opposite.
    return (near, same) if same or near <= MIRRORED else None


def _segments(a: str, b: str) -> int:
    """How near two segments of one field are."""
    if a == b:
        return EQUAL
    ends, others = ends_of(a), ends_of(b)
    if ends is None or others is None:
        return APART
    if max(ends[0], others[0]) < min(ends[1], others[1]):
        return WITHIN
    everybody = {*ends, *others} >= {-np.inf, np.inf} and len({*ends, *others}) == 3
    return MIRRORED if everybody else APART


def _names(methods: Sequence[str]) -> str:
    names = [CALLED.get(method, method) for method in methods]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
