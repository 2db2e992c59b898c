"""Decisions and events over /v1: scenes at once, candidates, fallbacks, records, and a database that is away."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kaleidoscope.businesses import change_business
from kaleidoscope.content import DEFAULT_PLACEHOLDERS
from kaleidoscope.database import Database, open_database
from kaleidoscope.decision_record import DecisionRecord
from kaleidoscope.errors import InputError, JobError, TooManyRequestsError, UnavailableError
from kaleidoscope.events import read_exposures, shown_in
from kaleidoscope.images import store_image
from kaleidoscope.ranker import Contribution
from kaleidoscope.release import PolicySpec, ReleasePlan, Shares, get_release, verify
from kaleidoscope.scenes import change_scene
from kaleidoscope.serving import decisions
from kaleidoscope.serving.decider import Asked, Decider, Metrics, Pace, Recorder, load_keys
from kaleidoscope.serving.live import Watched, models_in
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Bucket, Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.serving.conftest import SHARES, Client, Constant, release_next, settings_for
from tests.kaleidoscope.stock import spec


def ask(client: TestClient, unit: str = "u1", **more: object) -> Any:
    return client.post("/v1/decisions", json={"unit": unit, "scenes": ["welcome"], **more})


def unit_in(decider: Decider, bucket: Bucket) -> str:
    from kaleidoscope.buckets import assign

    shares = {b: getattr(SHARES, b) for b in Bucket}
    return next(u for u in map(str, range(1000)) if assign(shares, "acme/welcome/bucket", u) == bucket)


# ── decisions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scenes_are_decided_at_once_and_one_that_fails_fails_alone(released: FastAPI, client_of: Client) -> None:
    answer = ask(client_of("page", Role.CLIENT), scenes=["welcome", "nowhere", "welcome"], attributes={"age": 3})
    body = answer.json()
    [decision], [failure] = body["decisions"], body["failures"]
    assert set(decision["payload"]) == {"copy", "image", "layout"} and decision["propensity"] > 0
    assert (failure["scene"], failure["code"], body["stale_s"]) == ("nowhere", "not_found", None)


def test_the_best_candidates_come_with_scores_and_tags(released: FastAPI, client_of: Client) -> None:
    client, decider = client_of("page", Role.CLIENT), released.state.decider
    for bucket in (Bucket.CONTROL, Bucket.RANDOM):  # who is compared with is shown what was drawn
        body = ask(client, unit_in(decider, bucket), top=3).json()
        assert (body["decisions"][0]["bucket"], body["rankings"]) == (bucket, [])
    body = ask(client, unit_in(decider, Bucket.MODEL), top=3).json()
    [ranking] = body["rankings"]
    scores = [candidate["score"] for candidate in ranking["candidates"]]
    assert scores == [1.0, 0.0, 0.0] and ranking["model_version"] == "m1" and body["decisions"] == []
    assert all(candidate["tags"] for candidate in ranking["candidates"])


def test_a_tester_may_choose_and_a_page_may_not(released: FastAPI, client_of: Client) -> None:
    page, tester = client_of("page", Role.CLIENT), client_of("tom", Role.EDITOR)
    released.state.decider.live.refresh()
    variant = ask(page).json()["decisions"][0]["variant"]
    assert ask(page, forced=variant).status_code == 403
    [decision] = ask(tester, "u9", forced=variant).json()["decisions"]
    assert (decision["variant"], decision["reason"], decision["propensity"]) == (variant, "forced", 1.0)
    [failure] = ask(tester, forced="none").json()["failures"]
    assert "none" in failure["message"]


def test_why_a_variant_is_shown_is_told_to_people(released: FastAPI, client_of: Client, sqlite: Database) -> None:
    class Explaining(Constant):
        def explain(self, features: int, side: int, row: int, variant: int) -> list[Contribution]:
            assert (features, side, row) == (1, 16, 0) and 0 <= variant < 16  # one in a hundred is not the favourite
            small = Contribution("intercept", None, None, None, None, 0.1)
            return [small, Contribution("interaction", "age", "3", "subject", "gold", -0.9)]

    decider: Decider = released.state.decider
    decider.live.models = lambda business, version: Explaining(version)
    plan = ReleasePlan(shares=SHARES, model_version="m2", policy=PolicySpec(epsilon=0.01), stages=(1.0,))
    release_next(sqlite, plan)
    page, person_ = client_of("page", Role.CLIENT), client_of("tom", Role.VIEWER)
    decider.live.refresh()
    assert ask(page, explain=True).status_code == 403
    [decision] = ask(person_, unit_in(decider, Bucket.MODEL), explain=True).json()["decisions"]
    assert [(part["part"], part["logit"]) for part in decision["explanation"]] == [
        ("interaction", -0.9), ("intercept", 0.1),
    ]  # fmt: skip
    [decision] = ask(person_, unit_in(decider, Bucket.RANDOM), explain=True).json()["decisions"]
    assert decision["explanation"] is None


def test_attributes_are_told_apart(released: FastAPI, sqlite: Database) -> None:
    with sqlite.transaction(person("pat", Role.ADMIN)) as session:
        change_business(session, version=None, placeholders=DEFAULT_PLACEHOLDERS)
        change_scene(session, "welcome", spec(context=["hour"]), version=None)
    release_next(sqlite, ReleasePlan(shares=Shares(random=1.0), stages=(1.0,)))
    decider: Decider = released.state.decider
    decider.live.refresh()
    served = decider.served("acme", "welcome", "u1")
    asked = Asked("u1", {"first_name": "Ann", "city": "Rome", "age": 3, "hour": 9})
    request = decider.request(served, "acme", "welcome", asked)
    assert request.values == {"first_name": "Ann", "city": "Rome"}
    assert (request.features, request.context) == ({"city": "Rome", "age": 3}, {"hour": 9})


@pytest.mark.parametrize(
    "attributes",
    [
        {"x": [1]}, {"x": {"y": 1}}, {"x": "y" * 501}, {"x": "a\0"}, {"x": "\ud800"}, {"x": 2**63}, {"x": float("inf")},
        {"": 1}, {" ": 1}, {"\ud800": 1}, {"a\nb": 1}, {"n" * 101: 1}, {str(n): n for n in range(101)},
    ],
)  # fmt: skip
def test_what_no_log_could_hold_is_refused_by_every_door(
    released: FastAPI, client_of: Client, attributes: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        Asked("u1", attributes)
    client = client_of("page", Role.CLIENT)
    document = json.dumps({"unit": "u1", "scenes": ["welcome"], "attributes": attributes}, allow_nan=True)
    for path, body in (
        ("/v1/decisions", document),
        ("/ofrep/v1/evaluate/flags/welcome", json.dumps({"context": {"targetingKey": "u1", **attributes}})),
    ):
        answer = client.post(
            path, content=body.replace("Infinity", "1e999"), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, (path, answer.text)


@pytest.mark.parametrize("unit", ["", " ", "a\nb", "\0", "\ud800", "x" * 201])
def test_a_unit_is_an_id_that_a_log_can_hold(unit: str) -> None:
    with pytest.raises(InputError, match="the unit"):
        Asked(unit, {})


def test_units_may_be_of_any_script() -> None:
    for unit in ("用户-17", "👨‍👩‍👧", "a b", "x" * 200):
        assert Asked(unit, {}).unit == unit


def test_attributes_of_a_scene_have_an_end(
    released: FastAPI, client_of: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kaleidoscope.serving import decider

    monkeypatch.setattr(decider, "MAX_NAMES", 5)
    shown = released.state.decider
    first = shown.decide("acme", "welcome", Asked("u1", {"a": 1, "b": 2, "c": 3}))
    second = shown.decide("acme", "welcome", Asked("u1", {"c": 3, "d": 4, "e": 5, "f": 6, "g": 7}))
    assert (set(first.record.features), set(second.record.features)) == (set("abc"), set("cde"))
    assert second.record.detail == "2 attributes beyond the limit"
    other = shown.names.kept("acme", "another", {"x"})
    assert other == {"x"}


# ── when something is missing ───────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_cannot_be_loaded_is_named_and_decisions_fall_back(
    released: FastAPI, client_of: Client, sqlite: Database
) -> None:
    decider: Decider = released.state.decider
    unit = unit_in(decider, Bucket.MODEL)

    def broken(business: str, version: str) -> Constant:
        raise JobError(f"model {version} is damaged")

    decider.live.models = broken
    release_next(sqlite, ReleasePlan(shares=SHARES, model_version="m2", stages=(1.0,)))
    decider.live.refresh()
    client = client_of("page", Role.CLIENT)
    [decision] = ask(client, unit).json()["decisions"]
    assert decision["reason"] == "fallback_last_good" and "m2 is not loaded" in decision["detail"]
    assert decision["model_version"] == "m1"
    assert "model m2 is damaged" in " ".join(decider.live.problems)
    text = client.get("/metrics").text
    assert 'kaleidoscope_decisions_total{bucket="model",reason="fallback_last_good"} 1.0' in text
    assert "kaleidoscope_live_problems 1.0" in text


def test_a_model_that_is_slow_again_and_again_gets_a_pause() -> None:
    at = [0.0]

    class Slow(Constant):
        def score(self, features: int, side: int) -> Any:
            at[0] += 0.1
            return super().score(features, side)

    watched = Watched(Slow(), 0.05, clock=lambda: at[0])
    for _ in range(3):
        assert watched.score(1, 5).shape == (1, 5)
    with pytest.raises(TimeoutError, match="pause"):
        watched.score(1, 5)
    at[0] += 31
    assert watched.score(1, 5).shape == (1, 5)


def test_decisions_go_on_while_the_database_is_away_and_say_how_old_they_are(
    released: FastAPI, client_of: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, decider = client_of("page", Role.CLIENT), released.state.decider
    assert ask(client).json()["stale_s"] is None

    @contextmanager
    def away(*_: object, **__: object) -> Iterator[Any]:
        raise UnavailableError("the database is away")
        yield

    monkeypatch.setattr(decider.live.database, "transaction", away)
    decider.live._try_refresh()
    began = decider.live.clock()
    monkeypatch.setattr(decider.live, "clock", lambda: began + 60)
    body = ask(client).json()
    assert body["decisions"] and 59 < body["stale_s"] < 70
    flag = client.post("/ofrep/v1/evaluate/flags/welcome", json={"context": {"targetingKey": "u1"}}).json()
    assert flag["metadata"]["staleSeconds"] >= 59
    assert client.get("/readyz").json()["status"] == "stale"


def test_a_locked_log_keeps_neither_decisions_nor_health_waiting(
    released: FastAPI, client_of: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, held = client_of("page", Role.CLIENT), threading.Event()
    [decision] = ask(client).json()["decisions"]
    event = {"event_id": "e", "type": "exposure", "token": decision["token"]}
    monkeypatch.setattr(decisions, "ingest", lambda *_, **__: held.wait(30) and [])
    statuses: list[int] = []

    def send() -> None:
        statuses.append(client.post("/v1/events", json={"events": [event]}).status_code)

    senders = [threading.Thread(target=send) for _ in range(decisions.WRITERS + decisions.QUEUED + 3)]
    for sender in senders:
        sender.start()
    while len(statuses) < 3:
        threading.Event().wait(0.01)
    assert client.get("/healthz").json()["status"] == "ok" and ask(client).json()["decisions"]
    assert statuses == [503] * 3
    held.set()
    for sender in senders:
        sender.join()
    assert statuses.count(200) == decisions.WRITERS + decisions.QUEUED


def test_a_log_that_answers_slowly_is_not_waited_for(
    released: FastAPI, monkeypatch: pytest.MonkeyPatch, sqlite: Database
) -> None:
    from kaleidoscope.serving import decider

    with sqlite.transaction(person("pat", Role.ADMIN)) as session:
        change_scene(session, "welcome", spec(fatigue_hours=24), version=None)
    release_next(sqlite, ReleasePlan(shares=Shares(random=1.0), stages=(1.0,)))
    shown: Decider = released.state.decider
    shown.live.refresh()
    held, asked = threading.Event(), [0]

    def slow(*_: object) -> dict[str, int]:
        asked[0] += 1
        held.wait(30)
        return {}

    monkeypatch.setattr(decider, "recent_exposures", slow)
    for n in range(6):
        assert shown.decide("acme", "welcome", Asked(f"u{n}", {})).record.variant
    assert asked[0] <= decider.SLOW_IN_A_ROW
    held.set()


def test_a_server_waits_for_a_database_that_is_away_when_it_starts(tmp_path: Path) -> None:
    from kaleidoscope.serving.app import create_app

    away = "postgresql+psycopg://nobody@127.0.0.1:1/none"
    app = create_app(settings_for(away, tmp_path))
    with TestClient(app) as client:
        assert client.get("/healthz").json()["status"] == "starting"
        assert client.get("/readyz").status_code == 503
        asked = {"context": {"targetingKey": "u"}}
        answer = client.post("/ofrep/v1/evaluate/flags/x", json=asked, headers={"X-API-Key": "kld_x"})
        assert answer.status_code == 503


def test_a_server_that_never_knew_what_is_live_is_not_ready(app: FastAPI, client_of: Client) -> None:
    client = client_of()
    assert client.get("/healthz").json()["status"] == "starting"
    assert client.get("/readyz").status_code == 503


# ── what is recorded ────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_join_the_decisions_that_their_tokens_name(
    released: FastAPI, client_of: Client, sqlite: Database, tmp_path: Path
) -> None:
    decider: Decider = released.state.decider
    decider.recorder.start()
    client = client_of("page", Role.CLIENT)
    decisions = [ask(client, f"u{n}", attributes={"age": n}).json()["decisions"][0] for n in range(20)]
    decider.recorder.close()
    events = [{"event_id": f"e{n}", "type": "exposure", "token": d["token"]} for n, d in enumerate(decisions)]
    events += [{"event_id": "c1", "type": "click", "token": decisions[1]["token"]}]
    forged = decisions[0]["token"][:-2] + ("AA" if not decisions[0]["token"].endswith("AA") else "BB")
    events += [events[0], {"event_id": "f", "type": "click", "token": forged}, "nonsense"]
    answer = client.post("/v1/events", json={"events": events}, headers={"User-Agent": "Mozilla/5.0"})
    results = answer.json()["results"]
    assert [r["status"] for r in results] == ["accepted"] * 21 + ["duplicate", "refused", "refused"]
    assert [r["code"] for r in results[21:]] == [None, "forged", "malformed"]

    def describe(scene: str, number: int) -> Any:
        with sqlite.transaction(person("pat", Role.ADMIN), write=False) as session:
            return shown_in(verify(get_release(session, scene, number)))

    table = read_exposures(sqlite, tmp_path / "log", business="acme", describe=describe, scene="welcome")
    rows = table.to_pylist()
    assert len(rows) == 20 and sum(row["click"] for row in rows) == 1
    assert {row["decision_id"] for row in rows} == {d["id"] for d in decisions}
    assert sorted(row["u_age"] for row in rows) == list(range(20))
    assert 'kaleidoscope_events_total{code="forged",status="refused"} 1.0' in client.get("/metrics").text


def test_events_of_bots_are_left_out(released: FastAPI, client_of: Client) -> None:
    client = client_of("page", Role.CLIENT)
    [decision] = ask(client).json()["decisions"]
    event = {"event_id": "e", "type": "exposure", "token": decision["token"]}
    answer = client.post("/v1/events", json={"events": [event]}, headers={"User-Agent": "Googlebot/2.1"})
    [result] = answer.json()["results"]
    assert (result["event_id"], result["status"], result["code"]) == ("e", "filtered", "bot")


def record(n: int) -> DecisionRecord:
    from kaleidoscope.decision_record import Reason

    return DecisionRecord(
        f"{n:032x}", "acme", "welcome", f"u{n}", datetime.now(UTC), Bucket.RANDOM, "v", 0.5, True, Reason.EXPLORED, 1,
        "h", None, 2,
    )  # fmt: skip


def test_records_wait_for_a_log_that_is_away_and_beyond_a_limit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kaleidoscope.serving import decider

    monkeypatch.setattr(decider, "WAITING", 5)
    monkeypatch.setattr(decider, "RETRY_S", 0.01)
    tries, written, back = [0], [], threading.Event()

    def flaky(database: Database, batch: Any) -> int:
        tries[0] += 1
        if tries[0] <= 3:
            raise UnavailableError("away")
        written.extend(batch)
        back.set()
        return len(batch)

    monkeypatch.setattr(decider, "record_decisions", flaky)
    metrics = Metrics()
    with open_database(f"sqlite:///{tmp_path}/log.db") as database:
        recorder = Recorder(database, metrics)
        recorder.add([record(n) for n in range(8)])
        assert (recorder.waiting, metrics.dropped._value.get()) == (5, 3)
        recorder.start()
        assert back.wait(60)
        recorder.close()
    assert [r.unit for r in written] == ["u0", "u1", "u2", "u3", "u4"]


# ── pictures, keys, pace, models ────────────────────────────────────────────────────────────────────────────────────


def test_pictures_are_served_for_good_and_nothing_else_is(released: FastAPI, client_of: Client) -> None:
    picture = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    image = store_image(released.state.files, "acme", picture.getvalue())
    client = client_of()
    answer = client.get(f"/v1/images/acme/{image.file}.png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert "immutable" in answer.headers["cache-control"]
    assert client.get(f"/v1/images/rival/{image.file}.png").status_code == 404
    assert client.get(f"/v1/images/acme/{image.file}.svg").status_code == 400
    assert client.get("/v1/images/acme/..%2f..%2fkeys.png").status_code in (400, 404)


def test_keys_are_made_once_for_their_owner_alone(tmp_path: Path) -> None:
    settings = Settings(keys_file=tmp_path / "keys")
    made = load_keys(settings)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    assert load_keys(settings).derived("x") == made.derived("x")
    assert load_keys(Settings.model_validate({"keys": "a:0123456789abcdef"})).current == "a"
    with pytest.raises(InputError, match="KEYS_FILE"):
        load_keys(Settings(keys_file=tmp_path / "missing" / "keys"))


def test_a_caller_gets_a_seconds_worth_at_once_and_then_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    from kaleidoscope.serving import decider

    at = [100.0]
    monkeypatch.setattr(decider, "time", SimpleNamespace(monotonic=lambda: at[0]))
    pace = Pace(10)
    for _ in range(10):
        pace.take("a")
    with pytest.raises(TooManyRequestsError) as refused:
        pace.take("a")
    assert refused.value.retry_after_s == pytest.approx(0.1)
    pace.take("b")
    at[0] += 0.11
    pace.take("a")
    with pytest.raises(TooManyRequestsError):
        pace.take("a")


@pytest.mark.parametrize("version", ["../m", "a/b", ".hidden", "", "x" * 201])
def test_a_models_version_is_no_path(tmp_path: Path, version: str) -> None:
    with pytest.raises(JobError, match="no version's name"):
        models_in(lambda business, name: tmp_path / business / name)("acme", version)


def test_the_application_starts_and_stops_with_its_threads(sqlite: Database, tmp_path: Path) -> None:
    from kaleidoscope.serving.app import create_app

    url = sqlite.url.render_as_string(hide_password=False)
    app = create_app(settings_for(url, tmp_path, cors_origins="https://shop.example", refresh_s=0.05))
    with TestClient(app) as client:
        assert client.get("/readyz").json()["status"] == "ok"
        before = app.state.decider.live._held.at
        until = time.monotonic() + 60
        while app.state.decider.live._held.at == before and time.monotonic() < until:
            threading.Event().wait(0.02)
        assert app.state.decider.live._held.at != before
        headers = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        allowed = client.options("/v1/decisions", headers=headers)
        assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
        refused = client.options("/v1/decisions", headers={**headers, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
    assert not app.state.decider.live._thread.is_alive()


# ── what is known of a user ─────────────────────────────────────────────────────────────────────────────────────────


def test_stored_features_are_added_and_a_callers_own_win(
    released: FastAPI, client_of: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    decider: Decider = released.state.decider
    asked: list[tuple[str, str, str]] = []

    def known(business: str, scene: str, unit: str, at: datetime) -> tuple[dict[str, Any], str]:
        asked.append((business, scene, unit))
        return ({"age": 30, "income": 5}, "") if unit == "known" else ({}, "the feature store is not open yet")

    monkeypatch.setattr(decider.features, "features_for", known)
    decision = decider.decide("acme", "welcome", Asked("known", {"age": 44}))
    assert dict(decision.record.features) == {"age": 44, "income": 5}
    assert asked == [("acme", "welcome", "known")]
    [answer] = ask(client_of("page", Role.CLIENT), "stranger").json()["decisions"]
    assert "not open yet" in answer["detail"]
