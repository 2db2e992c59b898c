"""What to design for some users in a scene, by a portrait of it; and which tags were never tried enough to know.

Nothing is stored here: a portrait (portraits.py) is read, and what it says is put together for one user.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

from sqlalchemy import select

from kaleidoscope import wording
from kaleidoscope.database import Session
from kaleidoscope.errors import InputError
from kaleidoscope.portraits import (
    CellView,
    PortraitView,
    Reading,
    TagNow,
    TagStatus,
    View,
    find_portrait,
    no_attribute,
)
from kaleidoscope.scenes import get_scene, options_of, spec_of
from kaleidoscope.tables import Material, Portrait, PortraitRow
from kaleidoscope.taxonomy import Tag, Unknown, current_taxonomy, mapping_between, translate
from kaleidoscope.vocabulary import ReviewState
from kaleidoscope.wording import Language, Names, ends_of

MISSING = "missing"  # the label of a segment of whom a field is not known
JOINT = "statistics"  # the method whose insights are of one model, so that they add
LEVEL_DIFFERENCE, POWER, ALPHA = 0.2, 0.8, 0.05  # what a tag has to be shown often enough to see
MOST_LOGIT = 25.0  # an end of an interval beyond says no more, and what is made of several stays a number
OVERLAP = 1.01  # exposures of a dimension's values over all exposures, up to which they exclude each other

Reason = Literal["never", "too_few", "not_compared"]
Where = Literal["scene", "library", "nobody"]


# ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────────────


class PartView(View):
    """An insight about the user that an expectation holds, of the tag or of what was shown in its place."""

    segment: dict[str, str]
    tag: dict[str, str]
    effect: float
    effect_low: float
    effect_high: float
    q_value: float | None


class WeakerView(View):
    """A shrunken preference: a ratio, 1 is none. Weaker evidence than an insight."""

    segment: dict[str, str]
    shrunk: float
    low: float | None
    high: float | None
    n: int


class DesignTag(View):
    """What is expected of a tag: odds of a click against what was shown in its place, minus 1; None: not known."""

    tag: dict[str, str]
    was: dict[str, str] | None
    status: TagStatus
    expected: float | None
    low: float | None  # a conservative interval: the parts' intervals added, as if they erred together
    high: float | None
    insights: list[PartView]
    weaker: list[WeakerView]
    n: int | None  # exposures of such users to it, at most
    enough: bool | None  # whether that shows a difference of 20 %
    sentence: str


class DesignDimension(View):
    """The values of a dimension, what is expected of them, best first."""

    dimension: str
    label: str
    tags: list[DesignTag]


class Untried(View):
    """A tag value of today's vocabulary of which these users have seen too little."""

    tag: dict[str, str]
    reason: Reason
    n: int | None  # exposures of such users, at most
    where: Where  # who could show it: materials of the scene, others of the library, or nobody yet
    sentence: str


class Design(View):
    """What to design for some users in a scene, and what nobody knows because it was never tried enough."""

    portrait: PortraitView
    attributes: dict[str, str | None]
    segments: list[dict[str, str]]  # that the user is in
    notes: list[str]
    dimensions: list[DesignDimension]
    together: list[CellView]  # insights of several tags or attributes at once: no part of what is expected of one
    untried: list[Untried]
    click_rate: float | None  # of these users
    needed: int | None  # exposures of a tag that show a difference of 20 %
    rule: str
    says: list[str]


# ── putting it together ─────────────────────────────────────────────────────────────────────────────────────────────


