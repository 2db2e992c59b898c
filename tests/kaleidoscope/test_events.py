"""The log: what counts and what is refused, that nothing acknowledged is lost or doubled, and the table it becomes."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleidoscope import events
from kaleidoscope.database import Database
from kaleidoscope.decision_record import DecisionRecord, Keyring, Reason
from kaleidoscope.errors import InputError, TooLargeError, UnavailableError
from kaleidoscope.events import (
    Count,
    Fate,
    ItemResult,
    Rules,
    Shown,
    Windows,
    compact,
    contract_log,
    drop_before,
    erase_unit,
    event_counts,
    ingest,
    open_exposures,
    read_exposures,
    recent_exposures,
    record_decisions,
    replicate_of,
)
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.tables import Business, Decision, Event, LogPart
from kaleidoscope.vocabulary import Bucket
from tests.kaleidoscope.conftest import settle
from tests.kaleidoscope.people import person

ROOT = Path(__file__).parents[2]
RING = Keyring({"k1": b"0123456789abcdef"})
T0 = datetime(2030, 1, 10, 12, tzinfo=UTC)
LATER = T0 + timedelta(days=30)  # every window is over
SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
VARIANTS = {
    f"v{i}": Shown({"copy": f"c{i % 2}"}, {"tone": [f"t{i % 2}"], "style": ["flat"] * (i > 1)}, "card")
    for i in range(4)
}


def describe(scene: str, release: int) -> Mapping[str, Shown]:
    return VARIANTS if release == 1 else {}


def decision(number: int, **changes: Any) -> DecisionRecord:
    """A decision of `acme`'s scene `home`, a minute after the one before."""
    given = {
        "id": f"{number:032x}",
        "business": "acme",
        "scene": "home",
        "unit": f"user-{number % 7}",
        "at": T0 + number * MINUTE,
        "bucket": Bucket.RANDOM,
        "variant": f"v{number % 4}",
        "propensity": 0.25,
        "learn": True,
        "reason": Reason.EXPLORED,
        "release": 1,
        "release_hash": "r" * 64,
        "model_version": None,
        "candidates": 4,
        "features": {"age": 20 + number, "city": f"city {number % 3}"},
        "context": {"page": "start"},
        "rested": ("v9",),
        "key": "k1",
    }
    return DecisionRecord(**{**given, **changes})


def item(of: DecisionRecord, kind: str = "exposure", after: timedelta = SECOND, **more: Any) -> dict[str, Any]:
    """An event of a decision; its id follows from what it says."""
    event_id = f"{of.id}-{kind}-{after.total_seconds()}"
    at = (of.at + after).isoformat()
    return {"event_id": event_id, "type": kind, "token": RING.sign(of), "at": at, **more}


def send(database: Database, *items: object, now: datetime = T0 + HOUR, **more: Any) -> list[ItemResult]:
    return ingest(database, "acme", items, RING, now=now, **more)


def fates(results: Sequence[ItemResult]) -> list[str]:
    return [result.code or result.status for result in results]


def rows(database: Database, folder: Path, business: str = "acme", **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_exposures(
        database, folder, business=business, describe=describe, **more
    ).to_pylist()
    return found


def stored(database: Database, table: type[Any]) -> int:
    with database.bulk(write=False) as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table.__table__)) or 0


def close(database: Database, folder: Path, now: datetime = LATER, **more: Any) -> events.Compacted:
    return compact(database, folder, business="acme", now=now, describe=describe, **more)


# ── what counts ──


def test_an_event_counts_once(database: Database) -> None:
    one = decision(1)
    first, again = item(one), item(one)
    assert fates(send(database, first, again, item(one, "click"))) == ["accepted", "duplicate", "accepted"]
    assert fates(send(database, first)) == ["duplicate"]
    assert stored(database, Event) == 2
    assert event_counts(database, "acme") == {Count.ACCEPTED: 2, Count.DUPLICATE: 2}


def test_what_no_key_of_ours_signed_is_refused(database: Database) -> None:
    good = item(decision(1))
    other = Keyring({"k1": b"another secret of k1"}).sign(decision(1))
    unknown = Keyring({"k9": b"0123456789abcdef"}).sign(decision(1))
    name, body, mac = good["token"].split(".")
    tampered = f"{name}.{Keyring({'k1': b'x' * 16}).sign(decision(1, unit='somebody')).split('.')[1]}.{mac}"
    tokens = (other, unknown, tampered, "x", f"{name}.{body}.")
    results = send(database, *({**good, "event_id": f"e{i}", "token": token} for i, token in enumerate(tokens)))
    assert fates(results) == ["forged", "unknown_key", "forged", "malformed", "forged"]
    assert {result.status for result in results} == {Fate.REFUSED}
    assert all(result.message and result.message.startswith("token: ") for result in results)
    assert stored(database, Event) == stored(database, Decision) == 0
    assert event_counts(database, "acme", scene="") == {
        Count.FORGED: 3, Count.UNKNOWN_KEY: 1, Count.MALFORMED: 1
    }  # fmt: skip


def test_a_key_that_was_replaced_still_verifies(sqlite: Database) -> None:
    ring = Keyring({"k2": b"fedcba9876543210", "k1": b"0123456789abcdef"})
    assert fates(ingest(sqlite, "acme", [item(decision(1))], ring, now=T0 + HOUR)) == ["accepted"]


def test_a_decision_of_another_business_is_refused(database: Database, tmp_path: Path) -> None:
    theirs = decision(1, business="rival")
    record_decisions(database, [theirs, decision(2)])
    assert fates(send(database, item(theirs), item(decision(2)))) == ["foreign", "accepted"]
    assert event_counts(database, "acme", scene="home") == {Count.ACCEPTED: 1}
    assert event_counts(database, "rival") == {}
    assert rows(database, tmp_path, "rival") == []


