"""What is expected of a tag with some users, by a portrait: its main effect, and how these users differ from everybody.

A portrait's cells become kinds of users (kinds.py); how the answer is told is in portrait_design.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from kaleidoscope.kinds import LEAST, Floats, Grouping, Kinds
from kaleidoscope.portraits import Reading
from kaleidoscope.tables import PortraitRow
from kaleidoscope.vocabulary import Method
from kaleidoscope.wording import Names, ends_of

MOST_LOGIT = 25.0  # an end of an interval beyond says no more, and what is made of several stays a number
OVERLAP = 1.01  # shares of a dimension's values in all that is shown, up to which they exclude each other
LEAST_REST = 0.005  # of all that is shown, that no value of a dimension is, where that counts as one more


class Logit(NamedTuple):
    """An estimate on the logit scale, with its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_effect(cls, row: PortraitRow) -> Logit:
        """Of exp(γ) − 1."""
        return cls(*(_log1p(effect) for effect in (row.effect, row.effect_low, row.effect_high)))

    @classmethod
    def of_ratio(cls, row: PortraitRow) -> Logit:
        """Of a ratio of click rates minus 1, at the click rate that was seen with the tag."""
        return cls(*(_log_odds(effect, row.ctr) for effect in (row.effect, row.effect_low, row.effect_high)))

    def plus(self, other: Self) -> Self:
        """Both, as if they erred together."""
        return type(self)(*(_bounded(a + b) for a, b in zip(self, other, strict=True)))


def _log1p(effect: float | None) -> float:
    return _bounded(math.log1p(max(-1.0 + 1e-12, effect or 0.0)))


def _bounded(logit: float) -> float:
    return min(max(logit, -MOST_LOGIT), MOST_LOGIT)


def _log_odds(effect: float | None, rate: float | None) -> float:
    """The log-odds ratio of clicks at `rate` against clicks at rate / (1 + effect)."""
    log_ratio = _log1p(effect)
    without = None if rate is None else rate / math.exp(log_ratio)
    if rate is None or without is None or not 0 < rate < 1 or not 0 < without < 1:
        return log_ratio
    return log_ratio + math.log1p(-without) - math.log1p(-rate)


