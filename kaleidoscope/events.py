"""The log: decisions and what became of them, from the events that people's pages send to one table of exposures.

Events come in batches, are judged one by one, and are kept in the database until their day is closed: until the last
event that could still count has had its time. A closed day becomes one Parquet file per scene, and is read together
with the days that are still open as one table, "exposures with outcomes", of which a log of the contract (log.py) is
made. docs/events.md explains it to those who send events.

    folder/BUSINESS/scene=SCENE/day=2030-01-31/part-0000.parquet

Whatever is killed at whatever moment, an exposure is counted once: a day is first closed to new events, then written
to a file under another name, then the file gets its own name, then one transaction says that the day is in it, and
only then are the day's rows deleted, of which nobody takes notice any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar, cast

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa
import yaml
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.engine import Connection

from kaleidoscope.database import Database
from kaleidoscope.decision_record import DecisionRecord, Keyring, Reason, TokenClaims, TokenError
from kaleidoscope.errors import InputError, TooLargeError, UnavailableError
from kaleidoscope.files import make_folder, sync
from kaleidoscope.release import ReleaseContent
from kaleidoscope.scenes import AttributionSpec
from kaleidoscope.tables import ClosedDays, Decision, Event, EventCount, LogPart
from kaleidoscope.taxonomy import Mapping as TagMapping
from kaleidoscope.taxonomy import translate_column

REPLICATES = 64
MAX_VALUE = 1e9  # of a conversion
MAX_DWELL_S = 86_400.0
MAX_TOKEN_AHEAD_US = 60_000_000  # between the clocks of two servers
DAY_US = 86_400_000_000
BATCH = 50_000  # rows read from the database at a time
PURGED = 2_000  # decisions deleted in one transaction, so that events are not kept waiting
TRIES = 5  # of a read, while files of the log are replaced

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EVENT_ID = re.compile(r"[!-~]{1,128}", re.ASCII)
ITEM_FIELDS = frozenset({"event_id", "type", "token", "at", "value", "user_agent", "ip"})
BOTS = (
    r"bot\b|bot[/_-]|crawl|spider|slurp|scrap(er|y)|archiver|facebookexternalhit|preview|lighthouse|pagespeed",
    r"headless|phantomjs|selenium|puppeteer|playwright|pingdom|uptime|monitor|curl/|wget/|python-requests",
)

DECISIONS, EVENTS = cast(sa.Table, Decision.__table__), cast(sa.Table, Event.__table__)
COUNTS, PARTS = cast(sa.Table, EventCount.__table__), cast(sa.Table, LogPart.__table__)
CLOSED = cast(sa.Table, ClosedDays.__table__)

Answer = TypeVar("Answer")


# ── what events are, and which of them count ────────────────────────────────────────────────────────────────────────


class Kind(StrEnum):
    """What happened to a decision."""

    EXPOSURE = "exposure"
    CLICK = "click"
    CONVERSION = "conversion"
    DWELL = "dwell"


class Fate(StrEnum):
    """What became of an item of a batch. What was refused will be refused again; the others need no repeating."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    FILTERED = "filtered"
    REFUSED = "refused"


class Count(StrEnum):
    """What is counted of every scene and day."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    BOT = "bot"  # filtered
    INTERNAL = "internal"  # filtered
    MALFORMED = "malformed"  # refused, as are those below
    UNKNOWN_KEY = "unknown_key"
    FORGED = "forged"
    FOREIGN = "foreign"
    EXPIRED = "expired"
    LATE = "late"  # accepted, though it came after the window in which it happened
    CLAMPED = "clamped"  # accepted, though the client's clock was wrong
    LATE_RECORD = "late_record"  # decisions recorded after their day was closed
    UNEXPOSED = "unexposed"  # decisions that nobody is known to have seen
    ORPHANED = "orphaned"  # clicks, conversions and dwells of such


@dataclass(frozen=True)
class Windows:
    """How long after its decision an event still counts, in seconds; and how much later it may come in."""

    exposure_s: float = 86_400.0
    click_s: float = 86_400.0  # and dwell
    conversion_s: float = 7 * 86_400.0
    grace_s: float = 3_600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 400 * 86_400:
                raise InputError(f"{name}: {value} is no time to wait for events. Give 0 to 400 days, in seconds.")

    @classmethod
    def attributing(cls, spec: AttributionSpec) -> Windows:
        """The windows that a scene's attribution says."""
        return cls(spec.exposure_hours * 3600, spec.click_hours * 3600, spec.conversion_hours * 3600)

    def or_longer(self, other: Windows) -> Windows:
        """Of each window the longer one."""
        return Windows(**{name: max(value, vars(other)[name]) for name, value in vars(self).items()})

    def of(self, kind: Kind) -> float:
        """The window of a kind of event."""
        return {Kind.EXPOSURE: self.exposure_s, Kind.CONVERSION: self.conversion_s}.get(kind, self.click_s)

    @property
    def closing_s(self) -> float:
        """After this long nothing is accepted any more."""
        return max(self.exposure_s, self.click_s, self.conversion_s) + self.grace_s


@dataclass(frozen=True)
class Rules:
    """Which events of a business count: windows by scene, and whose events are left out."""

    windows: Mapping[str, Windows] = field(default_factory=dict)
    default: Windows = Windows()
    bots: tuple[str, ...] = BOTS  # regular expressions, searched for in the user agent; capitals do not matter
    internal_units: frozenset[str] = frozenset()
    internal_networks: tuple[str, ...] = ()  # such as 10.0.0.0/8
    max_items: int = 1_000  # of a batch

    def __post_init__(self) -> None:
        try:
            _ = self._bot, self._networks
        except (re.error, ValueError) as error:
            raise InputError(f"rules of the log: {error}. Correct the expression, or the network.") from None

    def of(self, scene: str) -> Windows:
        """The windows of a scene."""
        return self.windows.get(scene, self.default)

    def left_out(self, unit: str, agent: str | None, ip: str | None) -> Count | None:
        """Why the events of such a caller are not counted: bot, internal; None where they are."""
        if agent is not None and self._bot is not None and self._bot.search(agent):
            return Count.BOT
        if unit in self.internal_units or (ip is not None and self._networks and self._inside(ip)):
            return Count.INTERNAL
        return None

    @cached_property
    def _bot(self) -> re.Pattern[str] | None:
        for expression in self.bots:
            re.compile(expression)
        return re.compile("|".join(f"(?:{b})" for b in self.bots), re.IGNORECASE) if self.bots else None

    @cached_property
    def _networks(self) -> tuple[Any, ...]:
        return tuple(ip_network(network) for network in self.internal_networks)

    def _inside(self, ip: str) -> bool:
        try:
            address = ip_address(ip.strip())
        except ValueError:
            return False
        return any(address in network for network in self._networks)


# ── ingest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ItemResult:
    """What became of one item of a batch; `code` and `message` say why it was filtered or refused."""

    event_id: str | None  # None where the item has none
    status: Fate
    code: Count | None = None
    message: str | None = None


