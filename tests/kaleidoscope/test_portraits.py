"""Portraits: stored whole and once, and read in today's words; on SQLite and PostgreSQL."""

from __future__ import annotations

import csv
import json
import math
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from kaleidoscope.database import Database
from kaleidoscope.errors import ForbiddenError, InputError, NotFoundError
from kaleidoscope.portrait_design import design_for
from kaleidoscope.portraits import (
    CellView,
    PortraitCell,
    export_portrait,
    latest_portrait,
    list_portraits,
    portrait_of,
    store_portrait,
)
from kaleidoscope.tables import AuditEntry, PortraitRow
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.portrait_cells import cell, cells, change, found, run, store
from tests.kaleidoscope.stock import add_library, spec, stocked

FLAT = {"image_style": "flat"}
THIRTIES = {"age": "[30, 40)"}
NASTY = '=HYPERLINK("http://x")\n\x1b[2J\u202e,";<script>'


@pytest.fixture
def scene(database: Database) -> Database:
    """Scene `welcome` of acme, without a portrait."""
    stocked(database)
    return database


@pytest.fixture
def stored(sqlite: Database) -> Database:
    """Scene `welcome` of acme with a portrait, on SQLite alone."""
    stocked(sqlite)
    store(sqlite)
    return sqlite


def show(database: Database, segment: Any = None, **more: Any) -> list[CellView]:
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        return portrait_of(session, "welcome", segment, **more).items


# ── storing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_analysis_is_stored_whole_with_the_facts_of_its_log(scene: Database) -> None:
    assert store(scene) == (1, True)
    with scene.transaction(person("vic", Role.VIEWER), write=False) as session:
        page = portrait_of(session, "welcome", limit=500)
    facts, given = page.portrait, run()
    for name in ("log_hash", "taxonomy", "exposures", "units", "since", "until", "seed", "simulated"):
        assert getattr(facts, name) == getattr(given, name)
    assert (facts.releases, facts.buckets, facts.methods) == ([1, 2], ["random"], ["statistics", "ebm"])
    assert (facts.author, facts.cells, facts.insights) == ("ann", len(cells()), 2)
    read = {(*c.segment.items(), *c.tag.items()): c for c in page.items}
    assert len(read) == len(cells())
    for made in cells():
        got = read[(*made.segment.items(), *made.tag.items())]
        for name in (
            "n",
            "clicks",
            "share",
            "click_share",
            "independent",
            "ctr",
            "ctr_low",
            "shrunk",
            "shrunk_high",
            "effect",
            "effect_low",
            "q_value",
        ):
            assert getattr(got, name) == getattr(made, name), (made, name)
        assert got.found_by == (made.found_by or {})
    explained = read[("level", "beginner"), ("image_style", "flat")].explained_by
    assert [(p.segment, p.tag) for p in explained] == [({"age": "missing"}, FLAT)]


def test_what_matters_comes_first(scene: Database) -> None:
    store(scene)
    items = show(scene, limit=500)
    kinds = [0 if c.effect is not None and c.segment else 1 if not c.segment else 2 for c in items]
    assert kinds == sorted(kinds)
    assert items[0].segment == THIRTIES and items[0].tag == FLAT


def test_the_same_analysis_of_the_same_log_is_stored_once(scene: Database) -> None:
    assert store(scene) == (1, True)
    assert store(scene) == (1, False)
    assert store(scene, methods=("ebm", "statistics"), releases=(2, 1)) == (1, False)  # in another order
    assert store(scene, seed=8) == (2, True)
    assert store(scene, log_hash="b" * 64) == (3, True)
    with scene.transaction(person("vic", Role.VIEWER), write=False) as session:
        assert [p.number for p in list_portraits(session, "welcome").items] == [3, 2, 1]
        newest = latest_portrait(session, "welcome")
        assert newest is not None and newest.number == 3
        assert portrait_of(session, "welcome").portrait.number == 3
        assert portrait_of(session, "welcome", number=1).portrait.number == 1


