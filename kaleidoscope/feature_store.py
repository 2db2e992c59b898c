"""What is known of users: history for training, and the newest of it for decisions. Nobody else knows Feast.

    feature_dir/BUSINESS/profiles.parquet      what an operator loaded: unit, known_from, columns of their own
                         behaviour.parquet     what units did until a midnight, from the log
                         recent.parquet        what units did in a scene lately, from the log
                         registry.db, online.db   Feast's: the views that are declared, and the newest values
                         state.json            what was applied, and how far the online store has come

A row of the three files says what was known of a unit from a moment on, and is never changed: so every decision can
be given again what was known when it was taken. What is declared lies in features/; docs/features.md explains it all.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import sqlalchemy as sa
import yaml

from kaleidoscope.database import Database, check_id
from kaleidoscope.decision_record import Value
from kaleidoscope.errors import InputError, JobError, KaleidoscopeError, NotFoundError, UnavailableError
from kaleidoscope.events import DAY_US, Kind, open_exposures, to_us
from kaleidoscope.files import json_text, replacing
from kaleidoscope.settings import Settings
from kaleidoscope.tables import Decision, Event, LogPart

LOG = logging.getLogger("kaleidoscope.features")
DECLARATIONS = Path(__file__).resolve().parent.parent / "features"
RECENT = timedelta(hours=24)
RECENT_KEPT = timedelta(days=90)  # of the history of recent counters
SMOOTHING = 20  # exposures at the average rate that a unit's click rate begins with
PUSHED = 10_000  # rows written to the online store at a time
MAX_COLUMNS = 150  # of profiles: a request may have 200 attributes
MAX_TEXT = 500  # characters of a name or a text, as of a request's attributes
APPLY_S = 600.0
TRIES = 3  # to empty the write-ahead log; each waits for as long as the database's timeout

_MOMENT = pa.timestamp("us", "UTC")
_KEYS = {"profiles": ("unit",), "behaviour": ("unit",), "recent": ("unit", "scene")}
_FILES = {"user_profile": "profiles", "user_behaviour": "behaviour", "user_scene_recent": "recent"}  # by view
_EMPTY = {
    "profiles": pa.schema({"unit": pa.string(), "known_from": _MOMENT}),
    "behaviour": pa.schema(
        {
            "unit": pa.string(), "known_from": _MOMENT, "past_exposures": pa.int64(), "past_clicks": pa.int64(),
            "past_conversions": pa.int64(), "past_ctr": pa.float64(), "last_seen_us": pa.int64(),
        }
    ),
    "recent": pa.schema(
        {
            "unit": pa.string(), "scene": pa.string(), "known_from": _MOMENT, "recent_exposures": pa.int64(),
            "recent_clicks": pa.int64(),
        }
    ),
}  # fmt: skip
_OURS = frozenset(name for schema in _EMPTY.values() for name in schema.names) | {"days_since_seen", "event_timestamp"}
_TYPES = {
    "String": pa.string(),
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "Bool": pa.bool_(),
}  # as Feast calls them


# ── what is declared ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class View:
    """A view that Feast knows: what of, and the type of each feature as a request brings it."""

    name: str
    of: tuple[str, ...]
    features: Mapping[str, str]
    description: str


def apply(settings: Settings, business: str) -> list[View]:
    """Tell Feast what is declared, and return it. A second time changes nothing.

    Raises InputError where Feast is not installed, JobError where it refuses.
    """
    home = home_of(settings, business)
    with _alone(home):
        _apply(home, redis_of(settings))
    return views(settings, business)


def views(settings: Settings, business: str) -> list[View]:
    """The views of a business, by name; raises NotFoundError where nothing was applied."""
    opened = _opened(settings, business)
    return [
        View(view.name, tuple(view.join_keys), {_shown_as(f): _type_of(f) for f in view.features}, view.description)
        for view in opened.views
    ]


def home_of(settings: Settings, business: str) -> Path:
    """The folder of a business's features; it need not be there."""
    return settings.feature_dir.absolute() / check_id("business", business)


def is_applied(settings: Settings, business: str) -> bool:
    """Whether a business has features at all."""
    return (home_of(settings, business) / "registry.db").exists()


def redis_of(settings: Settings) -> str | None:
    """The URL of the Redis that holds the newest values; None: they are in a file beside the history."""
    return None if settings.feature_url is None else settings.feature_url.get_secret_value()


def _filled_in(home: Path, redis: str | None) -> dict[str, str]:
    """What features/feature_store.yaml leaves open. A project's name begins with a capital, which no business's id has:
    Feast deletes from Redis by how keys end, and one id may end like another."""
    store = {"type": "sqlite", "path": str(home / "online.db")}
    if redis is not None:
        store = {"type": "redis", "connection_string": _connection(redis)}
    return {"FEATURES_HOME": str(home), "FEATURES_PROJECT": f"B{home.name}", "FEATURES_ONLINE": json.dumps(store)}


