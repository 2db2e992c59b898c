"""OFREP: the protocol's answers and errors, who may ask, and the public clients, unmodified, against a real server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode
from openfeature.flag_evaluation import Reason

from kaleidoscope.database import Database
from kaleidoscope.release import ReleasePlan, Shares
from kaleidoscope.serving.decider import Pace
from kaleidoscope.serving.http import MAX_JSON
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.serving.conftest import Client, release_next

FLAGS = "/ofrep/v1/evaluate/flags"
CLIENTS = Path(__file__).parent / "clients"


def evaluate(client: TestClient, unit: object = "u1", key: str = "welcome", **attributes: object) -> Any:
    return client.post(f"{FLAGS}/{key}", json={"context": {"targetingKey": unit, **attributes}})


def test_a_success_carries_what_the_protocol_asks_for(released: FastAPI, client_of: Client) -> None:
    client = client_of("page", Role.CLIENT)
    buckets = set()
    for n in range(40):
        answer = evaluate(client, f"u{n}", age=33, city="Beijing", vip=True, note=None)
        assert answer.status_code == 200
        body = answer.json()
        assert set(body) == {"key", "value", "variant", "reason", "metadata"}
        assert body["key"] == "welcome" and set(body["value"]) == {"copy", "image", "layout"}
        metadata = body["metadata"]
        assert {"decisionId", "token", "bucket", "propensity", "modelVersion", "release"} <= set(metadata)
        assert all(isinstance(value, str | int | float | bool) for value in metadata.values())
        assert body["reason"] == {"control": "SPLIT", "random": "SPLIT"}.get(metadata["bucket"], body["reason"])
        if metadata["reason"] == "ranked":
            assert body["reason"] == "TARGETING_MATCH" and metadata["modelVersion"] == "m1"
        assert (
            evaluate(client, f"u{n}", age=33, city="Beijing", vip=True, note=None).json()["variant"] == body["variant"]
        )
        buckets.add(metadata["bucket"])
    assert buckets == {"control", "random", "model"}


@pytest.mark.parametrize("path", [FLAGS, f"{FLAGS}/welcome"])
def test_an_answer_that_did_not_change_is_304(released: FastAPI, client_of: Client, path: str) -> None:
    client = client_of("page", Role.CLIENT)
    body = {"context": {"targetingKey": "u1"}}
    first = client.post(path, json=body)
    again = client.post(path, json=body, headers={"If-None-Match": first.headers["ETag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    other = client.post(path, json={"context": {"targetingKey": "u1", "age": 4}}, headers={"If-None-Match": "x"})
    assert other.status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "PARSE_ERROR"),
        (b'{"context": {"targetingKey": "u", "x": NaN}}', "PARSE_ERROR"),
        (b'{"context": {"targetingKey": "\\ud800"}}', "PARSE_ERROR"),
        (b"", "TARGETING_KEY_MISSING"),
        (b"[]", "TARGETING_KEY_MISSING"),
        (b'{"context": {}}', "TARGETING_KEY_MISSING"),
        (b'{"context": {"targetingKey": ""}}', "TARGETING_KEY_MISSING"),
        (b'{"context": []}', "INVALID_CONTEXT"),
        (b'{"context": {"targetingKey": 7}}', "INVALID_CONTEXT"),
        (b'{"context": {"targetingKey": "u", "tags": ["a"]}}', "INVALID_CONTEXT"),
        (b'{"context": {"targetingKey": "u", "n": 1e999}}', "INVALID_CONTEXT"),
        (b'{"context": {"targetingKey": "u\\u0000"}}', "INVALID_CONTEXT"),
    ],
)
def test_a_bad_request_is_told_with_the_protocols_code(
    released: FastAPI, client_of: Client, body: bytes, code: str
) -> None:
    client = client_of("page", Role.CLIENT)
    for path, keys in (
        (f"{FLAGS}/welcome", {"key", "errorCode", "errorDetails"}),
        (FLAGS, {"errorCode", "errorDetails"}),
    ):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["errorCode"]) == (400, code)
        assert set(answer.json()) == keys


def test_whatever_goes_wrong_is_told_in_the_protocols_shape(released: FastAPI, client_of: Client) -> None:
    client = client_of("page", Role.CLIENT)
    for answer, status in (
        (client.get(f"{FLAGS}/welcome"), 405),
        (client.post("/ofrep/v2/evaluate"), 404),
        (client.post(FLAGS, content=b" " * (MAX_JSON + 1)), 413),
        (client.post("/v1/events", content=b" " * (MAX_JSON + 1)), 413),
    ):
        assert answer.status_code == status
        assert set(answer.json()) == ({"error"} if "/v1/events" in str(answer.url) else {"errorDetails"})


def test_what_is_not_live_is_not_found(released: FastAPI, client_of: Client) -> None:
    answer = evaluate(client_of("page", Role.CLIENT), key="nowhere")
    assert answer.status_code == 404
    assert answer.json()["errorCode"] == "FLAG_NOT_FOUND" and answer.json()["key"] == "nowhere"


def test_who_may_ask(released: FastAPI, client_of: Client, sqlite: Database) -> None:
    assert evaluate(client_of()).status_code == 401
    client = client_of("page", Role.CLIENT)
    token = client.headers["Authorization"].split()[1]
    anonymous = client_of()
    with_key = anonymous.post(
        f"{FLAGS}/welcome", json={"context": {"targetingKey": "u1"}}, headers={"X-API-Key": token}
    )
    assert with_key.status_code == 200
    root, stranger = client_of("root", business=None), client_of("eve", Role.ADMIN, business="rival")
    released.state.decider.live.refresh()
    assert evaluate(root).status_code == 403
    assert anonymous.post(FLAGS, json={}, headers={"X-API-Key": "kld_wrong"}).status_code == 401
    assert client.get("/api/v1/businesses/acme/audit").status_code == 403
    assert evaluate(stranger).status_code == 404
    assert stranger.post(FLAGS, json={"context": {"targetingKey": "u1"}}).json() == {"flags": []}


def test_too_many_requests_of_one_token_are_429_and_others_go_on(released: FastAPI, client_of: Client) -> None:
    released.state.decider.pace = Pace(0.01)
    busy, other = client_of("page", Role.CLIENT), client_of("app", Role.CLIENT)
    released.state.decider.live.refresh()
    assert evaluate(busy).status_code == 200
    refused = evaluate(busy, key="another")
    assert refused.status_code == 429 and 50 < int(refused.headers["Retry-After"]) <= 101
    assert evaluate(other).status_code == 200


def test_bulk_answers_every_live_scene_and_hides_those_that_show_nothing(
    released: FastAPI, client_of: Client, sqlite: Database
) -> None:
    client = client_of("page", Role.CLIENT)
    [flag] = client.post(FLAGS, json={"context": {"targetingKey": "u1"}}).json()["flags"]
    single = evaluate(client).json()
    assert {**flag, "metadata": {**flag["metadata"], "token": ""}} == {
        **single, "metadata": {**single["metadata"], "token": ""}
    }  # fmt: skip


# ── the public clients ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def address(released: FastAPI, client_of: Client) -> Iterator[tuple[str, str]]:
    """A real server, and a token."""
    token = client_of("page", Role.CLIENT).headers["Authorization"].split()[1]
    server = uvicorn.Server(uvicorn.Config(released, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", token
        server.should_exit = True
        thread.join(timeout=60)


def test_the_python_provider_works_unmodified(address: tuple[str, str]) -> None:
    url, token = address
    provider = OFREPProvider(url, headers_factory=lambda: {"Authorization": f"Bearer {token}"}, timeout=60)
    api.set_provider(provider)
    client = api.get_client()
    context = EvaluationContext(targeting_key="u1", attributes={"age": 30})
    found = client.get_object_details("welcome", {}, context)
    assert (
        found.error_code is None and isinstance(found.value, dict) and set(found.value) == {"copy", "image", "layout"}
    )
    assert found.reason in {Reason.SPLIT, Reason.TARGETING_MATCH} and found.variant
    assert found.flag_metadata["decisionId"] and found.flag_metadata["token"]
    missing = client.get_object_details("nowhere", {"mine": 1}, context)
    assert (missing.error_code, missing.value) == (ErrorCode.FLAG_NOT_FOUND, {"mine": 1})
    nobody = client.get_object_details("welcome", {}, EvaluationContext())
    assert nobody.error_code == ErrorCode.TARGETING_KEY_MISSING
    api.shutdown()
    provider.session.close()


def test_the_javascript_providers_work_unmodified(address: tuple[str, str]) -> None:
    node = shutil.which("node")
    if node is None or not (CLIENTS / "node_modules").is_dir():
        if os.environ.get("CI", "").lower() in {"", "0", "false"}:
            pytest.skip("needs Node.js, and `npm ci` in tests/kaleidoscope/serving/clients")
        pytest.fail("in CI the JavaScript clients must run: `npm ci` in tests/kaleidoscope/serving/clients")
    url, token = address
    run = subprocess.run(
        [node, "evaluate.mjs", url, token], cwd=CLIENTS, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for name in ("server", "web"):
        shown = found[name]["shown"]
        assert set(shown["value"]) == {"copy", "image", "layout"}
        assert shown["reason"] in {"SPLIT", "TARGETING_MATCH"} and shown["flagMetadata"]["token"]
        assert found[name]["missing"]["errorCode"] == "FLAG_NOT_FOUND"
        assert found[name]["missing"]["value"] == {"mine": 1}
    assert found["server"]["shown"]["variant"] == found["web"]["shown"]["variant"]
    assert found["web"]["statuses"] == [200, 304]


def test_the_next_release_is_served_without_dropping_a_request(
    released: FastAPI, client_of: Client, sqlite: Database
) -> None:
    client, answers, stop = client_of("page", Role.CLIENT), [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(evaluate(client, "u1").json())

    asking = threading.Thread(target=ask)
    asking.start()
    while not answers:
        time.sleep(0.01)
    plan = ReleasePlan(shares=Shares(control=0.5, random=0.5), stages=(1.0,))
    number = release_next(sqlite, plan)
    released.state.decider.live.refresh()
    seen = len(answers)
    while len(answers) < seen + 5:
        time.sleep(0.01)
    stop.set()
    asking.join()
    releases = [answer["metadata"]["release"] for answer in answers]
    assert releases == sorted(releases) and set(releases) == {1, number}


def test_a_canary_gets_its_share_of_the_units_and_keeps_them(
    released: FastAPI, client_of: Client, sqlite: Database
) -> None:
    assert person("pat").business == "acme"
    plan = ReleasePlan(shares=Shares(control=0.5, random=0.5), stages=(0.3, 1.0))
    number = release_next(sqlite, plan)
    released.state.decider.live.refresh()
    decider, units = released.state.decider, [f"unit {n}" for n in range(2_000)]
    before = {u for u in units if decider.served("acme", "welcome", u).number == number}
    assert 0.26 < len(before) / len(units) < 0.34
    release_next_stage(sqlite)
    decider.live.refresh()
    assert {u for u in units if decider.served("acme", "welcome", u).number == number} == set(units)


def release_next_stage(database: Database) -> None:
    from kaleidoscope.release import Health, advance
    from kaleidoscope.tables import now

    with database.transaction(person("pat", Role.ADMIN)) as session:
        advance(session, "welcome", health=Health(ok=True, observed_at=now()))
