"""Businesses: the tenants, and the trail of what was changed in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select

from kaleidoscope.content import DEFAULT_PLACEHOLDERS, Placeholder
from kaleidoscope.database import PAGE, Page, Session, check_id, check_version, paginate
from kaleidoscope.errors import ConflictError, InputError, NotFoundError
from kaleidoscope.tables import AuditEntry, Business
from kaleidoscope.taxonomy import found_taxonomy
from kaleidoscope.vocabulary import Role

MAX_NAME = 200


def create_business(session: Session, name: str, *, two_person_publish: bool = False) -> Business:
    """Found the session's business, with the built-in taxonomy and placeholders.

    Raises ForbiddenError for a caller who is not the installation's, ConflictError if it exists.
    """
    session.caller.require_installation()
    business_id = check_id("business", session.business)
    if session.get(Business, business_id) is not None:
        raise ConflictError(f"There is a business {business_id!r} already.")
    business = Business(
        id=business_id,
        name=_name(name),
        two_person_publish=two_person_publish,
        placeholders=[p.model_dump(mode="json") for p in DEFAULT_PLACEHOLDERS],
    )
    session.add(business)
    session.flush()
    found_taxonomy(session)
    return business


def get_business(session: Session, *, lock: bool = False) -> Business:
    """The session's business; raises NotFoundError."""
    business = session.get(Business, session.business, with_for_update=True if lock else None, populate_existing=lock)
    if business is None:
        raise NotFoundError(
            f"There is no business {session.business!r}. Make it:"
            f" `kaleidoscope business create {session.business} --name NAME`."
        )
    return business


def change_business(
    session: Session,
    *,
    version: int | None,
    name: str | None = None,
    two_person_publish: bool | None = None,
    placeholders: Sequence[Placeholder] | None = None,
) -> Business:
    """Change what is given. Raises ConflictError where `version` is not the current one."""
    session.caller.require(Role.ADMIN)
    business = get_business(session, lock=True)
    yours: dict[str, Any] = {"name": name, "two_person_publish": two_person_publish}
    if placeholders is not None:
        yours["placeholders"] = [p.model_dump(mode="json") for p in placeholders]
        names = [p.name for p in placeholders]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise InputError(f"placeholders: {', '.join(twice)} is given twice. Give every name once.")
    yours = {key: value for key, value in yours.items() if value is not None}
    check_version(business, version, yours, {key: getattr(business, key) for key in yours})
    if name is not None:
        yours["name"] = _name(name)
    for key, value in yours.items():
        setattr(business, key, value)
    session.flush()
    return business


def list_businesses(session: Session, *, cursor: str | None = None, limit: int = PAGE) -> Page[Business]:
    """The businesses the caller may see: all for one of the installation, otherwise their own."""
    query = select(Business)
    if not session.caller.installation:
        query = query.where(Business.id == session.business)
    return paginate(session, query, Business.id, cursor=cursor, limit=limit)


def placeholders_of(business: Business) -> tuple[Placeholder, ...]:
    """What copy of this business may hold in braces."""
    return tuple(Placeholder.model_validate(p) for p in business.placeholders)


def audit_trail(
    session: Session, *, entity: str | None = None, key: str | None = None, cursor: str | None = None, limit: int = PAGE
) -> Page[AuditEntry]:
    """Every change of a row of the business, newest first; of one table, or of one row of it."""
    query = select(AuditEntry).where(AuditEntry.business_id == session.business)
    query = query if entity is None else query.where(AuditEntry.entity == entity)
    query = query if key is None else query.where(AuditEntry.key == key)
    return paginate(session, query, AuditEntry.seq, cursor=cursor, limit=limit, descending=True)


def _name(name: str) -> str:
    name = name.strip()
    if not 0 < len(name) <= MAX_NAME or any(ord(c) < 32 for c in name):
        raise InputError(f"name: give a name of 1 to {MAX_NAME} characters on one line.")
    return name