def _connection(redis: str) -> str:
    """The URL as Feast writes it: host:port,name=value,…"""
    url = urlsplit(redis)
    try:
        port = url.port or 6379
    except ValueError:
        port = 0
    if url.scheme not in ("redis", "rediss") or not url.hostname or not port:
        raise InputError("feature_url: this is no URL such as redis://user:password@host:6379/0.")
    given = {"username": url.username, "password": url.password, "db": url.path.strip("/")}
    parts = {name: unquote(value) for name, value in given.items() if value}
    if any("," in value for value in parts.values()):
        raise InputError("feature_url: Feast takes no commas in names and passwords. Choose another password.")
    parts |= {"ssl": "true"} if url.scheme == "rediss" else {}
    parts |= {"socket_timeout": "5", "socket_connect_timeout": "5"}
    return ",".join([f"{url.hostname}:{port}", *(f"{name}={value}" for name, value in parts.items())])


def _apply(home: Path, redis: str | None) -> None:
    """`feast apply`, in a process of its own: it imports what is declared as top-level modules."""
    if importlib.util.find_spec("feast") is None:
        raise InputError(_absent("there is no module of this name"))
    _begin(home)
    given = _filled_in(home, redis) | {"PYTHONDONTWRITEBYTECODE": "1", "FEAST_USAGE": "False"}
    command = [sys.executable, "-m", "feast.cli.cli", "apply", "--skip-source-validation"]
    try:
        done = subprocess.run(
            command, cwd=DECLARATIONS, env={**os.environ, **given},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=APPLY_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobError(f"{DECLARATIONS}: `feast apply` could not be run: {error}.") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise JobError(f"{DECLARATIONS}: `feast apply` failed for business {home.name!r}: {said}")
    if redis is None:
        with _online(home) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # so that decisions do not wait for whoever writes
    state, store = _state(home), hashlib.sha256(given["FEATURES_ONLINE"].encode()).hexdigest()
    if state["store"] != store:  # another one, in which there is nothing yet
        state |= {"store": store, "online_until": {}}
    _save(home, state | {"applied": _declared(home, redis)})


def _begin(home: Path) -> None:
    """Make the files of history that are not there yet, with no rows."""
    for name, schema in _EMPTY.items():
        if not (home / f"{name}.parquet").exists():
            _replace(home / f"{name}.parquet", partial(pq.write_table, schema.empty_table()))


def _declared(home: Path, redis: str | None) -> str:
    """What has to be applied anew when it changes: what is declared, where, and the columns of the profiles."""
    told = hashlib.sha256(repr((_columns(home / "profiles.parquet"), _filled_in(home, redis))).encode())
    for path in sorted(DECLARATIONS.iterdir()):
        if path.suffix in (".py", ".yaml"):
            told.update(path.read_bytes())
    return told.hexdigest()


def _columns(file: Path) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in pq.read_schema(file)]


def _absent(why: object) -> str:
    return f"features need Feast, which is not installed ({why}): pip install 'kaleidoscope[features]'."


def _feast() -> Any:
    """Feast, imported when it is first needed: that takes seconds, and brings torch where there is one."""
    import prometheus_client  # noqa: F401 - before Feast, which has it write every number to a file otherwise

    theirs = ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR")
    kept = {name: os.environ.get(name) for name in theirs}
    os.environ.setdefault("FEAST_USAGE", "False")  # earlier versions reported home
    try:
        import feast

        with suppress(ImportError):  # not every version has it
            import feast.metrics
    except ImportError as error:
        raise InputError(_absent(error)) from error
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
    return feast


@dataclass(frozen=True, eq=False)
class _Opened:
    """A business's store, and what its registry said when it was opened."""

    store: Any
    views: tuple[Any, ...]

    @classmethod
    def at(cls, home: Path, redis: str | None) -> _Opened:
        """Open the store in a folder."""
        feast = _feast()
        text = Template((DECLARATIONS / "feature_store.yaml").read_text(encoding="utf-8"))
        filled = yaml.safe_load(text.substitute(_filled_in(home, redis)))
        config = feast.RepoConfig(**filled)
        config.repo_path = DECLARATIONS
        store = feast.FeatureStore(config=config)
        return cls(store, tuple(sorted(store.list_feature_views(), key=lambda view: str(view.name))))

    def online(self, unit: str, scene: str, at: datetime) -> dict[str, Value]:
        """What is known of a unit now, without what is not."""
        references = [f"{view.name}:{field.name}" for view in self.views for field in view.features]
        answer = self.store.get_online_features(references, [{"unit": unit, "scene": scene}]).to_dict()
        found: dict[str, Value] = {}
        for view in self.views:
            for field in view.features:
                [value] = answer[field.name]
                if value is not None:
                    found[_shown_as(field)] = _days(value, to_us(at)) if _elapses(field) else value
        return found

    def write(self, view: str, table: pa.Table) -> None:
        """Make these the newest values in the online store."""
        import pandas as pd

        for start in range(0, len(table), PUSHED):
            # Objects: what is unknown is None, not NaN, and whole numbers beside it stay such.
            part = table.slice(start, PUSHED)
            frame = pd.DataFrame({name: pd.Series(part[name].to_pylist(), dtype=object) for name in part.column_names})
            frame["known_from"] = pd.to_datetime(frame["known_from"], utc=True)
            if view == "user_scene_recent":
                self.store.push("recent_counters", frame)
            else:
                self.store.write_to_online_store(view, frame)


def _opened(settings: Settings, business: str) -> _Opened:
    if not is_applied(settings, business):
        raise NotFoundError(
            f"Business {business!r} has no features in {settings.feature_dir}: `kaleidoscope features apply` makes"
            " them."
        )
    return _Opened.at(home_of(settings, business), redis_of(settings))


