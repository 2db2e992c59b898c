"""What every session promises: one commit, one business, a trail, and no lost update, on both databases."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exists, func, literal, orm, select
from sqlalchemy.orm import aliased

from kaleidoscope import database as storage
from kaleidoscope.access import Caller, operator
from kaleidoscope.database import (
    MAX_PAGE,
    Database,
    Page,
    Session,
    add_rows,
    change_rows,
    check_id,
    check_version,
    find,
    open_database,
    paginate,
    read_cursor,
    refuse_existing,
    write_cursor,
)
from kaleidoscope.errors import ConflictError, InputError, NotFoundError, UnavailableError
from kaleidoscope.tables import (
    APPEND_ONLY,
    ApiToken,
    AuditEntry,
    Base,
    Business,
    EventCount,
    IdempotencyKey,
    Intervention,
    Job,
    LedgerEntry,
    Material,
    Portrait,
    PortraitRow,
    Release,
    Scene,
    TaxonomyVersion,
    Tenant,
    Variant,
    VariantMaterial,
    now,
)
from tests.kaleidoscope.conftest import settle
from tests.kaleidoscope.people import person

ACME, RIVAL = person("ann"), person("eve", business="rival")
TENANTS = sorted((m.class_ for m in Base.registry.mappers if issubclass(m.class_, Tenant)), key=lambda c: c.__name__)
ON_POSTGRESQL = pytest.mark.parametrize("database", ["postgresql"], indirect=True)


def scene(id_: str, business: str = "acme", **more: Any) -> Scene:
    return Scene(business_id=business, id=id_, **{"name": id_, "spec": {}, "author": "ann", **more})


def plant(database: Database, caller: Caller) -> None:
    """One row in every table that belongs to a business; its texts name the business."""
    business = str(caller.business)
    reviewed = {"state": "draft", "author": caller.user}
    with database.transaction(caller) as session:

        def add(table: type[Any], **columns: Any) -> None:
            session.add(table(business_id=business, **columns))
            session.flush()

        add(TaxonomyVersion, number=1, document={}, mapping={}, author=business)
        add(
            Material,
            id=f"copy-{business}",
            kind="copy",
            content={},
            content_hash="-",
            tags=[],
            taxonomy=1,
            **reviewed,
        )
        add(Scene, id="home", name=business, spec={}, author=business)
        held = VariantMaterial(
            business_id=business, scene_id="home", variant_id="v", slot="copy", material_id=f"copy-{business}"
        )
        add(Variant, scene_id="home", id="v", materials={}, remarks=[], held=[held], **reviewed)
        add(Intervention, scene_id="home", id="pin", kind="pin", target={}, segment={}, author=business)
        add(Release, scene_id="home", number=1, content={}, content_hash="-", author=business)
        add(LedgerEntry, scene_id="home", seq=1, actor=business, action="publish", release=1, share=1.0, paused=False)
        add(Job, id=1, kind="train", subject="home", arguments={}, state="queued", author=business, max_attempts=1)
        facts: dict[str, Any] = {
            "releases": [],
            "buckets": [],
            "methods": [],
            "shown": {},
            "segments": [{}],
            "tags": [],
        }
        add(
            Portrait,
            scene_id="home",
            number=1,
            log_hash="-",
            run_hash="-",
            exposures=1,
            simulated=True,
            cells=1,
            insights=0,
            overlaps=[],
            author=business,
            **facts,
        )
        add(PortraitRow, scene_id="home", number=1, position=0, segment=0, tag=0, n=1, crossed=False)


@pytest.fixture
def planted(database: Database) -> Database:
    """Two businesses with the same ids in every table."""
    plant(database, ACME)
    plant(database, RIVAL)
    return database


def raw(database: Database, statement: str, **values: Any) -> list[Any]:
    """Rows of a statement that passes by every session."""
    with database.engine.begin() as connection:
        result = connection.execute(sa.text(statement), values)
        return list(result) if result.returns_rows else []


def trail(database: Database) -> list[AuditEntry]:
    with database.transaction(operator("root", None), write=False) as session:
        return list(session.scalars(select(AuditEntry).order_by(AuditEntry.seq)))


# ── the one commit ──


def test_the_block_is_committed_at_its_end(database: Database) -> None:
    with database.transaction(ACME) as session:
        session.add(scene("home"))
        assert raw(database, "SELECT id FROM scenes") == []
    assert raw(database, "SELECT id FROM scenes") == [("home",)]


@pytest.mark.parametrize("error", [ValueError("x"), NotFoundError("x"), KeyboardInterrupt()])
def test_any_exception_takes_everything_back(database: Database, error: BaseException) -> None:
    before = len(trail(database))

    def change_and_fail() -> None:
        with database.transaction(ACME) as session:
            session.add(scene("home"))
            session.flush()
            raise error

    with pytest.raises(type(error)):
        change_and_fail()
    assert raw(database, "SELECT id FROM scenes") == []
    assert len(trail(database)) == before


def test_rows_can_be_read_after_the_transaction(database: Database) -> None:
    with database.transaction(ACME) as session:
        row = scene("home")
        session.add(row)
    assert (row.id, row.version, row.created_at.tzinfo) == ("home", 1, UTC)


def test_a_reading_transaction_changes_nothing_and_says_so(database: Database) -> None:
    with database.transaction(ACME) as session:
        session.add(scene("home"))
    with database.transaction(ACME, write=False) as session:
        assert session.get_one(Scene, ("acme", "home")).name == "home"
        session.get_one(Scene, ("acme", "home")).name = "home"
        session.flush()
        session.add(scene("new"))
        with pytest.raises(RuntimeError, match="only reads"):
            session.flush()
    assert raw(database, "SELECT id FROM scenes") == [("home",)]


def test_a_reading_transaction_does_not_wait_for_a_writing_one(database: Database) -> None:
    with database.transaction(ACME) as writing:
        writing.add(scene("home"))
        writing.flush()
        with database.transaction(ACME, write=False) as reading:
            assert reading.scalar(select(func.count()).select_from(Scene)) == 0


def test_times_keep_their_zone(database: Database) -> None:
    noon = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=8)))
    plant(database, ACME)
    with database.transaction(ACME) as session:
        session.get_one(Intervention, ("acme", "home", "pin")).starts_at = noon
    with database.transaction(ACME, write=False) as session:
        row = session.get_one(Intervention, ("acme", "home", "pin"))
        assert row.starts_at == noon and row.starts_at.tzinfo is UTC
    with pytest.raises(sa.exc.StatementError, match="needs a time zone"), database.transaction(ACME) as session:
        session.get_one(Intervention, ("acme", "home", "pin")).starts_at = datetime(2030, 1, 1)


def test_the_database_keeps_references_inside_a_business(planted: Database) -> None:
    held = VariantMaterial(business_id="acme", scene_id="home", variant_id="v", slot="image", material_id="copy-rival")
    with pytest.raises(ConflictError), planted.transaction(ACME) as session:
        session.add(held)


def test_the_same_row_twice_is_a_conflict(database: Database) -> None:
    with database.transaction(ACME) as session:
        session.add(scene("home"))
    with pytest.raises(ConflictError, match="exists already"), database.transaction(ACME) as session:
        session.add(scene("home"))


@ON_POSTGRESQL
@pytest.mark.parametrize("name", ["x" * 201, "a\0b"])
def test_what_the_database_cannot_hold_is_the_callers_error(database: Database, name: str) -> None:
    with pytest.raises(InputError, match="cannot hold a value"), database.transaction(ACME) as session:
        session.add(scene("home", name=name))


# ── one business ──

K = Any
READS: dict[str, Callable[[K], sa.Select[Any]]] = {
    "rows": lambda k: select(k),
    "column": lambda k: select(k.business_id),
    "where": lambda k: select(k.business_id).where(k.business_id == "rival"),
    "alias": lambda k: select(aliased(k).business_id),
    "alias of a subquery": lambda k: select(aliased(k, select(k).subquery())),
    "subquery": lambda k: select(select(k.business_id).subquery()),
    "CTE": lambda k: select(select(k.business_id).cte()),
    "scalar subquery": lambda k: select(
        select(func.min(k.business_id)).where(k.business_id != "acme").scalar_subquery()
    ),
    "max": lambda k: select(func.max(k.business_id)),
    "EXISTS": lambda k: select(literal("rival")).where(exists(select(k).where(k.business_id == "rival"))),
    "EXISTS of an alias": lambda k: select(Business.id).where(
        Business.id == "rival", exists().where(aliased(k).business_id == Business.id)
    ),
    "IN": lambda k: select(Business.id).where(Business.id.in_(select(k.business_id)), Business.id != "acme"),
    "join": lambda k: select(k.business_id).join(Business, Business.id == k.business_id),
    "joined to": lambda k: select(k.business_id).select_from(Business).join(k, k.business_id == Business.id),
    "self join": lambda k: (lambda a: select(a.business_id).select_from(k).join(a, sa.true()))(aliased(k)),
    "outer join": lambda k: select(k.business_id).select_from(Business).outerjoin(k, k.business_id == Business.id),
    "ORDER BY": lambda k: select(k.business_id).order_by(k.business_id.desc()),
    "CASE": lambda k: select(
        sa.case((exists(select(k).where(k.business_id == "rival")), "rival"), else_=func.max(k.business_id))
    ),
    "window": lambda k: select(func.first_value(k.business_id).over(order_by=k.business_id.desc()), k),
    "columns of a bundle": lambda k: select(orm.Bundle("b", k.business_id)),
    "lock": lambda k: select(k).with_for_update(),
}


def test_no_query_sees_another_business(planted: Database, subtests: pytest.Subtests) -> None:
    for kind in TENANTS:
        assert raw(planted, f"SELECT count(*) FROM {kind.__tablename__}") == [(2,)], "plant() has to plant this table"
        for shape, query in READS.items():
            with subtests.test(shape, table=kind.__tablename__), planted.transaction(ACME) as session:
                rows = [getattr(row[0], "business_id", row[0]) for row in session.execute(query(kind))]
                assert "rival" not in rows


def test_counts_and_unions_are_of_the_business(planted: Database) -> None:
    with planted.transaction(ACME) as session:
        for kind in TENANTS:
            assert session.scalar(select(func.count()).select_from(kind)) == 1
            assert session.scalar(select(func.count()).select_from(select(kind.business_id).subquery())) == 1
            both = sa.union_all(select(kind.business_id), select(aliased(kind).business_id))
            assert session.scalars(both).all() == ["acme", "acme"]
            assert session.query(kind).count() == len(session.query(kind.business_id).all()) == 1


def test_a_key_of_another_business_gets_nothing(planted: Database) -> None:
    with planted.transaction(ACME) as session:
        for kind in TENANTS:
            (mine,) = session.scalars(select(kind))
            key = sa.inspect(mine).identity
            assert key is not None and session.get(kind, key) is mine
            theirs = tuple({"acme": "rival", "copy-acme": "copy-rival"}.get(part, part) for part in key)
            assert session.get(kind, theirs) is None
            assert session.get(kind, theirs, with_for_update=True) is None
            session.expire(mine)
            assert mine.business_id == "acme"


def test_joins_between_tables_of_businesses_stay_inside(planted: Database) -> None:
    with planted.transaction(ACME) as session:
        # None of the conditions names the business; the ids are the same in both.
        rows = session.execute(
            select(Scene.business_id, Variant.business_id, VariantMaterial.material_id, Release.author)
            .join(Variant, Variant.scene_id == Scene.id)
            .join(VariantMaterial, VariantMaterial.variant_id == Variant.id)
            .outerjoin(Release, Release.scene_id == Scene.id)
        ).all()
        assert [tuple(row) for row in rows] == [("acme", "acme", "copy-acme", "acme")]
        held = select(Variant.business_id).where(Variant.held.any(VariantMaterial.material_id == "copy-rival"))
        assert session.scalars(held).all() == []
        using = select(Scene.id).where(
            Scene.id.in_(select(VariantMaterial.scene_id).where(VariantMaterial.material_id == "copy-rival"))
        )
        assert session.scalars(using).all() == []


@pytest.mark.parametrize("load", [orm.selectinload, orm.joinedload, orm.subqueryload])
def test_relationships_load_rows_of_the_business(planted: Database, load: Any) -> None:
    with planted.transaction(ACME, write=False) as session:
        (row,) = session.scalars(select(Variant).options(load(Variant.held))).unique()
        assert [held.material_id for held in row.held] == ["copy-acme"]


def test_each_session_sees_its_own_whoever_asked_before(planted: Database) -> None:
    query = select(Scene.name)
    callers = [Caller("nobody", None, frozenset()), ACME, RIVAL, Caller("nobody", None, frozenset()), ACME]
    seen = []
    for caller in callers:
        with planted.transaction(caller, write=False) as session:
            seen.append(session.scalars(query).all())
    assert seen == [[], ["acme"], ["rival"], [], ["acme"]]


TABLE = Scene.__table__
PASSES_BY: dict[str, Callable[[Session], Any]] = {
    "text": lambda s: s.execute(sa.text("SELECT name FROM scenes")),
    "text with columns": lambda s: s.execute(sa.text("SELECT id FROM scenes").columns(Scene.id)),
    "text as a class": lambda s: s.execute(select(Scene).from_statement(sa.text("SELECT * FROM scenes"))),
    "text in a query": lambda s: s.execute(select(Business.id).where(sa.text("EXISTS (SELECT 1 FROM scenes)"))),
    "table": lambda s: s.execute(select(TABLE)),
    "column of a table": lambda s: s.execute(select(TABLE.c.name)),
    "alias of a table": lambda s: s.execute(select(TABLE.alias())),
    "table in a subquery": lambda s: s.execute(select(Business.id).where(Business.id.in_(select(TABLE.c.business_id)))),
    "DELETE in a CTE": lambda s: s.execute(select(sa.delete(Scene).returning(Scene.id).cte().c.id)),
    "DELETE as text": lambda s: s.execute(sa.text("DELETE FROM interventions")),
    "UPDATE": lambda s: s.execute(sa.update(Scene).values(name="x")),
    "UPDATE of a table": lambda s: s.execute(sa.update(TABLE).values(name="x")),
    "DELETE": lambda s: s.execute(sa.delete(Scene)),
    "query.update": lambda s: s.query(Scene).update({"name": "x"}),
    "query.delete": lambda s: s.query(Scene).delete(),
    "INSERT": lambda s: s.execute(sa.insert(Scene), [{"business_id": "rival", "id": "x"}]),
    "INSERT into a table": lambda s: s.execute(sa.insert(TABLE).values(business_id="rival", id="x")),
    "bulk save": lambda s: s.bulk_save_objects([scene("x", "rival")]),
    "bulk insert": lambda s: s.bulk_insert_mappings(orm.class_mapper(Scene), [{"business_id": "rival", "id": "x"}]),
    "bulk update": lambda s: s.bulk_update_mappings(orm.class_mapper(Scene), [{"business_id": "rival", "id": "home"}]),
    "a new row": lambda s: s.add(scene("x", "rival")),
    "merge": lambda s: s.merge(scene("home", "rival", name="x")),
    "a row moved": lambda s: setattr(s.get(Scene, ("acme", "home")), "business_id", "rival"),
    "a row known by its key": lambda s: detached(s, scene("home", "rival", version=1)),
    "deleting by key": lambda s: s.delete(detached(s, scene("home", "rival", version=1))),
    "another business": lambda s: setattr(s.get(Business, "rival"), "name", "x"),
    "a token for another business": lambda s: s.add(
        ApiToken(id="t", business_id="rival", user="u", token_hash="h", roles=["admin"])
    ),
    "a token for the installation": lambda s: s.add(
        ApiToken(id="t", business_id=None, user="u", token_hash="h", roles=["admin"])
    ),
}


def detached(session: Session, row: Scene) -> Scene:
    """A row that claims to be stored, with a change."""
    orm.make_transient_to_detached(row)
    session.add(row)
    row.name = "x"
    return row


def test_no_way_passes_by_the_business_and_the_trail(planted: Database, subtests: pytest.Subtests) -> None:
    before = len(trail(planted))
    for way, take in PASSES_BY.items():
        with subtests.test(way), pytest.raises(RuntimeError), planted.transaction(ACME) as session:
            take(session)
    assert raw(planted, "SELECT business_id, name FROM scenes ORDER BY 1") == [("acme", "acme"), ("rival", "rival")]
    assert raw(planted, "SELECT name FROM businesses ORDER BY 1") == [("Acme",), ("Rival",)]
    assert raw(planted, "SELECT id FROM api_tokens") == []
    assert len(trail(planted)) == before


def test_finding_needs_a_business(planted: Database) -> None:
    with planted.transaction(operator("root", None)) as session:
        with pytest.raises(InputError, match="name the business to work in"):
            find(session, Scene, "home")
        assert session.scalars(select(Scene)).all() == []


def test_find_says_what_is_not_there(planted: Database) -> None:
    with planted.transaction(ACME) as session:
        assert find(session, Scene, "home").name == "acme"
        assert find(session, Variant, "home", "v", lock=True).state == "draft"
        with pytest.raises(NotFoundError, match=r"There is no taxonomy version '2' in business 'acme'"):
            find(session, TaxonomyVersion, 2)
        with pytest.raises(NotFoundError, match=r"There is no material 'copy-rival' in business 'acme'"):
            find(session, Material, "copy-rival")
        refuse_existing(session, Scene, "other")
        with pytest.raises(ConflictError, match="There is a scene 'home' already"):
            refuse_existing(session, Scene, "home")


# ── the trail ──


def test_each_change_leaves_who_what_before_and_after(database: Database) -> None:
    start = len(trail(database))
    with database.transaction(ACME) as session:
        session.add(scene("home", spec={"slots": ["copy"]}))
    with database.transaction(person("bob")) as session:
        row = find(session, Scene, "home", lock=True)
        row.name, row.spec = "Home", {"slots": []}
    with database.transaction(ACME) as session:
        session.delete(find(session, Scene, "home"))
    created, renamed, deleted = trail(database)[start:]
    assert (created.actor, created.action, created.entity, created.key) == ("ann", "created", "scenes", "home")
    assert created.before is None and created.after is not None
    assert created.after["spec"] == {"slots": ["copy"]} and created.after["version"] == 1
    assert (renamed.actor, renamed.action) == ("bob", "changed")
    assert renamed.before == {"name": "home", "spec": {"slots": ["copy"]}}
    assert renamed.after == {"name": "Home", "spec": {"slots": []}}
    assert (deleted.action, deleted.after) == ("deleted", None)
    assert deleted.before is not None and deleted.before["name"] == "Home"
    assert {entry.business_id for entry in (created, renamed, deleted)} == {"acme"}
    assert now() - created.at < timedelta(minutes=1)


def test_what_changes_nothing_leaves_nothing(planted: Database) -> None:
    before = len(trail(planted))
    with planted.transaction(ACME) as session:
        row = find(session, Scene, "home", lock=True)
        row.name = str(row.name)
        row.spec = dict(row.spec)
        session.flush()
    assert len(trail(planted)) == before
    assert raw(planted, "SELECT version FROM scenes") == [(1,), (1,)]


def test_every_flush_leaves_its_entries(database: Database) -> None:
    start = len(trail(database))
    with database.transaction(ACME) as session:
        row = scene("home")
        session.add(row)
        session.flush()
        row.name = "second"
        session.flush()
        session.add(scene("other"))
    assert [(e.action, e.key) for e in trail(database)[start:]] == [
        ("created", "home"),
        ("changed", "home"),
        ("created", "other"),
    ]


def test_a_key_of_several_columns_is_one_text(planted: Database) -> None:
    keys = {(e.entity, e.key) for e in trail(planted) if e.business_id == "acme"}
    assert {("variants", "home/v"), ("releases", "home/1"), ("businesses", "acme")} <= keys


def test_no_secret_is_in_the_trail(database: Database) -> None:
    with database.transaction(ACME) as session:
        session.add(ApiToken(id="t", business_id="acme", user="u", token_hash="SECRET", roles=["viewer"]))
        session.add(IdempotencyKey(owner="t", key="k", request_hash="SECRET", status=201, body={"x": "SECRET"}))
    assert "SECRET" not in str([(e.before, e.after) for e in trail(database)])
    assert any(e.entity == "api_tokens" for e in trail(database))


def test_history_cannot_be_changed_even_by_hand(planted: Database) -> None:
    assert {"audit", "taxonomies", "releases", "ledger"} == set(APPEND_ONLY)
    for table in APPEND_ONLY:
        before = raw(planted, f"SELECT * FROM {table}")
        assert before
        for statement in (f"UPDATE {table} SET business_id = business_id", f"DELETE FROM {table}"):
            with pytest.raises(sa.exc.IntegrityError, match=f"{table} is append-only"):
                raw(planted, statement)
        other = "REPLACE INTO {0} SELECT * FROM {0}" if planted.sqlite else "TRUNCATE {0} CASCADE"
        with pytest.raises(sa.exc.IntegrityError, match="is append-only"):
            raw(planted, other.format(table))
        assert raw(planted, f"SELECT * FROM {table}") == before


# ── two at once ──


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """What each returned or raised, having run at the same time."""
    outcomes: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        try:
            outcomes[number] = work[number]()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def test_an_older_version_is_a_conflict_that_shows_both(planted: Database) -> None:
    with planted.transaction(ACME) as session:
        row = find(session, Scene, "home", lock=True)
        check_version(row, None, {}, {})
        check_version(row, 1, {}, {})
        with pytest.raises(ConflictError, match="You changed version 3, and meanwhile it is version 1") as error:
            check_version(row, 3, {"name": "mine"}, {"name": row.name})
    assert error.value.details == {
        "yours": {"version": 3, "name": "mine"},
        "current": {"version": 1, "name": "acme"},
    }


def test_of_two_who_edit_what_they_read_one_wins(planted: Database) -> None:
    both_read = threading.Barrier(2)

    def edit(name: str) -> str:
        with planted.transaction(person(name), write=False) as session:
            read = find(session, Scene, "home").version
        both_read.wait(30)
        with planted.transaction(person(name)) as session:
            row = find(session, Scene, "home", lock=True)
            check_version(row, read, {"name": name}, {"name": row.name})
            row.name = name
        return name

    outcomes = at_once(lambda: edit("ann"), lambda: edit("bob"))
    (winner,) = [o for o in outcomes if isinstance(o, str)]
    (error,) = [o for o in outcomes if isinstance(o, ConflictError)]
    assert error.details["current"] == {"version": 2, "name": winner}
    assert error.details["yours"]["version"] == 1
    assert raw(planted, "SELECT name, version FROM scenes WHERE business_id = 'acme'") == [(winner, 2)]


@ON_POSTGRESQL
def test_of_two_open_transactions_without_a_lock_one_wins(planted: Database) -> None:
    both_read = threading.Barrier(2)

    def edit(name: str) -> str:
        with planted.transaction(person(name)) as session:
            row = find(session, Scene, "home")
            both_read.wait(30)
            row.name = name
        return name

    outcomes = at_once(lambda: edit("ann"), lambda: edit("bob"))
    assert sorted(type(o).__name__ for o in outcomes) == ["ConflictError", "str"]
    (winner,) = [o for o in outcomes if isinstance(o, str)]
    assert raw(planted, "SELECT name, version FROM scenes WHERE business_id = 'acme'") == [(winner, 2)]
    changes = [e for e in trail(planted) if e.action == "changed"]
    assert [(e.actor, e.after) for e in changes] == [(winner, {"name": winner})]


def test_of_two_who_delete_and_change_one_wins(planted: Database) -> None:
    both_ready = threading.Barrier(2)

    def delete() -> None:
        both_ready.wait(30)
        with planted.transaction(ACME) as session:
            session.delete(find(session, Intervention, "home", "pin", lock=True))

    def change() -> None:
        both_ready.wait(30)
        with planted.transaction(ACME) as session:
            find(session, Intervention, "home", "pin", lock=True).note = "changed"

    deleted, changed = at_once(delete, change)
    assert deleted is None
    assert changed is None or isinstance(changed, NotFoundError | ConflictError)
    assert raw(planted, "SELECT count(*) FROM interventions") == [(1,)]


def test_no_update_is_lost(planted: Database) -> None:
    each, people = 8, 4

    def count() -> None:
        for _ in range(each):
            with planted.transaction(ACME) as session:
                row = find(session, Scene, "home", lock=True)
                row.spec = {"count": row.spec.get("count", 0) + 1}

    assert at_once(*[count] * people) == [None] * people
    with planted.transaction(ACME) as session:
        row = find(session, Scene, "home")
        assert row.spec == {"count": each * people} and row.version == 1 + each * people
    assert len([e for e in trail(planted) if e.action == "changed"]) == each * people


def test_of_two_who_make_the_same_one_wins(database: Database) -> None:
    both_ready = threading.Barrier(2)

    def make() -> None:
        both_ready.wait(30)
        with database.transaction(ACME) as session:
            refuse_existing(session, Scene, "home")
            session.add(scene("home"))

    outcomes = at_once(make, make)
    assert sorted(type(o).__name__ for o in outcomes) == ["ConflictError", "NoneType"]


@ON_POSTGRESQL
def test_a_deadlock_is_worth_another_try(planted: Database) -> None:
    with planted.transaction(ACME) as session:
        session.add(scene("other"))
    both_locked = threading.Barrier(2)

    def lock(first: str, second: str) -> None:
        with planted.transaction(ACME) as session:
            find(session, Scene, first, lock=True)
            both_locked.wait(30)
            find(session, Scene, second, lock=True)

    outcomes = at_once(lambda: lock("home", "other"), lambda: lock("other", "home"))
    assert sorted(type(o).__name__ for o in outcomes) == ["NoneType", "UnavailableError"]


# ── away, busy, killed ──


def test_a_database_that_stays_busy_is_unavailable(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BUSY_TIMEOUT_S", 0.05)
    with Database(str(sqlite.url)) as impatient, sqlite.transaction(ACME) as session:
        session.add(scene("home"))
        session.flush()
        with pytest.raises(UnavailableError, match=r"locked.*try again"), impatient.transaction(ACME) as waiting:
            waiting.scalars(select(Scene))
        with impatient.transaction(ACME, write=False) as reading:
            assert reading.scalars(select(Scene)).all() == []


def test_a_server_that_is_away_is_unavailable_and_its_password_hidden() -> None:
    url = "postgresql://kaleidoscope:hunter2@127.0.0.1:1/kaleidoscope"
    with pytest.raises(UnavailableError) as opened:
        open_database(url)
    with Database(url) as away:
        with pytest.raises(UnavailableError) as used, away.transaction(ACME) as session:
            session.get(Business, "acme")
        assert "hunter2" not in repr(away.engine)
    for error in (opened.value, used.value):
        assert "kaleidoscope:***@127.0.0.1:1/kaleidoscope" in error.message and "hunter2" not in error.message


@ON_POSTGRESQL
def test_a_server_that_goes_away_is_unavailable_and_comes_back(database: Database) -> None:
    def lose_the_connection() -> None:
        with database.transaction(ACME) as session:
            session.add(scene("home"))
            session.flush()
            pid = session.scalar(select(func.pg_backend_pid()).select_from(Business).limit(1))
            raw(database, "SELECT pg_terminate_backend(:pid)", pid=pid)

    with pytest.raises(UnavailableError, match="try again"):
        lose_the_connection()
    with database.transaction(ACME) as session:
        assert session.scalars(select(Scene)).all() == []


def test_a_file_that_cannot_be_a_database_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="unable to open"):
        open_database(f"sqlite:///{tmp_path}/no/such/folder.db")
    text = tmp_path / "text.db"
    text.write_text("this is not a database, and long enough to be read as one" * 100)
    with pytest.raises(UnavailableError, match="not a database"):
        open_database(f"sqlite:///{text}")
    assert text.read_text().startswith("this is not")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "KALEIDOSCOPE_DATABASE_URL"),
        ("kaleidoscope.db", "Give sqlite:///FILE or postgresql"),
        ("mysql://root:hunter2@localhost/x", "mysql is neither sqlite nor postgresql"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("postgresql://root:hunter2@localhost:port/x", "KALEIDOSCOPE_DATABASE_URL"),
        ("postgresql+nonsense://root:hunter2@localhost/x", "KALEIDOSCOPE_DATABASE_URL"),
    ],
)
def test_a_url_that_cannot_be_is_refused_without_showing_it(url: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Database(url)
    assert message in str(error.value) and "hunter2" not in str(error.value)


LOOP = """
import sys
from kaleidoscope.database import Database
from kaleidoscope.access import Caller
from kaleidoscope.tables import Scene
from kaleidoscope.vocabulary import Role