@pytest.mark.parametrize(
    ("kind", "window", "value"),
    [("exposure", 86_400, None), ("click", 3_600, None), ("dwell", 3_600, 2), ("conversion", 7 * 86_400, None)],
)
def test_an_event_counts_within_its_window(sqlite: Database, kind: str, window: int, value: float | None) -> None:
    rules = Rules(windows={"home": Windows(click_s=3_600, grace_s=60)})
    one = decision(1)
    ends = one.at + timedelta(seconds=window)

    def sent(happened: timedelta, now: datetime) -> str:
        event = item(one, kind, happened, event_id=f"{happened} {now}".replace(" ", "_"), value=value)
        return fates(send(sqlite, event, now=now, rules=rules))[0]

    inside = timedelta(seconds=window)
    assert sent(inside, ends) == "accepted"
    assert sent(inside, ends + MINUTE) == "accepted"  # happened in time, and came in a little late
    assert sent(inside + SECOND, ends + MINUTE) == "expired"
    assert sent(inside, ends + MINUTE + SECOND) == "expired"  # whatever the client's clock says
    assert event_counts(sqlite, "acme") == {Count.ACCEPTED: 2, Count.LATE: 1, Count.EXPIRED: 2}


def test_without_a_time_it_happened_when_it_came(sqlite: Database, tmp_path: Path) -> None:
    one = decision(0)
    assert fates(send(sqlite, item(one, at=None), now=T0 + 2 * HOUR)) == ["accepted"]
    assert rows(sqlite, tmp_path)[0]["exposed_at"] == T0 + 2 * HOUR


def test_a_clients_clock_is_kept_between_decision_and_receipt(sqlite: Database, tmp_path: Path) -> None:
    one, two = decision(0), decision(1)
    send(sqlite, item(one, after=-DAY), item(two, after=300 * DAY), now=T0 + HOUR)
    assert [row["exposed_at"] for row in rows(sqlite, tmp_path)] == [T0, T0 + HOUR]
    assert event_counts(sqlite, "acme")[Count.CLAMPED] == 2


def test_a_decision_yet_to_come_is_refused(sqlite: Database) -> None:
    assert fates(send(sqlite, item(decision(61 + 1)))) == ["malformed"]
    assert fates(send(sqlite, item(decision(61)))) == ["accepted"]  # servers' clocks differ a little


BAD: list[tuple[object, str]] = [
    ("not an object", "item: an event is an object"),
    (None, "item: an event is an object"),
    ([], "item: an event is an object"),
    ({}, "event_id: give"),
    ({"event_id": ""}, "event_id: give"),
    ({"event_id": "a b"}, "event_id: give"),
    ({"event_id": "x" * 129}, "event_id: give"),
    ({"event_id": "\ud800"}, "event_id: give"),
    ({"event_id": 7}, "event_id: give"),
    ({"type": "swipe"}, "type: give one of exposure, click"),
    ({"type": None}, "type: give one of"),
    ({"type": ["click"]}, "type: give one of"),
    ({"token": None}, "token: give text"),
    ({"token": 3}, "token: give text"),
    ({"token": "é" * 10}, "token: this is not"),
    ({"token": "a.b.c" * 1000}, "token: this is not"),
    ({"at": "yesterday"}, "at: give a moment"),
    ({"at": "2030-01-10T12:00:00"}, "at: give a moment"),
    ({"at": 1_900_000_000}, "at: give a moment"),
    ({"at": "0001-01-01T00:00:00+14:00"}, None),
    ({"value": 1}, "value: a exposure has none"),
    ({"type": "dwell"}, "value: a dwell takes seconds"),
    ({"type": "dwell", "value": 86_401}, "value: a dwell takes seconds"),
    ({"type": "dwell", "value": -1}, "value: a dwell takes seconds"),
    ({"type": "dwell", "value": True}, "value: a dwell takes seconds"),
    ({"type": "conversion", "value": float("nan")}, "value: a conversion takes an amount"),
    ({"type": "conversion", "value": float("inf")}, "value: a conversion takes an amount"),
    ({"type": "conversion", "value": 10**400}, "value: a conversion takes an amount"),
    ({"type": "conversion", "value": "12"}, "value: a conversion takes an amount"),
    ({"user_agent": 1}, "user_agent: give text"),
    ({"ip": ["10.0.0.1"]}, "ip: give text"),
    ({"vaule": 1}, "'vaule' is no field"),
]  # type: ignore[list-item]


def test_a_malformed_item_sinks_nothing_but_itself(sqlite: Database, subtests: pytest.Subtests) -> None:
    for number, (wrong, message) in enumerate(BAD):
        one = decision(number)
        broken = {**item(one), **wrong} if isinstance(wrong, dict) and wrong else wrong
        before, result, after = send(sqlite, item(one, "click"), broken, item(one, "conversion"))
        with subtests.test(wrong=repr(wrong)[:60]):
            assert (before.status, after.status) == (Fate.ACCEPTED, Fate.ACCEPTED)
            if message is None:
                assert result.status is Fate.ACCEPTED
            else:
                assert result.status is Fate.REFUSED
                assert result.code is Count.MALFORMED
                assert message in str(result.message)
    assert event_counts(sqlite, "acme")[Count.MALFORMED] == sum(message is not None for _, message in BAD)


