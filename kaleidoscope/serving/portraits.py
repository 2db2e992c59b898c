"""Portraits over HTTP: who prefers which tag in a scene, and what to design for some users. Reads alone."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import AwareDatetime

from kaleidoscope import portrait_design, portraits
from kaleidoscope.database import PAGE
from kaleidoscope.errors import InputError
from kaleidoscope.serving.http import ERRORS, READ, Caught, Route
from kaleidoscope.serving.operate import MAX_INT, SCENE, Cursor, Limit
from kaleidoscope.views import PageView, page_view
from kaleidoscope.wording import Language

router = APIRouter(prefix="/api/v1", route_class=Route, responses=ERRORS, tags=["portraits"])

Pair = Annotated[str, Query(max_length=1_000)]
Pairs = Annotated[list[Pair], Query(max_length=50, description="NAME=VALUE, as often as needed")]
Number = Annotated[int | None, Query(ge=1, le=MAX_INT, description="Which portrait; left out: the newest")]
At = Annotated[
    AwareDatetime | date | None,
    Query(description="The newest portrait of then: a moment with its zone, or a day in UTC; not with `number`"),
]
Speaking = Annotated[Language, Query(description="What sentences are written in")]


@router.get(f"{SCENE}/portraits", responses=READ)
def list_portraits(
    call: Caught, scene: str, cursor: Cursor = None, limit: Limit = PAGE
) -> PageView[portraits.PortraitView]:
    """The scene's portraits, newest first."""
    with call.read() as session:
        return page_view(portraits.list_portraits(session, scene, cursor=cursor, limit=limit), lambda view: view)


@router.get(f"{SCENE}/portrait", responses=READ)
def get_portrait(
    call: Caught,
    scene: str,
    segment: Pairs = [],  # noqa: B006 - read only
    everyone: Annotated[bool, Query(description="Main effects alone, without a segment")] = False,
    number: Number = None,
    at: At = None,
    language: Speaking = "en",
    cursor: Cursor = None,
    limit: Limit = PAGE,
) -> portraits.PortraitPage:
    """A portrait: what it is of, and its cells in the order of what matters; of one segment where it is named."""
    wanted = _pairs("segment", segment) or ({} if everyone else None)
    with call.read() as session:
        return portraits.portrait_of(
            session, scene, wanted, number=number, at=at, language=language, cursor=cursor, limit=limit
        )


@router.get(f"{SCENE}/portrait/design", responses=READ)
def get_design(
    call: Caught,
    scene: str,
    attribute: Pairs = [],  # noqa: B006 - read only
    number: Number = None,
    at: At = None,
    language: Speaking = "en",
) -> portrait_design.Design:
    """What to design for users with these attributes (`age=30`; `age=`: missing), and what was never tried enough."""
    with call.read() as session:
        return portrait_design.design_for(
            session, scene, _pairs("attribute", attribute), number=number, at=at, language=language
        )


def _pairs(parameter: str, texts: Iterable[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [name for name, equals, _ in pairs if not equals or not name]
    if wrong:
        raise InputError(f"{parameter}: {wrong[0][:60]!r} is not NAME=VALUE, such as age=30.")
    return {name: value for name, _, value in pairs}
