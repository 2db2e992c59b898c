"""Portraits over HTTP: the same answers as the services give, and nothing that a request can break."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI

from kaleidoscope.database import Database
from kaleidoscope.portrait_design import design_for
from kaleidoscope.portraits import portrait_of, store_portrait
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.portrait_cells import cell, cells, found, run
from tests.kaleidoscope.serving.conftest import Client
from tests.kaleidoscope.stock import stocked

SCENE = "/api/v1/businesses/acme/scenes/welcome"
NASTY = "<script>alert(1)</script>\u202e\x1b\u2028"
PATHS = ("portraits", "portrait", "portrait/design")


@pytest.fixture
def stored(sqlite: Database, app: FastAPI) -> Database:
    """Scene `welcome` with a portrait."""
    stocked(sqlite)
    with sqlite.transaction(person("ann")) as session:
        nasty = cell({"level": NASTY}, {"image_style": "flat"}, **found(0.3, 0.1, 0.5))
        store_portrait(session, "welcome", run(), cells([nasty]))
    return sqlite


def test_the_answers_are_those_of_the_services(stored: Database, client_of: Client) -> None:
    vic = client_of("vic", Role.VIEWER)
    with stored.transaction(person("vic", Role.VIEWER), write=False) as session:
        page = portrait_of(session, "welcome", {"age": "[30, 40)"}, language="zh")
        design = design_for(session, "welcome", {"age": "30", "level": None})
    asked: dict[str, Any] = {"segment": "age=[30, 40)", "language": "zh"}
    assert vic.get(f"{SCENE}/portrait", params=asked).json() == page.model_dump(mode="json")
    asked = {"attribute": ["age=30", "level="]}
    assert vic.get(f"{SCENE}/portrait/design", params=asked).json() == design.model_dump(mode="json")
    assert vic.get(f"{SCENE}/portraits").json()["items"] == [page.portrait.model_dump(mode="json")]
    assert len(vic.get(f"{SCENE}/portrait", params={"everyone": "true"}).json()["items"]) == 4


@pytest.mark.parametrize("at", ["2026-11-15", "2026-11-03T20:00:00+08:00", "2026-11-03T12:00Z"])
def test_a_portrait_is_found_by_when_it_is_of(at: str, stored: Database, client_of: Client) -> None:
    for path in ("portrait", "portrait/design"):
        assert client_of("ann").get(f"{SCENE}/{path}", params={"at": at}).json()["portrait"]["number"] == 1


@pytest.mark.parametrize("path", PATHS)
def test_who_may_read_it(path: str, stored: Database, client_of: Client) -> None:
    assert client_of().get(f"{SCENE}/{path}").status_code == 401
    assert client_of("page", Role.CLIENT).get(f"{SCENE}/{path}").status_code == 403
    assert client_of("eve", business="rival").get(f"{SCENE}/{path}").status_code == 404
    elsewhere = f"/api/v1/businesses/rival/scenes/welcome/{path}"
    assert client_of("eve", business="rival").get(elsewhere).status_code == 404  # acme's scene is not rival's
    assert client_of("ann").get(f"{SCENE[:-7]}nowhere/{path}").status_code == 404
    read = client_of("vic", Role.VIEWER).get(f"{SCENE}/{path}")
    assert read.status_code == 200 and read.headers["content-type"] == "application/json"
    known = {"If-None-Match": read.headers["ETag"]}
    assert client_of("vic", Role.VIEWER).get(f"{SCENE}/{path}", headers=known).status_code == 304


@pytest.mark.parametrize("path", ["portrait", "portrait/design"])
def test_a_scene_without_a_portrait_is_a_404_that_says_what_to_do(path: str, app: FastAPI, sqlite: Database,
                                                                  client_of: Client) -> None:  # fmt: skip
    stocked(sqlite)
    answer = client_of("ann").get(f"{SCENE}/{path}")
    assert answer.status_code == 404 and "kaleidoscope attribute" in answer.json()["error"]["message"]
    assert client_of("ann").get(f"{SCENE}/portraits").json() == {"items": [], "next_cursor": None}


@pytest.mark.parametrize(
    ("path", "asked", "status", "says"),
    [
        ("portrait", {"segment": "age"}, 400, "NAME=VALUE"),
        ("portrait", {"segment": "=3"}, 400, "NAME=VALUE"),
        ("portrait", {"segment": "age=[1, 2)"}, 404, "no segment"),
        ("portrait", {"number": 9}, 404, "There is no portrait"),
        ("portrait", {"number": 0}, 400, "number"),
        ("portrait", {"at": "2026-12-01"}, 404, "1 of 2026-11-01 – 2026-11-15"),
        ("portrait", {"at": "yesterday"}, 400, "at"),
        ("portrait", {"at": "2026-11-03T20:00"}, 400, "at"),
        ("portrait/design", {"at": "2026-11-03", "number": 1}, 400, "Give one of them"),
        ("portrait", {"language": "fr"}, 400, "language"),
        ("portrait", {"cursor": "nonsense"}, 400, "cursor"),
        ("portrait", {"segmnet": "age=3"}, 400, "no parameter"),
        ("portrait/design", {"attribute": "aeg=3"}, 400, "There are: age, level"),
        ("portrait/design", {"attribute": "age=old"}, 400, "age is a number"),
        ("portrait/design", {"attribute": "x" * 2_000}, 400, "attribute"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(
    path: str, asked: dict[str, Any], status: int, says: str, stored: Database, client_of: Client
) -> None:
    answer = client_of("ann").get(f"{SCENE}/{path}", params=asked)
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), answer.text


def test_what_visitors_typed_is_data(stored: Database, client_of: Client) -> None:
    answer = client_of("ann").get(f"{SCENE}/portrait", params={"segment": f"level={NASTY}"}).json()
    (item,) = answer["items"]
    assert item["segment"] == {"level": NASTY}
    assert not set(item["sentence"]) & set("\u202e\x1b\u2028")