@dataclass(frozen=True)
class _Judged:
    """An item that may be counted: what its token claims, and its row."""

    claims: TokenClaims
    row: dict[str, Any]
    late: bool
    clamped: bool


class _Refusal(Exception):
    """Why an item is not counted."""

    def __init__(self, count: Count, message: str, *, scene: str = "", fate: Fate = Fate.REFUSED) -> None:
        super().__init__(message)
        self.count, self.scene, self.fate = count, scene, fate


def ingest(
    database: Database,
    business: str,
    items: Sequence[object],
    keyring: Keyring,
    *,
    now: datetime,
    rules: Rules | None = None,
    user_agent: str | None = None,
    ip: str | None = None,
) -> list[ItemResult]:
    """What became of each item of a batch of events, in order; what is accepted is on disk.

    An item is a mapping: `event_id` (any text that tells events apart), `type` (a Kind), `token` (of the decision), and
    optionally `at` (when it happened, ISO 8601 with a zone), `value` (money of a conversion, seconds of a dwell), and
    the end user's `user_agent` and `ip`, where they are not the caller's own.

    Raises TooLargeError for a batch of more than `rules.max_items`, UnavailableError where the database is away: then
    nothing is kept, and the whole batch can be sent again.
    """
    rules = Rules() if rules is None else rules
    if len(items) > rules.max_items:
        raise TooLargeError(f"events: {len(items):,} items in one batch. Send at most {rules.max_items:,} at a time.")
    if not items:
        return []
    received_us, results = to_us(now), [ItemResult(None, Fate.ACCEPTED)] * len(items)
    counts: Counter[tuple[str, Count]] = Counter()
    judged: dict[int, _Judged] = {}
    first: set[str] = set()
    for index, item in enumerate(items):
        event_id = _event_id(item)
        try:
            found = _judge(item, business, keyring, received_us, rules, user_agent, ip)
            if found.row["event_id"] in first:
                raise _Refusal(Count.DUPLICATE, "", scene=found.claims.scene, fate=Fate.DUPLICATE)
            first.add(found.row["event_id"])
            judged[index] = found
            results[index] = ItemResult(event_id, Fate.ACCEPTED)
        except _Refusal as refusal:
            results[index] = _refused(event_id, refusal, counts)
    with database.bulk() as connection:
        closed = _enter(connection, database, business)
        for index, found in list(judged.items()):
            if to_us(found.claims.at) < closed.get(found.claims.scene, 0):
                del judged[index]
                message = "token: the day of this decision is closed, and takes no more events."
                results[index] = _refused(
                    results[index].event_id, _Refusal(Count.EXPIRED, message, scene=found.claims.scene), counts
                )
        new = _append(connection, database, list(judged.values()))
        for index, found in judged.items():
            scene = found.claims.scene
            if found.row["event_id"] not in new:
                duplicate = _Refusal(Count.DUPLICATE, "", scene=scene, fate=Fate.DUPLICATE)
                results[index] = _refused(results[index].event_id, duplicate, counts)
                continue
            counts[scene, Count.ACCEPTED] += 1
            counts[scene, Count.LATE] += found.late
            counts[scene, Count.CLAMPED] += found.clamped
        _count(connection, database, business, _day(received_us), counts)
    return results


def _event_id(item: object) -> str | None:
    event_id = item.get("event_id") if isinstance(item, Mapping) else None
    return event_id if isinstance(event_id, str) and EVENT_ID.fullmatch(event_id) else None


def _refused(event_id: str | None, refusal: _Refusal, counts: Counter[tuple[str, Count]]) -> ItemResult:
    counts[refusal.scene, refusal.count] += 1
    if refusal.fate is Fate.DUPLICATE:
        return ItemResult(event_id, refusal.fate)
    return ItemResult(event_id, refusal.fate, refusal.count, str(refusal))


def _judge(
    item: object,
    business: str,
    keyring: Keyring,
    received_us: int,
    rules: Rules,
    user_agent: str | None,
    ip: str | None,
) -> _Judged:
    """The item, if by itself it may be counted; raises _Refusal."""
    if not isinstance(item, Mapping):
        raise _Refusal(Count.MALFORMED, "item: an event is an object with event_id, type and token.")
    if unknown := [str(name)[:40] for name in item if name not in ITEM_FIELDS]:
        known = ", ".join(sorted(ITEM_FIELDS))
        raise _Refusal(Count.MALFORMED, f"item: {unknown[0]!r} is no field of an event. Fields: {known}.")
    event_id = _event_id(item)
    if event_id is None:
        raise _Refusal(Count.MALFORMED, "event_id: give 1 to 128 visible ASCII characters, different for every event.")
    try:
        kind = Kind(cast(str, item.get("type")))
    except ValueError:
        raise _Refusal(Count.MALFORMED, f"type: give one of {', '.join(Kind)}.") from None
    for name in ("token", "user_agent", "ip"):
        if not isinstance(item.get(name, None if name == "token" else ""), str | None if name != "token" else str):
            raise _Refusal(Count.MALFORMED, f"{name}: give text.")
    value = _value(kind, item.get("value"))
    at_us = _at(item.get("at"))

    try:
        claims = keyring.read(item["token"])
    except TokenError as error:
        raise _Refusal(Count(error.kind), str(error)) from None
    decided_us, scene = to_us(claims.at), claims.scene
    if claims.business != business:
        raise _Refusal(Count.FOREIGN, "token: it is not of a decision of this business.")
    if decided_us > received_us + MAX_TOKEN_AHEAD_US:
        message = "token: it is of a decision that is yet to come. Set the servers' clocks."
        raise _Refusal(Count.MALFORMED, message, scene=scene)
    windows = rules.of(scene)
    ends_us = decided_us + int(windows.of(kind) * 1e6)
    latest_us = max(decided_us, received_us)
    happened_us = latest_us if at_us is None else min(max(at_us, decided_us), latest_us)
    if happened_us > ends_us or received_us > ends_us + int(windows.grace_s * 1e6):
        message = f"token: its decision was taken at {claims.at:%Y-%m-%d %H:%M:%S} UTC; a {kind} counts no more."
        raise _Refusal(Count.EXPIRED, message, scene=scene)
    left_out = rules.left_out(claims.unit, item.get("user_agent") or user_agent, item.get("ip") or ip)
    if left_out is not None:
        message = f"The event is of {'a bot' if left_out is Count.BOT else 'internal traffic'}, and not counted."
        raise _Refusal(left_out, message, scene=scene, fate=Fate.FILTERED)
    row = {
        "business_id": business,
        "event_id": event_id,
        "decision_id": claims.decision,
        "kind": kind.value,
        "at_us": happened_us,
        "received_us": received_us,
        "value": value,
    }
    return _Judged(claims, row, late=received_us > ends_us, clamped=at_us is not None and at_us != happened_us)


def _value(kind: Kind, value: object) -> float | None:
    most = {Kind.CONVERSION: MAX_VALUE, Kind.DWELL: MAX_DWELL_S}.get(kind)
    if most is None:
        if value is not None:
            raise _Refusal(Count.MALFORMED, f"value: a {kind} has none. Leave it out.")
        return None
    if value is None and kind is Kind.CONVERSION:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        what = "seconds" if kind is Kind.DWELL else "an amount"
        raise _Refusal(Count.MALFORMED, f"value: a {kind} takes {what} from 0 to {most:,.0f}.")
    return float(value)


