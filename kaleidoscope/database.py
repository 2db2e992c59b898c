"""Engines, sessions and the one commit.

A request or a job is one `Database.transaction`; services get its `Session` and never commit. The session knows its
caller, and three things follow without any service having to think of them: queries see only rows of the caller's
business, no row of another one can be written, and every change leaves an audit entry.
"""

from __future__ import annotations

import base64
import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import event, exc, orm
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql import visitors

from kaleidoscope.access import Caller
from kaleidoscope.errors import ConflictError, InputError, JobError, NotFoundError, UnavailableError
from kaleidoscope.tables import ApiToken, AuditEntry, Base, Business, Logged, Tenant, Versioned, now

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
BUSY_TIMEOUT_S = 10.0
PAGE = 50
MAX_PAGE = 500
MAX_CURSOR = 1000  # characters
# A PostgreSQL that dies without a word is noticed within seconds rather than hours.
ALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000}
MIGRATION_LOCK = 0x6B616C65  # of PostgreSQL's advisory locks, this one is ours

ONE_BY_ONE = "change rows one by one through the session, not by a statement: each is checked and audited"

SLUG = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII)

Row = TypeVar("Row")


class Session(orm.Session):
    """A transaction on behalf of somebody. `caller.business` is the tenant that all of its queries are about."""

    caller: Caller
    may_write: bool = True

    def bulk_save_objects(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: such writes pass by the tenant and the audit."""
        raise RuntimeError(ONE_BY_ONE)

    def bulk_insert_mappings(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, as `bulk_save_objects`."""
        raise RuntimeError(ONE_BY_ONE)

    def bulk_update_mappings(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, as `bulk_save_objects`."""
        raise RuntimeError(ONE_BY_ONE)

    @property
    def business(self) -> str:
        """The caller's business; raises InputError where the caller works on the installation as a whole."""
        if self.caller.business is None:
            raise InputError("name the business to work in: `--business NAME`, or KALEIDOSCOPE_BUSINESS")
        return self.caller.business


# ── engine ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Database:
    """The platform's database behind an SQLAlchemy URL; close it, or use it as a context manager."""

    def __init__(self, url: str) -> None:
        """Raises InputError for a URL that names no database we can use."""
        try:
            parsed = make_url(url)
        except (exc.ArgumentError, ValueError) as error:
            raise InputError(
                f"KALEIDOSCOPE_DATABASE_URL: {error}. Give sqlite:///FILE or postgresql+psycopg://…"
            ) from None
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise InputError(f"KALEIDOSCOPE_DATABASE_URL: {parsed.get_backend_name()} is neither sqlite nor postgresql")
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.sqlite = parsed.get_backend_name() == "sqlite"
        if self.sqlite and parsed.database in (None, "", ":memory:"):
            raise InputError("KALEIDOSCOPE_DATABASE_URL: an SQLite database needs a file: sqlite:///kaleidoscope.db")
        connect: dict[str, Any] = {"timeout": BUSY_TIMEOUT_S} if self.sqlite else {"connect_timeout": 10, **ALIVE}
        try:
            self.engine = sa.create_engine(parsed, connect_args=connect, pool_pre_ping=not self.sqlite)
        except exc.NoSuchModuleError:
            raise InputError(
                f"KALEIDOSCOPE_DATABASE_URL: there is no driver {parsed.drivername}. Take postgresql+psycopg://…"
            ) from None
        except ModuleNotFoundError as error:
            raise InputError(f"{error}. Install it: pip install 'kaleidoscope[postgresql]'") from None
        if self.sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        event.listen(self.engine, "before_execute", _only_logged)
        self.url = parsed
        self._inode: tuple[int, int] | None = None

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def transaction(self, caller: Caller, *, write: bool = True) -> Iterator[Session]:
        """One transaction on behalf of the caller: committed at the end of the block, rolled back by any exception.

        Writers on SQLite wait for each other from the start, so that what one reads is what it changes. With
        `write=False` nothing may be changed.

        Raises ConflictError where somebody else changed the same rows meanwhile, InputError for a value that the
        database cannot hold, UnavailableError where the database is away or stays locked.
        """
        engine = self.engine.execution_options(sqlite_begin="BEGIN IMMEDIATE" if write else "BEGIN")
        with self._in_our_words(), Session(engine, expire_on_commit=False, autoflush=False) as session:
            session.caller, session.may_write = caller, write
            yield session
            if write:
                session.commit()  # else closing rolls back, and what was read stays readable

    @contextmanager
    def bulk(self, *, write: bool = True) -> Iterator[Connection]:
        """A transaction on the tables of the log (tables.Logged), which are written in bulk, by Core statements.

        Nobody narrows them to a business: every statement has to name its own. Committed, and on disk, at the end of
        the block. Without `write` every statement sees the same state of the database. Raises as `transaction` does.
        """
        options: dict[str, Any] = {"sqlite_begin": "BEGIN IMMEDIATE" if write else "BEGIN", "logged_only": True}
        if not write and not self.sqlite:
            options["isolation_level"] = "REPEATABLE READ"
        engine = self.engine.execution_options(**options)
        self._refuse_another_file()
        with self._in_our_words(), engine.connect() as connection, connection.begin() as begun:
            yield connection
            if not write:
                begun.rollback()

    def _refuse_another_file(self) -> None:
        """Raise UnavailableError where the SQLite file was deleted or replaced since it was opened: connections would
        go on writing to one that nobody finds again."""
        if not self.sqlite:
            return
        try:
            found = Path(str(self.url.database)).stat()
        except OSError:
            found = None
        inode = None if found is None else (found.st_dev, found.st_ino)
        if self._inode is None:
            self._inode = inode
        elif inode != self._inode:
            raise UnavailableError(
                f"{self.name}: the file was deleted or replaced while it was in use. Put it back, or start again."
            )

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except StaleDataError as error:
            raise ConflictError("Somebody else changed this at the same time. Read it again, and repeat.") from error
        except exc.IntegrityError as error:
            message = str(error.orig).splitlines()[0]
            raise ConflictError(
                f"Somebody else changed this at the same time, or it exists already ({message}). Read it again."
            ) from error
        except exc.DataError as error:
            raise InputError(f"The database cannot hold a value ({str(error.orig).splitlines()[0]}).") from error
        except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
            raise UnavailableError(f"{self.name}: {_reason(error)}") from error

    def scrub(self) -> None:
        """Free the space of rows that were deleted, so that not even the database's files hold them any more."""
        options = {"sqlite_begin": ""} if self.sqlite else {"isolation_level": "AUTOCOMMIT"}
        engine = self.engine.execution_options(**options)
        with self._in_our_words(), engine.connect() as connection:
            if self.sqlite:
                connection.exec_driver_sql("VACUUM")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            else:
                for table in sorted(table.name for table in _logged()):
                    connection.exec_driver_sql(f"VACUUM {table}")

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    def backup(self, path: Path) -> None:
        """Copy a live SQLite database to a file; raises InputError for another database."""
        if not self.sqlite:
            raise InputError(f"{self.name}: this copies SQLite. Use pg_dump.")
        with closing(sqlite3.connect(str(self.url.database))) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)


def _reason(error: Exception) -> str:
    reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
    if "no such table" in reason:
        return f"{reason}. Run `kaleidoscope database upgrade`."
    return f"{reason}. Check that it is there and reachable, and try again."


def _prepare_sqlite(connection: DBAPIConnection, _: object) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, not where the driver guesses
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        "foreign_keys = ON",
        "recursive_triggers = ON",  # else REPLACE deletes behind the back of the append-only triggers
        "synchronous = FULL",
        f"busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    begin = connection.get_execution_options().get("sqlite_begin", "BEGIN")
    if begin:
        connection.exec_driver_sql(begin)


def _only_logged(connection: Connection, statement: sa.Executable, *_: object) -> None:
    """In bulk only the log is reached: all other tables have rules that sessions keep."""
    if not connection.get_execution_options().get("logged_only"):
        return
    parts = list(visitors.iterate(cast("visitors.ExternallyTraversible", statement)))
    tables = {part for part in parts if isinstance(part, sa.TableClause)}
    if any(isinstance(part, sa.TextClause) for part in parts) or not tables <= _logged():
        raise RuntimeError("in bulk only tables of the log can be named, and no text")


@cache
def _logged() -> frozenset[sa.Table]:
    mappers = (mapper for mapper in Base.registry.mappers if issubclass(mapper.class_, Logged))
    return frozenset(cast(sa.Table, mapper.local_table) for mapper in mappers)


# ── schema ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, for code and for tests; the schema is made by nothing else."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def revisions(database: Database) -> tuple[str | None, str | None]:
    """The schema revision of the database (None: it is empty), and the one this code needs."""
    try:
        with database.engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
    except exc.DBAPIError as error:  # also what says that a file is no database
        raise UnavailableError(f"{database.name}: {_reason(error)}") from error
    return current, ScriptDirectory.from_config(alembic_config()).get_current_head()


def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the schema to a revision, in one transaction."""
    _migrate(database, lambda config: command.upgrade(config, revision))


def downgrade(database: Database, revision: str) -> None:
    """Take the schema back to an earlier revision, in one transaction."""
    _migrate(database, lambda config: command.downgrade(config, revision))


def _migrate(database: Database, run: Callable[[Config], None]) -> None:
    try:
        engine = database.engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        with engine.connect() as connection, _references_at_rest(database, connection), connection.begin():
            if not database.sqlite:  # of servers that start together, one makes the schema
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            run(alembic_config(connection))
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all() if database.sqlite else []
            if broken:
                raise JobError(f"{database.name}: the migration would break references of {broken[0][0]}. Report this.")
    except CommandError as error:
        raise InputError(f"{database.name}: {error}. Is its schema of a newer version than this one?") from error
    except (exc.OperationalError, exc.InterfaceError) as error:
        raise UnavailableError(f"{database.name}: {_reason(error)}") from error


def open_database(url: str) -> Database:
    """The database behind the URL, its schema made if it is empty; raises InputError where it is of another version."""
    database = Database(url)
    try:
        _make_or_check_schema(database)
    except BaseException:
        database.close()
        raise
    return database


def _make_or_check_schema(database: Database) -> None:
    current, head = revisions(database)
    if current is None:
        upgrade(database)
    elif current != head:
        known = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
        older = "Back it up and run `kaleidoscope database upgrade`."
        newer = "A newer version made it: install that, or use another database."
        raise InputError(
            f"{database.name}: its schema is of revision {current}, this version needs {head}."
            f" {older if current in known else newer}"
        )


@contextmanager
def _references_at_rest(database: Database, connection: Connection) -> Iterator[None]:
    """SQLite changes a table by making it anew; dropping the old one must not delete what refers to its rows."""
    if not database.sqlite:
        yield
        return
    cursor = connection.connection.cursor()  # the driver's: within a transaction this pragma does nothing
    cursor.execute("PRAGMA foreign_keys = OFF")
    try:
        yield
    finally:
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


# ── what every session does ─────────────────────────────────────────────────────────────────────────────────────────


@event.listens_for(Session, "do_orm_execute")
def _scope(state: orm.ORMExecuteState) -> None:
    """Queries see the rows of the caller's business; rows are changed one by one, so that each leaves its trace."""
    session = cast(Session, state.session)
    if state.is_insert and state.bind_mapper is not None and state.bind_mapper.class_ is AuditEntry:
        return
    if state.is_insert or state.is_update or state.is_delete:
        raise RuntimeError(ONE_BY_ONE)
    if state.is_column_load or state.is_relationship_load:
        return
    if not (state.is_select and state.is_orm_statement) or state.is_from_statement or _passes_by(state.statement):
        raise RuntimeError("query mapped classes, not tables or text: only of those we see which business they are of")
    business = session.caller.business
    for kind in (Tenant, Logged):
        criteria = orm.with_loader_criteria(kind, lambda cls: cls.business_id == business, include_aliases=True)
        state.statement = state.statement.options(criteria)


def _passes_by(statement: sa.Executable) -> bool:
    """Whether the query holds text, a change, or a subquery that asks for a table's columns rather than its class's."""
    for part in visitors.iterate(cast("visitors.ExternallyTraversible", statement)):
        if isinstance(part, sa.TextClause | sa.UpdateBase):
            return True
        # The public `column_descriptions` fails on `exists().where(…)`. Mapped attributes are of a subclass of Column.
        asked = part._raw_columns if isinstance(part, sa.Select) else []
        if any(type(c) is sa.Table or (type(c) is sa.Column and isinstance(c.table, sa.Table)) for c in asked):
            return True
    return False


@event.listens_for(Session, "before_flush")
def _stay_inside(session: Session, *_: object) -> None:
    changed = (*session.new, *(row for row in session.dirty if session.is_modified(row)), *session.deleted)
    if changed and not session.may_write:
        raise RuntimeError(f"a {type(changed[0]).__name__} was changed in a transaction that only reads")
    caller = session.caller
    for row in (*session.new, *session.dirty, *session.deleted):
        if isinstance(row, Tenant):
            inside = row.business_id == caller.business
        elif isinstance(row, Business | ApiToken):
            owner = row.id if isinstance(row, Business) else row.business_id
            inside = caller.installation or owner == caller.business
        else:
            inside = True
        if not inside:
            raise RuntimeError(f"a {type(row).__name__} of another business than {caller.business} was touched")


@event.listens_for(Session, "after_flush")
def _audit(session: Session, *_: object) -> None:
    entries = [
        _audit_entry(row, action, session.caller)
        for action, rows in (("created", session.new), ("changed", session.dirty), ("deleted", session.deleted))
        for row in rows
        if isinstance(row, Base) and row.audited and (action != "changed" or session.is_modified(row))
    ]
    if entries:
        session.execute(sa.insert(AuditEntry), entries)


def _audit_entry(row: Base, action: str, caller: Caller) -> dict[str, Any]:
    state = sa.inspect(row)
    before, after = {}, {}
    for attribute in state.mapper.column_attrs:
        history = state.attrs[attribute.key].history
        if attribute.key in {"updated_at", *row.unaudited} or (action == "changed" and not history.has_changes()):
            continue
        if action != "created":
            old = history.deleted or history.unchanged
            before[attribute.key] = _plain(old[0]) if old else None
        if action != "deleted":
            after[attribute.key] = _plain(getattr(row, attribute.key))
    business = row.id if isinstance(row, Business) else getattr(row, "business_id", None)
    key = [str(getattr(row, str(c.key))) for c in state.mapper.primary_key if c.key != "business_id"]
    return {
        "business_id": business,
        "at": now(),
        "actor": caller.user,
        "action": action,
        "entity": row.__tablename__,
        "key": "/".join(key),
        "before": before or None,
        "after": after or None,
    }


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


# ── what every service needs ────────────────────────────────────────────────────────────────────────────────────────


def check_id(field: str, value: str) -> str:
    """The value, if it can be an id; raises InputError naming the field otherwise."""
    if not SLUG.fullmatch(value):
        raise InputError(
            f"{field}: {value!r} cannot be an id. Use 1 to 63 lower-case letters, digits, - and _, beginning with a"
            " letter or a digit."
        )
    return value


def check_moment(field: str, value: datetime) -> datetime:
    """The moment in UTC; raises InputError, naming the field, without a zone or beyond what a calendar holds."""
    if value.tzinfo is None:
        raise InputError(f"{field}: {value.isoformat()} has no time zone. Add one, such as +00:00.")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InputError(f"{field}: {value.isoformat()} is beyond the years 1 to 9999 in UTC.") from None


def find(session: Session, kind: type[Row], *key: object, lock: bool = False) -> Row:
    """The row of the caller's business with this key (without the business); raises NotFoundError.

    With `lock` nobody else can change it until the transaction ends: for rows that are read in order to be changed.
    """
    row = session.get(kind, (session.business, *key), with_for_update=True if lock else None, populate_existing=lock)
    if row is None:
        *scene, name = map(str, key)
        where = f"scene {scene[0]!r} of business {session.business!r}" if scene else f"business {session.business!r}"
        raise NotFoundError(f"There is no {_noun(kind)} {name!r} in {where}.")
    return row


def add_rows(session: Session, kind: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add many rows of a kind to the caller's business at once, each with its audit entry.

    For thousands of new rows, for which the session takes ten times as long. Every row names the same columns, without
    the business and without those that have a default.
    """
    if not session.may_write:
        raise RuntimeError(f"a {kind.__name__} was added in a transaction that only reads")
    if not rows:
        return
    if not issubclass(kind, Tenant):
        raise RuntimeError(f"a {kind.__name__} belongs to no business; add it through the session")
    connection = session.connection()
    connection.execute(sa.insert(kind), [{**row, "business_id": session.business} for row in rows])
    if not kind.audited:
        return
    keys = [str(column.key) for column in sa.inspect(kind).primary_key if column.key != "business_id"]
    entries = [
        {
            "business_id": session.business,
            "at": now(),
            "actor": session.caller.user,
            "action": "created",
            "entity": kind.__tablename__,
            "key": "/".join(str(row[key]) for key in keys),
            "before": None,
            "after": {name: _plain(value) for name, value in row.items() if name not in kind.unaudited},
        }
        for row in rows
    ]
    connection.execute(sa.insert(AuditEntry), entries)


def change_rows(session: Session, changes: Sequence[tuple[Base, Mapping[str, Any]]]) -> None:
    """Change many rows of one kind, which the session has read, at once: column → value, each with its audit entry.

    For thousands of rows, for which the session takes ten times as long. It leaves what the session would have: one
    that somebody else changed or deleted meanwhile is a ConflictError, a column that already has its value is left
    alone, and so is a row of which all columns have.
    """
    session.flush()
    compared = (
        (row, {name: value for name, value in wanted.items() if getattr(row, name) != value}) for row, wanted in changes
    )
    told = [(row, after) for row, after in compared if after]
    if not told:
        return
    kind = type(told[0][0])
    if not session.may_write:
        raise RuntimeError(f"a {kind.__name__} was changed in a transaction that only reads")
    if not issubclass(kind, Tenant) or any(type(row) is not kind for row, _ in told):
        raise RuntimeError("rows that are changed at once are all of one kind, which belongs to a business")
    if any(row.business_id != session.business for row, _ in told):  # type: ignore[attr-defined]
        raise RuntimeError(f"a {kind.__name__} of another business than {session.business} was touched")
    at, versioned, mapper = now(), issubclass(kind, Versioned), sa.inspect(kind)
    keys = [str(column.key) for column in mapper.primary_key]
    names = dict.fromkeys(name for _, after in told for name in after)
    table = cast(sa.Table, mapper.local_table)
    known = [*keys, *(["version"] if versioned else [])]
    statement = (
        sa.update(table)
        .where(*(table.c[name] == sa.bindparam(f"known_{name}") for name in known))
        .values({name: sa.bindparam(f"new_{name}") for name in [*names, *(["version", "updated_at"] * versioned)]})
    )
    parameters = [
        {
            **{f"known_{name}": getattr(row, name) for name in known},
            **{f"new_{name}": after[name] if name in after else getattr(row, name) for name in names},
            **({"new_version": row.version + 1, "new_updated_at": at} if versioned else {}),  # type: ignore[attr-defined]
        }
        for row, after in told
    ]
    connection = session.connection()
    if connection.execute(statement, parameters).rowcount != len(told):
        raise ConflictError("Somebody else changed this at the same time. Read it again, and repeat.")
    if kind.audited:
        entries = [_bulk_entry(session, row, keys, after, at) for row, after in told]
        connection.execute(sa.insert(AuditEntry), entries)
    for row, after in told:
        counted = {"version": row.version + 1, "updated_at": at} if versioned else {}  # type: ignore[attr-defined]
        for name, value in {**after, **counted}.items():
            orm.attributes.set_committed_value(row, name, value)


def _bulk_entry(
    session: Session, row: Base, keys: Sequence[str], after: Mapping[str, Any], at: datetime
) -> dict[str, Any]:
    """The audit entry of a row that still holds what it held before."""
    audited = [name for name in after if name not in row.unaudited]
    return {
        "business_id": session.business,
        "at": at,
        "actor": session.caller.user,
        "action": "changed",
        "entity": row.__tablename__,
        "key": "/".join(str(getattr(row, name)) for name in keys if name != "business_id"),
        "before": {name: _plain(getattr(row, name)) for name in audited} or None,
        "after": {name: _plain(after[name]) for name in audited} or None,
    }


def refuse_existing(session: Session, kind: type[Row], *key: object) -> None:
    """Raise ConflictError if there is such a row already."""
    if session.get(kind, (session.business, *key)) is not None:
        name = " ".join(map(str, key))
        raise ConflictError(f"There is a {_noun(kind)} {name!r} already. Change it, or choose another id.")


def _noun(kind: type[Any]) -> str:
    return "".join(f" {c.lower()}" if c.isupper() else c for c in kind.__name__).strip()


def check_version(row: Versioned, expected: int | None, yours: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ConflictError, with both versions, where the caller's change was made to an older version of a row.

    `expected` is the version the caller had read; None: whatever it is now. Read the row with `lock`.
    """
    if expected is not None and expected != row.version:
        raise ConflictError(
            f"You changed version {expected}, and meanwhile it is version {row.version}. Compare the two and repeat"
            " your change on the current one.",
            details={"yours": {"version": expected, **yours}, "current": {"version": row.version, **current}},
        )


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows in the order of their keys, and where the next page begins; None: there is none."""

    items: list[Row]
    next_cursor: str | None


def paginate(
    session: Session,
    query: sa.Select[Row],
    by: orm.InstrumentedAttribute[Any],
    *,
    cursor: str | None = None,
    limit: int = PAGE,
    descending: bool = False,
) -> Page[Row]:
    """A page of the query's rows, ordered by a unique column. Raises InputError for a cursor that is none of ours."""
    limit = max(1, min(limit, MAX_PAGE))
    if cursor is not None:
        after = read_cursor(cursor)
        if not isinstance(after, by.type.python_type) or isinstance(after, bool):
            raise InputError("cursor: this is not a cursor of this list. Take `next_cursor` of the page before.")
        query = query.where(by < after if descending else by > after)
    rows: list[Row] = list(session.scalars(query.order_by(by.desc() if descending else by).limit(limit + 1)))
    more = len(rows) > limit
    return Page(rows[:limit], write_cursor(getattr(rows[limit - 1], by.key)) if more else None)


def write_cursor(value: str | int) -> str:
    """A cursor after this key."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> str | int:
    """The key in a cursor; raises InputError."""
    try:
        padded = cursor[:MAX_CURSOR].encode("ascii") + b"=" * (-len(cursor) % 4)
        value = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        text = str(value).encode()  # there is JSON text that cannot be: half a surrogate pair
    except (ValueError, RecursionError):
        value, text = None, b""
    storable = b"\0" not in text if isinstance(value, str) else isinstance(value, int) and abs(value) < 2**63
    if not storable:
        raise InputError("cursor: this is not a cursor of this list. Take `next_cursor` of the page before.")
    return cast("str | int", value)