def design_for(
    session: Session,
    scene_id: str,
    attributes: Mapping[str, object],
    *,
    number: int | None = None,
    language: Language = "en",
) -> Design:
    """What to design for users with these attributes, by a portrait of the scene (by default the newest).

    A value of None (or an empty text) is one that is known to be missing. On the logit scale a tag is expected to do
    what it does with everybody; plus every insight about a segment that the user is in, less what the average already
    holds of each insight, log(1 − s + s·exp(γ)) at its segment's share s of the tag's exposures; less the same of the
    other values of its dimension, by their share of the clicks on what was shown in its place. Insights of one tag add
    where they are of method `statistics`, whose model holds all of them; of what only other methods found the surest
    of each user field counts. Their covariances are not stored: the interval adds the intervals of the parts, which is
    right if all err together, and wider than need be otherwise. Fields that are not among the attributes are averaged
    over, as users are in the log.

    Raises InputError for an attribute that the portrait does not know, naming those it knows, and for a value that is
    no number where it has to be; NotFoundError where there is no such scene or portrait.
    """
    reading = Reading(session, find_portrait(session, scene_id, number), language)
    told, labels, notes = _labels_of(reading.portrait.segments, attributes, language)
    segments: list[dict[str, str]] = reading.portrait.segments
    inside = {i for i, s in enumerate(segments) if s and all(s[f] in labels.get(f, ()) for f in s)}
    wanted = reading.query.where(PortraitRow.segment.in_([0, *inside]) | PortraitRow.effect.is_not(None))
    cells = list(session.scalars(wanted.order_by(PortraitRow.position)))
    about = _About(reading, inside, cells, {field: MISSING if v is None else v for field, v in told.items()})
    dimensions = about.dimensions()
    rule = wording.needed_rule(about.click_rate, about.needed, language=language)
    untried = _untried(session, scene_id, about)
    headline = wording.design_headline(
        told, scene_id, reading.portrait.number, simulated=reading.portrait.simulated, language=language
    )
    return Design(
        portrait=PortraitView.model_validate(reading.portrait),
        attributes=told,
        segments=[segments[i] for i in sorted(inside)],
        notes=notes,
        dimensions=dimensions,
        together=[CellView.model_validate(reading.cell(row)) for row in about.together()],
        untried=untried,
        click_rate=about.click_rate,
        needed=about.needed,
        rule=rule,
        says=[headline, *(t.sentence for d in dimensions for t in d.tags), rule, *(u.sentence for u in untried)],
    )


def _labels_of(
    segments: Sequence[Names], attributes: Mapping[str, object], language: Language
) -> tuple[dict[str, str | None], dict[str, set[str]], list[str]]:
    """The attributes as text, the labels that a user with them is in by field, and what there is to know about them."""
    known: dict[str, set[str]] = defaultdict(set)
    for segment in segments:
        for field, label in segment.items():
            known[field].add(label)
    told: dict[str, str | None] = {}
    labels: dict[str, set[str]] = {}
    notes = []
    for field, given in attributes.items():
        if field not in known:
            raise InputError(no_attribute(field, sorted(known)))
        text = "" if given is None else str(given).strip()
        told[field] = None if text in ("", MISSING) else text
        bins = {label: ends for label in known[field] if (ends := ends_of(label)) is not None}
        if told[field] is None:
            labels[field] = {MISSING} & known[field]
        elif bins:
            value = _number(field, text)
            labels[field] = {label for label, (low, high) in bins.items() if low <= value < high}
        else:
            labels[field] = {text, str(given)} & known[field]
        if not labels[field]:
            notes.append(wording.no_segment_note(field, told[field], sorted(known[field])[:20], language=language))
    left = [field for field in sorted(known) if field not in attributes]
    if left:
        notes.append(wording.not_said_note(left, language=language))
    return told, labels, notes


def _number(field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"attributes: {wording.plain(field)} is a number, and {wording.plain(text)!r} is none. Give one, or nothing"
            " where it is not known."
        )
    return value