def _at(value: object) -> int | None:
    if value is None:
        return None
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(cast(str, value))
        if moment.tzinfo is None:
            raise ValueError
        return to_us(moment)
    except (TypeError, ValueError, OverflowError):
        raise _Refusal(Count.MALFORMED, "at: give a moment as 2030-01-31T12:00:00Z, with its zone.") from None


def to_us(moment: datetime) -> int:
    """Whole microseconds since 1970."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def _from_us(us: int) -> datetime:
    return EPOCH + timedelta(microseconds=us)


def _day(us: int) -> str:
    return _from_us(us).date().isoformat()


def _start_us(day: str) -> int:
    return to_us(datetime.combine(date.fromisoformat(day), datetime.min.time(), UTC))


def _insert(database: Database, table: sa.Table) -> Any:
    """An INSERT of this database's own kind, which knows ON CONFLICT."""
    return sqlite_dialect.insert(table) if database.sqlite else postgresql.insert(table)


def _enter(connection: Connection, database: Database, business: str, *, alone: bool = False) -> dict[str, int]:
    """Until when each scene of the business is closed (microseconds); while the transaction lasts, this stays so.

    With `alone` nobody else is in such a transaction. On SQLite nobody ever is.
    """
    if not database.sqlite:
        digest = hashlib.blake2b(f"log of {business}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        lock = sa.func.pg_advisory_xact_lock if alone else sa.func.pg_advisory_xact_lock_shared
        connection.execute(sa.select(lock(key)))
    query = sa.select(CLOSED.c.scene, CLOSED.c.before).where(CLOSED.c.business_id == business)
    return {scene: _start_us(before) for scene, before in connection.execute(query)}


def _append(connection: Connection, database: Database, judged: Sequence[_Judged]) -> set[str]:
    """Ids of the events that are new; the others were there already."""
    if not judged:
        return set()
    stubs = {j.claims.decision: _claimed(j.claims) for j in judged}
    # In one order everywhere: of two batches with the same events neither waits for the other for ever.
    connection.execute(_insert(database, DECISIONS).on_conflict_do_nothing(), [stubs[key] for key in sorted(stubs)])
    insert = _insert(database, EVENTS).on_conflict_do_nothing().returning(EVENTS.c.event_id)
    rows = sorted((j.row for j in judged), key=lambda row: str(row["event_id"]))
    return set(connection.scalars(insert, rows))


def _claimed(claims: TokenClaims) -> dict[str, Any]:
    return {
        "business_id": claims.business,
        "id": claims.decision,
        "scene": claims.scene,
        "unit": claims.unit,
        "at_us": to_us(claims.at),
        "bucket": claims.bucket.value,
        "variant": claims.variant,
        "propensity": claims.propensity,
        "learn": claims.learn,
        "release": claims.release,
        "model_version": claims.model_version,
        "recorded": False,
    }


def _count(
    connection: Connection, database: Database, business: str, day: str, counts: Mapping[tuple[str, Count], int]
) -> None:
    rows = [
        {"business_id": business, "scene": scene, "day": day, "what": what.value, "n": n}
        for (scene, what), n in sorted(counts.items())
        if n
    ]
    if rows:
        insert = _insert(database, COUNTS)
        keys = [column.name for column in COUNTS.primary_key]
        connection.execute(
            insert.on_conflict_do_update(index_elements=keys, set_={"n": COUNTS.c.n + insert.excluded.n}), rows
        )


def event_counts(
    database: Database, business: str, *, scene: str | None = None, since: date | None = None
) -> dict[Count, int]:
    """How many events met which fate, of one scene or all, from a day on; what none met is not there.

    Refused items whose token could not be believed are of scene ''.
    """
    query = sa.select(COUNTS.c.what, sa.func.sum(COUNTS.c.n)).where(COUNTS.c.business_id == business)
    if scene is not None:
        query = query.where(COUNTS.c.scene == scene)
    if since is not None:
        query = query.where(COUNTS.c.day >= since.isoformat())
    with database.bulk(write=False) as connection:
        return {Count(what): int(n) for what, n in connection.execute(query.group_by(COUNTS.c.what))}


def record_decisions(database: Database, records: Sequence[DecisionRecord]) -> int:
    """Keep these decisions, and return how many of them were not recorded before. They are on disk then.

    A decision of a day that is closed is left out, and counted.
    """
    if not records:
        return 0
    rows = sorted(map(_recorded, records), key=lambda row: (str(row["business_id"]), str(row["id"])))
    businesses = sorted({str(row["business_id"]) for row in rows})
    insert = _insert(database, DECISIONS)
    new = insert.excluded
    values = {c.name: new[c.name] for c in DECISIONS.columns if not c.primary_key and c.name != "at_us"}
    earlier = sa.case((new.at_us < DECISIONS.c.at_us, new.at_us), else_=DECISIONS.c.at_us)
    upsert = insert.on_conflict_do_update(
        index_elements=["business_id", "id"],
        set_={**values, "at_us": earlier},
        where=DECISIONS.c.recorded.is_(sa.false()),
    )
    with database.bulk() as connection:
        closed = {business: _enter(connection, database, business) for business in businesses}
        late: dict[tuple[str, str], Counter[tuple[str, Count]]] = {}
        kept = []
        for row in rows:
            if row["at_us"] >= closed[row["business_id"]].get(row["scene"], 0):
                kept.append(row)
            else:
                counts = late.setdefault((row["business_id"], _day(row["at_us"])), Counter())
                counts[row["scene"], Count.LATE_RECORD] += 1
        for (business, day), counts in late.items():
            _count(connection, database, business, day, counts)
        return len(connection.execute(upsert.returning(DECISIONS.c.id), kept).all()) if kept else 0


def _recorded(record: DecisionRecord) -> dict[str, Any]:
    return {
        "business_id": record.business,
        "id": record.id,
        "scene": record.scene,
        "unit": record.unit,
        "at_us": to_us(record.at),
        "bucket": record.bucket.value,
        "variant": record.variant,
        "propensity": record.propensity,
        "learn": record.learn,
        "release": record.release,
        "model_version": record.model_version,
        "recorded": True,
        "reason": record.reason.value,
        "release_hash": record.release_hash,
        "candidates": record.candidates,
        "features": dict(record.features),
        "context": dict(record.context),
        "rested": list(record.rested),
        "key": record.key,
        "detail": record.detail,
    }


def recent_exposures(database: Database, business: str, scene: str, unit: str, since: datetime) -> dict[str, int]:
    """How often a unit was shown each variant of a scene since a moment: decisions with an exposure, from the days that
    are not compacted (the longest window of the scene, and more)."""
    shown = sa.exists().where(
        EVENTS.c.business_id == business,
        EVENTS.c.decision_id == DECISIONS.c.id,
        EVENTS.c.kind == Kind.EXPOSURE.value,
        EVENTS.c.at_us >= to_us(since),
    )
    query = (
        sa.select(DECISIONS.c.variant, sa.func.count().label("n"))
        .where(DECISIONS.c.business_id == business, DECISIONS.c.unit == unit, DECISIONS.c.scene == scene, shown)
        .group_by(DECISIONS.c.variant)
    )
    with database.bulk(write=False) as connection:
        return {row.variant: row.n for row in connection.execute(query)}


# ── exposures with outcomes ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shown:
    """What a variant of a release showed."""

    materials: Mapping[str, str]  # slot → material id
    tags: Mapping[str, Sequence[str]]  # dimension → values
    product: str


Describe = Callable[[str, int], Mapping[str, Shown]]  # scene, number of the release → its variants by id
# (scene, number) of releases → what became of each one's tags in the newest vocabulary among theirs
Words = Callable[[Collection[tuple[str, int]]], Mapping[tuple[str, int], TagMapping]]


def shown_in(content: ReleaseContent) -> dict[str, Shown]:
    """What the variants of a release show."""
    product = ", ".join(f"{key}={value}" for key, value in sorted(content.scene.product.items())) or content.scene.id
    return {variant.id: Shown(variant.materials, variant.tags, product) for variant in content.variants}


@lru_cache(maxsize=100_000)
def replicate_of(unit: str) -> int:
    """Which of the 64 replicates a unit is in: sums by replicate give errors by unit, additive over days."""
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "little") % REPLICATES