@dataclass
class Evidence:
    """What a portrait says about a user who is in the segments `inside`."""

    reading: Reading
    inside: set[int]
    cells: Sequence[PortraitRow]  # of everybody, of those segments, and of all that have insights
    users: Names  # the user's attributes

    @cached_property
    def by_tag(self) -> dict[int, list[PortraitRow]]:
        """The cells of each tag, but for those of several tags at once."""
        found: dict[int, list[PortraitRow]] = defaultdict(list)
        for row in self.cells:
            if not row.crossed:
                found[row.tag].append(row)
        return found

    @cached_property
    def mains(self) -> dict[int, PortraitRow]:
        """The main effect of each tag that has one."""
        return {row.tag: row for row in self.cells if row.segment == 0 and row.effect is not None and not row.crossed}

    def size(self, segment: int, tags: Sequence[int]) -> tuple[float, float] | None:
        """A segment's share of all users, and of all clicks, by what it saw and clicked of these tags."""
        found = []
        for tag in tags:
            weight, rate = self.mains[tag].share or 0.0, self.mains[tag].ctr or 0.0
            for row in self.by_tag[tag]:
                if row.segment == segment and row.share is not None:
                    clicked = row.share if row.click_share is None else row.click_share
                    found.append((weight, weight * row.share, weight * rate, weight * rate * clicked))
        of, own, of_clicks, clicks = map(sum, zip(*found, strict=True)) if found else (0.0,) * 4
        if not of:
            return None
        return min(own / of, 1.0), min(clicks / of_clicks if of_clicks else own / of, 1.0)

    @cached_property
    def insights(self) -> dict[int, list[PortraitRow]]:
        """The insights about each tag that has a main effect, which add."""
        return {
            tag: _adding([row for row in self.by_tag[tag] if row.segment and row.effect is not None], self.fields)
            for tag in self.mains
        }

    @cached_property
    def overlaps(self) -> dict[tuple[int, int], float]:
        """Of pairs of segments of different fields, the share of the users who are in both."""
        pairs = [(a, b, share) for a, b, share in self.reading.portrait.overlaps]
        return {(a, b): share for a, b, share in pairs} | {(b, a): share for a, b, share in pairs}

    @cached_property
    def compared(self) -> dict[int, tuple[Compared, int]]:
        """What each tag is compared with, and where it is in that: the values of a dimension of its in which they
        exclude each other; else what was shown without it, other values being as frequent there as with it."""
        found: dict[int, tuple[Compared, int]] = {}
        names = self.reading.portrait.tags
        known = {tag: main for tag, main in self.mains.items() if main.share and main.ctr is not None}
        for dimension in dict.fromkeys(d for tag in known for d in names[tag]):
            values = [tag for tag in known if dimension in names[tag]]
            if sum(known[tag].share or 0.0 for tag in values) <= OVERLAP:
                made = Compared.of(self, values)
                found |= {tag: (made, i) for i, tag in enumerate(values) if tag not in found}
        return found | {tag: (Compared.of(self, [tag]), 0) for tag in known if tag not in found}

    def expected(self, tag: int) -> Logit | None:
        """The log-odds ratio of such users' clicks with the tag over what was shown in its place; None: not known."""
        if tag not in self.compared:
            return None
        among, at = self.compared[tag]
        deviation = among.deviation(at)
        if deviation is None:
            return None
        return Logit.of_ratio(self.mains[tag]).plus(deviation).plus(self._beyond(tag, among, at))

    def about(self, tag: int) -> Sequence[PortraitRow]:
        """The insights that go into what is expected of a tag, whoever they are about."""
        return self.compared[tag][0].rows if tag in self.compared else ()

    def rarest(self, tag: int) -> dict[tuple[str, ...], PortraitRow]:
        """Of each user field the cell of the rarest segment that the user is in, and whose preference is known."""
        rarest: dict[tuple[str, ...], PortraitRow] = {}
        for row in self.by_tag[tag]:
            fields = self.fields(row)
            if row.segment in self.inside and row.shrunk is not None:
                rarest[fields] = min(rarest.get(fields, row), row, key=lambda r: r.n)
        return rarest

    def _beyond(self, tag: int, among: Compared, at: int) -> Logit:
        """What the insights leave unsaid of these users: how far the shrunken preferences of the segments they are in
        reach beyond what follows from insights about the same field. Preferences too weak to be found are there."""
        low = high = 0.0
        for field in sorted(self.rarest(tag)):
            seen = among.preferred(self, at, field)
            said = among.deviation(at, field)
            if seen is not None and said is not None:
                low, high = low + min(0.0, seen.low - said.low), high + max(0.0, seen.high - said.high)
        return Logit(*map(_bounded, (0.0, low, high)))

    def fields(self, row: PortraitRow) -> tuple[str, ...]:
        """The user fields that a cell is about."""
        return tuple(sorted(self.reading.portrait.segments[row.segment]))


