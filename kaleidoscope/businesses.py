"""Businesses: the tenants, what their copy may hold in braces, and the trail of what was changed in one.

A change of what fills a placeholder changes what variants show; their approval is taken back here, on the floor that
businesses, scenes, materials and review stand on.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from kaleidoscope.access import check_readable
from kaleidoscope.content import DEFAULT_PLACEHOLDERS, Copy, Placeholder, parse_content, placeholders_in
from kaleidoscope.database import PAGE, Page, Session, check_id, check_version, paginate
from kaleidoscope.errors import ConflictError, InputError, NotFoundError
from kaleidoscope.tables import ApiToken, AuditEntry, Business, Material, Variant, VariantMaterial
from kaleidoscope.taxonomy import found_taxonomy
from kaleidoscope.vocabulary import MaterialKind, ReviewState, Role

MAX_NAME = 200
NAMED = 5  # of many that a message could name


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
    """Change what is given; variants whose copies hold a placeholder that is changed fall back to draft.

    Raises ConflictError where `version` is not the current one, and where copies in use hold a placeholder that
    `placeholders` leaves out.
    """
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
    before = {p.name: p.fills({}) for p in placeholders_of(business)}
    after = before if placeholders is None else {p.name: p.fills({}) for p in placeholders}
    _refuse_removing(session, before.keys() - after.keys())
    for key, value in yours.items():
        setattr(business, key, value)
    session.flush()
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    reopen_filled(session, {name: f"placeholder {name} changed" for name in changed})
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
    """Every change of a row of the business, newest first; of one table, or of one row of it.

    Those of API tokens are for admins alone.
    """
    if entity == ApiToken.__tablename__:
        session.caller.require(Role.ADMIN)
    query = select(AuditEntry).where(AuditEntry.business_id == session.business)
    if not session.caller.may(Role.ADMIN):
        query = query.where(AuditEntry.entity != ApiToken.__tablename__)
    query = query if entity is None else query.where(AuditEntry.entity == entity)
    query = query if key is None else query.where(AuditEntry.key == key)
    return paginate(session, query, AuditEntry.seq, cursor=cursor, limit=limit, descending=True)


def audit_erasure(session: Session, unit: str) -> None:
    """Note in the audit that a unit is forgotten: by a hash, which tells two apart and says of nobody who it was."""
    session.caller.require(Role.ADMIN)
    digest = hashlib.sha256(f"{session.business}/{unit}".encode()).hexdigest()
    session.add(
        AuditEntry(
            business_id=session.business, actor=session.caller.user, action="erased", entity="units", key=digest[:16]
        )
    )
    session.flush()


def _name(name: str) -> str:
    name = unicodedata.normalize("NFC", name.strip())
    if not 0 < len(name) <= MAX_NAME or any(ord(c) < 32 for c in name):
        raise InputError(f"name: give a name of 1 to {MAX_NAME} characters on one line.")
    return check_readable("name", name)


# ── what placeholders fill ──────────────────────────────────────────────────────────────────────────────────────────


def copies_holding(session: Session, names: Collection[str]) -> dict[str, list[str]]:
    """Per placeholder, those of the copies in use (not retired) that hold it, by id; only for those that some hold."""
    found: dict[str, list[str]] = {}
    query = select(Material.id, Material.content).where(
        Material.business_id == session.business,
        Material.kind == MaterialKind.COPY,
        Material.state != ReviewState.RETIRED,
    )
    for id, content in session.execute(query.order_by(Material.id)) if names else ():
        copy = parse_content(content)
        for name in placeholders_in(copy) & set(names) if isinstance(copy, Copy) else ():
            found.setdefault(name, []).append(id)
    return found


def reopen_filled(session: Session, reasons: Mapping[str, str], *, scene_id: str | None = None) -> int:
    """Take back the approval of the variants (of the scene) whose copies hold a placeholder that has a reason here.

    Returns how many fell back to draft.
    """
    holding = copies_holding(session, reasons.keys())
    return sum(reopen_variants(session, holding[n], reasons[n], scene_id=scene_id) for n in sorted(holding))


def reopen_variants(session: Session, material_ids: Sequence[str], reason: str, *, scene_id: str | None = None) -> int:
    """Take back the approval of every variant (of the scene) that holds one of the materials.

    Returns how many fell back to draft.
    """
    reopened = 0
    for start in range(0, len(material_ids), 500):
        holding = sa.exists().where(
            VariantMaterial.business_id == Variant.business_id,
            VariantMaterial.scene_id == Variant.scene_id,
            VariantMaterial.variant_id == Variant.id,
            VariantMaterial.material_id.in_(material_ids[start : start + 500]),
        )
        query = select(Variant).where(Variant.state.in_((ReviewState.APPROVED, ReviewState.IN_REVIEW)), holding)
        query = query if scene_id is None else query.where(Variant.scene_id == scene_id)
        for variant in session.scalars(query.order_by(Variant.scene_id, Variant.id).with_for_update()).all():
            variant.state, variant.reason = ReviewState.DRAFT, reason
            variant.reviewer = variant.reviewed_at = variant.fingerprint = None
            variant.author = session.caller.user  # who changed what it shows; somebody else has to look at it
            reopened += 1
        session.flush()
    return reopened


def _refuse_removing(session: Session, names: Collection[str]) -> None:
    """Raise ConflictError where copies in use hold one of these placeholders."""
    problems = []
    for name, ids in sorted(copies_holding(session, names).items()):
        more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
        verb = "holds" if len(ids) == 1 else "hold"
        problems.append(f"cop{'y' if len(ids) == 1 else 'ies'} {', '.join(ids[:NAMED])}{more} {verb} {{{name}}}")
    if problems:
        more = f"; and so with {len(problems) - NAMED:,} more placeholders" if len(problems) > NAMED else ""
        raise ConflictError(
            f"placeholders: {'; '.join(problems[:NAMED])}{more}. Keep the placeholder, or change or retire its copies"
            " first."
        )