_FIXED: dict[str, Any] = {
    "decision_id": pa.string(),
    "scene": pa.string(),
    "day": pa.string(),
    "unit": pa.string(),
    "decided_at": pa.timestamp("us", "UTC"),
    "bucket": pa.string(),
    "variant_id": pa.string(),
    "propensity": pa.float64(),
    "learn": pa.bool_(),
    "release": pa.int64(),
    "model_version": pa.string(),
    "recorded": pa.bool_(),
    "reason": pa.string(),
    "release_hash": pa.string(),
    "candidates": pa.int64(),
    "key": pa.string(),
    "detail": pa.string(),
    "rested": pa.list_(pa.string()),
}
_PREFIXES = ("u_", "c_", "t_", "m_")  # user features, context, tag dimensions, slots
_READ = (
    *(DECISIONS.c[name] for name in ("id", "scene", "unit", "at_us", "bucket", "variant", "propensity", "learn")),
    *(DECISIONS.c[name] for name in ("release", "model_version", "recorded", "reason", "release_hash", "candidates")),
    *(DECISIONS.c[name] for name in ("key", "detail")),
    *(sa.cast(DECISIONS.c[name], sa.Text) for name in ("rested", "features", "context")),  # see _parsed
)

# Nobody is known to have seen a decision without an exposure, whatever else is said of it. Sums are taken in the order
# of their values, so that the order in which events came makes no difference, not even to the last bit.
_JOINED = """
SELECT d.*, o.exposed_at, o.exposures, CAST(o.clicked_at IS NOT NULL AS TINYINT) AS click, o.clicked_at,
    CAST(o.converted_at IS NOT NULL AS TINYINT) AS conversion, o.converted_at, o.conversion_value, o.dwell_s,
    coalesce(e.n, 0) + row_number() OVER (
        PARTITION BY d.scene, d.unit ORDER BY d.day, o.exposed_at, d.decision_id) - 1 AS nth,
    s.variant_id IS NOT NULL AS described, s.* EXCLUDE (scene, release, variant_id)
FROM decision_rows d
JOIN (
    SELECT decision_id,
        min(happened) FILTER (kind = 'exposure') AS exposed_at, count(*) FILTER (kind = 'exposure') AS exposures,
        min(happened) FILTER (kind = 'click') AS clicked_at, min(happened) FILTER (kind = 'conversion') AS converted_at,
        sum(value ORDER BY value) FILTER (kind = 'conversion') AS conversion_value,
        sum(value ORDER BY value) FILTER (kind = 'dwell') AS dwell_s
    FROM event_rows GROUP BY decision_id
) o ON o.decision_id = d.decision_id AND o.exposures > 0
LEFT JOIN earlier e ON e.scene = d.scene AND e.unit = d.unit
LEFT JOIN shown s ON s.scene = d.scene AND s.release = d.release AND s.variant_id = d.variant_id
"""


def _parts(files: Sequence[Path]) -> str:
    paths = ", ".join("'" + str(file.absolute()).replace("'", "''") + "'" for file in files)
    types = "{'scene': VARCHAR, 'day': VARCHAR}"
    return f"read_parquet([{paths}], union_by_name = true, hive_partitioning = true, hive_types = {types})"


@contextmanager
def _duckdb() -> Iterator[duckdb.DuckDBPyConnection]:
    with tempfile.TemporaryDirectory(prefix="kaleidoscope-") as scratch:
        connection = duckdb.connect(
            ":memory:",
            config={
                "temp_directory": scratch,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
            },
        )
        try:
            connection.execute("SET TimeZone = 'UTC'")
            yield connection
        finally:
            connection.close()


def _load(
    into: duckdb.DuckDBPyConnection,
    connection: Connection,
    business: str,
    where: Sequence[sa.ColumnElement[bool]],
    done: frozenset[tuple[str, str]],
    earlier: Sequence[Path],
    describe: Describe,
) -> int:
    """Make what `_JOINED` asks of: decisions of the database but for days that are `done`, with their events, what they
    showed, and how many exposures their units had before. Return the number of decisions."""
    stream = connection.execution_options(stream_results=True, yield_per=BATCH)
    of = (DECISIONS.c.business_id == business, *where)
    decisions = _decisions(stream.execute(sa.select(*_READ).where(*of)).partitions(BATCH), done)
    query = (
        sa.select(EVENTS.c.decision_id, EVENTS.c.kind, EVENTS.c.at_us, EVENTS.c.value)
        .join(DECISIONS, (DECISIONS.c.business_id == EVENTS.c.business_id) & (DECISIONS.c.id == EVENTS.c.decision_id))
        .where(*of)
    )
    types = {
        "decision_id": pa.string(), "kind": pa.string(), "happened": pa.timestamp("us", "UTC"), "value": pa.float64()
    }  # fmt: skip
    schema = pa.schema(list(types.items()))
    chunks = stream.execute(query).partitions(BATCH)
    tables = [pa.table(list(map(pa.array, zip(*c, strict=True), types.values())), schema=schema) for c in chunks]
    into.register("event_rows", pa.concat_tables(tables) if tables else schema.empty_table())
    into.register("decision_rows", decisions)
    pairs = decisions.select(["scene", "release"]).group_by(["scene", "release"]).aggregate([]).to_pylist()
    into.register("shown", _shown({(p["scene"], p["release"]): describe(p["scene"], p["release"]) for p in pairs}))
    if earlier:
        into.execute(
            f"CREATE TABLE earlier AS SELECT scene, unit, max(nth) + 1 AS n FROM {_parts(earlier)}"
            " SEMI JOIN (SELECT DISTINCT unit FROM decision_rows) USING (unit) GROUP BY ALL"
        )
    else:
        into.execute("CREATE TABLE earlier (scene VARCHAR, unit VARCHAR, n BIGINT)")
    return int(decisions.num_rows)


