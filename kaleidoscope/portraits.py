"""Portraits: who prefers which tag in a scene: stored by analysis, and read in today's words.

An analysis is stored whole, with the facts of its log, and never changed; the next one is added beside it. Tags are
kept as they were, and translated when they are read (taxonomy.py). How the log is analysed is nothing known here; what
to design by a portrait is in portrait_design.py.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Select, func, select
from sqlalchemy.orm import defer

from kaleidoscope import wording
from kaleidoscope.database import PAGE, Page, Session, add_rows, check_moment, find, paginate
from kaleidoscope.errors import InputError, NotFoundError, TooLargeError
from kaleidoscope.scenes import get_scene
from kaleidoscope.tables import Portrait, PortraitRow, Scene, TaxonomyVersion
from kaleidoscope.taxonomy import Tag, Taxonomy, Unknown, current_taxonomy, mapping_between, taxonomy_at, translate
from kaleidoscope.terminal import printable
from kaleidoscope.vocabulary import Role
from kaleidoscope.wording import Language, Names

MAX_CELLS = 1_000_000  # of one analysis

TagStatus = Literal["current", "renamed", "merged", "split", "retired", "unknown", "unversioned"]
Format = Literal["csv", "json", "parquet"]
Moment = datetime | date  # a moment with a zone, or a day in UTC


# ── what is stored ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PortraitRun:
    """One analysis of a scene's log, and the facts of the log that it is true of."""

    log_hash: str  # the same for the same exposures and outcomes
    taxonomy: int | None  # number of the version that the tags are of; None: they are of none
    exposures: int
    units: int | None
    methods: tuple[str, ...]
    since: datetime | None = None  # of the exposures
    until: datetime | None = None
    releases: tuple[int, ...] = ()  # that the exposures are of
    buckets: tuple[str, ...] = ()
    seed: int | None = None
    simulated: bool = False  # the users are not real
    # Dimension → value → exposures, of every value that was shown, whether or not it can be compared; empty: not known.
    shown: Mapping[str, Mapping[str, int]] | None = None
    # (segment, segment of another field, share of the users in both): such as are not here are taken to be independent.
    overlaps: Sequence[tuple[Names, Names, float]] = ()

    @property
    def run_hash(self) -> str:
        """The same for the same log analysed in the same way by the same version."""
        facts = {
            "log": self.log_hash,
            "taxonomy": self.taxonomy,
            "releases": sorted(self.releases),
            "period": [
                None if at is None else check_moment("period", at).isoformat() for at in (self.since, self.until)
            ],
            "buckets": sorted(self.buckets),
            "methods": sorted(self.methods),
            "seed": self.seed,
            "version": version("kaleidoscope"),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PortraitCell:
    """How a segment takes a tag. Without a field the segment is everybody, and the effect a main effect.

    Intervals are of 95 %; None is what is not known. Values of one dimension that never vary apart are joined by `|`.
    """

    segment: Names
    tag: Names
    n: int  # exposures of the segment to the tag
    clicks: int | None = None
    ctr: float | None = None
    ctr_low: float | None = None
    ctr_high: float | None = None
    preference: float | None = None  # standardised; a ratio, 1 is none
    preference_low: float | None = None
    preference_high: float | None = None
    shrunk: float | None = None  # the same, pulled towards 1 where little is known
    shrunk_low: float | None = None
    shrunk_high: float | None = None
    # exp(γ) − 1 where it is reported as an insight, and nowhere else; of the joint model of method `statistics` where
    # that found it. Of everybody: a ratio of click rates, minus 1.
    effect: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    q_value: float | None = None
    found_by: Mapping[str, int] | None = None  # method → sign, of those that found it
    explained_by: tuple[tuple[Names, Names], ...] = ()  # (segment, tag): what this explains
    crossed: bool = False  # its values work together: no effect of any of them alone
    # As exposures count, weighted by propensity, never as they were chosen. Of a segment: its part of the tag's
    # exposures, and of the clicks on it; of everybody: the tag's part of all exposures, were all variants shown alike.
    share: float | None = None
    click_share: float | None = None  # of a segment alone
    independent: float | None = None  # as how many independent exposures `n` count

    @property
    def insight(self) -> bool:
        """Whether it was reported of a segment."""
        return bool(self.segment) and self.effect is not None


NUMBERS = (
    "share", "click_share", "independent", "ctr", "ctr_low", "ctr_high",
    "preference", "preference_low", "preference_high", "shrunk", "shrunk_low", "shrunk_high",
    "effect", "effect_low", "effect_high", "q_value",
)  # fmt: skip


SHARES = ("share", "click_share", "ctr", "ctr_low", "ctr_high", "q_value")  # from 0 to 1
ROUNDING = 1e-9


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


class View(BaseModel):
    """Base of what is read."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class PortraitView(View):
    """An analysis, without its cells."""

    scene_id: str
    number: int
    author: str
    created_at: datetime
    log_hash: str
    taxonomy: int | None
    releases: list[int]
    since: datetime | None
    until: datetime | None
    exposures: int
    units: int | None
    buckets: list[str]
    methods: list[str]
    seed: int | None
    simulated: bool
    cells: int
    insights: int


class PairView(View):
    """A segment and a tag."""

    segment: dict[str, str]
    tag: dict[str, str]


class CellView(View):
    """How a segment takes a tag, in today's words; `status` says what became of the tag since."""

    segment: dict[str, str]
    tag: dict[str, str]
    was: dict[str, str] | None  # the tag as it was, where it is called otherwise now
    status: TagStatus
    n: int
    clicks: int | None
    share: float | None
    click_share: float | None
    independent: float | None
    ctr: float | None
    ctr_low: float | None
    ctr_high: float | None
    preference: float | None
    preference_low: float | None
    preference_high: float | None
    shrunk: float | None
    shrunk_low: float | None
    shrunk_high: float | None
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    q_value: float | None
    crossed: bool
    found_by: dict[str, int]
    explained_by: list[PairView]
    sentence: str


class PortraitPage(View):
    """A portrait and a page of its cells, in the order of what matters."""

    portrait: PortraitView
    items: list[CellView]
    next_cursor: str | None


class Stored(NamedTuple):
    """What came of storing an analysis."""

    portrait: PortraitView
    new: bool  # else the same one was there


# ── storing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def store_portrait(session: Session, scene_id: str, run: PortraitRun, cells: Iterable[PortraitCell]) -> Stored:
    """The analysis as the scene's newest portrait; the same analysis of the same log is stored once.

    Raises InputError for a cell that is there twice or holds numbers that cannot be, NotFoundError where there is no
    such scene or version of the taxonomy, TooLargeError beyond MAX_CELLS.
    """
    session.caller.require(Role.EDITOR)
    find(session, Scene, scene_id, lock=True)  # of two at once, the second sees the first
    if run.taxonomy is not None:
        find(session, TaxonomyVersion, run.taxonomy)
    known = session.scalar(_portraits(session, scene_id).where(Portrait.run_hash == run.run_hash))
    if known is not None:
        return Stored(PortraitView.model_validate(known), new=False)
    ordered = sorted(_checked(cells), key=_importance)
    segments, tags = _Positions([{}]), _Positions([])
    number = (_newest_number(session, scene_id) or 0) + 1
    rows = [
        {
            "scene_id": scene_id,
            "number": number,
            "position": position,
            "segment": segments.of(cell.segment),
            "tag": tags.of(cell.tag),
            "n": int(cell.n),
            "clicks": None if cell.clicks is None else int(cell.clicks),
            **{name: _kept(name, getattr(cell, name)) for name in NUMBERS},
            "crossed": bool(cell.crossed),
            "found_by": {_storable(method): int(sign) for method, sign in cell.found_by.items()}
            if cell.found_by
            else None,
            "explained_by": [[segments.of(s), tags.of(t)] for s, t in cell.explained_by] or None,
        }
        for position, cell in enumerate(ordered)
    ]
    _refuse_repeated(rows, segments, tags)
    row = Portrait(
        business_id=session.business,
        scene_id=scene_id,
        number=number,
        log_hash=run.log_hash,
        run_hash=run.run_hash,
        taxonomy=run.taxonomy,
        releases=[int(number) for number in sorted(run.releases)],
        since=run.since,
        until=run.until,
        exposures=int(run.exposures),
        units=None if run.units is None else int(run.units),
        buckets=list(run.buckets),
        methods=list(run.methods),
        seed=run.seed,
        simulated=run.simulated,
        shown={
            _storable(dimension): {_storable(value): int(n) for value, n in values.items()}
            for dimension, values in (run.shown or {}).items()
        },
        overlaps=[[segments.of(a), segments.of(b), float(share)] for a, b, share in run.overlaps],
        segments=segments.names,
        tags=tags.names,
        cells=len(rows),
        insights=sum(cell.insight for cell in ordered),
        author=session.caller.user,
    )
    session.add(row)
    session.flush()
    add_rows(session, PortraitRow, rows)
    return Stored(PortraitView.model_validate(row), new=True)


class _Positions:
    """Segments or tags, each once, in the order in which they came."""

    def __init__(self, names: list[dict[str, str]]) -> None:
        self.names = names
        self._at = {tuple(sorted(name.items())): i for i, name in enumerate(names)}

    def of(self, name: Names) -> int:
        """Its position; a new one at the end."""
        stored = {_storable(k): _storable(v) for k, v in name.items()}
        key = tuple(sorted(stored.items()))
        if key not in self._at:
            self._at[key] = len(self.names)
            self.names.append(stored)
        return self._at[key]


def _storable(text: str) -> str:
    """No database stores U+0000 or halves of pairs, which a log that was brought may hold."""
    return text.replace("\0", "␀").encode("utf-8", "replace").decode()


def _kept(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    return min(max(float(value), 0.0), 1.0) if name in SHARES else float(value)  # −1e−18 is rounding


def _checked(cells: Iterable[PortraitCell]) -> Iterator[PortraitCell]:
    for count, cell in enumerate(cells, 1):
        if count > MAX_CELLS:
            raise TooLargeError(f"portrait: more than {MAX_CELLS:,} cells. Analyse fewer user features at once.")
        if not cell.tag:
            raise InputError(f"portrait: cell {count:,} ({dict(cell.segment)}) is about no tag. Name one.")
        for name in NUMBERS:
            value = getattr(cell, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"portrait: {name} of {_pair(cell)} is {value}. What is not known is None.")
        shares = [getattr(cell, name) for name in SHARES]
        least = min((v for v in (cell.effect, cell.effect_low, cell.effect_high) if v is not None), default=0.0)
        wrong = (
            cell.n < 0
            or (cell.independent or 0) < 0
            or least < -1 - ROUNDING
            or any(v is not None and not -ROUNDING <= v <= 1 + ROUNDING for v in shares)
        )
        bare = cell.effect is not None and (cell.effect_low is None or cell.effect_high is None)
        if wrong or bare or (cell.insight and cell.q_value is None):
            raise InputError(
                f"portrait: {_pair(cell)} holds what cannot be: n is from 0, rates and q are from 0 to 1, effects from"
                " −1 and with their interval, an insight's with its q."
            )
        yield cell


def _pair(cell: PortraitCell) -> str:
    return f"{_names(cell.segment)} × {_names(cell.tag)}"


def _importance(cell: PortraitCell) -> tuple[float, ...]:
    """Insights first, then main effects, then what is only a preference, the surest first."""
    kind = 0 if cell.insight else 1 if not cell.segment else 2
    distance = 0.0
    if cell.effect is not None:
        distance = abs(math.log1p(max(cell.effect, -0.999)))
    elif 0 < (cell.shrunk_low or 0.0) < (cell.shrunk_high or 0.0) and (cell.shrunk or 0.0) > 0:
        distance = abs(math.log(cell.shrunk or 1.0)) / math.log((cell.shrunk_high or 1.0) / (cell.shrunk_low or 1.0))
    return kind, 1.0 if cell.q_value is None else cell.q_value, -distance, -cell.n


def _refuse_repeated(rows: Sequence[Mapping[str, Any]], segments: _Positions, tags: _Positions) -> None:
    counts = Counter((row["segment"], row["tag"], row["crossed"]) for row in rows)
    repeated = next((key for key, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise InputError(
            f"portrait: {_names(segments.names[repeated[0]])} × {_names(tags.names[repeated[1]])} is there twice. Make"
            " one cell of them."
        )


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_portraits(
    session: Session, scene_id: str, *, cursor: str | None = None, limit: int = PAGE
) -> Page[PortraitView]:
    """The scene's portraits, newest first; raises NotFoundError where there is no such scene."""
    get_scene(session, scene_id)
    bulk = (Portrait.segments, Portrait.tags, Portrait.shown, Portrait.overlaps)
    query = _portraits(session, scene_id).options(*map(defer, bulk))
    page = paginate(session, query, Portrait.number, cursor=cursor, limit=limit, descending=True)
    return Page([PortraitView.model_validate(row) for row in page.items], page.next_cursor)


def latest_portrait(session: Session, scene_id: str) -> PortraitView | None:
    """The scene's newest portrait; None where it has none, NotFoundError where there is no such scene."""
    get_scene(session, scene_id)
    number = _newest_number(session, scene_id)
    return None if number is None else PortraitView.model_validate(find(session, Portrait, scene_id, number))


def portrait_of(
    session: Session,
    scene_id: str,
    segment: Names | None = None,
    *,
    number: int | None = None,
    at: Moment | None = None,
    language: Language = "en",
    cursor: str | None = None,
    limit: int = PAGE,
) -> PortraitPage:
    """A portrait of the scene (by default the newest; find_portrait), and a page of its cells in today's words.

    `segment`: of exactly these users; {} is everybody, None all segments. Raises NotFoundError where there is no such
    scene, portrait or segment; the message names the segments there are.
    """
    reading = Reading(session, find_portrait(session, scene_id, number, at), language)
    query = reading.query
    if segment is not None:
        query = query.where(PortraitRow.segment == reading.position(segment))
    page = paginate(session, query, PortraitRow.position, cursor=cursor, limit=limit)
    return PortraitPage(
        portrait=PortraitView.model_validate(reading.portrait),
        items=[CellView.model_validate(reading.cell(row)) for row in page.items],
        next_cursor=page.next_cursor,
    )


class TagNow(NamedTuple):
    """What a tag of an analysis is now."""

    tag: dict[str, str]
    was: dict[str, str] | None
    status: TagStatus
    parts: tuple[Tag, ...]  # of it, in today's vocabulary


@dataclass
class Reading:
    """A portrait as it is read in a transaction: its tags in today's words."""

    session: Session
    portrait: Portrait
    language: Language

    @cached_property
    def vocabulary(self) -> Taxonomy:
        """Today's."""
        return current_taxonomy(self.session)[1]

    @cached_property
    def tags(self) -> list[TagNow]:
        """What each tag is now, in the order of the portrait's."""
        return _tags_now(self.session, self.portrait)

    @property
    def query(self) -> Select[PortraitRow]:
        """All cells."""
        return select(PortraitRow).where(
            PortraitRow.business_id == self.session.business,
            PortraitRow.scene_id == self.portrait.scene_id,
            PortraitRow.number == self.portrait.number,
        )

    def position(self, segment: Names) -> int:
        """Of a segment, by its names; raises NotFoundError."""
        for position, names in enumerate(self.portrait.segments):
            if names == dict(segment):
                return position
        fields = sorted({name for names in self.portrait.segments for name in names})
        unknown = [name for name in segment if name not in fields]
        if unknown:
            raise NotFoundError(no_attribute(unknown[0], fields))
        there = [_names(names) for names in self.portrait.segments if set(names) == set(segment)]
        several = f" {len(there):,} with these attributes, such as" if len(there) > 20 else ""
        raise NotFoundError(
            f"segment: portrait {self.portrait.number} has no segment {_names(segment)!r}. There are{several}:"
            f" {'; '.join(there[:20]) or 'none of these attributes together'}."
        )

    def cell(self, row: PortraitRow) -> dict[str, Any]:
        """A cell in today's words, in the shape of CellView."""
        segment, now = self.portrait.segments[row.segment], self.tags[row.tag]
        explained = [{"segment": self.portrait.segments[s], "tag": self.tags[t].tag} for s, t in row.explained_by or ()]
        return {
            "segment": segment,
            "tag": now.tag,
            "was": now.was,
            "status": now.status,
            "n": row.n,
            "clicks": row.clicks,
            **{name: getattr(row, name) for name in NUMBERS},
            "crossed": row.crossed,
            "found_by": row.found_by or {},
            "explained_by": explained,
            "sentence": self.sentence(row),
        }

    def sentence(self, row: PortraitRow) -> str:
        """What a cell says, and no more."""
        segment, now = self.portrait.segments[row.segment], self.tags[row.tag]
        tag = self.words(now.tag)
        if row.effect is not None and row.effect_low is not None and row.effect_high is not None:
            effect = row.effect, row.effect_low, row.effect_high
            if segment:
                q = 1.0 if row.q_value is None else row.q_value  # stored ones have it
                said = wording.insight_sentence(segment, tag, *effect, q, crossed=row.crossed, language=self.language)
            else:
                said = wording.main_effect_sentence(tag, *effect, row.q_value, row.n, language=self.language)
        elif row.shrunk is not None and row.shrunk_low is not None and row.shrunk_high is not None:
            ratios = row.shrunk, row.shrunk_low, row.shrunk_high
            said = wording.preference_sentence(segment, tag, *ratios, row.n, language=self.language)
        else:
            n = row.n if row.independent is None else math.ceil(row.independent)
            said = wording.not_enough_sentence(segment, tag, n, None, language=self.language)
        was = None if now.was is None else self.words(now.was)
        return self.join(said, wording.status_sentence(now.status, was, language=self.language))

    def join(self, *said: str) -> str:
        """Sentences as one text."""
        return ("" if self.language == "zh" else " ").join(text for text in said if text)

    def words(self, tag: Names) -> dict[str, str]:
        """A tag as people read it: in Chinese by its labels, as far as today's vocabulary has them."""
        return labelled(self.vocabulary, tag) if self.language == "zh" else dict(tag)


def labelled(vocabulary: Taxonomy, tag: Names) -> dict[str, str]:
    """A tag by its Chinese labels, as far as the vocabulary has them."""
    named = {}
    for dimension_id, text in tag.items():
        dimension = vocabulary.dimension(dimension_id)
        if dimension is None:
            named[dimension_id] = text
            continue
        found = [(value, dimension.value(value)) for value in text.split("|")]
        label = dimension.labels.zh
        name = dimension_id if label in named else label  # two dimensions may be called alike
        named[name] = "|".join(value if known is None else known.labels.zh for value, known in found)
    return named


def _tags_now(session: Session, portrait: Portrait) -> list[TagNow]:
    parts = [[(d, value) for d, text in tag.items() for value in text.split("|")] for tag in portrait.tags]
    if portrait.taxonomy is None:
        return [TagNow(tag, None, "unversioned", tuple(p)) for tag, p in zip(portrait.tags, parts, strict=True)]
    number, vocabulary = current_taxonomy(session)
    mapping = mapping_between(session, portrait.taxonomy, number)
    before = taxonomy_at(session, portrait.taxonomy).tags
    merged = Counter(now for now in translate(before, [mapping]) if isinstance(now, tuple))
    ends = iter(translate([part for tag in parts for part in tag], [mapping]))
    return [_tag_now(tag, [(part, next(ends)) for part in of], vocabulary, merged)
            for tag, of in zip(portrait.tags, parts, strict=True)]  # fmt: skip


def _tag_now(
    tag: dict[str, str], became: Sequence[tuple[Tag, Tag | Unknown]], vocabulary: Taxonomy, merged: Counter[Tag]
) -> TagNow:
    names: dict[str, list[str]] = defaultdict(list)
    found: set[TagStatus] = set()
    for before, now in became:
        if isinstance(now, Unknown):
            dimensions = {dimension for dimension, _ in now.of}
            names[dimensions.pop() if len(dimensions) == 1 else before[0]].append(str(now))
            found.add("split")
            continue
        if now[1] not in names[now[0]]:
            names[now[0]].append(now[1])
        status = _status(vocabulary, now)
        renamed: TagStatus = "merged" if merged[now] > 1 else "renamed"
        found.add(renamed if status == "current" and (now != before or merged[now] > 1) else status)
    order: tuple[TagStatus, ...] = ("split", "retired", "unknown", "merged", "renamed", "current")
    said = {dimension: "|".join(values) for dimension, values in names.items()}
    known = tuple(now for _, now in became if not isinstance(now, Unknown))
    return TagNow(said, tag if said != tag else None, next(s for s in order if s in found), known)


def _status(vocabulary: Taxonomy, tag: Tag) -> TagStatus:
    dimension = vocabulary.dimension(tag[0])
    value = None if dimension is None else dimension.value(tag[1])
    if dimension is None or value is None:
        return "unknown"
    return "retired" if dimension.retired or value.retired else "current"


def _portraits(session: Session, scene_id: str) -> Select[Portrait]:
    return select(Portrait).where(Portrait.business_id == session.business, Portrait.scene_id == scene_id)


def _newest_number(session: Session, scene_id: str) -> int | None:
    query = select(func.max(Portrait.number)).where(
        Portrait.business_id == session.business, Portrait.scene_id == scene_id
    )
    found: int | None = session.scalar(query)
    return found


def find_portrait(session: Session, scene_id: str, number: int | None = None, at: Moment | None = None) -> Portrait:
    """The scene's portrait of this number, the newest one whose exposures are of `at` (from before until after it; of a
    day, some part of it), or simply the newest. Raises NotFoundError, and InputError where both are given."""
    get_scene(session, scene_id)
    if at is not None:
        if number is not None:
            raise InputError("at: a portrait has a number, or is of a time. Give one of them.")
        return _portrait_of(session, scene_id, at)
    number = _newest_number(session, scene_id) if number is None else number
    if number is None:
        raise NotFoundError(
            f"Scene {scene_id!r} has no portrait yet: `kaleidoscope attribute {scene_id}` makes one from its log."
        )
    return find(session, Portrait, scene_id, number)


def _portrait_of(session: Session, scene_id: str, at: Moment) -> Portrait:
    first, last = (
        (check_moment("at", at),) * 2
        if isinstance(at, datetime)
        else (datetime.combine(at, of, tzinfo=UTC) for of in (time.min, time.max))
    )
    newest_first = _portraits(session, scene_id).order_by(Portrait.number.desc())
    found = session.scalar(newest_first.where(Portrait.since <= last, Portrait.until >= first).limit(1))
    if found is not None:
        return found
    asked = first.strftime("%Y-%m-%d %H:%M UTC") if isinstance(at, datetime) else at.isoformat()
    periods = [
        f"{number} of {since:%Y-%m-%d} – {until:%Y-%m-%d}"
        for number, since, until in session.execute(
            newest_first.where(Portrait.since.is_not(None), Portrait.until.is_not(None))
            .with_only_columns(Portrait.number, Portrait.since, Portrait.until)
            .limit(10)
        )
    ]
    there = f"There are: {'; '.join(periods)}." if periods else "None of its portraits says of when it is."
    raise NotFoundError(f"at: scene {scene_id!r} has no portrait of {asked}. {there}")


def _names(names: Names) -> str:
    """A segment or a tag in a line."""
    return ", ".join(f"{wording.plain(name)}={wording.plain(value)}" for name, value in names.items()) or "everybody"


def no_attribute(name: str, known: Sequence[str]) -> str:
    """What is said of an attribute that a portrait does not know."""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    there = f"There are: {', '.join(map(wording.plain, known))}." if known else "It is about everybody alone."
    return f"attributes: this portrait knows no attribute {wording.plain(name)!r}.{hint} {there}"


# ── as a file ───────────────────────────────────────────────────────────────────────────────────────────────────────

FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet takes a cell for a formula by


def export_portrait(
    session: Session,
    scene_id: str,
    path: Path,
    *,
    number: int | None = None,
    at: Moment | None = None,
    format: Format | None = None,
    language: Language = "en",
    overwrite: bool = False,
) -> tuple[PortraitView, int]:
    """Write every cell of a portrait to a file, and return the portrait and how many; the format is the suffix's.

    CSV is for spreadsheets: texts are on one line, and none is a formula. Raises InputError for another suffix, for a
    file that is there unless `overwrite`, and where it cannot be written.
    """
    known: tuple[Format, ...] = ("csv", "json", "parquet")
    chosen = format or next((f for f in known if path.suffix.lower() == f".{f}"), None)
    if chosen is None:
        raise InputError(f"{path}: its ending says no format. Call it .csv, .json or .parquet, or give the format.")
    if not overwrite and path.exists():
        raise InputError(f"{path}: is there already. Choose another name, or give --overwrite.")
    reading = Reading(session, find_portrait(session, scene_id, number, at), language)
    cells = [reading.cell(row) for row in session.scalars(reading.query.order_by(PortraitRow.position))]
    view = PortraitView.model_validate(reading.portrait)
    partial = path.with_name(f".{path.name}.partial")
    try:
        _WRITERS[chosen](partial, view, cells)
        if not overwrite:
            try:
                path.open("xb").close()  # nobody else's, from now on
            except FileExistsError:
                raise InputError(f"{path}: is there already. Choose another name, or give --overwrite.") from None
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)
    return view, len(cells)


def _write_csv(path: Path, _: PortraitView, cells: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # spreadsheets know UTF-8 by its mark
        lines = csv.writer(file)
        columns = ("segment", "tag", "was", "status", "n", "clicks", *NUMBERS, "crossed", "found_by", "explained_by")
        lines.writerow((*columns, "sentence"))
        for cell in cells:
            told = {
                **cell,
                "segment": _pairs(cell["segment"]),
                "tag": _pairs(cell["tag"]),
                "was": _pairs(cell["was"] or {}),
                "found_by": _pairs({m: "+" if sign > 0 else "-" for m, sign in cell["found_by"].items()}),
                "explained_by": "; ".join(f"{_pairs(p['segment'])} × {_pairs(p['tag'])}" for p in cell["explained_by"]),
            }
            lines.writerow([csv_cell(told[name]) for name in (*columns, "sentence")])


def _pairs(names: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in names.items())


def csv_cell(value: object) -> object:
    """A cell of a CSV: text on one line, and marked as text where a spreadsheet would calculate it."""
    if not isinstance(value, str):
        return value
    text = printable(" ".join(value.split()))
    return f"'{text}" if text.startswith(FORMULA) or value.startswith(FORMULA) else text


def _write_json(path: Path, view: PortraitView, cells: Sequence[Mapping[str, Any]]) -> None:
    document = {"portrait": view.model_dump(mode="json"), "cells": list(cells)}
    with path.open("w", encoding="utf-8") as file:
        json.dump(document, file, ensure_ascii=False, allow_nan=False)


def _write_parquet(path: Path, view: PortraitView, cells: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, names = pa.string(), pa.map_(pa.string(), pa.string())
    pair = pa.struct([("segment", names), ("tag", names)])
    types = {
        "segment": names, "tag": names, "was": names, "status": text, "n": pa.int64(), "clicks": pa.int64(),
        **dict.fromkeys(NUMBERS, pa.float64()), "crossed": pa.bool_(), "found_by": pa.map_(text, pa.int8()),
        "explained_by": pa.list_(pair), "sentence": text,
    }  # fmt: skip
    schema = pa.schema(list(types.items()), metadata={"portrait": view.model_dump_json()})
    maps = ("segment", "tag", "was", "found_by")
    rows = [
        {
            **cell,
            **{name: None if cell[name] is None else list(cell[name].items()) for name in maps},
            "explained_by": [{k: list(v.items()) for k, v in pair.items()} for pair in cell["explained_by"]],
        }
        for cell in cells
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


_WRITERS = {"csv": _write_csv, "json": _write_json, "parquet": _write_parquet}