def _elapses(field: Any) -> bool:
    return "days_since" in field.tags


def _shown_as(field: Any) -> str:
    return str(field.tags.get("days_since", field.name))


def _type_of(field: Any) -> str:
    return {"String": "text", "Bool": "true or false"}.get(str(field.dtype), "number")


def _days(since_us: Any, at_us: Any) -> Any:
    """Whole days, so that answers stay the same for a while."""
    return (at_us - since_us) // DAY_US


# ── profiles ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Loaded:
    """What a file of profiles brought: its rows, those that said something new, and its features."""

    rows: int
    new: int
    features: tuple[str, ...]


def load_profiles(
    settings: Settings, business: str, path: Path, *, now: datetime, unit: str = "unit", since: str | None = None
) -> Loaded:
    """Take what a Parquet or CSV file says of units, a row each; its columns are features, and online at once.

    It is known from `now` on, or from what the column `since` says. A row is all that is known of its unit from then
    on; units that it does not name keep what they have. Raises InputError naming file, column and unit.
    """
    home = home_of(settings, business)
    given = _read_profiles(path, unit, since, now)
    with _alone(home):
        _begin(home)
        file = home / "profiles.parquet"
        before, columns = pq.read_schema(file), _columns(file)
        given = _fitting(given, before, path)
        features = [name for name in given.column_names if name not in ("unit", "known_from")]
        every = [*features, *(name for name in before.names if name not in given.column_names)]
        if len(every) > MAX_COLUMNS:
            raise InputError(f"{path}: with it there are {len(every)} features. Profiles may have {MAX_COLUMNS}.")
        with _duckdb() as duck:
            duck.register("given", given)
            stored = ", ".join(f"NULL AS {_name(n)}" for n in features if n not in before.names)
            duck.execute(f"CREATE VIEW stored AS SELECT *{f', {stored}' if stored else ''} FROM {_read(file)}")
            absent = ", ".join(f"NULL AS {_name(n)}" for n in every if n not in features)
            duck.execute(f"CREATE VIEW whole AS SELECT *{f', {absent}' if absent else ''} FROM given")
            same = " AND ".join(
                ["l.unit = g.unit", *(f"l.{_name(n)} IS NOT DISTINCT FROM g.{_name(n)}" for n in every)]
            )
            latest = "SELECT * FROM stored QUALIFY row_number() OVER (PARTITION BY unit ORDER BY known_from DESC) = 1"
            unlike = "" if since is not None else f" WHERE NOT EXISTS (FROM ({latest}) l WHERE {same})"
            duck.execute(f"CREATE TABLE new AS SELECT * FROM whole g{unlike}")
            new = _count(duck, "new")
            if new:
                kept = "SELECT s.* FROM stored s ANTI JOIN new USING (unit, known_from)"
                _copy(duck, f"{kept} UNION ALL BY NAME SELECT * FROM new", file)
        state = _state(home)
        if since is not None or columns != _columns(file):
            state["online_until"].pop("user_profile", None)
            _save(home, state)
        redis = redis_of(settings)
        if state["applied"] != _declared(home, redis):
            _apply(home, redis)
        _publish(home, _Opened.at(home, redis), ["user_profile"], now)
    return Loaded(len(given), new, tuple(features))


def _read_profiles(path: Path, unit: str, since: str | None, now: datetime) -> pa.Table:
    """The file as a table: unit, known_from, and a column of text, whole numbers, numbers or booleans per feature."""
    table = _read_file(path, unit)
    for name in (unit, *([since] if since is not None else [])):
        if name not in table.column_names:
            raise InputError(f"{path}: there is no column {name!r}. It has {', '.join(table.column_names[:20])}.")
    if len({name.lower() for name in table.column_names}) < len(table.column_names):
        raise InputError(f"{path}: two columns have the same name, or differ in capitals alone. Rename one.")
    if not len(table):
        raise InputError(f"{path}: it has no rows.")
    units = table[unit].cast(pa.string()).combine_chunks()
    if units.null_count or pc.any(pc.equal(pc.utf8_trim_whitespace(units), "")).as_py():
        raise InputError(f"{path}: column {unit!r} is empty in some rows. Every row is of a unit.")
    if since is None:
        known = pa.repeat(pa.scalar(now.astimezone(UTC), _MOMENT), len(table))
    else:
        known = _moments(table[since], path, since)
    columns = {"unit": units, "known_from": known}
    for name in table.column_names:
        if name in (unit, since):
            continue
        if not name.strip() or len(name) > MAX_TEXT or name.lower() in _OURS or re.search(r"[:@\0]|__|^_", name):
            why = "is a name of ours" if name.lower() in _OURS else "is no name of a feature (without : @ __)"
            raise InputError(f"{path}: column {name!r} {why}. Rename it.")
        columns[name] = _plain(table[name], path, name)
    if len(columns) == 2:
        raise InputError(f"{path}: beside {unit!r} there is no column, and so no feature.")
    made = pa.table(columns)
    twice = made.group_by(["unit", "known_from"]).aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)
    if len(twice):
        raise InputError(f"{path}: unit {twice['unit'][0].as_py()!r} has two rows. Give one, or the time of each.")
    return made


