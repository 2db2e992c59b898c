"""What every endpoint shares: tokens, one error shape, ETags, idempotency keys, limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi import FastAPI

from kaleidoscope.access import operator
from kaleidoscope.database import Database
from kaleidoscope.serving import http
from kaleidoscope.tokens import list_tokens, revoke_token
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.serving.conftest import Client
from tests.kaleidoscope.stock import stocked

COPY = {"id": "hello", "content": {"kind": "copy", "title": "Hello"}}
MATERIALS = "/api/v1/businesses/acme/materials"


def test_a_token_is_taken_as_bearer_or_as_api_key(client_of: Client, sqlite: Database) -> None:
    client = client_of("ann")
    secret = client.headers["Authorization"].removeprefix("Bearer ")
    assert client.get("/api/v1/businesses/acme").json()["name"] == "Acme"
    by_key = client_of()
    assert by_key.get("/api/v1/businesses/acme", headers={"X-API-Key": secret}).status_code == 200


@pytest.mark.parametrize("secret", ["", "kld_wrong", "Basic x", "kld_" + "a" * 5000, "\x7f"])
def test_nobody_is_told_who_they_are_not(client_of: Client, secret: str) -> None:
    response = client_of().get("/api/v1/businesses/acme", headers={"Authorization": f"Bearer {secret}"})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "unauthenticated"


def test_a_revoked_token_ends_at_once(client_of: Client, sqlite: Database) -> None:
    client = client_of("ann")
    with sqlite.transaction(operator("root", "acme")) as session:
        revoke_token(session, list_tokens(session)[0].id)
    assert client.get("/api/v1/businesses/acme").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/businesses/acme/scenes/none", 404, "not_found"),
        ("GET", "/api/v1/nowhere", 404, "not_found"),
        ("DELETE", "/api/v1/businesses/acme", 405, "method_not_allowed"),
        ("GET", "/api/v1/businesses/acme/materials?limit=0", 400, "bad_input"),
        ("GET", "/api/v1/businesses/acme/materials?cursor=%21", 400, "bad_input"),
        ("GET", "/api/v1/businesses/acme/audit?key=%00", 400, "bad_input"),
        ("GET", "/api/v1/businesses/ac%00me", 400, "bad_input"),
        ("GET", "/api/v1/businesses/acme/materials?stat=draft", 400, "bad_input"),
    ],
)
def test_every_error_has_the_one_shape(client_of: Client, method: str, path: str, status: int, code: str) -> None:
    response = client_of("ann").request(method, path)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        (
            "GET",
            f"{MATERIALS}?stat=draft&kind=copy",
            "no parameter 'stat' here. There are: kind, state, tag, cursor, limit.",
        ),
        ("GET", "/api/v1/businesses/acme?verbose", "no parameter 'verbose' here. This endpoint takes none."),
        ("POST", f"{MATERIALS}?dry_run=1", "no parameter 'dry_run' here."),
    ],
)
def test_a_query_parameter_that_nothing_reads_is_refused(client_of: Client, method: str, path: str, said: str) -> None:
    client = client_of("ann")
    response = client.request(method, path, json=COPY if method == "POST" else None)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert client.get(MATERIALS).json()["items"] == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("GET", "/audit", None),
        ("GET", "/materials", None),
        ("GET", "/scenes", None),
        ("GET", "/tokens", None),
        ("GET", "/taxonomy/versions", None),
        ("POST", "/tokens", {"user": "x", "roles": ["viewer"]}),
        ("POST", "/materials", COPY),
        ("DELETE", "/tokens/x", None),
    ],
)
def test_a_business_that_nobody_founded_is_not_there(
    client_of: Client, method: str, path: str, body: dict[str, object] | None
) -> None:
    response = client_of("root", business=None).request(method, f"/api/v1/businesses/nowhere{path}", json=body)
    assert response.status_code == 404, response.text
    assert response.json()["error"]["message"] == "There is no business 'nowhere'."


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00%2B14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00"])
@pytest.mark.parametrize("route", ["live?at=", "interventions?active_at="])
def test_moments_beyond_the_calendar_or_without_a_zone_are_refused(
    client_of: Client, sqlite: Database, route: str, at: str
) -> None:
    stocked(sqlite)
    response = client_of("ann").get(f"/api/v1/businesses/acme/scenes/welcome/{route}{at}")
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe",
        b'{"id": "x", "content": {"kind": "copy", "title": "a\\u0000b"}}',
        b'{"id": "x", "content": {"kind": "copy", "title": "\\ud800"}}',
        b'{"id": NaN}',
        b"[" * 100_000,
        b'{"id": "x"}',
        b'{"id": "x", "content": {"kind": "copy", "title": "t"}, "colour": "red"}',
        b'{"id": "../x", "content": {"kind": "copy", "title": "t"}}',
    ],
)
def test_a_body_that_cannot_be_used_is_refused_and_nothing_is_stored(client_of: Client, body: bytes) -> None:
    client = client_of("ann")
    response = client.post(MATERIALS, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] in {"bad_input"}
    assert client.get(MATERIALS).json()["items"] == []


@pytest.mark.parametrize("kind", ["application/x+json", "application/vnd.api+json", "text/plain", "", "*/json"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"id": "x", "spec": {"name": "x", "slots": [], "product": {"yield": NaN}}}',
        b'{"id": "x", "spec": {"name": "x", "slots": [], "product": {"yield": 1e999}}}',
        b'{"id": "x", "content": {"kind": "copy", "title": "a\\u0000b"}}',
        b'{"id": "x", "content": {"kind": "copy", "title": "\\ud800"}}',
        b'{"id": "x", "content": {"kind": "copy", "title": "' + b"x" * 5_000_000 + b'"}}',
    ],
)
@pytest.mark.parametrize("path", ["materials", "scenes"])
def test_the_type_of_a_body_does_not_spare_it_the_checks(client_of: Client, kind: str, body: bytes, path: str) -> None:
    url = f"/api/v1/businesses/acme/{path}"
    response = client_of("ann").post(url, content=body, headers={"Content-Type": kind})
    assert response.status_code == (413 if len(body) > http.MAX_JSON else 400), response.text
    assert response.json()["error"]["message"].startswith("body: ")


def test_a_body_of_another_json_type_is_taken(client_of: Client, sqlite: Database) -> None:
    stocked(sqlite)
    body, headers = json.dumps(COPY).encode(), {"Content-Type": "application/vnd.api+json"}
    assert client_of("ann").post(MATERIALS, content=body, headers=headers).status_code == 201


def test_a_body_that_is_too_large_is_refused(client_of: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY", 1000)
    client = client_of("ann")
    big = json.dumps({**COPY, "id": "x" * 2000}).encode()
    assert client.post(MATERIALS, content=big).status_code == 413

    def chunks():  # type: ignore[no-untyped-def]
        yield from (b"x" * 400 for _ in range(5))

    assert client.post(MATERIALS, content=chunks()).status_code == 413


def test_reads_carry_an_etag_that_changes_with_what_is_read(client_of: Client, sqlite: Database) -> None:
    stocked(sqlite)
    client = client_of("ann")
    first = client.get(f"{MATERIALS}/c1")
    tag = first.headers["ETag"]
    known = {"If-None-Match": f'"other", W/{tag}'}
    again = client.get(f"{MATERIALS}/c1", headers=known)
    assert again.status_code == 304
    assert again.content == b""
    assert again.headers["ETag"] == tag
    change = {"version": 1, "content": {"kind": "copy", "title": "Another"}}
    assert client.patch(f"{MATERIALS}/c1", json=change).status_code == 200
    assert client.get(f"{MATERIALS}/c1", headers=known).status_code == 200


def test_the_loser_of_two_changes_gets_both_versions(client_of: Client, sqlite: Database) -> None:
    stocked(sqlite)
    client = client_of("ann")
    change = {"version": 1, "content": {"kind": "copy", "title": "First"}}
    assert client.patch(f"{MATERIALS}/c1", json=change).json()["version"] == 2
    lost = client.patch(f"{MATERIALS}/c1", json={**change, "content": {"kind": "copy", "title": "Second"}})
    assert lost.status_code == 409
    details = lost.json()["error"]["details"]
    assert details["yours"]["content"]["title"] == "Second"
    assert details["current"]["content"]["title"] == "First"


def test_a_create_with_a_key_happens_once(client_of: Client, sqlite: Database) -> None:
    stocked(sqlite)
    client, key = client_of("ann"), {"Idempotency-Key": "k-1"}
    first = client.post(MATERIALS, json=COPY, headers=key)
    again = client.post(MATERIALS, json=COPY, headers=key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert client.post(MATERIALS, json=COPY).status_code == 409
    other = client.post(MATERIALS, json={**COPY, "id": "else"}, headers=key)
    assert other.status_code == 409
    assert "Idempotency-Key" in other.json()["error"]["message"]
    somebody_else = client_of("bob").post(MATERIALS, json={**COPY, "id": "mine"}, headers=key)
    assert somebody_else.status_code in {201, 409}
    assert somebody_else.headers.get("Idempotent-Replayed") is None


def test_a_failed_create_does_not_use_its_key_up(client_of: Client, sqlite: Database) -> None:
    stocked(sqlite)
    client, key = client_of("ann"), {"Idempotency-Key": "k-2"}
    bad = {"id": "bad", "content": {"kind": "copy", "title": "Hi {nobody}"}}
    assert client.post(MATERIALS, json=bad, headers=key).status_code == 400
    assert client.post(MATERIALS, json={**bad, "content": COPY["content"]}, headers=key).status_code == 201


def test_a_database_that_is_away_is_a_503_to_try_again(
    app: FastAPI, client_of: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of("ann")
    app.state.database.close()
    (tmp_path / "kaleidoscope.db").rename(tmp_path / "elsewhere.db")
    (tmp_path / "kaleidoscope.db").mkdir()
    response = client.get("/api/v1/businesses/acme")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert response.json()["error"]["code"] == "unavailable"
    assert "kaleidoscope.db" not in response.text  # where it is is in the log
    assert "kaleidoscope.db" in caplog.text


def test_an_unexpected_error_tells_nothing_of_the_inside(client_of: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("kaleidoscope.businesses.get_business", broken)
    response = client_of("ann", Role.VIEWER).get("/api/v1/businesses/acme")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "secret detail" not in response.text