@dataclass(frozen=True)
class Compared:
    """The values of a dimension that are shown in each other's place, and the insights about them."""

    tags: Sequence[int]
    rows: Sequence[PortraitRow]  # insights
    kinds: Kinds | None  # None: where an insight does not say how many users it is about
    groupings: Sequence[Segments]
    stated: Mapping[int, int]  # grouping → the user's part

    @classmethod
    def of(cls, about: Evidence, tags: Sequence[int]) -> Self:
        """Of these tags, and of what else is shown."""
        rows = [row for tag in tags for row in about.insights[tag]]
        mains = [about.mains[tag] for tag in tags]
        shares = [main.share or 0.0 for main in mains]
        rates = [main.ctr or 0.0 for main in mains]
        rest = 1 - sum(shares)
        if rest > LEAST_REST:
            ratios = [math.exp(_log1p(main.effect)) for main in mains]
            sized = list(zip(shares, rates, ratios, strict=True))
            overall = sum(s * (s * r + (1 - s) * r / ratio) for s, r, ratio in sized) / sum(shares)
            left = (overall - sum(s * r for s, r, _ in sized)) / rest
            shares, rates = [*shares, rest], [*rates, min(max(left, LEAST_REST * overall), 1.0)]
        groupings = Segments.among(about, tags, rows)
        if any(group is None for group in groupings):
            return cls(tags, rows, None, (), {})
        known = [group for group in groupings if group is not None]
        if known:
            known += Segments.beside(about, tags, {field for group in known for field in group.fields})
        stated = {
            i: at for i, group in enumerate(known) if (at := group.part_of(about.users, about.inside)) is not None
        }
        made = [group.grouping(tags, len(shares), {}) for group in known]
        joint = {
            (i, j): table
            for i, one in enumerate(known)
            for j, other in enumerate(known[:i])
            if (table := one.joint(other, about.overlaps)) is not None
        }
        return cls(tags, rows, Kinds.of(np.array(shares), np.array(rates), made, stated, joint), known, stated)

    def deviation(self, at: int, fields: tuple[str, ...] | None = None) -> Logit | None:
        """How these users' log-odds ratio of the value differs from everybody's; its ends are those of the insights',
        added as if all erred together. `fields`: were nothing else said of them."""
        if self.kinds is None:
            return None
        stated = {i: part for i, part in self.stated.items() if fields in (None, self.groupings[i].fields)}
        value = self.kinds.beside_average(at, stated)
        low = high = value
        for end_of in self._ends:
            ends = [end.beside_average(at, stated) - value for end in end_of]
            low, high = low + min(0.0, *ends), high + max(0.0, *ends)
        return Logit(*map(_bounded, (value, low, high)))

    def preferred(self, about: Evidence, at: int, fields: tuple[str, ...]) -> Logit | None:
        """The same by the shrunken preferences alone, of the smallest segment of a field that the user is in: with the
        value, over those for what is shown in its place. None where they are not known."""
        if self.kinds is None:
            return None
        found = [about.rarest(tag).get(fields) for tag in self.tags]
        known = {i: row for i, row in enumerate(found) if row is not None and row.shrunk_low and row.shrunk_high}
        if at not in known:
            return None
        clicks = self.kinds.value_share * self.kinds.value_rate
        total, own = float(clicks.sum()), float(clicks[at])
        ends = {i: (math.log(row.shrunk_low or 1.0), math.log(row.shrunk_high or 1.0)) for i, row in known.items()}
        low, high = ends[at]
        if len(known) < len(clicks):  # of the rest nothing is known but that it is preferred the less
            if total <= own:
                return None
            low, high = low * total / (total - own), high * total / (total - own)
        else:
            others = {i: float(clicks[i]) / (total - own) for i in known if i != at}
            least, most = (math.log(sum(k * math.exp(ends[i][end]) for i, k in others.items())) for end in (0, 1))
            low, high = low - most, high - least
        odds = 1 - float(self.kinds.value_rate[at])  # ratios of rates, as ratios of odds
        return Logit(0.0, low / odds, high / odds)

    @cached_property
    def _ends(self) -> list[tuple[Kinds, Kinds]]:
        """The kinds, were an insight at the low or at the high end of its interval."""
        assert self.kinds is not None
        found = []
        for i, group in enumerate(self.groupings):
            for row in group.rows:
                low, high = (
                    self.kinds.where(i, group.grouping(self.tags, len(self.kinds.value_share), {row: end}).liking)
                    for end in Logit.of_effect(row)[1:]
                )
                found.append((low, high))
        return found