def _read_file(path: Path, unit: str) -> pa.Table:
    try:
        if path.suffix.lower() == ".csv":
            options = pyarrow.csv.ConvertOptions(column_types={unit: pa.string()}, strings_can_be_null=True)
            return pyarrow.csv.read_csv(path, convert_options=options)
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: it cannot be read as {'CSV' if path.suffix == '.csv' else 'Parquet'}: {error}"
        ) from None


def _moments(column: pa.ChunkedArray, path: Path, name: str) -> pa.Array:
    try:
        if pa.types.is_timestamp(column.type) and column.type.tz is None:
            column = pc.assume_timezone(column.cast(pa.timestamp("us"), safe=False), "UTC")
        known = column.cast(_MOMENT, safe=False).combine_chunks()
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {name!r} does not hold times: {error}. Write 2030-01-31T20:00:00Z.") from None
    if known.null_count:
        raise InputError(f"{path}: column {name!r} is empty in some rows. Say from when on each is known.")
    return known


def _plain(column: pa.ChunkedArray, path: Path, name: str) -> pa.Array:
    """A column in one of the four types that features have; what is no number is unknown."""
    kind, array = column.type, column.combine_chunks()
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_boolean(kind):
        return array
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        text = array.cast(pa.string())
        if (pc.max(pc.utf8_length(text)).as_py() or 0) > MAX_TEXT:
            raise InputError(f"{path}: column {name!r} holds texts of more than {MAX_TEXT} characters. Shorten them.")
        return text
    try:
        if pa.types.is_integer(kind):
            return array.cast(pa.int64())
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            numbers = array.cast(pa.float64())
            return pc.if_else(pc.is_finite(numbers), numbers, None)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: column {name!r}: {error}") from None
    raise InputError(f"{path}: column {name!r} is {kind}. Give text, numbers, or true and false; of a date the days.")


def _fitting(given: pa.Table, before: pa.Schema, path: Path) -> pa.Table:
    """The table, with the types that its columns have already; raises InputError where they contradict."""
    spelt = {name.lower(): name for name in before.names}
    for index, field in enumerate(given.schema):
        known = spelt.get(field.name.lower())
        if known is not None and known != field.name:
            raise InputError(f"{path}: column {field.name!r} is called {known!r} already. Rename it.")
        of = field.type if known is None else before.field(known).type
        if of == field.type or (pa.types.is_floating(field.type) and pa.types.is_integer(of)):
            continue
        empty = given[field.name].null_count == len(given)
        if not empty and not (pa.types.is_integer(field.type) and pa.types.is_floating(of)):
            raise InputError(
                f"{path}: column {field.name!r} is {field.type}, and was {of} up to now. Give it another name."
            )
        given = given.set_column(index, field.name, given[field.name].cast(of))
    return given


# ── from the log ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Materialised:
    """How much became known: rows of history, and values that are new in the online store, by view."""

    known: Mapping[str, int]
    online: Mapping[str, int]


def materialise(settings: Settings, log: Database, business: str, now: datetime) -> Materialised | None:
    """Bring the features of a business up to date: what users did until midnight (once a day), what they did lately,
    and all of it in the online store. None where the business has no features. Can be killed and called again.
    """
    home = home_of(settings, business)
    if not is_applied(settings, business):
        return None
    with _alone(home):
        state = _state(home)
        redis = redis_of(settings)
        if state["applied"] != _declared(home, redis):
            _apply(home, redis)
            state = _state(home)
        opened = _Opened.at(home, redis)
        known = {"user_profile": 0, "user_behaviour": 0, "user_scene_recent": 0}
        today = _midnight(now)
        with _duckdb() as duck:
            try:
                if state["behaviour_until"] != today.isoformat():
                    known["user_behaviour"] = _behave(duck, home, log, settings.log_dir, business, today, now)
                known["user_scene_recent"] = _count_recent(duck, home, log, settings.log_dir, business, now)
            except duckdb.IOException as error:  # compaction, or an erasure, has just replaced it
                raise UnavailableError(f"A file of the log was replaced meanwhile ({error}). Try again.") from error
        online = _publish(home, opened, list(known), now)
        _save(home, _state(home) | {"behaviour_until": today.isoformat()})
    return Materialised(known, online)


def _midnight(now: datetime) -> datetime:
    now = now.astimezone(UTC)
    return datetime(now.year, now.month, now.day, tzinfo=UTC)


# A day's clicks are those of the day, whenever they were shown what they clicked. All that is known of a unit changes
# only on days on which it did something.
_BEHAVIOUR = """
WITH happened AS (
    SELECT unit, CAST(exposed_at AS DATE) AS day, exposed_at AS seen, 1 AS exposures, 0 AS clicks, 0 AS conversions
    FROM exposures
    UNION ALL SELECT unit, CAST(clicked_at AS DATE), NULL, 0, 1, 0 FROM exposures WHERE clicked_at < $today
    UNION ALL SELECT unit, CAST(converted_at AS DATE), NULL, 0, 0, 1 FROM exposures WHERE converted_at < $today
), daily AS (
    SELECT unit, day, max(seen) AS seen, sum(exposures) AS exposures, sum(clicks) AS clicks,
        sum(conversions) AS conversions
    FROM happened GROUP BY unit, day
), overall AS (
    SELECT day, sum(sum(clicks)) OVER (ORDER BY day) / nullif(sum(sum(exposures)) OVER (ORDER BY day), 0) AS rate
    FROM daily GROUP BY day
), whole AS (
    SELECT unit, day, max(seen) OVER so_far AS seen, sum(exposures) OVER so_far AS exposures,
        sum(clicks) OVER so_far AS clicks, sum(conversions) OVER so_far AS conversions
    FROM daily WINDOW so_far AS (PARTITION BY unit ORDER BY day)
)
SELECT unit, CAST(CAST(day + 1 AS TIMESTAMP) AS TIMESTAMPTZ) AS known_from,
    CAST(exposures AS BIGINT) AS past_exposures, CAST(clicks AS BIGINT) AS past_clicks,
    CAST(conversions AS BIGINT) AS past_conversions,
    (clicks + $smoothing * rate) / (exposures + $smoothing) AS past_ctr, epoch_us(seen) AS last_seen_us
FROM whole JOIN overall USING (day)
"""