def _decisions(chunks: Iterable[Sequence[sa.Row[Any]]], done: frozenset[tuple[str, str]]) -> pa.Table:
    """Rows of `_READ` as columns, with a column for each user feature (`u_…`) and context (`c_…`)."""
    tables = []
    for chunk in chunks:
        (ids, scenes, units, at, *plain, rested, features, contexts) = zip(*chunk, strict=True)
        days = [_day_of(us // DAY_US) for us in at]
        columns = [ids, scenes, days, units, at, *plain, [*map(_parsed, rested)]]
        arrays = {
            name: _texts(values) if kind == pa.string() else pa.array(values, kind)
            for (name, kind), values in zip(_FIXED.items(), columns, strict=True)
        }
        arrays["replicate"] = pa.array(map(replicate_of, units), pa.int8())
        table = pa.table({**arrays, **_spread("u_", map(_parsed, features)), **_spread("c_", map(_parsed, contexts))})
        if done:
            table = table.filter(pa.array([key not in done for key in zip(scenes, days, strict=True)]))
        tables.append(table)
    if not tables:
        return pa.schema([*_FIXED.items(), ("replicate", pa.int8())]).empty_table()
    return _concat(tables)


@lru_cache(maxsize=10_000)
def _day_of(number: int) -> str:
    return _day(number * DAY_US)


@lru_cache(maxsize=200_000)
def _parsed(document: str | None) -> Any:
    """What a JSON document says, for looking only: a unit comes again and again, and with it its features."""
    return None if document is None else json.loads(document)


def _spread(prefix: str, documents: Iterable[Mapping[str, Any] | None]) -> dict[str, pa.Array]:
    """A column for each name in the documents. Names that differ in capitals alone are one: so they are in SQL."""
    rows = list(documents)
    columns: dict[str, list[Any]] = {}
    spelt: dict[str, str] = {}
    for index, row in enumerate(rows):
        for name, value in (row or {}).items():
            column = columns.get(name)
            if column is None:
                column = columns[name] = [None] * len(rows)
            column[index] = value
    arrays = {}
    for name in sorted(columns):
        key = prefix + name.replace("\0", "")
        one = spelt.setdefault(key.lower(), key)
        if one == key:
            arrays[one] = columns[name]
        else:
            arrays[one] = [a if a is not None else b for a, b in zip(arrays[one], columns[name], strict=True)]
    return {key: array for key, values in arrays.items() if (array := _typed(values)) is not None}


def _typed(values: Sequence[Any]) -> pa.Array | None:
    """A column of numbers or booleans where all values are such, and otherwise of text; None where all are unknown."""
    kinds = set(map(type, values)) - {type(None)}
    if not kinds:
        return None
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    with contextlib.suppress(OverflowError, pa.ArrowInvalid):  # whole numbers beyond 64 bits are text
        if kinds == {int}:
            return pa.array(values, pa.int64())
        if kinds <= {int, float}:
            return pa.array(values, pa.float64())
    return _texts([v if v is None or isinstance(v, str) else json.dumps(v) for v in values])


def _texts(values: Sequence[str | None]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # half of a surrogate pair, which no text file can hold
        return pa.array([None if v is None else v.encode("utf-8", "replace").decode() for v in values], pa.string())


def _concat(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables below each other; a column that is of several types becomes a number, or text, that holds them all."""
    kinds: dict[str, set[Any]] = {}
    for table in tables:
        for column in table.schema:
            kinds.setdefault(column.name, set()).add(column.type)
    mixed = {
        name: pa.float64() if of == {pa.int64(), pa.float64()} else pa.string()
        for name, of in kinds.items()
        if len(of) > 1
    }
    cast_tables = []
    for table in tables:
        for name in mixed.keys() & set(table.column_names):
            index = table.schema.get_field_index(name)
            table = table.set_column(index, name, pc.cast(table[name], mixed[name], safe=False))
        cast_tables.append(table)
    return pa.concat_tables(cast_tables, promote_options="default")


def _shown(releases: Mapping[tuple[str, int], Mapping[str, Shown]]) -> pa.Table:
    """What variants showed: scene, release, variant_id, product, a list per tag dimension (`t_…`), a material per slot
    (`m_…`)."""
    rows = [(scene, number, id, s) for (scene, number), all_ in releases.items() for id, s in all_.items()]
    dimensions = sorted({d for *_, s in rows for d in s.tags})
    slots = sorted({slot for *_, s in rows for slot in s.materials})
    return pa.table(
        {
            "scene": pa.array([scene for scene, *_ in rows], pa.string()),
            "release": pa.array([number for _, number, *_ in rows], pa.int64()),
            "variant_id": pa.array([id for *_, id, _ in rows], pa.string()),
            "product": pa.array([s.product for *_, s in rows], pa.string()),
            **{
                f"t_{d}": pa.array([sorted(s.tags.get(d, ())) for *_, s in rows], pa.list_(pa.string()))
                for d in dimensions
            },
            **{f"m_{slot}": pa.array([s.materials.get(slot) for *_, s in rows], pa.string()) for slot in slots},
        }
    )


# ── compaction ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Compacted:
    """What a compaction did."""

    days: tuple[tuple[str, str], ...] = ()  # scene, day: those that went to Parquet
    exposures: int = 0


def compact(
    database: Database,
    folder: Path,
    *,
    business: str,
    now: datetime,
    describe: Describe,
    rules: Rules | None = None,
    everything: bool = False,
) -> Compacted:
    """Bring every day of the business to Parquet whose last window is over, and close it to events.

    With `everything` all days, also today: events of their decisions that are still to come will be refused. Can be
    killed at any moment and called again. One at a time per business; raises UnavailableError while another one runs.
    """
    rules = Rules() if rules is None else rules
    done, exposures = [], 0
    with _alone(folder, business):
        _sweep(database, folder, business)
        for scene, latest_us in _scenes(database, business):
            ends_us = latest_us + DAY_US if everything else to_us(now) - int(rules.of(scene).closing_s * 1e6)
            before_us = _close(database, business, scene, ends_us // DAY_US * DAY_US)
            while (oldest_us := _oldest(database, business, scene, before_us)) is not None:
                day = _day(oldest_us)
                if not _is_done(database, business, scene, day):
                    exposures += _write_day(database, folder, business, scene, day, describe)
                    done.append((scene, day))
                while _purge(database, business, scene, _start_us(day) + DAY_US):
                    pass
    return Compacted(tuple(done), exposures)


@contextmanager
def _alone(folder: Path, business: str) -> Iterator[None]:
    """Only one process changes the files of a business; a process that dies lets go."""
    inside = folder / business
    make_folder(inside)
    with (inside / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UnavailableError(f"{inside}: another process is changing the log's files. Try again later.") from None
        yield


def _manifest(connection: Connection, business: str, scene: str | None = None) -> list[sa.Row[Any]]:
    query = sa.select(PARTS).where(PARTS.c.business_id == business).order_by(PARTS.c.scene, PARTS.c.day)
    return list(connection.execute(query if scene is None else query.where(PARTS.c.scene == scene)))


def _sweep(database: Database, folder: Path, business: str) -> None:
    """Delete what was left by processes that were killed: files of ours that no manifest names."""
    with database.bulk(write=False) as connection:
        named = {part.file for part in _manifest(connection, business)}
    for file in (folder / business).glob("scene=*/day=*/part-*.parquet*"):
        if str(file.relative_to(folder)) not in named:
            file.unlink()


def _scenes(database: Database, business: str) -> list[tuple[str, int]]:
    """The scenes that have decisions in the database, and when the latest was taken."""
    latest = sa.func.max(DECISIONS.c.at_us)
    query = sa.select(DECISIONS.c.scene, latest).where(DECISIONS.c.business_id == business).group_by(DECISIONS.c.scene)
    with database.bulk(write=False) as connection:
        return [(scene, at_us) for scene, at_us in connection.execute(query.order_by(DECISIONS.c.scene))]


def _close(database: Database, business: str, scene: str, before_us: int) -> int:
    """Close a scene to the events of decisions before a moment, and return until when it is closed."""
    insert = _insert(database, CLOSED)
    later = sa.case((insert.excluded.before > CLOSED.c.before, insert.excluded.before), else_=CLOSED.c.before)
    upsert = insert.on_conflict_do_update(index_elements=["business_id", "scene"], set_={"before": later})
    with database.bulk() as connection:
        closed = _enter(connection, database, business, alone=True)
        connection.execute(upsert, {"business_id": business, "scene": scene, "before": _day(before_us)})
    return max(before_us, closed.get(scene, 0))


def _oldest(database: Database, business: str, scene: str, before_us: int) -> int | None:
    at = DECISIONS.c.at_us
    query = sa.select(sa.func.min(at)).where(
        DECISIONS.c.business_id == business, DECISIONS.c.scene == scene, at < before_us
    )
    with database.bulk(write=False) as connection:
        return cast("int | None", connection.scalar(query))


def _is_done(database: Database, business: str, scene: str, day: str) -> bool:
    with database.bulk(write=False) as connection:
        return any(part.day == day for part in _manifest(connection, business, scene))


def _write_day(database: Database, folder: Path, business: str, scene: str, day: str, describe: Describe) -> int:
    """Write a closed day of a scene to its file, say so in the manifest, and return the number of exposures."""
    start_us = _start_us(day)
    at = DECISIONS.c.at_us
    where = (DECISIONS.c.scene == scene, at >= start_us, at < start_us + DAY_US)
    counts: Counter[tuple[str, Count]] = Counter()
    with _duckdb() as duck:
        with database.bulk(write=False) as connection:
            parts = _manifest(connection, business, scene)
            earlier = [folder / part.file for part in parts if part.file is not None and part.day < day]
            decisions = _load(duck, connection, business, where, frozenset(), earlier, describe)
        file = _part(business, scene, day, 0)
        query = f"SELECT * EXCLUDE (scene, day) FROM ({_JOINED}) ORDER BY exposed_at, decision_id"
        exposures = _write(duck, query, folder / file)
        counts[scene, Count.UNEXPOSED] = decisions - exposures
        orphans = duck.execute(
            "SELECT count(*) FROM event_rows WHERE decision_id NOT IN"
            " (SELECT decision_id FROM event_rows WHERE kind = 'exposure')"
        ).fetchone()
        counts[scene, Count.ORPHANED] = 0 if orphans is None else orphans[0]
    with database.bulk() as connection:
        row = {"business_id": business, "scene": scene, "day": day, "generation": 0}
        connection.execute(PARTS.insert(), row | {"file": file if exposures else None, "rows": exposures})
        _count(connection, database, business, day, counts)
    return exposures


def _part(business: str, scene: str, day: str, generation: int) -> str:
    return f"{business}/scene={scene}/day={day}/part-{generation:04}.parquet"


def _write(duck: duckdb.DuckDBPyConnection, query: str, file: Path) -> int:
    """Write what a query finds to a file that is there as a whole, and on disk, or not at all; without rows there is
    none. Return the number of rows."""
    make_folder(file.parent)
    unfinished = file.with_name(file.name + ".unfinished")
    target = str(unfinished).replace("'", "''")
    written = duck.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)").fetchone()
    rows = 0 if written is None else int(written[0])
    if rows:
        sync(unfinished)
        unfinished.replace(file)
    else:
        unfinished.unlink()
    sync(file.parent)
    return rows


def _purge(database: Database, business: str, scene: str, before_us: int) -> int:
    """Delete some of the decisions before a moment, with their events, and return how many; 0: there are none left."""
    at = DECISIONS.c.at_us
    of = (DECISIONS.c.business_id == business, DECISIONS.c.scene == scene, at < before_us)
    with database.bulk() as connection:
        ids = list(connection.scalars(sa.select(DECISIONS.c.id).where(*of).order_by(at).limit(PURGED)))
        _delete(connection, business, ids)
        return len(ids)


def _delete(connection: Connection, business: str, ids: Sequence[str]) -> tuple[int, int]:
    """Delete decisions and their events; return how many of each there were."""
    if not ids:
        return 0, 0
    events = connection.execute(
        EVENTS.delete().where(EVENTS.c.business_id == business, EVENTS.c.decision_id.in_(ids))
    ).rowcount
    decisions = connection.execute(
        DECISIONS.delete().where(DECISIONS.c.business_id == business, DECISIONS.c.id.in_(ids))
    ).rowcount
    return decisions, events


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def open_exposures(
    database: Database,
    folder: Path,
    *,
    business: str,
    describe: Describe,
    scene: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection with a view `exposures`: one row per decision that was seen, with what became of it, of days
    that are compacted and days that are not alike; docs/events.md describes the columns.

    Of one scene or all of them, first seen from `since` on and before `until`.
    """
    with _duckdb() as duck:
        with database.bulk(write=False) as connection:
            parts = _manifest(connection, business, scene)
            done = frozenset((part.scene, part.day) for part in parts)
            files = [folder / part.file for part in parts if part.file is not None]
            where = [] if scene is None else [DECISIONS.c.scene == scene]
            if until is not None:
                where.append(DECISIONS.c.at_us < to_us(until))
            _load(duck, connection, business, where, done, files, describe)
        duck.execute(f"CREATE TABLE whole AS {_JOINED}")
        for name in ("decision_rows", "event_rows", "shown"):
            duck.unregister(name)
        whole = f"(FROM whole UNION ALL BY NAME FROM {_parts(files)})" if files else "whole"
        bounds = [
            f"exposed_at {sign} make_timestamptz({to_us(moment)})"
            for sign, moment in ((">=", since), ("<", until))
            if moment is not None
        ]
        names = [row[0] for row in duck.execute(f"DESCRIBE SELECT * FROM {whole}").fetchall()]
        features = sorted(name for name in names if name[:2] in _PREFIXES)
        columns = ", ".join(_name(name) for name in (*(n for n in names if n not in features), *features))
        duck.execute(f"CREATE VIEW exposures AS SELECT {columns} FROM {whole} WHERE {' AND '.join(bounds) or 'true'}")
        yield duck


def read_exposures(
    database: Database,
    folder: Path,
    *,
    business: str,
    describe: Describe,
    scene: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> pa.Table:
    """The exposures with outcomes that `open_exposures` describes, in the order in which they were seen."""

    def read() -> pa.Table:
        with open_exposures(
            database, folder, business=business, describe=describe, scene=scene, since=since, until=until
        ) as duck:
            return duck.sql("SELECT * FROM exposures ORDER BY exposed_at, decision_id").to_arrow_table()

    return read_anew(read)


def read_anew(read: Callable[[], Answer]) -> Answer:
    """What a read gives; anew where a file was replaced between the manifest and its reading."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(duckdb.IOException):
            return read()
    return read()


def day_files(database: Database, folder: Path, *, business: str, scene: str) -> dict[str, Path | None]:
    """The days of a scene that are compacted, in order, each with its file; None: nobody saw anything on it."""
    with database.bulk(write=False) as connection:
        parts = _manifest(connection, business, scene)
    return {part.day: None if part.file is None else folder / part.file for part in parts}


@dataclass(frozen=True)
class ContractLog:
    """A log of the contract that was written: `kaleidoscope learn PATH --schema SCHEMA`."""

    path: Path
    schema: Path
    exposures: int
    left_out: dict[str, int]  # exposures by why they are not in it: not_learn, not_recorded, not_described
    units: dict[int, dict[str, tuple[int, int]]]  # of one scene: release → bucket → units, new ones; left out or not


def contract_log(
    database: Database,
    folder: Path,
    out: Path,
    *,
    business: str,
    describe: Describe,
    scene: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    label: str = "click",
    control: bool = False,
    words: Words | None = None,
) -> ContractLog:
    """Write the exposures that may be learned from to `out`, as exposures.parquet and schema.yaml (log_schema.py).

    Features, context and tags keep their own names; what is ours begins with `_`. A variant has the tags that it was
    last shown with, as the vocabulary of that release called them; with `words`, as the newest vocabulary of them all
    does, so that a tag that was renamed in between is one. Over all scenes, variants compete within their scene.
    `control`: with the exposures of that bucket, which say nothing of preferences, and are what lifts are measured
    against. Raises InputError where nothing can be learned from, or a name is both a feature and a tag.
    """
    if label not in ("click", "conversion"):
        raise InputError(f"label: {label!r} is no outcome. Take click or conversion.")
    make_folder(out)

    def write() -> ContractLog:
        with open_exposures(
            database, folder, business=business, describe=describe, scene=scene, since=since, until=until
        ) as duck:
            return _write_contract(duck, out, scene, label, control, words)

    return read_anew(write)


def _write_contract(
    duck: duckdb.DuckDBPyConnection, out: Path, scene: str | None, label: str, control: bool, words: Words | None
) -> ContractLog:
    found = [row[0] for row in duck.execute("DESCRIBE exposures").fetchall()]
    wanted = f"(learn OR reason = '{Reason.CONTROL}')" if control else "learn"
    usable = f"{wanted} AND recorded AND described"
    why = {"not_learn": f"NOT {wanted}", "not_recorded": f"{wanted} AND NOT recorded"}
    why["not_described"] = f"{wanted} AND recorded AND NOT described"
    sums = ", ".join(f"count(*) FILTER ({condition})" for condition in (*why.values(), usable))
    ((*left, exposures),) = duck.execute(f"SELECT {sums} FROM exposures").fetchall()
    left_out = dict(zip(why, left, strict=True))
    known: dict[str, list[str]] = {"u_": [], "c_": [], "t_": []}
    named = [column for column in found if column[:2] in known]
    tests = [f"{_name(c)} IS NOT NULL" if c[:2] != "t_" else f"len({_name(c)}) > 0" for c in named]
    sums = ", ".join(["count(*)", *(f"count(*) FILTER ({test})" for test in tests)])
    ((_, *counted),) = duck.execute(f"SELECT {sums} FROM exposures WHERE {usable}").fetchall()
    for column, n in zip(named, counted, strict=True):
        if n:
            known[column[:2]].append(column)
    if not exposures or not known["t_"]:
        reasons = "; ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in left_out.items() if n)
        what = "have no tags" if exposures else "there are none"
        raise InputError(
            f"scene {scene!r}: no exposures to learn from: {what}{f' ({reasons})' if reasons else ''}."
            " Give a bucket that learns some traffic, and tag the materials."
        )
    known["t_"] = _register_latest(duck, known["t_"], usable, words)
    _refuse_ambiguous([column for columns in known.values() for column in columns])
    ours = {
        "_click" if label == "click" else "_conversion": f"CAST({label} AS TINYINT)",
        "_unit": "unit",
        "_scene": "scene",
        "_variant": "variant_id",
        "_propensity": "propensity",
        "_time": "exposed_at",
        "_bucket": "bucket",
        "_product": "product",
    }
    select = [f"{sql} AS {_name(name)}" for name, sql in ours.items()]
    select += [f"{_name(c)} AS {_name(c[2:])}" for c in (*known["u_"], *known["c_"])]
    select += [f"coalesce(l.{_name(c)}, []) AS {_name(c[2:])}" for c in known["t_"]]
    query = (
        f"SELECT {', '.join(select)} FROM exposures e JOIN latest l USING (scene, variant_id)"
        f" WHERE {usable} ORDER BY exposed_at, decision_id"
    )
    path, schema = out / "exposures.parquet", out / "schema.yaml"
    _write(duck, query, path)
    document = {
        "scene": scene if scene is not None else "all scenes",
        "label": next(iter(ours)),
        "unit": "_unit",
        "group": "_scene" if scene is None else None,
        "context": [c[2:] for c in known["c_"]],
        "user": [c[2:] for c in known["u_"]],
        "variant": [c[2:] for c in known["t_"]],
        "variant_id": "_variant",
        "propensity": "_propensity",
        "time": "_time",
        "bucket": "_bucket",
        "product": "_product",
    }
    text = yaml.safe_dump(document, allow_unicode=True, sort_keys=False)
    schema.write_text(text, encoding="utf-8")
    return ContractLog(path, schema, exposures, left_out, {} if scene is None else _units(duck))


def _units(duck: duckdb.DuckDBPyConnection) -> dict[int, dict[str, tuple[int, int]]]:
    """The units that each release has seen, by the bucket in which it saw them first; and how many of these had never
    been seen before.

    Whether an exposure may be learned from makes no difference: that depends on the bucket, and would look as if units
    were lost. What a tester asked for was not drawn.
    """
    found: dict[int, dict[str, tuple[int, int]]] = {}
    query = (
        "WITH by_unit AS (SELECT release, arg_min(bucket, (exposed_at, decision_id)) AS bucket, min(nth) = 0 AS new"
        f" FROM exposures WHERE reason IS DISTINCT FROM '{Reason.FORCED}' GROUP BY release, unit)"
        " SELECT release, bucket, count(*), count(*) FILTER (new) FROM by_unit GROUP BY ALL ORDER BY ALL"
    )
    for release, bucket, units, new in duck.execute(query).fetchall():
        found.setdefault(int(release), {})[str(bucket)] = int(units), int(new)
    return found


def _register_latest(
    duck: duckdb.DuckDBPyConnection, tags: Sequence[str], usable: str, words: Words | None
) -> list[str]:
    """Make `latest`, the tags that each variant was last shown with, and return its columns that hold any."""
    packed = ", ".join(f"{_name(c)} := coalesce({_name(c)}, [])" for c in tags)
    last = f"arg_max(struct_pack(release := release, {packed}), struct_pack(a := decided_at, b := release))"
    query = f"SELECT scene, variant_id, {last} AS l FROM exposures WHERE {usable} GROUP BY ALL"
    table = duck.sql(f"SELECT scene, variant_id, l.* FROM ({query}) ORDER BY ALL").to_arrow_table()
    keys = list(zip(table["scene"].to_pylist(), table["release"].to_pylist(), strict=True))
    became = {} if words is None else words(set(keys))
    parts = []
    for key in sorted(set(keys)):
        rows = table.filter(pa.array([other == key for other in keys]))
        columns = {name: rows[name] for name in ("scene", "variant_id")}
        found: dict[str, pa.ChunkedArray] = {}
        for column in tags:
            mapping = became.get(key)
            now = {column[2:]: rows[column]}
            if mapping is not None:
                now = translate_column(rows[column], column[2:], [mapping])
            for dimension, values in now.items():
                before = found.get(f"t_{dimension}")
                found[f"t_{dimension}"] = values if before is None else _both(before, values)
        parts.append(pa.table(columns | found))
    latest = pa.concat_tables(parts, promote_options="default")
    kept = sorted(
        name for name in latest.column_names[2:] if (pc.max(pc.list_value_length(latest[name])).as_py() or 0) > 0
    )
    duck.register("latest", latest.select(["scene", "variant_id", *kept]))
    return kept


def _both(a: Any, b: Any) -> pa.Array:
    """The values of two columns of lists: those of a dimension, and those that were moved there."""
    lists = zip(a.to_pylist(), b.to_pylist(), strict=True)
    return pa.array([sorted({*(x or ()), *(y or ())}) for x, y in lists], pa.list_(pa.string()))


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _refuse_ambiguous(columns: Sequence[str]) -> None:
    kinds = {"u_": "a user feature", "c_": "a context", "t_": "a tag dimension"}
    first: dict[str, str] = {}
    for column in columns:
        other = first.setdefault(column[2:].lower(), column)
        if other != column:
            raise InputError(
                f"{column[2:]!r} is both {kinds[other[:2]]} and {kinds[column[:2]]}: a log cannot tell them apart."
                " Give one of them another name."
            )


# ── retention and erasure ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Dropped:
    """What left the log."""

    decisions: int  # in the database
    events: int  # in the database
    exposures: int  # in Parquet
    files: int  # that were deleted or written anew


def drop_before(database: Database, folder: Path, *, business: str, before: date) -> Dropped:
    """Delete everything of the days before one, compacted or not; they are closed from then on. Counts stay."""
    day = before.isoformat()
    with _alone(folder, business):
        with database.bulk(write=False) as connection:
            old = [part for part in _manifest(connection, business) if part.day < day]
        for scene in {scene for scene, _ in _scenes(database, business)} | {part.scene for part in old}:
            _close(database, business, scene, _start_us(day))
        with database.bulk() as connection:
            forgotten = PARTS.update().where(PARTS.c.business_id == business, PARTS.c.day < day)
            connection.execute(forgotten.values(file=None, rows=0))
        decisions = events = 0
        before_us = _start_us(day)
        of = (DECISIONS.c.business_id == business, DECISIONS.c.at_us < before_us)
        while True:
            with database.bulk() as connection:
                ids = list(connection.scalars(sa.select(DECISIONS.c.id).where(*of).limit(PURGED)))
                gone = _delete(connection, business, ids)
            decisions, events = decisions + gone[0], events + gone[1]
            if not ids:
                break
        _sweep(database, folder, business)
        _remove_empty(folder / business)
    files = [part for part in old if part.file is not None]
    return Dropped(decisions, events, sum(part.rows for part in files), len(files))


def _remove_empty(folder: Path) -> None:
    for inside in sorted(folder.glob("scene=*/day=*")):
        if not any(inside.iterdir()):
            shutil.rmtree(inside)


def erase_unit(database: Database, folder: Path, *, business: str, unit: str, scrub: bool = True) -> Dropped:
    """Delete everything that the log holds of a unit: decisions and events, and rows in Parquet, whose files are
    written anew; with `scrub` the database's files, too, hold nothing of it afterwards.

    Can be killed and called again. Events of decisions whose tokens the unit still holds will be taken as before.
    """
    erased = files = 0
    with _alone(folder, business):
        decisions, events = _erase_rows(database, business, unit)
        with database.bulk(write=False) as connection:
            parts = {part.file: part for part in _manifest(connection, business) if part.file is not None}
        for file, part in parts.items():
            n = _erase_from(database, folder, file, part, unit)
            erased, files = erased + n, files + (n > 0)
        _sweep(database, folder, business)
    if scrub:
        database.scrub()
    return Dropped(decisions, events, erased, files)


def _erase_rows(database: Database, business: str, unit: str) -> tuple[int, int]:
    decisions = events = 0
    of = (DECISIONS.c.business_id == business, DECISIONS.c.unit == unit)
    while True:
        with database.bulk() as connection:
            ids = list(connection.scalars(sa.select(DECISIONS.c.id).where(*of).limit(PURGED)))
            gone = _delete(connection, business, ids)
        decisions, events = decisions + gone[0], events + gone[1]
        if not ids:
            return decisions, events


def _erase_from(database: Database, folder: Path, file: str, part: sa.Row[Any], unit: str) -> int:
    """Write a file anew without a unit; return how many rows it had."""
    source = "read_parquet('" + str((folder / file).absolute()).replace("'", "''") + "', hive_partitioning = false)"
    with _duckdb() as duck:
        found = duck.execute(f"SELECT count(*) FROM {source} WHERE unit = ?", [unit]).fetchone()
        if found is None or not found[0]:
            return 0
        duck.execute("CREATE TABLE erased AS SELECT ?::VARCHAR AS unit", [unit])
        anew = _part(part.business_id, part.scene, part.day, part.generation + 1)
        left = _write(duck, f"SELECT * FROM {source} WHERE unit <> (SELECT unit FROM erased)", folder / anew)
    changed = PARTS.update().where(
        PARTS.c.business_id == part.business_id, PARTS.c.scene == part.scene, PARTS.c.day == part.day
    )
    with database.bulk() as connection:
        values = {"file": anew if left else None, "rows": left, "generation": part.generation + 1}
        connection.execute(changed.values(**values))
    return int(found[0])
