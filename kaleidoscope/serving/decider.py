"""What every way of asking for a decision shares: who asks, how often, what is decided, and that it is recorded.

Nothing here waits for a disk: records of decisions are written by a thread, in batches.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import secrets
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kaleidoscope.access import Caller
from kaleidoscope.buckets import assign
from kaleidoscope.database import Database
from kaleidoscope.decide import (
    Decision,
    Ranking,
    Request,
    Served,
    bucket_seed,
    decide_many,
    fatigue_features,
    rank_top,
)
from kaleidoscope.decision_record import DecisionRecord, Keyring, Value
from kaleidoscope.errors import (
    ForbiddenError,
    InputError,
    KaleidoscopeError,
    NotFoundError,
    TooManyRequestsError,
    UnavailableError,
)
from kaleidoscope.events import recent_exposures, record_decisions
from kaleidoscope.feature_store import OnlineFeatures
from kaleidoscope.serving.live import Live
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Bucket

LOG = logging.getLogger("kaleidoscope.serving")
Answer = TypeVar("Answer")
MAX_ATTRIBUTES = 100
MAX_NAMES = 300  # different attributes of a scene that a process keeps: each is a column of the log
MAX_NAME = 100
MAX_TEXT = 500  # characters of an attribute
READ_S = 0.25  # that a decision waits, at worst, for what the log knows of a user
READERS = 4
SLOW_IN_A_ROW = 3
PAUSE_AFTER_S = 10.0
WRITERS = 8  # batches of events that are written at once
QUEUED = 64  # batches that may wait for that
MAX_UNIT = 200
WAITING = 50_000  # records in memory; beyond, the database has been away for long, and they are counted and dropped
BATCH = 2_000
PAUSE_S = 0.05  # between batches
RETRY_S = 1.0
CALLERS = 10_000  # whose rate is remembered


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_keys(settings: Settings) -> Keyring:
    """The secrets of the settings; those of the file, made where there is none. Raises InputError naming which."""
    if settings.keys is not None:
        return Keyring.parse(settings.keys.get_secret_value())
    path = settings.keys_file
    try:
        try:
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return Keyring.parse(_whole(path).strip())
        with os.fdopen(made, "w") as file:
            file.write(f"k1:{secrets.token_urlsafe(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        return Keyring.parse(path.read_text().strip())
    except OSError as error:
        raise InputError(f"{path}: the keys cannot be read or made: {error}. See KALEIDOSCOPE_KEYS_FILE.") from None


def _whole(path: Path) -> str:
    """The file's text; waits a moment for another process that is just making it."""
    for _ in range(50):
        text = path.read_text()
        if text.endswith("\n") or text.strip():
            return text
        time.sleep(0.02)
    raise InputError(f"{path}: the file of keys is empty. Delete it, and it will be made anew.")


# ── how often ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Pace:
    """How often each caller may ask: a token bucket of one second's worth (never by what they ask for)."""

    def __init__(self, per_s: float) -> None:
        self.per_s, self.burst = per_s, max(per_s, 1.0)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller → what is left, since when
        self._lock = threading.Lock()

    def take(self, caller: str, n: int = 1) -> None:
        """Count n requests; raises TooManyRequestsError with the seconds to wait."""
        at = time.monotonic()
        with self._lock:
            left, since = self._left.pop(caller, (self.burst, at))
            left = min(self.burst, left + (at - since) * self.per_s)
            allowed = left >= min(n, self.burst)
            self._left[caller] = (left - n if allowed else left, at)
            if len(self._left) > CALLERS:
                self._left.popitem(last=False)
        if not allowed:
            wait = (min(n, self.burst) - left) / self.per_s
            raise TooManyRequestsError(
                f"More than {self.per_s:g} requests a second with this token. Wait, or ask for several at once.", wait
            )


# ── what was decided ────────────────────────────────────────────────────────────────────────────────────────────────