def _behave(
    duck: duckdb.DuckDBPyConnection,
    home: Path,
    log: Database,
    folder: Path,
    business: str,
    today: datetime,
    now: datetime,
) -> int:
    """Write down what units did until `today`; return for how many rows that is news.

    The first time every day of the log is told as if it had been known at its end. Later what has changed is known from
    `now` on: it was not before, and training must not see more than decisions did.
    """
    file = home / "behaviour.parquet"
    with open_exposures(log, folder, business=business, describe=lambda scene, release: {}, until=today) as exposures:
        table = exposures.sql(_BEHAVIOUR, params={"today": today, "smoothing": SMOOTHING}).to_arrow_table()
    duck.register("days", table)
    duck.execute("CREATE OR REPLACE TABLE told AS FROM days")
    duck.unregister("days")
    if pq.read_metadata(file).num_rows:
        features = "past_exposures, past_clicks, past_conversions, last_seen_us"
        latest = "QUALIFY row_number() OVER (PARTITION BY unit ORDER BY known_from DESC) = 1"
        duck.execute(
            "CREATE OR REPLACE TABLE new AS"
            f" SELECT * REPLACE ($now AS known_from) FROM (FROM told {latest})"
            f" ANTI JOIN (SELECT unit, {features} FROM {_read(file)} {latest}) USING (unit, {features})",
            {"now": now},
        )
    else:
        duck.execute("CREATE OR REPLACE TABLE new AS FROM told")
    return _append(duck, file, _KEYS["behaviour"], "true")


def _count_recent(
    duck: duckdb.DuckDBPyConnection, home: Path, log: Database, folder: Path, business: str, now: datetime
) -> int:
    """Count what units did in the last RECENT, and write down where that differs from what was known."""
    file, since = home / "recent.parquet", now - RECENT
    schema = pa.schema([field for field in _EMPTY["recent"] if field.name != "known_from"])
    with log.bulk(write=False) as connection:
        parts = _recent_parts(connection, business, since)
        rows = connection.execute(_recent_query(connection, business, since, now, list(parts))).all()
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    duck.register("open_days", pa.table(dict(zip(schema.names, map(list, columns), strict=True)), schema=schema))
    query = "SELECT * FROM open_days"
    files = [folder / part for part in parts.values() if part is not None]
    if files:
        paths = ", ".join(_text(str(path.absolute())) for path in files)
        query += (
            " UNION ALL SELECT unit, scene, count(*), sum(click)"
            f" FROM read_parquet([{paths}], hive_partitioning = true, hive_types = {{'scene': VARCHAR}})"
            f" WHERE decided_at >= make_timestamptz({to_us(since)}) AND exposed_at <= make_timestamptz({to_us(now)})"
            " GROUP BY unit, scene"
        )
    sums = (
        "CAST(sum(recent_exposures) AS BIGINT) AS recent_exposures, CAST(sum(recent_clicks) AS BIGINT) AS recent_clicks"
    )
    duck.execute(f"CREATE OR REPLACE TABLE counted AS SELECT unit, scene, {sums} FROM ({query}) GROUP BY unit, scene")
    duck.unregister("open_days")
    latest = "QUALIFY row_number() OVER (PARTITION BY unit, scene ORDER BY known_from DESC) = 1"
    duck.execute(
        "CREATE OR REPLACE TABLE new AS SELECT unit, scene, CAST($now AS TIMESTAMPTZ) AS known_from,"
        " coalesce(c.recent_exposures, 0) AS recent_exposures, coalesce(c.recent_clicks, 0) AS recent_clicks"
        f" FROM counted c FULL JOIN (FROM {_read(file)} {latest}) l USING (unit, scene)"
        " WHERE (coalesce(c.recent_exposures, 0), coalesce(c.recent_clicks, 0))"
        " IS DISTINCT FROM (l.recent_exposures, l.recent_clicks)",
        {"now": now},
    )
    # What was known lately stays in history, and so does the newest of every unit.
    newest = "row_number() OVER (PARTITION BY unit, scene ORDER BY known_from DESC) = 1"
    kept = f"known_from >= make_timestamptz({to_us(now - RECENT_KEPT)}) OR {newest}"
    return _append(duck, file, _KEYS["recent"], kept)


def _recent_parts(connection: sa.Connection, business: str, since: datetime) -> dict[tuple[str, str], str | None]:
    """The days that are in Parquet, by scene and day, and their files."""
    day = since.astimezone(UTC).date().isoformat()
    query = sa.select(LogPart.scene, LogPart.day, LogPart.file).where(
        LogPart.business_id == business, LogPart.day >= day
    )
    return {(scene, day): file for scene, day, file in connection.execute(query)}


