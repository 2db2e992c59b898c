"""What the faces show of stored rows: one pydantic model per kind, for REST, for `--json` and for the console.

A view is plain data: it outlives the session it was read in.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from kaleidoscope import database, tables
from kaleidoscope.content import Content, Placeholder, Tag, parse_content
from kaleidoscope.scenes import SceneSpec
from kaleidoscope.vocabulary import InterventionKind, MaterialKind, ReleaseState, ReviewState, Role

Row = TypeVar("Row")
Shown = TypeVar("Shown", bound=BaseModel)


class View(BaseModel):
    """Base of all views."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class PageView(View, Generic[Shown]):
    """Some items, and the cursor of the next page; null: there is none."""

    items: list[Shown]
    next_cursor: str | None


def page_view(page: database.Page[Row], view: Callable[[Row], Shown]) -> PageView[Shown]:
    """A page of rows as a page of views."""
    return PageView(items=[view(row) for row in page.items], next_cursor=page.next_cursor)


class BusinessView(View):
    """A tenant."""

    id: str
    name: str
    two_person_publish: bool
    placeholders: list[Placeholder]
    version: int


class TokenView(View):
    """An API token, without its secret."""

    id: str
    business: str | None
    user: str
    roles: list[Role]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: tables.ApiToken) -> TokenView:
        """The view of a row."""
        return cls.model_validate({**_columns(row), "business": row.business_id})


class AuditView(View):
    """One change of one row."""

    seq: int
    at: datetime
    actor: str
    action: str
    entity: str
    key: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class TaxonomyVersionView(View):
    """A version of the tag vocabulary, without the vocabulary."""

    number: int
    author: str
    note: str
    created_at: datetime


class MaterialView(View):
    """A material and where it stands."""

    id: str
    kind: MaterialKind
    content: Content
    content_hash: str
    tags: list[Tag]
    taxonomy: int
    state: ReviewState
    reason: str | None
    author: str
    reviewer: str | None
    reviewed_at: datetime | None
    version: int

    @classmethod
    def of(cls, row: tables.Material) -> MaterialView:
        """The view of a row."""
        return cls.model_validate({**_columns(row), "content": parse_content(row.content)})


class SceneView(View):
    """A scene and its version."""

    id: str
    spec: SceneSpec
    author: str
    version: int

    @classmethod
    def of(cls, row: tables.Scene) -> SceneView:
        """The view of a row."""
        return cls.model_validate(_columns(row))


class VariantView(View):
    """A combination of materials and where it stands."""

    id: str
    materials: dict[str, str]
    remarks: list[str]
    state: ReviewState
    reason: str | None
    author: str
    reviewer: str | None
    reviewed_at: datetime | None
    version: int


class InterventionView(View):
    """A business rule."""

    id: str
    kind: InterventionKind
    target: dict[str, Any]
    segment: dict[str, str]
    starts_at: datetime | None
    ends_at: datetime | None
    priority: int
    note: str
    ended: bool
    author: str
    version: int


class ReleaseView(View):
    """A release and where it stands, without its content."""

    number: int
    state: ReleaseState
    content_hash: str
    author: str
    note: str
    created_at: datetime

    @classmethod
    def of(cls, row: tables.Release, state: ReleaseState) -> ReleaseView:
        """The view of a row and its state."""
        names = [name for name in cls.model_fields if name != "state"]  # not the content, which may not be loaded
        return cls.model_validate({name: getattr(row, name) for name in names} | {"state": state})


class LedgerView(View):
    """One transition, and what was live after it."""

    seq: int
    at: datetime
    actor: str
    action: str
    release: int
    stable: int | None
    candidate: int | None
    share: float
    paused: bool
    stage: int | None
    health: dict[str, Any] | None
    reason: str


def _columns(row: tables.Base) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in type(row).__mapper__.column_attrs}