def test_bots_and_internal_traffic_are_left_out_and_counted(sqlite: Database) -> None:
    rules = Rules(internal_units=frozenset({"user-2"}), internal_networks=("10.0.0.0/8", "2001:db8::/32"))
    sent = [
        item(decision(1), user_agent="Mozilla/5.0 (compatible; Googlebot/2.1)"),
        item(decision(2)),
        item(decision(3), ip="10.1.2.3"),
        item(decision(4), ip="2001:db8::1"),
        item(decision(5), ip="11.1.2.3", user_agent="Mozilla/5.0 (X11; Linux x86_64) Firefox/130.0"),
        item(decision(6), ip="not an address"),
    ]
    expected = ["bot", "internal", "internal", "internal", "accepted", "accepted"]
    results = send(sqlite, *sent, rules=rules)
    assert fates(results) == expected
    assert [result.status for result in results[:2]] == [Fate.FILTERED, Fate.FILTERED]
    assert stored(sqlite, Event) == 2
    assert event_counts(sqlite, "acme", scene="home") == {Count.BOT: 1, Count.INTERNAL: 3, Count.ACCEPTED: 2}
    assert fates(send(sqlite, item(decision(8)), user_agent="HeadlessChrome")) == ["bot"]  # of the caller
    assert fates(send(sqlite, item(decision(9)), ip="10.0.0.1", rules=rules)) == ["internal"]


@pytest.mark.parametrize("wrong", [{"bots": ("(",)}, {"internal_networks": ("10.0.0.0/99",)}])
def test_rules_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="rules of the log"):
        Rules(**wrong)


@pytest.mark.parametrize("seconds", [-1, float("nan"), 401 * 86_400])
def test_windows_that_cannot_be_are_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="click_s"):
        Windows(click_s=seconds)


def test_a_batch_has_its_limit(sqlite: Database) -> None:
    with pytest.raises(TooLargeError, match=r"3 items in one batch. Send at most 2"):
        send(sqlite, *[item(decision(1))] * 3, rules=Rules(max_items=2))
    assert send(sqlite) == []
    assert event_counts(sqlite, "acme") == {}


def test_counts_are_of_a_scene_and_a_day(sqlite: Database) -> None:
    send(sqlite, item(decision(1)), item(decision(2, scene="other")))
    send(sqlite, item(decision(3)), now=T0 + DAY)
    assert event_counts(sqlite, "acme") == {Count.ACCEPTED: 3}
    assert event_counts(sqlite, "acme", scene="home") == {Count.ACCEPTED: 2}
    assert event_counts(sqlite, "acme", since=date(2030, 1, 11)) == {Count.ACCEPTED: 1}


# ── decisions ──


def test_a_decision_is_recorded_once(database: Database) -> None:
    records = [decision(i) for i in range(3)]
    assert record_decisions(database, records) == 3
    assert record_decisions(database, [*records, decision(3)]) == 1
    assert record_decisions(database, []) == 0
    assert stored(database, Decision) == 4


@pytest.mark.parametrize("record_first", [True, False])
def test_record_and_events_meet_in_either_order(database: Database, tmp_path: Path, record_first: bool) -> None:
    one = decision(1)
    steps = [lambda: record_decisions(database, [one]), lambda: send(database, item(one))]
    for step in steps if record_first else steps[::-1]:
        step()
    (row,) = rows(database, tmp_path)
    assert row["recorded"] and row["u_age"] == 21 and row["u_city"] == "city 1" and row["c_page"] == "start"
    assert record_decisions(database, [one]) == 0


def test_an_exposure_whose_record_was_lost_counts_but_teaches_nothing(database: Database, tmp_path: Path) -> None:
    kept, lost = decision(1), decision(2)
    record_decisions(database, [kept])
    send(database, *(item(d, kind) for d in (kept, lost) for kind in ("exposure", "click")))
    found = {row["decision_id"]: row for row in rows(database, tmp_path)}
    assert found[lost.id]["recorded"] is False
    assert (found[lost.id]["variant_id"], found[lost.id]["propensity"], found[lost.id]["click"]) == ("v2", 0.25, 1)
    assert found[lost.id]["u_age"] is None
    written = contract_log(database, tmp_path, tmp_path / "out", business="acme", describe=describe, scene="home")
    assert (written.exposures, written.left_out["not_recorded"]) == (1, 1)


def test_recent_exposures_are_counted_by_variant(database: Database) -> None:
    mine = [decision(i, unit="me", variant="v1" if i < 3 else "v2") for i in range(5)]
    record_decisions(database, mine)
    send(database, *map(item, mine[:4]), item(mine[0], after=2 * SECOND), item(mine[4], "click"))
    send(database, item(decision(9, unit="you")), item(decision(10, unit="me", scene="other")))
    assert recent_exposures(database, "acme", "home", "me", T0) == {"v1": 3, "v2": 1}
    assert recent_exposures(database, "acme", "home", "me", T0 + 90 * SECOND) == {"v1": 1, "v2": 1}
    assert recent_exposures(database, "acme", "home", "nobody", T0) == {}
    assert recent_exposures(database, "rival", "home", "me", T0) == {}


# ── exposures with outcomes ──


def test_a_row_is_an_exposure_with_what_became_of_it(database: Database, tmp_path: Path) -> None:
    one, two, unseen = decision(1), decision(2), decision(3)
    record_decisions(database, [one, two, unseen])
    send(
        database,
        item(one, after=5 * SECOND),
        item(one, after=2 * SECOND),
        item(one, "click", 9 * SECOND),
        item(one, "click", 8 * SECOND),
        item(one, "conversion", MINUTE, value=10),
        item(one, "conversion", 2 * MINUTE, value=2.5),
        item(one, "dwell", MINUTE, value=4),
        item(one, "dwell", 2 * MINUTE, value=3),
        item(two),
        item(two, "conversion"),
        item(unseen, "click"),
    )
    first, second = rows(database, tmp_path)
    assert first == {
        "decision_id": one.id,
        "scene": "home",
        "day": "2030-01-10",
        "unit": "user-1",
        "decided_at": one.at,
        "bucket": "random",
        "variant_id": "v1",
        "propensity": 0.25,
        "learn": True,
        "release": 1,
        "model_version": None,
        "recorded": True,
        "reason": "explored",
        "release_hash": "r" * 64,
        "candidates": 4,
        "rested": ["v9"],
        "key": "k1",
        "detail": "",
        "replicate": replicate_of("user-1"),
        "exposed_at": one.at + 2 * SECOND,
        "exposures": 2,
        "click": 1,
        "clicked_at": one.at + 8 * SECOND,
        "conversion": 1,
        "converted_at": one.at + MINUTE,
        "conversion_value": 12.5,
        "dwell_s": 7.0,
        "nth": 0,
        "described": True,
        "product": "card",
        "c_page": "start",
        "m_copy": "c1",
        "t_style": [],
        "t_tone": ["t1"],
        "u_age": 21,
        "u_city": "city 1",
    }
    assert (second["click"], second["conversion"], second["conversion_value"], second["dwell_s"]) == (0, 1, None, None)