def test_a_portrait_is_stored_whole_or_not_at_all(scene: Database) -> None:
    twice = cell(THIRTIES, FLAT)
    with pytest.raises(InputError, match=r"age=\[30, 40\) × image_style=flat is there twice"):
        store(scene, [twice])
    with scene.transaction(person("ann"), write=False) as session:
        assert latest_portrait(session, "welcome") is None
        assert session.scalar(sa.select(sa.func.count()).select_from(PortraitRow)) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ctr": math.nan}, "ctr of .* is nan"),
        ({"effect": 0.1, "effect_low": -math.inf, "effect_high": 1.0}, "effect_low of .* is -inf"),
        ({"ctr": 1.5}, "cannot be"),
        ({"share": 1.5}, "cannot be"),
        ({"independent": -1.0}, "cannot be"),
        ({"effect": -1.5, "effect_low": -2.0, "effect_high": 0.0}, "cannot be"),
        ({"effect": 0.5}, "with their interval"),
        ({"effect": 0.5, "effect_low": 0.1, "effect_high": 0.9}, "with its q"),
        ({"n": -1}, "cannot be"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(stored: Database, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        store(stored, [cell({"age": "other"}, FLAT, **wrong)], seed=9)


def test_rounding_is_no_error_and_unknown_is_no_zero(stored: Database) -> None:
    store(stored, [PortraitCell({"x": "y"}, FLAT, 5, ctr=0.0, ctr_low=-1e-17, ctr_high=0.5)], seed=9)
    (kept,) = show(stored, {"x": "y"})
    assert (kept.ctr, kept.ctr_low, kept.clicks, kept.shrunk, kept.effect) == (0.0, 0.0, None, None, None)


def test_a_cell_about_no_tag_and_a_taxonomy_that_is_not_there_are_refused(stored: Database) -> None:
    with pytest.raises(InputError, match="about no tag"):
        store(stored, [PortraitCell({"x": "y"}, {}, 5)], seed=9)
    with pytest.raises(NotFoundError, match="taxonomy version '9'"):
        store(stored, taxonomy=9)


def test_only_who_may_write_stores_and_anybody_of_the_business_reads(scene: Database) -> None:
    with pytest.raises(ForbiddenError), scene.transaction(person("vic", Role.VIEWER)) as session:
        store_portrait(session, "welcome", run(), cells())
    store(scene)
    assert show(scene)


def test_it_is_audited_without_its_bulk(scene: Database) -> None:
    store(scene)
    with scene.transaction(person("ann"), write=False) as session:
        (entry,) = session.scalars(sa.select(AuditEntry).where(AuditEntry.entity == "portraits"))
        assert entry.actor == "ann" and entry.key == "welcome/1"
        assert entry.after is not None and entry.after["exposures"] == 90_000 and "segments" not in entry.after
        assert not session.scalars(sa.select(AuditEntry).where(AuditEntry.entity == "portrait_cells")).all()


def test_thousands_of_cells_are_stored_at_once(scene: Database) -> None:
    many = [
        PortraitCell({f"f{i % 7}": f"v{i}"}, {"image_style": f"s{j}"}, 10, clicks=1, ctr=0.1)
        for i in range(100)
        for j in range(100)
    ]
    store(scene, many)
    with scene.transaction(person("ann"), write=False) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(PortraitRow)) == len(many) + len(cells())
    assert len(show(scene, {"f0": "v0"}, limit=500)) == 100


# ── whose ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_business_neither_sees_nor_changes_it(scene: Database) -> None:
    store(scene)
    rival = person("eve", business="rival")
    with scene.transaction(rival) as session:
        for ask in (
            lambda: portrait_of(session, "welcome"),
            lambda: design_for(session, "welcome", {}),
            lambda: latest_portrait(session, "welcome"),
            lambda: list_portraits(session, "welcome"),
            lambda: export_portrait(session, "welcome", Path("never.csv")),
            lambda: store_portrait(session, "welcome", run(taxonomy=None), cells()),
        ):
            with pytest.raises(NotFoundError):
                ask()


def test_scenes_of_the_same_name_have_portraits_of_their_own(scene: Database) -> None:
    store(scene)
    with scene.transaction(person("eve", business="rival")) as session:
        add_library(session)
        from kaleidoscope.scenes import create_scene

        create_scene(session, "welcome", spec())
        assert latest_portrait(session, "welcome") is None
        made = store_portrait(session, "welcome", run(exposures=5), cells()[:3])
        assert (made.portrait.number, made.new) == (1, True)
    assert len(show(scene, limit=500)) == len(cells())


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_segment_or_everybody_can_be_read_alone(scene: Database) -> None:
    store(scene)
    assert {json.dumps(c.segment) for c in show(scene, THIRTIES)} == {json.dumps(THIRTIES)}
    everybody = show(scene, {})
    assert len(everybody) == 4 and all(not c.segment and "click rate is 10 %" in c.sentence for c in everybody)
    with pytest.raises(NotFoundError, match=r"no segment 'age=\[1, 2\)'. There are: .*age=\[30, 40\)"):
        show(scene, {"age": "[1, 2)"})
    with pytest.raises(NotFoundError, match=r"knows no attribute 'aeg'\. Did you mean 'age'"):
        show(scene, {"aeg": "[1, 2)"})


def test_a_scene_without_a_portrait_says_how_to_make_one(scene: Database) -> None:
    with pytest.raises(NotFoundError, match="kaleidoscope attribute welcome"):
        show(scene)


@pytest.fixture
def periods(sqlite: Database) -> Database:
    """Four portraits of scene `welcome`: of the first half of November twice, of the second half, of no known time."""
    stocked(sqlite)
    first = {"since": datetime(2026, 11, 1, 8, tzinfo=UTC), "until": datetime(2026, 11, 15, 20, tzinfo=UTC)}
    second = {"since": datetime(2026, 11, 16, 9, tzinfo=UTC), "until": datetime(2026, 11, 30, 8, tzinfo=UTC)}
    for n, period in enumerate((first, second, first, {"since": None, "until": None})):
        store(sqlite, seed=n, **period)
    return sqlite


@pytest.mark.parametrize(
    ("at", "number"),
    [
        (datetime(2026, 11, 3, tzinfo=UTC), 3),  # the newest of the two that are of then
        (datetime(2026, 11, 16, 17, tzinfo=timezone(timedelta(hours=8))), 2),  # 09:00 UTC, the very first exposure
        (date(2026, 11, 1), 3),
        (date(2026, 11, 15), 3),
        (date(2026, 11, 16), 2),
        (date(2026, 11, 30), 2),
    ],
)
def test_a_portrait_is_found_by_when_it_is_of(periods: Database, at: Any, number: int, tmp_path: Path) -> None:
    with periods.transaction(person("vic", Role.VIEWER), write=False) as session:
        assert portrait_of(session, "welcome", at=at).portrait.number == number
        assert design_for(session, "welcome", {"age": 30}, at=at).portrait.number == number
        assert export_portrait(session, "welcome", tmp_path / "p.json", at=at)[0].number == number
        assert portrait_of(session, "welcome").portrait.number == 4


@pytest.mark.parametrize("at", [datetime(2026, 11, 16, 8, 59, tzinfo=UTC), date(2026, 10, 31), date(2026, 12, 1)])
def test_a_time_without_a_portrait_names_those_there_are(periods: Database, at: Any) -> None:
    there = r"portrait of 2026-1\d-\d\d.*There are: 3 of 2026-11-01 – 2026-11-15; 2 of 2026-11-16 – 2026-11-30; 1 of"
    with pytest.raises(NotFoundError, match=there):
        show(periods, at=at)


def test_a_time_and_a_number_and_a_time_without_a_zone_are_refused(periods: Database) -> None:
    with pytest.raises(InputError, match="Give one of them"):
        show(periods, at=date(2026, 11, 3), number=1)
    with pytest.raises(InputError, match="no time zone"):
        show(periods, at=datetime(2026, 11, 3))


def test_portraits_that_say_nothing_of_when_are_found_at_no_time(sqlite: Database) -> None:
    stocked(sqlite)
    store(sqlite, since=None, until=None)
    with pytest.raises(NotFoundError, match="None of its portraits says of when"):
        show(sqlite, at=date(2026, 11, 3))


def test_pages_neither_skip_nor_repeat(stored: Database) -> None:
    seen: list[CellView] = []
    cursor = None
    with stored.transaction(person("ann"), write=False) as session:
        while True:
            page = portrait_of(session, "welcome", cursor=cursor, limit=5)
            seen += page.items
            cursor = page.next_cursor
            if cursor is None:
                break
    assert seen == show(stored, limit=500) and len(seen) == len(cells())


def test_sentences_come_in_both_languages_with_labels_in_chinese(stored: Database) -> None:
    assert "a click on image_style=flat are 50 % higher" in show(stored)[0].sentence
    assert "图片风格“扁平”的点击几率" in show(stored, language="zh")[0].sentence


@pytest.mark.parametrize(
    ("changes", "tag", "status", "says"),
    [
        ([{"op": "rename", "dimension": "image_style", "value": "flat", "id": "plain"}],
         {"image_style": "plain"}, "renamed", "It was image_style=flat then."),
        ([{"op": "rename", "dimension": "image_style", "id": "style"}],
         {"style": "flat"}, "renamed", "It was image_style=flat then."),
        ([{"op": "merge", "dimension": "image_style", "values": ["flat", "line"], "into": "line"}],
         {"image_style": "line"}, "merged", "merged with others since"),
        ([{"op": "retire", "dimension": "image_style", "value": "flat"}], FLAT, "retired", "The tag is retired."),
        ([{"op": "retire", "dimension": "image_style"}], FLAT, "retired", "The tag is retired."),
        ([{"op": "split", "dimension": "image_style", "value": "flat", "into": ["3d", "line"]}],
         {"image_style": "unknown of {3d, line}"}, "split", "nobody knows which"),
    ],
)  # fmt: skip
def test_a_tag_is_read_in_todays_words(
    stored: Database, changes: list[dict[str, Any]], tag: dict[str, str], status: str, says: str
) -> None:
    change(stored, *changes)
    (insight,) = [c for c in show(stored, THIRTIES) if c.effect is not None]
    assert (insight.tag, insight.status) == (tag, status)
    assert insight.was == (None if insight.tag == FLAT else FLAT)
    assert says in insight.sentence
    with stored.transaction(person("ann"), write=False) as session:
        dimensions = design_for(session, "welcome", {"age": 30}).dimensions
    usable = {json.dumps(t.tag) for d in dimensions for t in d.tags}
    assert (json.dumps(tag) in usable) == (status not in ("retired", "split"))


def test_a_tag_of_no_vocabulary_is_read_as_it_is(stored: Database) -> None:
    store(stored, [cell(THIRTIES, {"banner": "B"}, **found(0.3, 0.1, 0.5))], seed=9)
    (kept,) = [c for c in show(stored, THIRTIES) if "banner" in c.tag]
    assert (kept.status, kept.was) == ("unknown", None) and "not in the vocabulary" in kept.sentence
    store(stored, [cell(THIRTIES, {"banner": "B"}, **found(0.3, 0.1, 0.5))], taxonomy=None)
    change(stored, {"op": "retire", "dimension": "image_style", "value": "flat"})
    assert {c.status for c in show(stored, limit=500)} == {"unversioned"}


def test_tags_never_shown_apart_are_translated_part_by_part(stored: Database) -> None:
    both = {"image_style": "flat|line", "subject": "gold"}
    store(stored, [cell(THIRTIES, both, **found(0.3, 0.1, 0.5))], seed=9)
    change(stored, {"op": "rename", "dimension": "image_style", "value": "line", "id": "drawn"})
    (kept,) = [c for c in show(stored, THIRTIES) if len(c.tag) > 1]
    assert kept.tag == {"image_style": "flat|drawn", "subject": "gold"} and kept.was == both
    assert kept.status == "renamed" and "never shown apart" in kept.sentence


# ── as a file ───────────────────────────────────────────────────────────────────────────────────────────────────────


def export(database: Database, path: Path, **more: Any) -> int:
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        return export_portrait(session, "welcome", path, **more)[1]


def test_every_format_holds_every_cell(stored: Database, tmp_path: Path) -> None:
    counts = {export(stored, tmp_path / f"p.{suffix}") for suffix in ("csv", "json", "parquet")}
    assert counts == {len(cells())}
    with (tmp_path / "p.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    document = json.loads((tmp_path / "p.json").read_text())
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert len(rows) == len(document["cells"]) == len(table) == len(cells())
    assert rows[0]["segment"] == "age=[30, 40)" and rows[0]["effect"] == "0.5"
    assert rows[0]["found_by"] == "statistics=+, ebm=+" and rows[1]["explained_by"] == "age=missing × image_style=flat"
    assert document["portrait"]["number"] == 1 and document["cells"][0]["segment"] == THIRTIES
    assert dict(table[0]["segment"]) == THIRTIES and table[0]["effect"] == 0.5
    assert [c["q_value"] for c in document["cells"]] == [c["q_value"] for c in table]
    assert "" in {r["clicks"] for r in rows}  # unknown is empty, not 0


def test_a_file_that_is_there_stays_unless_it_is_to_go(stored: Database, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        export(stored, path)
    assert path.read_text() == "mine"
    export(stored, path, overwrite=True)
    assert "segment" in path.read_text(encoding="utf-8-sig")
    assert [p.name for p in tmp_path.glob("*p.csv*")] == ["p.csv"]  # nothing half-written beside it


def test_what_cannot_be_written_is_said(stored: Database, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="says no format"):
        export(stored, tmp_path / "p.txt")
    with pytest.raises(InputError, match="cannot be written"):
        export(stored, tmp_path / "nowhere" / "p.csv")
    export(stored, tmp_path / "p.txt", format="json")
    assert json.loads((tmp_path / "p.txt").read_text())["cells"]


def test_what_visitors_typed_is_no_formula_and_steers_nothing(stored: Database, tmp_path: Path) -> None:
    extra = [
        cell({text: text}, {text: text}, **found(0.3, 0.1, 0.5)) for text in (NASTY, "+1", "-1", "@x", "＝x", "a\0b")
    ]
    store(stored, extra, seed=9)
    export(stored, tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells()) + len(extra)
    texts = [value for row in rows for name, value in row.items() if name in ("segment", "tag", "was", "sentence")]
    for text in texts:
        assert not text.startswith(tuple("=+-@\t\r＝＋－＠")), text
        assert not set(text) & set("\n\r\x1b\u202e\0")
    assert any(text.startswith("'=HYPERLINK") for text in texts)
    exact = json.loads((tmp_path / "q.json").read_text()) if export(stored, tmp_path / "q.json") else {}
    assert {NASTY: NASTY} in [c["segment"] for c in exact["cells"]]
    export(stored, tmp_path / "q.parquet")
    assert show(stored, {NASTY: NASTY})[0].n == 6_000