def _recent_query(
    connection: sa.Connection, business: str, since: datetime, now: datetime, done: Sequence[tuple[str, str]]
) -> sa.Select[str, str, int, Any]:
    """Exposures and clicks of decisions since a moment by unit and scene, from the days that are in the database."""
    scenes = sa.select(Decision.scene).where(Decision.business_id == business).distinct()

    def happened(kind: Kind) -> sa.Exists:
        return sa.exists().where(
            Event.business_id == business,
            Event.decision_id == Decision.id,
            Event.kind == kind.value,
            Event.at_us <= to_us(now),
        )

    clicks = sa.func.sum(sa.case((happened(Kind.CLICK), 1), else_=0))
    query = (
        sa.select(Decision.unit, Decision.scene, sa.func.count(), clicks)
        .where(
            Decision.business_id == business,
            Decision.scene.in_(list(connection.scalars(scenes))),
            Decision.at_us.between(to_us(since), to_us(now)),
            happened(Kind.EXPOSURE),
        )
        .group_by(Decision.unit, Decision.scene)
    )
    for scene, day in done:
        begins = to_us(datetime.fromisoformat(day).replace(tzinfo=UTC))
        in_parquet = sa.and_(Decision.scene == scene, Decision.at_us.between(begins, begins + DAY_US - 1))
        query = query.where(sa.not_(in_parquet))
    return query


def _publish(home: Path, opened: _Opened, of: Sequence[str], now: datetime) -> dict[str, int]:
    """Bring views in the online store up to date; return how many units (in scenes) got newer values."""
    written = {}
    declared = {view.name for view in opened.views}
    for view in of:
        name = _FILES[view]
        if view not in declared:
            continue
        state = _state(home)
        begins = state["online_until"].get(view, "1970-01-01T00:00:00+00:00")
        keys = ", ".join(_KEYS[name])
        with _duckdb() as duck:
            table: pa.Table = duck.sql(
                f"SELECT * FROM {_read(home / f'{name}.parquet')}"
                " WHERE known_from BETWEEN CAST($begins AS TIMESTAMPTZ) AND CAST($ends AS TIMESTAMPTZ)"
                f" QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY known_from DESC) = 1",
                params={"begins": begins, "ends": now.isoformat()},
            ).to_arrow_table()
        opened.write(view, table)
        written[view] = len(table)
        state["online_until"][view] = now.isoformat()
        _save(home, state)
    return written


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


def training_set(
    settings: Settings, business: str, units: Sequence[str], scene: str, at: Sequence[datetime]
) -> pa.Table:
    """What was known of units at moments: a row each, in their order, with "unit" and a column per feature.

    Nothing that became known later is in it: what a decision at this moment was given, it is given again.
    """
    if len(units) != len(at):
        raise InputError(f"there are {len(units)} units and {len(at)} moments. Give a moment for each.")
    import pandas as pd

    opened, home = _opened(settings, business), home_of(settings, business)
    moments = np.array([to_us(moment) for moment in at], np.int64)
    columns: dict[str, Any] = {"unit": pa.array(units, pa.string())}
    # Feast returns one row for equal ones, in an order of its own, and none where all is known later. So rows are
    # numbered, and a view is asked on its own: a row that it loses is not lost for the others.
    asked = pd.DataFrame({"unit": list(units), "us": moments})
    first = asked.drop_duplicates()
    number = asked.merge(first.assign(row=range(len(first))), how="left", on=["unit", "us"])["row"].to_numpy()
    entities = pd.DataFrame(
        {
            "unit": first["unit"].to_numpy(),
            "scene": scene,
            "event_timestamp": pd.to_datetime(first["us"].to_numpy(), unit="us", utc=True),
            "row": range(len(first)),
        }
    )
    for view in opened.views:
        found: Any = None
        if len(first) and pq.read_metadata(home / f"{_FILES[view.name]}.parquet").num_rows:
            given = entities[[*view.join_keys, "event_timestamp", "row"]]
            references = [f"{view.name}:{field.name}" for field in view.features]
            job = opened.store.get_historical_features(given, references)
            found = job.to_df().set_index("row").reindex(range(len(first)))
        for field in view.features:
            kind = _TYPES[str(field.dtype)]
            values = pa.nulls(len(first), kind) if found is None else _values(found[field.name], kind)
            values = values.take(pa.array(number, pa.int64()))
            if _elapses(field):
                known = np.asarray(values.is_valid())
                days = _days(values.fill_null(0).to_numpy(zero_copy_only=False), moments)
                values = pa.array(days, pa.int64(), mask=~known)
            columns[_shown_as(field)] = values
    return pa.table(columns)


def _values(series: Any, kind: pa.DataType) -> pa.Array:
    """A column as Feast declares it: pandas makes numbers of whole numbers where some are unknown."""
    array = pa.array(series, from_pandas=True)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return array.cast(kind)


# ── decisions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def online(settings: Settings, business: str, unit: str, scene: str, at: datetime) -> dict[str, Value]:
    """What is known of a unit now, by feature; what is not known is not there. Opens the store, which takes seconds."""
    return _opened(settings, business).online(unit, scene, at)