def test_compaction_changes_nothing_that_is_read(database: Database, tmp_path: Path) -> None:
    records = [decision(i * 300, unit=f"user-{i % 3}", scene="home" if i % 4 else "shop") for i in range(24)]  # 5 days
    record_decisions(database, records)
    for record in records:
        kinds = ["exposure", *(["click"] if hash(record.id) % 2 else [])]
        send(database, *(item(record, kind) for kind in kinds), now=record.at + HOUR)
    before = rows(database, tmp_path)
    assert len(before) == 24
    assert [row["nth"] for row in before if row["unit"] == "user-0" and row["scene"] == "home"] == list(range(6))

    halfway = T0 + 3 * DAY + timedelta(days=7, hours=1)
    done = close(database, tmp_path, halfway)
    assert {day for _, day in done.days} == {"2030-01-10", "2030-01-11", "2030-01-12"}
    assert 0 < stored(database, Decision) == 24 - done.exposures < 24
    assert rows(database, tmp_path) == before
    assert close(database, tmp_path, halfway) == events.Compacted()

    close(database, tmp_path)
    assert stored(database, Decision) == stored(database, Event) == 0
    assert rows(database, tmp_path) == before
    assert rows(database, tmp_path, scene="shop") == [row for row in before if row["scene"] == "shop"]
    bounds = {"since": before[5]["exposed_at"], "until": before[9]["exposed_at"]}
    assert rows(database, tmp_path, **bounds) == before[5:9]


def test_a_part_is_where_its_scene_and_day_say(sqlite: Database, tmp_path: Path) -> None:
    record_decisions(sqlite, [decision(1), decision(2)])
    send(sqlite, item(decision(1)))
    assert close(sqlite, tmp_path) == events.Compacted((("home", "2030-01-10"),), 1)
    (file,) = tmp_path.rglob("*.parquet")
    assert str(file.relative_to(tmp_path)) == "acme/scene=home/day=2030-01-10/part-0000.parquet"
    assert pq.read_table(tmp_path / "acme", filters=[("unit", "=", "user-1")]).num_rows == 1
    assert event_counts(sqlite, "acme")[Count.UNEXPOSED] == 1


def test_a_day_is_closed_only_when_its_last_window_is_over(sqlite: Database, tmp_path: Path) -> None:
    send(sqlite, item(decision(1)))
    rules = Rules(default=Windows(conversion_s=3_600, click_s=3_600, exposure_s=60, grace_s=60))
    closing = datetime(2030, 1, 11, 1, 1, tzinfo=UTC)
    assert close(sqlite, tmp_path, closing - SECOND, rules=rules).days == ()
    assert close(sqlite, tmp_path, closing, rules=rules).days == (("home", "2030-01-10"),)


def test_a_closed_day_takes_no_more(database: Database, tmp_path: Path) -> None:
    one, two = decision(1), decision(2)
    send(database, item(one))
    assert close(database, tmp_path, T0 + HOUR, everything=True).exposures == 1
    results = send(database, item(one, "click"), item(two), item(decision(3, scene="other")))
    assert fates(results) == ["expired", "expired", "accepted"]
    assert "closed" in str(results[0].message)
    assert record_decisions(database, [two]) == 0
    counts = event_counts(database, "acme", scene="home")
    assert counts == {Count.ACCEPTED: 1, Count.EXPIRED: 2, Count.LATE_RECORD: 1}
    assert [row["decision_id"] for row in rows(database, tmp_path, scene="home")] == [one.id]


def test_what_is_accepted_while_days_close_is_in_the_log(database: Database, tmp_path: Path) -> None:
    """Of senders and a compaction at the same time, either the event is first, or it is refused."""
    accepted: set[str] = set()
    refused: list[str] = []
    failed: list[Exception] = []

    def sends(sender: int) -> None:
        try:
            for n in range(12):
                batch = [decision(sender * 1_000_000 + n * 120 + i, at=T0 + n * HOUR * 2) for i in range(5)]
                results = send(database, *map(item, batch), now=T0 + DAY)
                for one, result in zip(batch, results, strict=True):
                    if result.status is Fate.ACCEPTED:
                        accepted.add(one.id)
                    else:
                        refused.append(str(result.code))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=sends, args=(sender,), daemon=True) for sender in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        close(database, tmp_path, everything=True)
    assert failed == []
    found = [row["decision_id"] for row in rows(database, tmp_path)]
    assert len(found) == len(accepted) > 0
    assert set(found) == accepted
    assert set(refused) <= {"expired"}


