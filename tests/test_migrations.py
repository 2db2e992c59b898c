"""Every migration, up and down, on data; and what they make is what the code's tables say, on both databases."""

from __future__ import annotations

import ast
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from kaleidoscope import database as storage
from kaleidoscope.database import Database, alembic_config, downgrade, open_database, revisions, upgrade
from kaleidoscope.errors import InputError, JobError
from kaleidoscope.tables import APPEND_ONLY, Base
from tests.kaleidoscope.conftest import postgresql_server  # noqa: F401 - a fixture

MOMENT = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
SCRIPTS = ScriptDirectory.from_config(alembic_config())
STEPS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]  # oldest first


def empty_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/empty.db"
    server: str = request.getfixturevalue("postgresql_server")
    name = "empty_" + "".join(c if c.isalnum() else "_" for c in tmp_path.name.lower())[-50:]
    admin = sa.create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    admin.dispose()
    return server.format(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with nothing in it."""
    return empty_url(request.param, request, tmp_path)


@pytest.fixture
def empty(url: str) -> Iterator[Database]:
    with Database(url) as database:
        yield database


def tables_of(database: Database) -> sa.MetaData:
    """The schema as the database has it, without Alembic's own table."""
    found = sa.MetaData()
    with database.engine.connect() as connection:
        found.reflect(connection)
    if "alembic_version" in found.tables:
        found.remove(found.tables["alembic_version"])
    return found


def some(column: sa.Column[Any]) -> Any:
    """A value of the column's type; the same everywhere, so that every reference has something to refer to."""
    kinds: list[tuple[type[Any], Any]] = [
        (sa.Boolean, True),
        (sa.Integer, 1),
        (sa.Float, 0.5),
        (sa.Numeric, 1),
        (sa.JSON, {"a": ["ü", 1, None]}),
        (sa.DateTime, MOMENT),
        (sa.String, "a"),
    ]
    found = [value for kind, value in kinds if isinstance(column.type, kind)]
    assert found, f"some() needs a value of type {column.type}"
    return found[0]


def fill(database: Database) -> None:
    """One row in every table that has none."""
    with database.engine.begin() as connection:
        for table in tables_of(database).sorted_tables:
            if not connection.execute(sa.select(sa.func.count()).select_from(table)).scalar():
                connection.execute(table.insert().values({c.name: some(c) for c in table.columns}))


def contents(database: Database) -> dict[str, list[dict[str, Any]]]:
    with database.engine.connect() as connection:
        return {
            table.name: [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            for table in tables_of(database).sorted_tables
        }


def common(one: dict[str, list[dict[str, Any]]], other: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What `one` holds in the tables and columns that both have."""
    return {
        table: [{c: v for c, v in row.items() if c in other[table][0]} for row in rows]
        for table, rows in one.items()
        if other.get(table)
    }


def described(index: Any) -> str:
    """An index as text; the condition of a partial one is an object that only its text tells from another."""
    options = {name: str(value) for name, value in index.get("dialect_options", {}).items()}
    return str({**index, "dialect_options": options})


def shape(database: Database) -> dict[str, Any]:
    """The schema as comparable data."""
    with database.engine.connect() as connection:
        inspector = sa.inspect(connection)
        triggers = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        if not database.sqlite:
            triggers = "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
        return {
            "triggers": sorted(row[0] for row in connection.execute(sa.text(triggers))),
            **{
                table: {
                    "columns": [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(table)],
                    "primary key": inspector.get_pk_constraint(table),
                    "foreign keys": sorted(map(str, inspector.get_foreign_keys(table))),
                    "unique": sorted(map(str, inspector.get_unique_constraints(table))),
                    "indexes": sorted(map(described, inspector.get_indexes(table))),
                }
                for table in inspector.get_table_names()
            },
        }


# ── the history ──


def test_history_is_one_line_with_one_head() -> None:
    assert len(SCRIPTS.get_heads()) == len(SCRIPTS.get_bases()) == 1
    assert [script.down_revision for script in SCRIPTS.walk_revisions()][::-1] == [None, *STEPS[:-1]]


def test_migrations_are_numbered_and_say_what_they_do() -> None:
    assert [int(step) for step in STEPS] == list(range(1, len(STEPS) + 1))
    for script in SCRIPTS.walk_revisions():
        assert Path(script.path).name.startswith(f"{script.revision}_")
        assert script.doc.endswith(".")


def test_migrations_do_not_depend_on_the_code_of_today() -> None:
    for script in SCRIPTS.walk_revisions():
        tree = ast.parse(Path(script.path).read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not [module for module in modules if module.startswith("kaleidoscope")], script.path


# ── up and down ──


def test_every_step_keeps_data_and_can_be_undone(empty: Database) -> None:
    bare = shape(empty)
    shapes, held = {"base": bare}, {}
    for step in STEPS:
        before = contents(empty)
        upgrade(empty, step)
        assert revisions(empty)[0] == step
        after = contents(empty)
        assert common(before, after) == common(after, before)
        fill(empty)
        shapes[step], held[step] = shape(empty), contents(empty)
    assert all(rows for rows in held[STEPS[-1]].values())

    for step, target in zip(STEPS[::-1], [*STEPS[-2::-1], "base"], strict=True):
        downgrade(empty, target)
        after = contents(empty)
        assert common(held[step], after) == common(after, held[step])
        if target == "base":
            assert tables_of(empty).tables == {}
        else:
            assert shape(empty) == shapes[target]
    upgrade(empty)
    assert shape(empty) == shapes[STEPS[-1]]
    fill(empty)
    assert contents(empty) == held[STEPS[-1]]


def test_a_step_that_fails_leaves_nothing_behind(
    empty: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(empty)
    fill(empty)
    before, held = shape(empty), contents(empty)
    _add_migration(
        tmp_path,
        monkeypatch,
        'op.create_table("half", sa.Column("id", sa.Integer()))\n    raise ValueError("half done")',
    )
    with pytest.raises(ValueError, match=r"^half done$"):
        upgrade(empty)
    assert (shape(empty), contents(empty)) == (before, held)
    assert revisions(empty) == (STEPS[-1], "9999")


def test_a_table_made_anew_keeps_what_refers_to_it(
    empty: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(empty)
    fill(empty)
    held = contents(empty)
    _add_migration(
        tmp_path,
        monkeypatch,
        'with op.batch_alter_table("variants", recreate="auto") as batch:\n'
        '        batch.alter_column("remarks", existing_type=sa.JSON(), nullable=True)',
    )
    upgrade(empty)
    assert contents(empty) == held
    with pytest.raises(sa.exc.IntegrityError), empty.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE variant_materials SET variant_id = 'nowhere'")


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_migration_that_breaks_references_is_taken_back(
    empty: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(empty)
    fill(empty)
    held = contents(empty)
    _add_migration(tmp_path, monkeypatch, "op.execute(\"UPDATE variant_materials SET variant_id = 'nowhere'\")")
    with pytest.raises(JobError, match="break references of variant_materials"):
        upgrade(empty)
    assert contents(empty) == held


# ── what they make ──


def test_the_schema_is_what_the_tables_say(empty: Database) -> None:
    upgrade(empty)
    with empty.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "render_as_batch": empty.sqlite}
        )
        assert compare_metadata(context, Base.metadata) == []
        found = tables_of(empty)
        for table in Base.metadata.sorted_tables:
            made = found.tables[table.name]
            assert [c.name for c in made.columns] == [c.name for c in table.columns], table.name
            assert [c.nullable for c in made.columns] == [c.nullable for c in table.columns], table.name
            assert [c.name for c in made.primary_key] == [c.name for c in table.primary_key], table.name
            assert not any(c.server_default for c in table.columns)


def test_names_follow_the_convention(empty: Database) -> None:
    upgrade(empty)
    for name, made in tables_of(empty).tables.items():
        table = Base.metadata.tables[name]
        assert {str(c.name) for c in made.constraints} == {str(c.name) for c in table.constraints}
        assert {index.name for index in made.indexes} == {index.name for index in table.indexes}
        assert made.primary_key.name == f"pk_{name}"
        for constraint in made.constraints:
            assert str(constraint.name).startswith((f"pk_{name}", f"fk_{name}_", f"uq_{name}_", f"ck_{name}_"))
            assert len(str(constraint.name)) <= 63  # where PostgreSQL cuts
        for index in made.indexes:
            assert str(index.name).startswith(f"{'uq' if index.unique else 'ix'}_{name}_")


def test_what_cascades_is_what_the_tables_say(empty: Database) -> None:
    upgrade(empty)
    for name, made in tables_of(empty).tables.items():
        says = {c.name: c.ondelete for c in Base.metadata.tables[name].foreign_key_constraints}
        assert {c.name: c.ondelete for c in made.foreign_key_constraints} == says


def test_history_cannot_be_rewritten(empty: Database) -> None:
    upgrade(empty)
    fill(empty)
    for table in APPEND_ONLY:
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET business_id = 'b'"):
            with pytest.raises(sa.exc.IntegrityError, match="append-only"), empty.engine.begin() as connection:
                connection.exec_driver_sql(statement)


# ── opening ──


def _add_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str = "pass") -> None:
    """A code of tomorrow, with one migration more."""
    tomorrow = tmp_path / "tomorrow"
    shutil.copytree(storage.MIGRATIONS, tomorrow, ignore=shutil.ignore_patterns("__pycache__"))
    (tomorrow / "versions" / "9999_later.py").write_text(
        f'''"""Later."""

import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{STEPS[-1]}"


def upgrade() -> None:
    {does}


def downgrade() -> None:
    pass
'''
    )
    monkeypatch.setattr(storage, "MIGRATIONS", tomorrow)


def test_an_empty_database_gets_its_schema(url: str) -> None:
    for _ in range(2):
        with open_database(url) as database:
            assert revisions(database) == (STEPS[-1], STEPS[-1])


def test_servers_that_start_together_make_one_schema(url: str) -> None:
    errors: list[Exception] = []
    ready = threading.Barrier(4)

    def start() -> None:
        ready.wait(30)
        try:
            open_database(url).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    with open_database(url) as database:
        assert set(tables_of(database).tables) == set(Base.metadata.tables)


def test_an_older_schema_is_not_touched_but_upgraded_on_request(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_database(url).close()
    _add_migration(tmp_path, monkeypatch)
    with pytest.raises(InputError) as error:
        open_database(url)
    assert f"revision {STEPS[-1]}, this version needs 9999" in str(error.value)
    assert "Back it up and run `kaleidoscope database upgrade`" in str(error.value)
    with Database(url) as database:
        assert revisions(database)[0] == STEPS[-1]
        upgrade(database)
    open_database(url).close()


def test_a_newer_schema_is_not_touched(url: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as tomorrow:
        _add_migration(tmp_path, tomorrow)
        open_database(url).close()
    with pytest.raises(InputError, match=r"revision 9999, this version needs .* A newer version made it"):
        open_database(url)
    with Database(url) as database:
        for change in (upgrade, lambda d: downgrade(d, "base")):
            with pytest.raises(InputError, match="Is its schema of a newer version"):
                change(database)
        assert revisions(database)[0] == "9999"


def test_a_revision_that_is_none_is_refused(empty: Database) -> None:
    with pytest.raises(InputError, match="nonsense"):
        upgrade(empty, "nonsense")
    assert revisions(empty)[0] is None


def test_alembic_by_hand_is_sent_to_the_command() -> None:
    from alembic import command

    with pytest.raises(SystemExit, match="kaleidoscope database upgrade"):
        command.upgrade(alembic_config(), "head")
