"""What to design for some users in a scene, by a portrait of it; and which tags were never tried enough to know.

Nothing is stored here: a portrait (portraits.py) is read, and what follows from it for one user (expectation.py) told.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from sqlalchemy import select

from kaleidoscope import wording
from kaleidoscope.database import Session
from kaleidoscope.errors import InputError
from kaleidoscope.expectation import Evidence
from kaleidoscope.portraits import (
    CellView,
    Moment,
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
LEVEL_DIFFERENCE, POWER, ALPHA = 0.2, 0.8, 0.05  # what a tag has to be shown often enough to see

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
    n: int | None  # independent exposures of such users to it, at most: what they saw, weighted by propensity
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
    n: int | None  # independent exposures of such users, at most
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
    at: Moment | None = None,
    language: Language = "en",
) -> Design:
    """What to design for users with these attributes, by a portrait of the scene (by default the newest; `number` and
    `at` are find_portrait's).

    A value of None (or an empty text) is one that is known to be missing. On the logit scale a tag is expected to do
    what it does with everybody, plus how these users differ from everybody by the insights: click rates of all kinds
    of users with all values of the dimension are put together (kinds.py) so that everybody's rate with each value, each
    segment's rate, and the insights' odds ratios hold. All of these are as if every variant had been shown to everybody
    alike: what a model liked to show is weighed out. Insights of one tag add where they are of method `statistics`,
    whose model holds all of them; of what only other methods found the surest of each user field counts. Their
    covariances are not stored: the interval adds what each part's interval does, which is right if all err together,
    and wider than need be otherwise. Fields that are not among the attributes are averaged over.

    Raises InputError for an attribute that the portrait does not know, naming those it knows, and for a value that is
    no number where it has to be; NotFoundError where there is no such scene or portrait.
    """
    reading = Reading(session, find_portrait(session, scene_id, number, at), language)
    told, labels, notes = _labels_of(reading.portrait.segments, attributes, language)
    segments: list[dict[str, str]] = reading.portrait.segments
    inside = {i for i, s in enumerate(segments) if s and all(s[f] in labels.get(f, ()) for f in s)}
    with_insights = set(session.scalars(reading.query.where(PortraitRow.effect.is_not(None))
                                        .with_only_columns(PortraitRow.segment).distinct()))  # fmt: skip
    wanted = reading.query.where(PortraitRow.segment.in_([0, *inside, *with_insights]))
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


class _About(Evidence):
    """What a portrait says about a user, told."""

    @cached_property
    def click_rate(self) -> float | None:
        """Of the rarest of the user's segments, were every variant shown alike; of everybody where there is none."""
        found: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
        for tag, main in self.mains.items():
            for row in self.by_tag[tag]:
                told = row.segment in (self.inside or {0}) and None not in (main.share, row.share, row.ctr)
                if told:
                    size = (main.share or 0.0) * ((row.share or 0.0) if row.segment else 1.0)
                    found[row.segment].append((size, size * (row.ctr or 0.0), main.share or 0.0))
        rates = [
            (size / of, clicks / size)
            for size, clicks, of in (map(sum, zip(*rows, strict=True)) for rows in found.values())
            if size > 0
        ]
        return min(rates)[1] if rates else None

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
        """What such users saw of each tag value, at most: the least of what the segments they are in saw, in exposures
        that are independent and equally weighted. Of a model's favourite they saw more, and learned less."""
        found: dict[Tag, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for tag, rows in self.by_tag.items():
            for row in rows:
                if row.segment in (self.inside or {0}) and row.independent is not None:
                    for part in dict.fromkeys(self.reading.tags[tag].parts):
                        found[part][row.segment] += row.independent
        return {part: math.ceil(min(counts.values())) for part, counts in found.items()}

    def dimensions(self) -> list[DesignDimension]:
        """The tags that can be given today, by dimension in the vocabulary's order, best first."""
        found: dict[str, list[DesignTag]] = defaultdict(list)
        for tag in self.by_tag:
            now = self.reading.tags[tag]
            if now.status in ("split", "retired"):
                continue
            made = self._tag(tag, now)
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

    def _tag(self, tag: int, now: TagNow) -> DesignTag:
        main, total = self.mains.get(tag), self.expected(tag)
        parts = [self._part(row) for row in self.about(tag) if row.segment in self.inside]
        told = {field for row in self.about(tag) for field in self.fields(row)}
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
            q_value=main.q_value if main is not None and not told & self.users.keys() else None,
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
            weaker=self._weaker(tag),
            n=n,
            enough=enough,
            sentence=self.reading.join(
                sentence, wording.status_sentence(now.status, was, language=self.reading.language)
            ),
        )

    def _part(self, row: PortraitRow) -> PartView:
        return PartView.model_validate(
            {
                "segment": self.reading.portrait.segments[row.segment],
                "tag": self.reading.tags[row.tag].tag,
                **{name: getattr(row, name) for name in ("effect", "effect_low", "effect_high", "q_value")},
            }
        )

    def _weaker(self, tag: int) -> list[WeakerView]:
        """Of each user field the preference of the rarest segment that the user is in."""
        return [
            WeakerView(
                segment=self.reading.portrait.segments[row.segment],
                shrunk=row.shrunk or 0.0,
                low=row.shrunk_low,
                high=row.shrunk_high,
                n=row.n,
            )
            for _, row in sorted(self.rarest(tag).items())
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