def test_features_of_many_kinds_become_columns(sqlite: Database, tmp_path: Path) -> None:
    nasty: list[dict[str, Any]] = [
        {"n": 1, "mixed": 1, "big": 2**70, "flag": True, 'we"ird; name': "x", "City": "a", "": 1, "never": None},
        {"n": 2.5, "mixed": "two", "big": 1, "flag": None, "city": "b", "ü": "ö", "half": "\ud800"},
    ]
    records = [decision(i, features=features, unit="ü") for i, features in enumerate(nasty)]
    record_decisions(sqlite, records)
    send(sqlite, *map(item, records))
    before = rows(sqlite, tmp_path)
    expected = {
        "u_n": [1.0, 2.5],
        "u_mixed": ["1", "two"],
        "u_big": [str(2**70), "1"],
        "u_flag": [True, None],
        'u_we"ird; name': ["x", None],
        "u_City": ["a", "b"],
        "u_": [1, None],
        "u_ü": [None, "ö"],
        "u_half": [None, "?"],
    }
    assert {name: [row[name] for row in before] for name in before[0] if name.startswith("u_")} == expected
    close(sqlite, tmp_path)
    assert rows(sqlite, tmp_path) == before


def test_features_may_change_their_kind_from_day_to_day(sqlite: Database, tmp_path: Path) -> None:
    records = [decision(i * 1440, features={"x": x}) for i, x in enumerate((1, 2.5, "three", True))]
    record_decisions(sqlite, records)
    for record in records:
        send(sqlite, item(record), now=record.at + HOUR)
    close(sqlite, tmp_path, T0 + 2 * DAY + timedelta(days=7, hours=1))
    assert len(list(tmp_path.rglob("*.parquet"))) == 2
    assert [row["u_x"] for row in rows(sqlite, tmp_path)] in (
        ["1.0", "2.5", "three", "true"],
        ["1", "2.5", "three", "true"],
    )