class _Logit(NamedTuple):
    """An estimate on the logit scale, with its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_effect(cls, row: PortraitRow) -> _Logit:
        """Of exp(γ) − 1."""
        return cls(*(_log1p(effect) for effect in (row.effect, row.effect_low, row.effect_high)))

    @classmethod
    def of_ratio(cls, row: PortraitRow) -> _Logit:
        """Of a ratio of click rates minus 1, at the click rate that was seen with the tag."""
        return cls(*(_log_odds(effect, row.ctr) for effect in (row.effect, row.effect_low, row.effect_high)))

    def beside_average(self, share: float, *, inside: bool) -> Self:
        """What it adds to the average over all users for one who is inside of its segment, or outside; `share` of
        them are inside. Odds average, not their logarithms."""
        value, *ends = (inside * x - math.log1p(share * math.expm1(x)) for x in self)
        return type(self)(value, *sorted(ends))

    def plus(self, other: Self) -> Self:
        """Both, as if they erred together."""
        return type(self)(*(_bounded(a + b) for a, b in zip(self, other, strict=True)))

    def minus(self, other: Self) -> Self:
        """The difference, as if they erred apart."""
        turned = type(self)(-other.value, -other.high, -other.low)
        return self.plus(turned)


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
class _About:
    """What a portrait says about a user who is in the segments `inside`."""

    reading: Reading
    inside: set[int]
    cells: Sequence[PortraitRow]  # of everybody and of those segments, and all insights
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
    def click_rate(self) -> float | None:
        """Of the rarest of the user's segments; of everybody where there is none."""
        found: dict[int, list[PortraitRow]] = defaultdict(list)
        for row in self.cells:
            if row.clicks is not None and row.n and not row.crossed and row.segment in (self.inside or {0}):
                found[row.segment].append(row)
        if not found:
            return None
        rarest = min(found.values(), key=lambda rows: sum(row.n for row in rows) / len(rows))
        return sum(row.clicks or 0 for row in rarest) / sum(row.n for row in rarest)

    @cached_property
    def needed(self) -> int | None:
        """Exposures with a tag, and as many without it, that show a difference of 20 % with a power of .8."""
        from kaleidoscope.coverage import exposures_needed

        if self.click_rate is None or not 0 < self.click_rate < 1 / (1 + LEVEL_DIFFERENCE):
            return None
        import numpy as np

        both = exposures_needed(np.array([[0.5, 0.5]]), self.click_rate, LEVEL_DIFFERENCE, power=POWER, alpha=ALPHA)
        return math.ceil(float(both[0]) / 2)

    @cached_property
    def seen(self) -> dict[Tag, int]:
        """How often, at most, such users saw each tag value: the least of what the segments they are in saw."""
        found: dict[Tag, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for tag, rows in self.by_tag.items():
            for row in rows:
                if row.segment in (self.inside or {0}):
                    for part in dict.fromkeys(self.reading.tags[tag].parts):
                        found[part][row.segment] += row.n
        return {part: min(counts.values()) for part, counts in found.items()}

    def dimensions(self) -> list[DesignDimension]:
        """The tags that can be given today, by dimension in the vocabulary's order, best first."""
        found: dict[str, list[DesignTag]] = defaultdict(list)
        for tag, rows in self.by_tag.items():
            now = self.reading.tags[tag]
            if now.status in ("split", "retired"):
                continue
            made = self._tag(tag, now, rows)
            for dimension in now.tag:
                found[dimension].append(made)
        order = {d.id: i for i, d in enumerate(self.reading.vocabulary.dimensions)}
        return [
            DesignDimension(
                dimension=dimension,
                label=self._label(dimension),
                tags=sorted(tags, key=lambda t: (t.expected is None, -(t.expected or 0.0), sorted(t.tag.items()))),
            )
            for dimension, tags in sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
        ]

    def _label(self, dimension_id: str) -> str:
        dimension = self.reading.vocabulary.dimension(dimension_id)
        return dimension_id if dimension is None else getattr(dimension.labels, self.reading.language)

    @cached_property
    def mains(self) -> dict[int, PortraitRow]:
        """The main effect of each tag that has one."""
        return {row.tag: row for row in self.cells if row.segment == 0 and row.effect is not None and not row.crossed}

    @cached_property
    def insights(self) -> dict[int, list[PortraitRow]]:
        """The insights about each tag that has a main effect, which add."""
        return {
            tag: _adding([row for row in self.by_tag[tag] if row.segment and row.effect is not None], self._fields)
            for tag in self.mains
        }

    @cached_property
    def deviations(self) -> dict[int, _Logit]:
        """How far the user deviates from the average user, by tag; of what is not said of the user, not at all."""
        found = {}
        for tag, rows in self.insights.items():
            total = _Logit(0.0, 0.0, 0.0)
            for row in rows:
                if not self.users.keys() >= set(self._fields(row)):
                    continue
                share = min(1.0, row.n / max(self.mains[tag].n, 1))
                inside = row.segment in self.inside
                total = total.plus(_Logit.of_effect(row).beside_average(share, inside=inside))
            found[tag] = total
        return found

    def _in_its_place(self, tag: int) -> dict[int, float]:
        """The other values of a dimension of the tag's in which they exclude each other, by their share of the clicks
        on what was shown in its place. Where several are shown at once, the others are as frequent with it as without.
        """
        names = self.reading.portrait.tags
        for dimension in names[tag]:
            shown = {other: main for other, main in self.mains.items() if dimension in names[other]}
            if sum(main.n for main in shown.values()) <= OVERLAP * self.reading.portrait.exposures:
                shown.pop(tag, None)
                counted = all(main.clicks is not None for main in shown.values())
                clicks = {other: (main.clicks or 0) if counted else main.n for other, main in shown.items()}
                total = sum(clicks.values())
                return {other: n / total for other, n in clicks.items() if n}
        return {}

    def _tag(self, tag: int, now: TagNow, rows: Sequence[PortraitRow]) -> DesignTag:
        main = self.mains.get(tag)
        total: _Logit | None = None
        parts: list[PartView] = []
        if main is not None:
            place = self._in_its_place(tag)
            total = _Logit.of_ratio(main).plus(self.deviations[tag])
            if place:
                total = total.minus(_mean({other: self.deviations[other] for other in place}, place))
            counted = [row for one in (tag, *place) for row in self.insights[one]]
            parts = [self._part(row) for row in counted if row.segment in self.inside]
        counts = [self.seen[part] for part in now.parts if part in self.seen]
        n = min(counts, default=None)
        enough = None if n is None or self.needed is None else n >= self.needed
        expected, low, high = (None, None, None) if total is None else (math.expm1(end) for end in total)
        sentence = wording.expected_sentence(
            self.reading.words(now.tag),
            expected,
            low,
            high,
            len(parts),
            # Of the main effect: beside what is known of such users it says nothing of what is expected.
            q_value=main.q_value if main is not None and total == _Logit.of_ratio(main) else None,
            too_few=n if enough is False else None,
            language=self.reading.language,
        )
        was = None if now.was is None else self.reading.words(now.was)
        return DesignTag(
            tag=now.tag,
            was=now.was,
            status=now.status,
            expected=expected,
            low=low,
            high=high,
            insights=parts,
            weaker=self._weaker(rows),
            n=n,
            enough=enough,
            sentence=self.reading.join(
                sentence, wording.status_sentence(now.status, was, language=self.reading.language)
            ),
        )

    def _fields(self, row: PortraitRow) -> tuple[str, ...]:
        return tuple(sorted(self.reading.portrait.segments[row.segment]))

    def _part(self, row: PortraitRow) -> PartView:
        return PartView.model_validate(
            {
                "segment": self.reading.portrait.segments[row.segment],
                "tag": self.reading.tags[row.tag].tag,
                **{name: getattr(row, name) for name in ("effect", "effect_low", "effect_high", "q_value")},
            }
        )

    def _weaker(self, rows: Sequence[PortraitRow]) -> list[WeakerView]:
        """Of each user field the preference of the rarest segment that the user is in."""
        rarest: dict[tuple[str, ...], PortraitRow] = {}
        for row in rows:
            fields = self._fields(row)
            if row.segment in self.inside and row.shrunk is not None:
                rarest[fields] = min(rarest.get(fields, row), row, key=lambda r: r.n)
        return [
            WeakerView(
                segment=self.reading.portrait.segments[row.segment],
                shrunk=row.shrunk or 0.0,
                low=row.shrunk_low,
                high=row.shrunk_high,
                n=row.n,
            )
            for _, row in sorted(rarest.items())
        ]

    def together(self) -> list[PortraitRow]:
        """Insights about the user of values that work together, of tags that can be given today."""
        return [
            row
            for row in self.cells
            if row.crossed
            and row.effect is not None
            and row.segment in self.inside
            and self.reading.tags[row.tag].status not in ("split", "retired")
        ]


def _mean(logits: Mapping[int, _Logit], shares: Mapping[int, float]) -> _Logit:
    """Of odds, by their shares."""
    return _Logit(*(math.log(sum(shares[i] * math.exp(one[end]) for i, one in logits.items())) for end in range(3)))


def _adding(rows: Sequence[PortraitRow], fields: Any) -> list[PortraitRow]:
    """Those insights about one tag that add: of one model, or the surest about a user field, where none is of it."""
    groups: dict[tuple[str, ...], list[PortraitRow]] = defaultdict(list)
    for row in rows:
        groups[fields(row)].append(row)
    found = []
    for group in groups.values():
        joint = [row for row in group if JOINT in (row.found_by or {JOINT: 0})]
        found += joint or [min(group, key=lambda row: 1.0 if row.q_value is None else row.q_value)]
    return found


# ── what was never tried enough ─────────────────────────────────────────────────────────────────────────────────────


def _untried(session: Session, scene_id: str, about: _About) -> list[Untried]:
    """The values that can be given today and that such users saw too rarely, or never; the scene's own first."""
    reading = about.reading
    where = _where(session, scene_id)
    compared = {part for now in reading.tags for part in now.parts}
    shown, mixed = _shown_now(session, reading.portrait)
    found = []
    for dimension in reading.vocabulary.dimensions:
        for value in dimension.values:
            tag: Tag = (dimension.id, value.id)
            if dimension.retired or value.retired:
                continue
            names, n = {tag[0]: tag[1]}, about.seen.get(tag)
            words = reading.words(names)
            reason: Reason = "never"
            if tag in compared:
                if n and about.needed is not None and n >= about.needed:
                    continue
                reason = "too_few" if n != 0 else "never"
                said = wording.not_enough_sentence(about.users, words, n, about.needed, language=reading.language)
            elif tag in mixed:
                reason, said = "not_compared", wording.mixed_sentence(words, language=reading.language)
            elif shown is None or shown.get(tag):
                reason, n = "not_compared", None if shown is None else shown[tag]
                said = wording.not_compared_sentence(words, n, language=reading.language)
            else:
                n, said = 0, wording.not_enough_sentence({}, words, 0, about.needed, language=reading.language)
            found.append(Untried(tag=names, reason=reason, n=n, where=where.get(tag, "nobody"), sentence=said))
    order: tuple[Where, ...] = ("scene", "library", "nobody")
    return sorted(found, key=lambda one: order.index(one.where))


def _shown_now(session: Session, portrait: Portrait) -> tuple[dict[Tag, int] | None, set[Tag]]:
    """How often each tag value of today was shown to anybody (None: the analysis did not say), and those that came out
    of a split since, of which nobody knows."""
    if not portrait.shown:
        return None, set()
    before = [(d, v) for d, values in portrait.shown.items() for v in values]
    now: Sequence[Tag | Unknown] = before
    if portrait.taxonomy is not None:
        number, _ = current_taxonomy(session)
        now = translate(before, [mapping_between(session, portrait.taxonomy, number)])
    counts: dict[Tag, int] = defaultdict(int)
    mixed: set[Tag] = set()
    for (dimension, value), tag in zip(before, now, strict=True):
        if isinstance(tag, Unknown):
            mixed |= tag.of
        else:
            counts[tag] += portrait.shown[dimension][value]
    return dict(counts), mixed


def _where(session: Session, scene_id: str) -> dict[Tag, Where]:
    """Whose materials carry each tag today: the scene's, or others of the library."""
    mine = {material for slot in spec_of(get_scene(session, scene_id)).slots for material in slot.materials}
    gone = (ReviewState.RETIRED, ReviewState.REJECTED)
    usable = [m for m in session.scalars(select(Material)) if m.state not in gone]
    found: dict[Tag, Where] = {}
    for id, option in options_of(session, usable).items():
        for dimension, values in option.tags.items():
            for value in values:
                if id in mine or (dimension, value) not in found:
                    found[(dimension, value)] = "scene" if id in mine else "library"
    return found