@dataclass(frozen=True)
class Segments:
    """Segments of a user field of which each two are apart, or one is in the other; and insights about them."""

    fields: tuple[str, ...]
    segments: list[int]
    inside: list[list[int]]  # of each segment, the positions of those that it is in, itself among them
    share: list[float]
    clicks: list[float]
    rows: list[PortraitRow]

    @classmethod
    def among(cls, about: Evidence, tags: Sequence[int], rows: Sequence[PortraitRow]) -> list[Self | None]:
        """The segments that insights are about, grouped so; None for one whose share of the users is not known."""
        found: list[Self | None] = []
        sizes = {segment: about.size(segment, tags) for segment in {row.segment for row in rows}}
        for segment in sorted(sizes, key=lambda s: (-(sizes[s] or (0.0, 0.0))[0], s)):
            size, own = sizes[segment], [row for row in rows if row.segment == segment]
            if size is None:
                return [None]
            names = about.reading.portrait.segments
            fields = about.fields(own[0])
            for group in found:
                if group is None or group.fields != fields:
                    continue
                nested = [_nested(names[segment], names[other]) for other in group.segments]
                if None not in nested:
                    group.inside.append([i for i, within in enumerate(nested) if within] + [len(group.segments)])
                    break
            else:
                group = cls(fields, [], [[0]], [], [], [])
                found.append(group)
            group.segments.append(segment)
            group.share.append(size[0])
            group.clicks.append(size[1])
            group.rows.extend(own)
        return found

    @classmethod
    def beside(cls, about: Evidence, tags: Sequence[int], fields: Collection[str]) -> list[Self]:
        """The smallest segments that the user is in, of other fields: they may go together with those of insights."""
        found: dict[tuple[str, ...], tuple[float, float, int]] = {}
        for segment in about.inside:
            own, size = tuple(sorted(about.reading.portrait.segments[segment])), about.size(segment, tags)
            if size is not None and not set(own) & set(fields):
                found[own] = min(found.get(own, (*size, segment)), (*size, segment))
        return [cls(own, [at], [[0]], [share], [clicks], []) for own, (share, clicks, at) in sorted(found.items())]

    def joint(self, other: Self, overlaps: Mapping[tuple[int, int], float]) -> Floats | None:
        """Shares of the users by the parts of both; None where it is not known which users are in both."""
        both = np.zeros((len(self.segments) + 1, len(other.segments) + 1))
        both[:-1, -1], both[-1, :-1], both[-1, -1] = self.share, other.share, 1.0
        for i, j in np.ndindex(len(self.segments), len(other.segments)):
            known = overlaps.get((self.segments[i], other.segments[j]))
            if known is None:
                return None
            both[i, j] = known
        return np.asarray(np.maximum(self.apart @ both @ other.apart.T, 0.0))

    @property
    def apart(self) -> Floats:
        """(parts, segments and everybody) what makes parts of them: each without those that are directly in it."""
        n = len(self.segments)
        found = np.eye(n + 1)
        for i in range(n):
            around = [j for j in self.inside[i] if j != i]
            found[max(around, key=lambda j: len(self.inside[j]), default=n), i] = -1.0
        return found

    def part_of(self, users: Names, inside: set[int]) -> int | None:
        """In which part a user is: the smallest segment, or (the last part) in none; None where it was not said."""
        if not users.keys() >= set(self.fields):
            return None
        within = [i for i, segment in enumerate(self.segments) if segment in inside]
        return max(within, key=lambda i: len(self.inside[i]), default=len(self.segments))

    def grouping(self, tags: Sequence[int], values: int, instead: Mapping[PortraitRow, float]) -> Grouping:
        """Each segment without those in it, and the users in none, as a partition; `instead`: logits of insights."""
        n = len(self.segments)
        share, clicks = (np.maximum(self.apart @ np.array([*of, 1.0]), LEAST) for of in (self.share, self.clicks))
        liking = np.zeros((n + 1, values))
        for row in self.rows:
            logit = instead.get(row, Logit.of_effect(row).value)
            about = self.segments.index(row.segment)
            liking[[i for i in range(n) if about in self.inside[i]], tags.index(row.tag)] += logit
        return Grouping(share / share.sum(), np.clip(clicks / share, LEAST, 1 / LEAST), liking)


def _nested(segment: Names, other: Names) -> bool | None:
    """Whether a segment is in another one of its field; None where they merely overlap."""
    within = []
    for field, label in segment.items():
        a, b = ends_of(label), ends_of(other[field])
        if label == other[field]:
            within.append(True)
        elif a is None or b is None or a[1] <= b[0] or b[1] <= a[0]:
            return False
        else:
            within.append(b[0] <= a[0] and a[1] <= b[1])
    return True if all(within) else None


def _adding(rows: Sequence[PortraitRow], fields: Callable[[PortraitRow], tuple[str, ...]]) -> list[PortraitRow]:
    """Those insights about one tag that add: of one model, or the surest about a user field, where none is of it."""
    groups: dict[tuple[str, ...], list[PortraitRow]] = defaultdict(list)
    for row in rows:
        groups[fields(row)].append(row)
    found = []
    for group in groups.values():
        joint = [row for row in group if Method.STATISTICS in (row.found_by or {Method.STATISTICS: 0})]
        found += joint or [min(group, key=lambda row: 1.0 if row.q_value is None else row.q_value)]
    return found