def test_many_rows_are_read_in_several_batches(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "BATCH", 4)
    monkeypatch.setattr(events, "PURGED", 3)
    kinds = (1, 2.5, "three", None)
    records = [decision(i, features={"x": kinds[i // 5], f"y{i}": i}) for i in range(20)]
    record_decisions(sqlite, records)
    send(sqlite, *map(item, records))
    before = rows(sqlite, tmp_path)
    assert [row["u_x"] for row in before[15:]] == [None] * 5
    assert all(isinstance(row["u_x"], str) for row in before[:15])
    assert [row[f"u_y{i}"] for i, row in enumerate(before)] == list(range(20))
    assert close(sqlite, tmp_path).exposures == 20
    assert rows(sqlite, tmp_path) == before
    assert stored(sqlite, Decision) == stored(sqlite, Event) == 0


def test_an_unknown_release_loses_no_exposure(sqlite: Database, tmp_path: Path) -> None:
    record_decisions(sqlite, [decision(1, release=2), decision(2)])
    send(sqlite, item(decision(1, release=2)), item(decision(2)))
    close(sqlite, tmp_path)
    assert [(row["described"], row["t_tone"]) for row in rows(sqlite, tmp_path)] == [(False, None), (True, ["t0"])]


@pytest.fixture(scope="module")
def blank(sqlite_template: Path) -> bytes:
    return sqlite_template.read_bytes()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_order_of_delivery_makes_no_difference(
    blank: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Records and events in any order, in any batches, some more than once, before a compaction or after another's."""
    records = [decision(i * 200, unit=f"u{i % 2}") for i in range(6)]
    sent: list[Any] = list(records)
    for record in records:
        for kind, value in (("exposure", None), ("click", None), ("conversion", 0.1), ("dwell", 7.7)):
            times = data.draw(st.lists(st.integers(-5, 500), max_size=3, unique=True))
            more = {} if value is None else {"value": value}
            sent += [item(record, kind, timedelta(seconds=t), **more) for t in times]
    tables = []
    for again in range(2):
        order = data.draw(st.permutations(sent)) if again else sent
        repeats = data.draw(st.lists(st.sampled_from(sent), max_size=5)) if again else []
        folder = tmp_path_factory.mktemp("order")
        (folder / "log.db").write_bytes(blank)
        with Database(f"sqlite:///{folder}/log.db") as database:
            pile = [*order, *repeats]
            while pile:
                n = data.draw(st.integers(1, 12)) if again else len(pile)
                batch, pile = pile[:n], pile[n:]
                record_decisions(database, [x for x in batch if isinstance(x, DecisionRecord)])
                send(database, *(x for x in batch if isinstance(x, dict)), now=T0 + DAY)
            if again and data.draw(st.booleans()):
                close(database, folder)
            tables.append(rows(database, folder))
        shutil.rmtree(folder)
    assert tables[0] == tables[1]


# ── the log of the contract ──


def test_learn_reads_it_unchanged(database: Database, tmp_path: Path) -> None:
    records = [decision(i) for i in range(100)]
    pinned = decision(100, learn=False, reason=Reason.PINNED, propensity=1.0)
    elsewhere = decision(101, release=2)
    record_decisions(database, [*records, pinned, elsewhere])
    now = T0 + 2 * HOUR
    send(database, *map(item, (*records, pinned, elsewhere)), *(item(r, "click") for r in records[::3]), now=now)
    if database.sqlite:
        close(database, tmp_path)
    out = tmp_path / "out"
    written = contract_log(database, tmp_path, out, business="acme", describe=describe, scene="home")
    assert written.exposures == 100
    assert written.left_out == {"not_learn": 1, "not_recorded": 0, "not_described": 1}
    schema = read_schema(written.schema)
    log = read_log(written.path, schema)
    assert (len(log), log.n_units, log.n_variants, log.positive_rate) == (100, 7, 4, pytest.approx(0.34))
    assert (schema.scene, schema.user, schema.context, schema.variant) == (
        "home",
        ("age", "city"),
        ("page",),
        ("style", "tone"),
    )
    assert log.variants.to_pylist()[2] == {"style": ["flat"], "tone": ["t0"], "variant_id": "v2"}
    assert log.propensity is not None and set(log.propensity) == {0.25}
    assert log.time is not None and log.time[0] == (T0 + SECOND).timestamp()
    assert log.products is not None and log.products.to_pylist() == ["card"]
    assert [c.code for c in log.checks if c.level == "error"] == []


def test_the_control_bucket_is_written_where_it_is_asked_for(sqlite: Database, tmp_path: Path) -> None:
    control = [decision(i, learn=False, bucket=Bucket.CONTROL, reason=Reason.CONTROL, propensity=1.0) for i in range(9)]
    pinned = decision(50, learn=False, bucket=Bucket.CONTROL, reason=Reason.FALLBACK_ELIGIBLE, propensity=1.0)
    records = [*control, pinned, *(decision(i) for i in range(10, 40))]
    record_decisions(sqlite, records)
    send(sqlite, *map(item, records), item(records[0], "click"), item(records[-1], "click"))
    with_it, without = (
        contract_log(sqlite, tmp_path, tmp_path / str(c), business="acme", describe=describe, scene="home", control=c)
        for c in (True, False)
    )
    assert (with_it.exposures, with_it.left_out["not_learn"]) == (39, 1)
    assert (without.exposures, without.left_out["not_learn"]) == (30, 10)
    log = read_log(with_it.path, read_schema(with_it.schema))
    assert log.bucket is not None and log.buckets is not None
    assert log.buckets.to_pylist() == ["control", "random"]
    assert [int((log.bucket == b).sum()) for b in range(2)] == [9, 30]
    assert set(log.take(log.bucket == 1).bucket) == {1}


def test_the_same_log_is_written_the_same(sqlite: Database, tmp_path: Path) -> None:
    record_decisions(sqlite, [decision(i) for i in range(30)])
    send(sqlite, *(item(decision(i)) for i in range(30)))
    one, two = (contract_log(sqlite, tmp_path, tmp_path / n, business="acme", describe=describe) for n in "ab")
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.schema.read_bytes() == two.schema.read_bytes()


def test_over_all_scenes_variants_compete_within_theirs(sqlite: Database, tmp_path: Path) -> None:
    records = [decision(i, scene="home" if i % 2 else "shop") for i in range(40)]
    record_decisions(sqlite, records)
    send(sqlite, *map(item, records), *(item(r, "conversion") for r in records[::5]))
    made = contract_log(sqlite, tmp_path, tmp_path / "out", business="acme", describe=describe, label="conversion")
    log = read_log(made.path, read_schema(made.schema))
    assert log.groups is not None and log.groups.to_pylist() == ["home", "shop"]
    assert log.reward.sum() == 8


def test_a_variant_has_the_tags_it_was_last_shown_with(sqlite: Database, tmp_path: Path) -> None:
    def changing(scene: str, release: int) -> Mapping[str, Shown]:
        return {"v1": Shown({}, {"tone": [f"release {release}"]}, "card"), "v0": Shown({}, {"tone": ["x"]}, "card")}

    records = [decision(i, variant=f"v{i % 2}", release=1 + (i > 10)) for i in range(20)]
    record_decisions(sqlite, records)
    send(sqlite, *map(item, records), item(records[0], "click"))
    made = contract_log(sqlite, tmp_path, tmp_path / "out", business="acme", describe=changing, scene="home")
    log = read_log(made.path, read_schema(made.schema))
    assert log.variants["tone"].to_pylist() == [["x"], ["release 2"]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"features": {"Tone": 1}}, "'tone' is both a user feature and a tag dimension"),
        ({"features": {"page": 1}}, "'page' is both a user feature and a context"),
        ({"learn": False}, r"no exposures to learn from: there are none \(1 not learn\)"),
        ({"release": 2}, r"no exposures to learn from: there are none \(1 not described\)"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(sqlite: Database, tmp_path: Path, changes: Any, match: str) -> None:
    record_decisions(sqlite, [decision(1, **changes)])
    send(sqlite, item(decision(1, **changes)))
    with pytest.raises(InputError, match=match):
        contract_log(sqlite, tmp_path, tmp_path / "out", business="acme", describe=describe, scene="home")


# ── tenants, retention, erasure ──


def test_businesses_do_not_meet(database: Database, tmp_path: Path) -> None:
    mine, theirs = decision(1), decision(1, business="rival", variant="v3")  # the same decision id, and event id
    record_decisions(database, [mine, theirs])
    send(database, item(mine))
    assert fates(ingest(database, "rival", [item(theirs)], RING, now=T0 + HOUR)) == ["accepted"]
    for step in range(2):
        assert [row["variant_id"] for row in rows(database, tmp_path)] == ["v1"], step
        assert [row["variant_id"] for row in rows(database, tmp_path, "rival")] == ["v3"]
        close(database, tmp_path)
    assert erase_unit(database, tmp_path, business="rival", unit="nobody").exposures == 0
    assert erase_unit(database, tmp_path, business="acme", unit="user-1").exposures == 1
    assert drop_before(database, tmp_path, business="acme", before=date(2031, 1, 1)).decisions == 0
    assert len(rows(database, tmp_path, "rival")) == 1
    with database.transaction(person("ann")) as session:
        assert list(session.scalars(sa.select(Decision))) == []
    with database.transaction(person("eve", business="rival")) as session:
        assert [row.variant for row in session.scalars(sa.select(Decision))] == ["v3"]


def test_in_bulk_only_the_log_is_reached(database: Database) -> None:
    businesses = sa.table("businesses", sa.column("id"))
    for statement in (
        sa.select(Business.id),
        sa.update(Business).values(name="x"),
        sa.insert(Business).values(id="x"),
        sa.delete(Business),
        sa.text("DELETE FROM businesses"),
        sa.select(sa.text("1")),
        sa.select(Decision.id).where(Decision.id.in_(sa.select(Business.id))),
        sa.select(businesses.c.id),
    ):
        with pytest.raises(RuntimeError, match="only tables of the log"), database.bulk() as connection:
            connection.execute(statement)


def test_what_only_reads_changes_nothing(database: Database) -> None:
    send(database, item(decision(1)))
    with database.bulk(write=False) as connection:
        connection.execute(sa.delete(Event))
    assert stored(database, Event) == 1


def test_old_days_are_dropped(database: Database, tmp_path: Path) -> None:
    records = [decision(i * 1440) for i in range(4)]
    record_decisions(database, records)
    for record in records:
        send(database, item(record), now=record.at + HOUR)
    close(database, tmp_path, T0 + DAY + timedelta(days=7))  # the first day
    assert len(list(tmp_path.rglob("*.parquet"))) == 1
    dropped = drop_before(database, tmp_path, business="acme", before=date(2030, 1, 12))
    assert dataclasses.astuple(dropped) == (1, 1, 1, 1)
    assert list(tmp_path.rglob("*.parquet")) == []
    assert [row["day"] for row in rows(database, tmp_path)] == ["2030-01-12", "2030-01-13"]
    assert dataclasses.astuple(drop_before(database, tmp_path, business="acme", before=date(2030, 1, 12))) == (
        0,
        0,
        0,
        0,
    )
    assert fates(send(database, item(records[1], "click"), now=T0 + DAY + HOUR)) == ["expired"]
    close(database, tmp_path)
    assert [row["day"] for row in rows(database, tmp_path)] == ["2030-01-12", "2030-01-13"]


def test_an_erased_unit_is_nowhere(database: Database, tmp_path: Path) -> None:
    name = "somebody.with.a.name@example.org"
    records = [
        decision(
            i * 500, unit=name if i % 3 == 0 else f"user-{i}", features={"who": "of " + name} if i % 3 == 0 else {}
        )
        for i in range(12)
    ]
    record_decisions(database, records)
    for record in records:
        send(database, item(record), item(record, "click"), now=record.at + HOUR)
    close(database, tmp_path, T0 + 2 * DAY + timedelta(days=7, hours=1))
    leftover = tmp_path / "acme/scene=home/day=2030-01-10/part-0000.parquet.unfinished"
    leftover.write_text(name)
    others = [row for row in rows(database, tmp_path) if row["unit"] != name]
    erased = erase_unit(database, tmp_path, business="acme", unit=name)
    assert erased.decisions + erased.exposures == 4
    assert erased.exposures > 0 and erased.files > 0 and erased.events == 2 * erased.decisions > 0
    assert [{**row, "u_who": None} for row in rows(database, tmp_path)] == others
    assert erase_unit(database, tmp_path, business="acme", unit=name) == events.Dropped(0, 0, 0, 0)
    held = [file for file in tmp_path.rglob("*") if file.is_file() and name.encode() in file.read_bytes()]
    assert held == []
    close(database, tmp_path)
    assert len(rows(database, tmp_path)) == 8


def test_a_unit_that_was_alone_in_a_file_takes_it_along(sqlite: Database, tmp_path: Path) -> None:
    send(sqlite, item(decision(1)))
    close(sqlite, tmp_path)
    assert erase_unit(sqlite, tmp_path, business="acme", unit="user-1").files == 1
    assert list(tmp_path.rglob("*.parquet")) == []
    assert rows(sqlite, tmp_path) == []


def test_one_process_at_a_time_changes_the_files(sqlite: Database, tmp_path: Path) -> None:
    with events._alone(tmp_path, "acme"):
        with pytest.raises(UnavailableError, match="another process is changing"):
            close(sqlite, tmp_path)
        compact(sqlite, tmp_path, business="rival", now=LATER, describe=describe)
    close(sqlite, tmp_path)


def test_a_read_whose_file_is_replaced_meanwhile_is_taken_again(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [decision(1), decision(2)]
    send(sqlite, *map(item, records))
    close(sqlite, tmp_path)
    taken = events._load
    calls: list[int] = []

    def load(*args: Any) -> int:
        calls.append(1)
        answer = taken(*args)
        if len(calls) == 1:
            erase_unit(sqlite, tmp_path, business="acme", unit="user-1", scrub=False)
        return answer

    monkeypatch.setattr(events, "_load", load)
    assert [row["unit"] for row in rows(sqlite, tmp_path)] == ["user-2"]
    assert len(calls) == 2


def test_events_are_found_by_their_decision(sqlite: Database, tmp_path: Path) -> None:
    """Never by reading all of a business's: that takes the square of the time."""
    plans: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        if statement.startswith(("SELECT", "DELETE")) and "events" in statement:
            plan = connection.connection.cursor().execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(row[3] for row in plan if "events" in row[3].split())

    send(sqlite, item(decision(1)))
    sa.event.listen(sqlite.engine, "before_cursor_execute", explain)
    recent_exposures(sqlite, "acme", "home", "user-1", T0)
    erase_unit(sqlite, tmp_path, business="acme", unit="user-1", scrub=False)
    send(sqlite, item(decision(1)))
    close(sqlite, tmp_path)
    assert len(plans) == 4
    assert {plan for plan in plans if "decision_id=?" not in plan} == set()


def test_an_open_view_answers_sql(sqlite: Database, tmp_path: Path) -> None:
    send(sqlite, item(decision(1)), item(decision(1), "click"))
    with open_exposures(sqlite, tmp_path, business="acme", describe=describe) as duck:
        assert duck.sql("SELECT bucket, sum(click), count(*) FROM exposures GROUP BY ALL").fetchall() == [
            ("random", 1, 1)
        ]


def test_no_exposures_are_a_table_too(database: Database, tmp_path: Path) -> None:
    assert rows(database, tmp_path) == []
    assert close(database, tmp_path) == events.Compacted()
    table = read_exposures(database, tmp_path, business="acme", describe=describe)
    assert {"unit", "click", "nth", "replicate"} <= set(table.column_names)


def test_replicates_are_even_and_stay_what_they_are() -> None:
    assert [replicate_of(unit) for unit in ("a", "ü", "user-1")] == [0, 21, 26]
    found = [replicate_of(str(i)) for i in range(6400)]
    assert min(map(found.count, range(64))) > 60
    assert set(found) == set(range(64))


# ── kill -9 ──

# Forks a worker for each line it reads, and says its pid. A worker of the last two jobs kills itself at its n-th step:
# before a transaction begins or ends, a folder is written to disk, a file gets its name, or is deleted.
WORKSHOP = """
import os, signal, sys
from pathlib import Path
import sqlalchemy as sa
from kaleidoscope import events
from kaleidoscope.database import Database
from tests.kaleidoscope import test_events as t

url, folder = sys.argv[1:]
events.PURGED = 5

def sends(database, n):
    while True:
        batch = [t.decision(n + i) for i in range(5)]
        t.record_decisions(database, batch[:3])  # and some are lost
        results = t.send(database, *(t.item(d, k) for d in batch for k in ("exposure", "click")), now=batch[-1].at)
        assert {r.status for r in results} <= {"accepted", "duplicate"}, results
        n += 5
        os.write(1, b"done %d\\n" % n)

def stumbles(database, step):
    left = [step]
    def counted(does):
        def one(*args, **more):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return does(*args, **more)
        return one
    for name in ("begin", "commit"):
        sa.event.listen(database.engine, name, counted(lambda *_: None))
    events.sync = counted(events.sync)
    Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)

def compacts(database, step):
    stumbles(database, step)
    t.close(database, Path(folder))
    os.write(1, b"whole\\n")

def erases(database, step):
    stumbles(database, step)
    events.erase_unit(database, Path(folder), business="acme", unit="user-1")
    os.write(1, b"whole\\n")

signal.alarm(600)
for line in sys.stdin:
    job, number = line.split()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # never outlives a test that failed
        {"sends": sends, "compacts": compacts, "erases": erases}[job](Database(url), int(number))
        os._exit(0)
    os.write(1, b"pid %d\\n" % pid)
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
"""
KILLS = 20


class Workshop:
    """Workers that are killed in the middle of a job."""

    def __init__(self, database: Database, folder: Path) -> None:
        url = database.url.render_as_string(hide_password=False)
        command = [sys.executable, "-c", WORKSHOP, url, str(folder)]
        self.database = database
        self.process = subprocess.Popen(command, text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)

    def run(self, job: str, number: int, *, kill_after_s: float | None = None) -> list[str]:
        """What a worker said until it ended, or was killed so long after it had done something for the first time."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{job} {number}\n")
        self.process.stdin.flush()
        said: list[str] = []
        while "dead" not in said:
            said.append(self.process.stdout.readline().strip())
            assert said[-1], "the workshop ended"
            if kill_after_s is not None and {"pid", "done"} <= {s.split()[0] for s in said}:
                time.sleep(kill_after_s)
                os.kill(int(next(s for s in said if s.startswith("pid")).split()[1]), signal.SIGKILL)
                kill_after_s = None
        settle(self.database)
        return said


def test_an_acknowledged_event_survives_a_kill(database: Database, tmp_path: Path) -> None:
    draw, told = random.Random(5), 0
    with Workshop(database, tmp_path) as workshop:
        for _ in range(KILLS):
            said = workshop.run("sends", told, kill_after_s=draw.uniform(0, 0.03))
            told = max(int(s.split()[1]) for s in said if s.startswith("done"))
            found = rows(database, tmp_path)
            assert [row["decision_id"] for row in found[:told]] == [f"{i:032x}" for i in range(told)]
            assert all(row["exposures"] == row["click"] == 1 for row in found)
            assert len(found) in (told, told + 5), "a batch is there as a whole or not at all"
    assert told >= 5 * KILLS


def several_days(database: Database) -> list[dict[str, Any]]:
    """Two days of two scenes, and what is read of them."""
    records = [decision(i * 100, scene="home" if i % 3 else "shop", unit=f"user-{i % 4}") for i in range(14)]
    record_decisions(database, records)
    for record in records:
        send(
            database, item(record), *([item(record, "click")] if record.unit == "user-2" else []), now=record.at + HOUR
        )
    return rows(database, Path("nowhere"))


def test_a_compaction_that_is_killed_loses_and_doubles_nothing(database: Database, tmp_path: Path) -> None:
    before, log = several_days(database), tmp_path / "log"
    assert len(before) == 14
    with Workshop(database, log) as workshop:
        step = 1
        while "whole" not in workshop.run("compacts", step):
            assert rows(database, log) == before
            step += 1
    assert step > 15
    assert rows(database, log) == before
    assert stored(database, Decision) == stored(database, Event) == 0
    assert close(database, log) == events.Compacted()
    files = {str(file.relative_to(log)) for file in log.rglob("*.parquet*")}
    with database.bulk(write=False) as connection:
        assert files == set(connection.scalars(sa.select(LogPart.file)))
    assert len(files) == 4


def test_an_erasure_that_is_killed_can_be_finished_and_takes_nobody_elses(sqlite: Database, tmp_path: Path) -> None:
    before = several_days(sqlite)
    close(sqlite, tmp_path, T0 + timedelta(days=8))  # one of two days
    others = [row for row in before if row["unit"] != "user-1"]
    with Workshop(sqlite, tmp_path) as workshop:
        step = 1
        while "whole" not in workshop.run("erases", step):
            assert [row for row in rows(sqlite, tmp_path) if row["unit"] != "user-1"] == others
            step += 1
    assert step > 5
    assert rows(sqlite, tmp_path) == others
    held = [f for f in tmp_path.rglob("*") if f.is_file() and b"user-1" in f.read_bytes()]
    assert held == []
