"""`kaleidoscope events`: from events that a page sent to a log that `learn` takes, and to nothing."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kaleidoscope import cli
from kaleidoscope.businesses import audit_trail
from kaleidoscope.database import Database
from kaleidoscope.decide import Request, decide_many, prepare
from kaleidoscope.decision_record import Keyring
from kaleidoscope.events import ingest, record_decisions
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.release import ReleasePlan, Shares, draft_release, start, verify
from kaleidoscope.review import make_variants, move_variants
from kaleidoscope.scenes import change_scene
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import spec, stocked

KEYS = Keyring({"k1": b"0123456789abcdef0123"})
N = 300


@pytest.fixture
def logged(sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A scene whose 300 decisions, two weeks ago, were seen by a unit each, every tenth of which clicked."""
    stocked(sqlite, approved=True)
    with sqlite.transaction(person("ann")) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
    with sqlite.transaction(person("rex")) as session:
        move_variants(session, "welcome", "approve")
    with sqlite.transaction(person("pat", Role.ADMIN)) as session:
        plan = ReleasePlan(shares=Shares(random=1.0), stages=(1.0,))
        release = draft_release(session, "welcome", plan)
        start(session, "welcome", release.number)
    served = prepare(verify(release), release.number, release.content_hash)
    at = datetime.now(UTC) - timedelta(days=14)
    requests = [Request(f"unit {n}", at, {"age": n % 50}) for n in range(N)]
    decisions = decide_many(served, requests, keyring=KEYS, business="acme", scene="welcome", window_s=3600)
    record_decisions(sqlite, [decision.record for decision in decisions])
    items = [{"event_id": f"e{n}", "type": "exposure", "token": d.token} for n, d in enumerate(decisions)]
    items += [{"event_id": f"c{n}", "type": "click", "token": decisions[n].token} for n in range(0, N, 10)]
    ingest(sqlite, "acme", items, KEYS, now=at + timedelta(minutes=5))
    url = sqlite.url.render_as_string(hide_password=False)
    for name, value in {
        "DATABASE_URL": url, "LOG_URL": url, "LOG_DIR": str(tmp_path / "log"), "BUSINESS": "acme", "USER": "ann",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"KALEIDOSCOPE_{name}", value)
    return sqlite


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--json"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, out + err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_from_events_to_a_log_and_to_nothing(
    logged: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run(capsys, "events", "counts", "--scene", "welcome")["counts"]
    assert counts["accepted"] == N + N // 10
    done = run(capsys, "events", "compact")
    assert (done["exposures"], len(done["days"])) == (N, 1)
    assert run(capsys, "events", "compact")["exposures"] == 0
    written = run(capsys, "events", "export", "--out", str(tmp_path / "out"), "--scene", "welcome")
    log = read_log(Path(written["log"]), read_schema(Path(written["schema"])))
    assert (log.n_exposures, log.n_units, log.n_variants) == (N, N, 16)
    assert log.positive_rate == pytest.approx(0.1)
    erased = run(capsys, "events", "erase", "--unit", "unit 7")
    assert erased["exposures"] == 1
    left = run(capsys, "events", "export", "--out", str(tmp_path / "left"), "--scene", "welcome")
    assert left["exposures"] == N - 1
    with logged.transaction(person("ann", Role.ADMIN), write=False) as session:
        [entry] = audit_trail(session, entity="units").items
        assert entry.action == "erased" and entry.key == hashlib.sha256(b"acme/unit 7").hexdigest()[:16]
        assert "unit 7" not in str((entry.before, entry.after))
    dropped = run(capsys, "events", "drop", "--before", datetime.now(UTC).date().isoformat())
    assert dropped["exposures"] == N - 1


def test_days_that_are_not_over_are_left_open(logged: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with logged.transaction(person("ann", Role.ADMIN)) as session:
        change_scene(session, "welcome", spec(attribution={"conversion_hours": 24 * 30}), version=None)
    assert run(capsys, "events", "compact")["days"] == []
    assert run(capsys, "events", "compact", "--all")["exposures"] == N


def test_days_wait_for_the_release_that_servers_go_by(logged: Database, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody shortens the attribution of the scene; until that is released, servers accept events as before."""
    with logged.transaction(person("pat", Role.ADMIN)) as session:
        change_scene(session, "welcome", spec(attribution={"conversion_hours": 24 * 30}), version=None)
        release = draft_release(session, "welcome", ReleasePlan(shares=Shares(random=1.0), stages=(1.0,)))
        start(session, "welcome", release.number)
        change_scene(session, "welcome", spec(attribution={"conversion_hours": 1}), version=None)
    assert run(capsys, "events", "compact")["days"] == []


@pytest.mark.parametrize("words", [("counts", "--since", "yesterday"), ("drop", "--before", "2026-13-01")])
def test_a_day_that_is_none_is_refused(
    logged: Database, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["events", *words])
    assert stop.value.code == 2
    assert "is no day" in capsys.readouterr().err