Clock = Callable[[], float]
NOT_YET = "features are not opened yet"
TOO_SLOW = "features did not come in time"
PAUSED = "features have a pause after being too slow"
SLOW_IN_A_ROW = 3  # reads that did not come in time, after which nobody waits for a while
PAUSE_S = 5.0
READERS = 4


class OnlineFeatures:
    """The features that decisions are given, opened and kept up to date by a thread. `close` it.

    A decision waits for them no longer than `timeout_s`; a store that is too slow again and again is not asked for a
    while. Feast is imported only where some business has features.
    """

    def __init__(
        self, settings: Settings, *, timeout_s: float = 0.03, refresh_s: float = 2.0, clock: Clock = time.monotonic
    ) -> None:
        self.settings, self.timeout_s, self.refresh_s, self.clock = settings, timeout_s, refresh_s, clock
        self._stores: dict[str, tuple[object, _Opened]] = {}  # business → which registry, opened
        self._problems: dict[str, str] = {}
        self._looked, self._stop = threading.Event(), threading.Event()
        self._slow, self._paused_until = 0, -float("inf")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="features")
        self._thread = threading.Thread(target=self._run, name="features", daemon=True)

    def start(self) -> None:
        """Begin to open them."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking for newer ones."""
        self._stop.set()
        self._readers.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Whether what there is has been opened, or cannot be."""
        return self._looked.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is ready, for so long; return whether it is."""
        return self._looked.wait(timeout_s)

    def has(self, business: str) -> bool:
        """Whether a business has features that are open, and have to be read."""
        return business in self._stores

    def features_for(
        self, business: str, scene: str, unit: str, at: datetime | None = None
    ) -> tuple[dict[str, Value], str]:
        """What is known of a unit, and why it may be too little: empty where there is nothing to say."""
        kept = self._stores.get(business)
        if kept is None:
            return {}, self._why_not(business)
        if self.clock() < self._paused_until:
            return {}, PAUSED
        asked: Future[dict[str, Value]] | None = None
        try:
            asked = self._readers.submit(kept[1].online, unit, scene, at or datetime.now(UTC))
            found = asked.result(self.timeout_s)
        except FutureTimeoutError:
            if asked is not None:
                asked.cancel()
            self._slow += 1
            if self._slow >= SLOW_IN_A_ROW:
                self._slow, self._paused_until = 0, self.clock() + PAUSE_S
                LOG.warning("Features of business %r are too slow; decisions do without for %g s.", business, PAUSE_S)
            return {}, TOO_SLOW
        except Exception as error:  # whatever is wrong with it, the decision has to be taken
            LOG.warning("Features of unit %r of business %r cannot be read: %s", unit, business, error)
            return {}, f"features cannot be read: {type(error).__name__}"
        self._slow = 0
        return found, ""

    def _why_not(self, business: str) -> str:
        if business in self._problems:
            return self._problems[business]
        return NOT_YET if not self.ready and is_applied(self.settings, business) else ""

    def _run(self) -> None:
        while True:
            try:
                self._look()
            except Exception:  # the thread has to go on
                LOG.exception("The features in %s cannot be opened.", self.settings.feature_dir)
            self._looked.set()
            if self._stop.wait(self.refresh_s):
                return

    def _look(self) -> None:
        """Open what is new or has changed, and forget what is gone."""
        root = self.settings.feature_dir
        found = {path.parent.name: path for path in root.glob("*/registry.db")} if root.is_dir() else {}
        for business in [*self._stores, *self._problems]:
            if business not in found:
                self._stores.pop(business, None)
                self._problems.pop(business, None)
        for business, path in sorted(found.items()):
            told = path.stat()
            which = (told.st_mtime_ns, told.st_size, told.st_ino)
            if business in self._stores and self._stores[business][0] == which:
                continue
            try:
                opened = _Opened.at(path.parent.absolute(), redis_of(self.settings))
                opened.online("", "", datetime.now(UTC))  # the first read is slow
            except Exception as error:  # half written, or damaged: it is tried again
                message = error.message if isinstance(error, KaleidoscopeError) else f"{type(error).__name__}: {error}"
                if self._problems.get(business) is None:
                    LOG.warning("Features of business %r cannot be opened: %s", business, message)
                self._problems[business] = f"features cannot be opened: {message}"[:200]
                continue
            self._stores[business] = (which, opened)
            self._problems.pop(business, None)


# ── erasure ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Erased:
    """What was known of a unit: rows of history, and entries of the online store."""

    history: int
    online: int


def erase(settings: Settings, business: str, unit: str) -> Erased:
    """Forget everything that is known of a unit; no file holds any of it afterwards.

    Erase it from the log first (events.erase_unit), or it comes back from there. Can be killed and called again.
    """
    home = home_of(settings, business)
    if not home.is_dir():
        return Erased(0, 0)
    with _alone(home):
        history = sum(_erase_history(home / f"{name}.parquet", unit) for name in _KEYS)
        online = _erase_online(home, unit) if (home / "online.db").exists() else 0
        redis = redis_of(settings)
        return Erased(history, online + (_erase_redis(_Opened.at(home, redis), unit) if redis is not None else 0))