with Database(sys.argv[1]) as database:
    for number in range(10_000):
        with database.transaction(Caller("loop", "acme", frozenset({Role.ADMIN}))) as session:
            for half in "ab":
                session.add(Scene(business_id="acme", id=f"s{number}{half}", name="x", spec={}, author="loop"))
                session.flush()
                print(number, half, flush=True)
"""


@pytest.mark.parametrize("stop_after", ["0 a", "7 a", "9 b"])
def test_a_process_that_is_killed_leaves_whole_transactions(database: Database, stop_after: str) -> None:
    url = database.url.render_as_string(hide_password=False)
    with subprocess.Popen([sys.executable, "-c", LOOP, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == stop_after:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    settle(database)
    ids = [row[0] for row in raw(database, "SELECT id FROM scenes")]
    assert sorted(id_[:-1] for id_ in ids if id_.endswith("a")) == sorted(i[:-1] for i in ids if i.endswith("b"))
    assert len(ids) >= 2 * int(stop_after[0])
    with database.transaction(ACME) as session:
        session.add(scene("after"))
    assert sorted(e.key for e in trail(database) if e.entity == "scenes") == sorted([*ids, "after"])
    if database.sqlite:
        assert raw(database, "PRAGMA integrity_check") == [("ok",)]


def test_a_live_database_is_copied(sqlite: Database, tmp_path: Path) -> None:
    with sqlite.transaction(ACME) as session:
        session.add(scene("home"))
    with sqlite.transaction(ACME) as session:
        session.add(scene("unfinished"))
        session.flush()
        sqlite.backup(tmp_path / "copy.db")
    with open_database(f"sqlite:///{tmp_path}/copy.db") as copy:
        assert raw(copy, "SELECT id FROM scenes") == [("home",)]


@ON_POSTGRESQL
def test_only_sqlite_is_copied(database: Database, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pg_dump"):
        database.backup(tmp_path / "copy.db")


# ── ids and pages ──


@pytest.mark.parametrize("id_", ["a", "0", "spring-sale", "image_style", "a" * 63])
def test_a_slug_is_an_id(id_: str) -> None:
    assert check_id("scene", id_) == id_


@pytest.mark.parametrize("id_", ["", "A", "-a", "_a", "a b", "a/b", "a.b", "a\n", "é", "a" * 64, "٣"])
def test_anything_else_is_no_id(id_: str) -> None:
    with pytest.raises(InputError, match=r"scene: .* cannot be an id"):
        check_id("scene", id_)


def pages(session: Session, limit: int, **more: Any) -> list[list[str]]:
    found: list[list[str]] = []
    cursor: str | None = None
    while True:
        page: Page[Scene] = paginate(session, select(Scene), Scene.id, cursor=cursor, limit=limit, **more)
        found.append([row.id for row in page.items])
        cursor = page.next_cursor
        if cursor is None:
            return found


@pytest.fixture
def seven(database: Database) -> Database:
    with database.transaction(ACME) as session:
        session.add_all(scene(id_) for id_ in "bdfhjln")
    with database.transaction(RIVAL) as session:
        session.add_all(scene(id_, "rival") for id_ in "acz")
    return database


def test_pages_hold_everything_once_in_order(seven: Database) -> None:
    with seven.transaction(ACME, write=False) as session:
        assert pages(session, 3) == [["b", "d", "f"], ["h", "j", "l"], ["n"]]
        assert pages(session, 7) == [list("bdfhjln")]
        assert pages(session, 3, descending=True) == [["n", "l", "j"], ["h", "f", "d"], ["b"]]
        none = paginate(session, select(Scene).where(Scene.id == "zz"), Scene.id)
        assert (none.items, none.next_cursor) == ([], None)


def test_pages_stand_still_while_rows_come_and_go(seven: Database) -> None:
    with seven.transaction(ACME) as session:
        first = paginate(session, select(Scene), Scene.id, limit=3)
        session.add_all([scene("a"), scene("g")])
        session.delete(find(session, Scene, "f"))
        session.flush()
        second = paginate(session, select(Scene), Scene.id, limit=3, cursor=first.next_cursor)
        assert [row.id for row in second.items] == ["g", "h", "j"]


def test_a_page_has_at_least_one_and_at_most_so_many(sqlite: Database) -> None:
    with sqlite.transaction(ACME) as session:
        session.add_all(scene(f"s{number:04}") for number in range(MAX_PAGE + 1))
        session.flush()
        for limit, expected in ((0, 1), (-5, 1), (10**9, MAX_PAGE)):
            assert len(paginate(session, select(Scene), Scene.id, limit=limit).items) == expected


def test_numbers_are_pages_too(planted: Database) -> None:
    with planted.transaction(operator("root", None), write=False) as session:
        page = paginate(session, select(AuditEntry), AuditEntry.seq, limit=2, descending=True)
        assert page.next_cursor is not None
        following = paginate(
            session, select(AuditEntry), AuditEntry.seq, limit=2, descending=True, cursor=page.next_cursor
        )
        assert [e.seq for e in page.items][-1] - 1 == following.items[0].seq
        beyond = paginate(session, select(AuditEntry), AuditEntry.seq, cursor=write_cursor(2**40))
        assert beyond.items == []


def encoded(text: str | bytes) -> str:
    return base64.urlsafe_b64encode(text.encode() if isinstance(text, str) else text).decode().rstrip("=")


HOSTILE = {
    "empty": "",
    "blank": " ",
    "not base64": "***",
    "not ASCII": "é",
    "NUL": "\0",
    "not JSON": encoded("nonsense"),
    "not UTF-8": encoded(b"\xff\xfe\xfd"),
    "null": encoded("null"),
    "list": encoded('["b"]'),
    "mapping": encoded('{"id": "b"}'),
    "nested": encoded("[" * 100_000),
    "fraction": encoded("1.5"),
    "NaN": encoded("NaN"),
    "true": encoded("true"),
    "number": encoded("3"),
    "huge number": encoded("9" * 30),
    "number beyond parsing": encoded("9" * 10_000),
    "NUL inside": encoded(json.dumps("a\0")),
    "half a surrogate": encoded('"\\ud800"'),
    "long": encoded(json.dumps("a" * 100_000)),
}


def test_a_cursor_of_somebody_elses_making_is_refused(seven: Database, subtests: pytest.Subtests) -> None:
    for case, cursor in HOSTILE.items():
        with (
            subtests.test(case),
            seven.transaction(ACME, write=False) as session,
            pytest.raises(InputError, match="cursor: this is not a cursor of this list"),
        ):
            paginate(session, select(Scene), Scene.id, cursor=cursor)


def test_text_is_no_cursor_of_numbers(sqlite: Database) -> None:
    with sqlite.transaction(ACME) as session:
        for cursor in (write_cursor("b"), encoded("true")):
            with pytest.raises(InputError):
                paginate(session, select(AuditEntry), AuditEntry.seq, cursor=cursor)


def test_a_cursor_only_moves_within_the_callers_rows(seven: Database) -> None:
    with seven.transaction(ACME, write=False) as session:
        for key in ("a", "' OR 1=1 --", "%", "zzz"):
            page = paginate(session, select(Scene), Scene.id, cursor=write_cursor(key))
            assert {row.business_id for row in page.items} <= {"acme"}


@pytest.mark.parametrize("key", ["a", "ü-漢字", 'quo"te', "", 0, -5, 2**62])
def test_a_cursor_gives_its_key_back(key: str | int) -> None:
    assert read_cursor(write_cursor(key)) == key


def test_rows_added_in_bulk_are_of_the_callers_business_and_audited(database: Database) -> None:
    rows = [{"id": f"s{i}", "name": "x", "spec": {"n": i}, "author": "ann", "version": 1} for i in range(3)]
    with database.transaction(ACME) as session:
        add_rows(session, Scene, rows)
        add_rows(session, Scene, [])
    with database.transaction(ACME, write=False) as session:
        assert [row.id for row in session.scalars(select(Scene).order_by(Scene.id))] == ["s0", "s1", "s2"]
        entries = session.scalars(
            select(AuditEntry).where(AuditEntry.entity == "scenes").order_by(AuditEntry.seq)
        ).all()
        assert [(e.key, e.actor, e.action, e.business_id) for e in entries] == [
            (f"s{i}", "ann", "created", "acme") for i in range(3)
        ]
        assert entries[2].after is not None and entries[2].after["spec"] == {"n": 2}
    with database.transaction(RIVAL, write=False) as session:
        assert session.scalars(select(Scene)).all() == []
        with pytest.raises(RuntimeError, match="only reads"):
            add_rows(session, Scene, rows)
    with database.transaction(ACME) as session, pytest.raises(RuntimeError, match="belongs to no business"):
        add_rows(session, Business, [{"id": "b"}])
    with pytest.raises(ConflictError), database.transaction(ACME) as session:
        add_rows(session, Scene, rows)


def test_rows_changed_in_bulk_are_as_the_session_would_leave_them(database: Database) -> None:
    with database.transaction(ACME) as session:
        session.add_all([scene(id) for id in "abcd"])
    with database.transaction(ACME) as session:
        a, b, c, d = session.scalars(select(Scene).order_by(Scene.id)).all()
        a.name, a.spec = "new", {"n": 1}
        session.flush()
        change_rows(session, [(b, {"name": "new", "spec": {"n": 1}}), (c, {"author": "rex"}), (d, {"name": "d"})])
        assert (b.name, b.spec, b.version, c.author, c.version, d.version) == ("new", {"n": 1}, 2, "rex", 2, 1)
        b.name = "newer"
        change_rows(session, [])
    with database.transaction(ACME, write=False) as session:
        a, b, c, d = session.scalars(select(Scene).order_by(Scene.id)).all()
        assert [(row.name, row.version) for row in (a, b, c, d)] == [("new", 2), ("newer", 3), ("c", 2), ("d", 1)]
        assert b.updated_at >= a.updated_at > d.updated_at
        changed = AuditEntry.entity == "scenes", AuditEntry.action == "changed"
        trail = session.scalars(select(AuditEntry).where(*changed).order_by(AuditEntry.seq)).all()
        told = [(e.key, e.actor, e.business_id, e.before, e.after) for e in trail]
        one = ("ann", "acme", {"name": "b", "spec": {}}, {"name": "new", "spec": {"n": 1}})
        assert told[:2] == [("a", *one[:2], {"name": "a", "spec": {}}, one[3]), ("b", *one)]
        assert told[2:] == [
            ("c", "ann", "acme", {"author": "ann"}, {"author": "rex"}),
            ("b", "ann", "acme", {"name": "new"}, {"name": "newer"}),
        ]


@pytest.mark.parametrize(
    "change", ["UPDATE scenes SET version = 9 WHERE id = 'b'", "DELETE FROM scenes WHERE id = 'b'"]
)
def test_rows_that_somebody_else_changed_meanwhile_are_not_changed_in_bulk(database: Database, change: str) -> None:
    with database.transaction(ACME) as session:
        session.add_all([scene("a"), scene("b")])

    def rename(session: Session) -> None:
        rows = session.scalars(select(Scene).order_by(Scene.id)).all()
        session.connection().exec_driver_sql(change)
        change_rows(session, [(row, {"name": "new"}) for row in rows])

    with pytest.raises(ConflictError), database.transaction(ACME) as session:
        rename(session)
    with database.transaction(ACME, write=False) as session:
        assert set(session.scalars(select(Scene.name))) == {"a", "b"}


def test_rows_are_changed_in_bulk_only_where_the_session_may(database: Database) -> None:
    with database.transaction(ACME) as session:
        session.add(scene("a"))
    with database.transaction(ACME, write=False) as session:
        row = session.scalars(select(Scene)).one()
        with pytest.raises(RuntimeError, match="only reads"):
            change_rows(session, [(row, {"name": "new"})])
    with database.transaction(RIVAL) as session, pytest.raises(RuntimeError, match="of another business"):
        change_rows(session, [(row, {"name": "new"})])
    with database.transaction(ACME) as session:
        business = session.get(Business, "acme")
        assert business is not None
        with pytest.raises(RuntimeError, match="belongs to a business"):
            change_rows(session, [(business, {"name": "new"})])


def test_a_file_that_was_deleted_under_it_is_not_written_to_in_silence(sqlite: Database) -> None:
    with sqlite.bulk() as connection:
        connection.execute(sa.select(EventCount.__table__.c.n)).all()
    Path(str(sqlite.url.database)).unlink()
    with pytest.raises(UnavailableError, match="deleted or replaced"), sqlite.bulk():
        pass