class Metrics:
    """What an operator of the server watches; of this process alone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.decisions = Counter("kaleidoscope_decisions", "Decisions", ["bucket", "reason"], registry=self.registry)
        self.errors = Counter(
            "kaleidoscope_decision_errors", "Requests without a decision", ["code"], registry=self.registry
        )
        self.seconds = Histogram(
            "kaleidoscope_decision_seconds", "Time to decide", registry=self.registry,
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
        )  # fmt: skip
        self.events = Counter(
            "kaleidoscope_events", "Items of event batches", ["status", "code"], registry=self.registry
        )
        self.dropped = Counter(
            "kaleidoscope_decision_records_dropped",
            "Records lost: the log was away for too long",
            registry=self.registry,
        )
        self.waiting = Gauge("kaleidoscope_decision_records_waiting", "Records to be written", registry=self.registry)
        self.age = Gauge("kaleidoscope_live_age_seconds", "How old what is live is", registry=self.registry)
        self.problems = Gauge("kaleidoscope_live_problems", "Releases and models not loaded", registry=self.registry)


class Recorder:
    """Writes records of decisions to the log, by a thread; `close` writes what is left."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self.database, self.metrics = database, metrics
        self._queue: queue.Queue[DecisionRecord] = queue.Queue(WAITING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def add(self, records: Sequence[DecisionRecord]) -> None:
        """Have them written soon. Where the log was away for too long, they are dropped, and counted."""
        for record in records:
            try:
                self._queue.put_nowait(record)
            except queue.Full:
                self.metrics.dropped.inc()

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is left, for so long."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def waiting(self) -> int:
        """How many records are still to be written."""
        return self._queue.qsize()

    def _run(self) -> None:
        while not (self._stop.is_set() and self._queue.empty()):
            batch = self._batch()
            while batch:
                try:
                    record_decisions(self.database, batch)
                    break
                except KaleidoscopeError as error:
                    LOG.warning("%d decisions could not be recorded yet: %s", len(batch), error.message)
                except Exception:  # the thread has to go on
                    LOG.exception("%d decisions could not be recorded.", len(batch))
                if self._stop.wait(RETRY_S):
                    LOG.error("%d decisions are lost: the log is away.", len(batch) + self._queue.qsize())
                    return
            self._stop.wait(PAUSE_S)

    def _batch(self) -> list[DecisionRecord]:
        batch: list[DecisionRecord] = []
        try:
            batch.append(self._queue.get(timeout=0.2))
            while len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return batch


@dataclass(frozen=True)
class Asked:
    """Whom to decide for, as a caller says it: a unit, and attributes that are not yet told apart.

    Raises InputError for what no log could hold: a unit, a name or a text with control characters or halves of
    surrogate pairs, values that are no text, number, true, false or null, and more or longer ones than are taken.
    """

    unit: str
    attributes: Mapping[str, object]

    def __post_init__(self) -> None:
        if not self.unit.strip():
            raise InputError("the unit is empty. Send the user's id.")
        if len(self.unit) > MAX_UNIT:
            raise InputError(f"the unit has {len(self.unit):,} characters. Send an id of at most {MAX_UNIT}.")
        if _unkeepable(self.unit):
            raise InputError("the unit holds control characters. Send the user's id.")
        if len(self.attributes) > MAX_ATTRIBUTES:
            raise InputError(f"there are {len(self.attributes):,} attributes. Send at most {MAX_ATTRIBUTES}.")
        for name, value in self.attributes.items():
            if not name.strip() or len(name) > MAX_NAME or _unkeepable(name):
                raise InputError(
                    f"{name[:40]!r} cannot be an attribute's name. Use 1 to {MAX_NAME} characters that can be seen."
                )
            problem = _problem(value)
            if problem:
                raise InputError(f"{name}: {problem}")


def _unkeepable(text: str) -> bool:
    """Whether no log could hold it, or no eye tell it: control characters, halves of surrogate pairs."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def _problem(value: object) -> str:
    """What is wrong with an attribute's value; empty: nothing."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            return f"this text has {len(value):,} characters. Send at most {MAX_TEXT}."
        return "this text holds control characters. Leave them out." if _unkeepable(value) else ""
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**63 else "this number is beyond 64 bits. Send a smaller one, or text."
    if isinstance(value, float):
        return "" if math.isfinite(value) else "this is no number that can be compared. Leave it out, or send null."
    return "this is a list or an object. Send text, a number, true, false or null."


class Names:
    """The attributes of each scene that this process has seen: each is a column of the log, so there is an end."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], set[str]] = {}
        self._lock = threading.Lock()

    def kept(self, business: str, scene: str, names: Iterable[str]) -> set[str]:
        """Those of the names that are among the first MAX_NAMES of the scene."""
        seen = self._seen.setdefault((business, scene), set())
        found = set(names)
        if found <= seen:
            return found
        with self._lock:
            for name in sorted(found - seen)[: max(0, MAX_NAMES - len(seen))]:
                seen.add(name)
        return found & seen


class Timely:
    """Asks something that may be slow and waits for a moment only; after that again and again, it gets a pause."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix=name)
        self._slow, self._paused_until = 0, -float("inf")

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer; raises TimeoutError where there is none in time, or there were too many such."""
        if time.monotonic() < self._paused_until:
            raise TimeoutError("it was too slow, and has a pause")
        asked = self._pool.submit(question)
        try:
            found = asked.result(READ_S)
        except FutureTimeoutError:
            asked.cancel()
            self._slow += 1
            if self._slow >= SLOW_IN_A_ROW:
                self._slow, self._paused_until = 0, time.monotonic() + PAUSE_AFTER_S
            raise TimeoutError("it is too slow") from None
        self._slow = 0
        return found

    def close(self) -> None:
        """Ask nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Decider:
    """Decides for callers, from what is live."""

    def __init__(self, live: Live, log: Database, keyring: Keyring, settings: Settings, metrics: Metrics) -> None:
        self.live, self.log, self.keyring, self.metrics = live, log, keyring, metrics
        self.window_s = settings.decision_window_s
        self.pace = Pace(settings.requests_per_s)
        self.recorder = Recorder(log, metrics)
        self.names, self.reads = Names(), Timely("log-reader")
        self.writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="events")
        self.writing = 0  # batches of events that are written or wait
        self.features = OnlineFeatures(settings, refresh_s=settings.refresh_s)

    def start(self) -> None:
        """Begin to look what is live and what is known of users, and to write what was decided."""
        self.live.start()
        self.features.start()
        self.recorder.start()

    def close(self) -> None:
        """Stop looking, and write what is left."""
        self.live.close()
        self.features.close()
        self.reads.close()
        self.writers.shutdown()
        self.recorder.close()

    def caller(self, secret: str, *, look_up: bool = True) -> tuple[Caller, str]:
        """Whose token it is, and of which business. Raises UnauthenticatedError, ForbiddenError."""
        caller = self.live.caller(secret, look_up=look_up)
        if caller.business is None:
            raise ForbiddenError("This token is of the installation. Take one of the business that owns the scenes.")
        return caller, caller.business

    def at_once(self, secret: str, scene: str | None = None) -> bool:
        """Whether decisions for a token wait for nothing: no token to look up, and nothing to read of users.

        In a scene, or in all of its business. Such decisions take less than handing them to a thread does.
        """
        if not self.live.knows(secret):
            return False
        business = self.live.caller(secret, look_up=False).business or ""
        scenes = self.live.scenes(business)
        asked = scenes.values() if scene is None else [scenes[scene]] if scene in scenes else []
        reads = any(
            served is not None and (served.content.frequency or served.content.scene.fatigue_hours)
            for live in asked
            for served in (live.stable, live.candidate)
        )
        return not reads and not self.features.has(business)

    def served(self, business: str, scene: str, unit: str) -> Served:
        """The release that decides for a unit; raises NotFoundError where nothing is live for it."""
        if not self.live.loaded:
            raise UnavailableError("What is live is not known yet: the database is away. Show your own default.")
        found = self.live.scenes(business).get(scene)
        served = None if found is None else found.serving(business, unit)
        if served is None:
            raise NotFoundError(f"Nothing is live in scene {scene!r} for this unit. Show your own default.")
        return served

    def decide(self, business: str, scene: str, asked: Asked, *, forced: str | None = None) -> Decision:
        """The decision for a unit, recorded. Raises NotFoundError, NothingToShowError, InputError."""
        begun = time.perf_counter()
        try:
            served = self.served(business, scene, asked.unit)
            request = self.request(served, business, scene, asked, forced=forced)
            [decision] = decide_many(
                served, [request], keyring=self.keyring, business=business, scene=scene, window_s=self.window_s
            )
        except Exception as error:
            self.metrics.errors.labels(error.code if isinstance(error, KaleidoscopeError) else "internal").inc()
            raise
        self.recorder.add([decision.record])
        self.metrics.decisions.labels(decision.record.bucket.value, decision.record.reason.value).inc()
        self.metrics.seconds.observe(time.perf_counter() - begun)
        return decision

    def top(self, business: str, scene: str, asked: Asked, k: int) -> tuple[Served, Ranking] | Decision:
        """The k best candidates for a unit, of which a caller chooses; nothing is decided or recorded.

        For a unit of bucket control or random it is a decision all the same: they show what was drawn for them, or
        nothing could be compared with them.
        """
        served = self.served(business, scene, asked.unit)
        if assign(served.shares, bucket_seed(business, scene), asked.unit) in (Bucket.CONTROL, Bucket.RANDOM):
            return self.decide(business, scene, asked)
        return served, rank_top(served, self.request(served, business, scene, asked), k)

    def request(self, served: Served, business: str, scene: str, asked: Asked, *, forced: str | None = None) -> Request:
        """The attributes told apart: what placeholders take, what is of the moment, and what is the user's."""
        filled = {p.name: p for p in served.content.placeholders if p.source == "request"}
        moment = set(served.content.scene.context)
        kept = self.names.kept(business, scene, asked.attributes)
        features: dict[str, Value] = {}
        context: dict[str, Value] = {}
        values: dict[str, object] = {}
        for name, value in asked.attributes.items():
            if name in filled:
                values[name] = value
            if name not in kept or (name in filled and not filled[name].feature):
                continue
            if name in moment:
                context[name] = value  # type: ignore[assignment]  # checked by Asked
            else:
                features[name] = value  # type: ignore[assignment]
        at = datetime.now(UTC)
        known, note = self.features.features_for(business, scene, asked.unit, at)
        if len(kept) < len(asked.attributes):
            note = "; ".join(filter(None, [note, f"{len(asked.attributes) - len(kept)} attributes beyond the limit"]))
        features = {name: value for name, value in known.items() if name not in moment} | features
        rule, hours = served.content.frequency, served.content.scene.fatigue_hours
        seen = self._exposures(business, scene, asked.unit, at, hours * 3600) if hours is not None else {}
        features |= fatigue_features(seen, served)
        exposures = self._exposures(business, scene, asked.unit, at, rule.window_s) if rule is not None else {}
        return Request(asked.unit, at, features, context, exposures, values, forced, note)

    def _exposures(self, business: str, scene: str, unit: str, at: datetime, window_s: float) -> dict[str, int]:
        since = at - timedelta(seconds=window_s)
        try:
            return self.reads.ask(lambda: recent_exposures(self.log, business, scene, unit, since))
        except (KaleidoscopeError, TimeoutError) as error:  # a decision does not wait for the log to come back
            LOG.warning("What unit %r saw is not known: %s", unit, error)
            return {}

    @property
    def stale(self) -> bool:
        """Whether the database has been away for a while, so that newer releases are not known."""
        return self.live.age_s > 5 * self.live.refresh_s + 1

    def settle(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.waiting.set(self.recorder.waiting)
        self.metrics.age.set(self.live.age_s if self.live.loaded else -1)
        self.metrics.problems.set(len(self.live.problems))