def _erase_history(file: Path, unit: str) -> int:
    if not file.exists():
        return 0
    with _duckdb() as duck:
        duck.execute("CREATE TABLE erased AS SELECT CAST(? AS VARCHAR) AS unit", [unit])
        erased = _count(duck, f"{_read(file)} SEMI JOIN erased USING (unit)")
        if erased:
            _copy(duck, f"SELECT * FROM {_read(file)} ANTI JOIN erased USING (unit)", file)
    return erased


def _erase_online(home: Path, unit: str) -> int:
    """Delete a unit's rows in whatever table: of any scene, and of views that are not declared any more."""
    erased = 0
    with _online(home) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            if "entity_key" not in {row[1] for row in connection.execute(f"PRAGMA table_info({_name(table)})")}:
                continue
            # The unit's bytes are somewhere in the key; only Feast knows where.
            query = f"SELECT DISTINCT entity_key FROM {_name(table)} WHERE instr(entity_key, ?) > 0"
            keys = [key for (key,) in connection.execute(query, [unit.encode()]) if _is_of(key, unit)]
            for key in keys:
                erased += connection.execute(f"DELETE FROM {_name(table)} WHERE entity_key = ?", [key]).rowcount
        connection.execute("VACUUM")
        # Only then the pages from before are gone, and only while nobody is in the middle of reading them.
        if not any(_checkpointed(connection) for _ in range(TRIES)):
            raise UnavailableError(f"{home / 'online.db'}: others do not stop reading. Forget the unit again.")
    return erased


def _is_of(key: bytes, unit: str) -> bool:
    """Whether an entry of the online store is of this unit, alone or in a scene."""
    _feast()
    from feast.infra.key_encoding_utils import deserialize_entity_key

    entity = deserialize_entity_key(key, entity_key_serialization_version=3)
    named = dict(zip(entity.join_keys, entity.entity_values, strict=True))
    return "unit" in named and named["unit"].string_val == unit


def _erase_redis(opened: _Opened, unit: str) -> int:
    """Delete a unit's entries; their keys are Feast's, with the project behind."""
    config, erased = opened.store.config, 0
    client = opened.store.provider.online_store._get_client(config.online_store)
    project = config.project.encode()
    pattern = b"*" + re.sub(rb"([\\*?\[\]^-])", rb"\\\1", unit.encode()) + b"*" + project
    for key in list(client.scan_iter(pattern, count=1_000)):
        if not key.endswith(project):
            continue
        try:
            ours = _is_of(key[: -len(project)], unit)
        except Exception:  # others keep things there, too
            continue
        if ours:
            erased += client.hlen(key)
            client.delete(key)
    return erased


def _checkpointed(connection: sqlite3.Connection) -> bool:
    """Whether everything is in the database itself now, and its write-ahead log is empty."""
    [(busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return not busy


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Wait until nobody else changes the features of a business; a process that dies lets others go on."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        stream = (home / ".lock").open("a")
    except OSError as error:
        raise JobError(f"{home}: cannot be written to ({error}); see KALEIDOSCOPE_FEATURE_DIR.") from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _state(home: Path) -> dict[str, Any]:
    """What was applied, until when behaviour is known, and until when each view is in the online store."""
    path = home / "state.json"
    blank: dict[str, Any] = {"applied": "", "behaviour_until": None, "store": None, "online_until": {}}
    if not path.exists():
        return blank
    try:
        return blank | cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise JobError(
            f"{path}: cannot be read ({error}). Remove it; all that is known is put online again."
        ) from error


def _save(home: Path, state: Mapping[str, Any]) -> None:
    _replace(home / "state.json", lambda path: path.write_text(json_text(state), encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file: all of it is there afterwards, or what was there before."""
    try:
        with replacing(path) as new:
            write(new)
    except (OSError, duckdb.IOException) as error:
        raise JobError(
            f"{path}: cannot be written ({error}). Free some space, or check who may write there."
        ) from error


@contextmanager
def _duckdb() -> Iterator[duckdb.DuckDBPyConnection]:
    options = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    with closing(duckdb.connect(":memory:", config={**options, "python_enable_replacements": False})) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        yield connection


@contextmanager
def _online(home: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(home / "online.db", timeout=60, isolation_level=None)) as connection:
            yield connection
    except sqlite3.OperationalError as error:
        raise UnavailableError(f"{home / 'online.db'}: {error}. Try again.") from error


def _copy(duck: duckdb.DuckDBPyConnection, query: str, file: Path) -> None:
    _replace(
        file, lambda path: duck.execute(f"COPY ({query}) TO {_text(str(path))} (FORMAT parquet, COMPRESSION zstd)")
    )


def _append(duck: duckdb.DuckDBPyConnection, file: Path, keys: Sequence[str], kept: str) -> int:
    """Add the rows of the table `new` to a file, of whose rows it leaves those that are `kept`."""
    new = _count(duck, "new")
    if new:
        old = f"SELECT * FROM {_read(file)} ANTI JOIN new USING ({', '.join(keys)}, known_from)"
        _copy(duck, f"FROM ({old} UNION ALL BY NAME FROM new) QUALIFY {kept}" if kept != "true" else
              f"{old} UNION ALL BY NAME FROM new", file)  # fmt: skip
    return new


def _count(duck: duckdb.DuckDBPyConnection, table: str) -> int:
    [(n,)] = duck.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(n)


def _read(file: Path) -> str:
    return f"read_parquet({_text(str(file))}, hive_partitioning = false)"


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
