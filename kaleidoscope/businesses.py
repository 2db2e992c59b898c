"""Businesses: the tenants, what their copy may hold in braces, and the trail of what was changed in one.

A change of what fills a placeholder changes what variants show; their approval is taken back here, on the floor that
businesses, scenes, materials and review stand on. The trail remembers what rows forget: everybody who changed what a
variant shows, not only the last, and what was rejected before it was submitted again.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from kaleidoscope.access import RULE, check_readable, person_key
from kaleidoscope.content import DEFAULT_PLACEHOLDERS, Copy, Placeholder, parse_content, placeholders_in
from kaleidoscope.database import PAGE, Page, Session, change_rows, check_id, check_version, paginate
from kaleidoscope.errors import ConflictError, InputError, NotFoundError
from kaleidoscope.tables import ApiToken, AuditEntry, Base, Business, Material, Variant, VariantMaterial
from kaleidoscope.taxonomy import found_taxonomy
from kaleidoscope.vocabulary import MaterialKind, ReviewState, Role

MAX_NAME = 200
NAMED = 5  # of many that a message could name
UNITS = "units"  # the entity of an erasure, which is of no one table


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

    Those of API tokens are for admins alone. Raises InputError for a table that leaves no trail.
    """
    there = sorted({m.class_.__tablename__ for m in Base.registry.mappers if m.class_.audited} | {UNITS})
    if entity is not None and entity not in there:
        raise InputError(f"entity: {entity!r} leaves no trail. There are: {', '.join(there)}.")
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
            business_id=session.business, actor=session.caller.user, action="erased", entity=UNITS, key=digest[:16]
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
        # Not EXISTS, for which SQLite looks through all variants of a material once per variant.
        holding = sa.tuple_(Variant.scene_id, Variant.id).in_(
            select(VariantMaterial.scene_id, VariantMaterial.variant_id).where(
                VariantMaterial.business_id == session.business,
                VariantMaterial.material_id.in_(material_ids[start : start + 500]),
            )
        )
        query = select(Variant).where(Variant.state.in_((ReviewState.APPROVED, ReviewState.IN_REVIEW)), holding)
        query = query if scene_id is None else query.where(Variant.scene_id == scene_id)
        variants = session.scalars(query.order_by(Variant.scene_id, Variant.id).with_for_update()).all()
        draft = {
            "state": ReviewState.DRAFT.value,
            "reason": reason,
            "reviewer": None,
            "reviewed_at": None,
            "fingerprint": None,
            "author": session.caller.user,  # who changed what it shows; somebody else has to look at it
        }
        change_rows(session, [(variant, draft) for variant in variants])
        reopened += len(variants)
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


# ── what the trail tells of reviews ─────────────────────────────────────────────────────────────────────────────────


def wrote_material(session: Session, material_id: str, user: str) -> bool:
    """Whether the user wrote any of the material's content or tags since it was last approved, whoever came after."""
    mine = person_key(user)
    query = select(AuditEntry).where(*_of(session, "materials"), AuditEntry.key == material_id)
    for entry in session.scalars(query.order_by(AuditEntry.seq.desc())):
        after = entry.after or {}
        if entry.action != "created" and after.get("state") == ReviewState.APPROVED:
            return False
        wrote = entry.action == "created" or not after.keys().isdisjoint({"content", "tags"})
        if wrote and person_key(entry.actor) == mine:
            return True
    return False


def shaped_by(session: Session, scene_id: str, holding: Mapping[str, Collection[str]], user: str) -> set[str]:
    """Which variants of the scene the user made, or changed in what they show, since a person last approved them.

    `holding`: variant → the placeholders in its copies. A change is one of a material, of a product value or of a
    placeholder, also one that somebody has changed again since.
    """
    mine = person_key(user)
    values = _last(
        (name, change.seq)
        for change in _value_changes(session, scene_id)
        if person_key(change.actor) == mine
        for name in change.names
    )
    return _unapproved_since(session, scene_id, _latest(holding, values, _made_or_reopened(session, scene_id, mine)))


def kept_from_rule(session: Session, scene_id: str, holding: Mapping[str, Collection[str]]) -> set[str]:
    """Which variants of the scene only a person may approve, whatever the scene's rule says; `holding` as before.

    Those that were rejected, and those that show a value which was changed after the rule was switched on, or by
    whoever switched it on, and that no person has approved since.
    """
    switched_on, switcher = _rule_switched_on(session, scene_id)
    values = _last(
        (name, change.seq)
        for change in _value_changes(session, scene_id)
        if change.seq > switched_on or person_key(change.actor) == switcher
        for name in change.names
    )
    rejected = select(AuditEntry.key, AuditEntry.seq).where(*_of_variants(session, scene_id))
    rejected = rejected.where(_became(ReviewState.REJECTED))
    by_variant = _last((_variant_in(key), seq) for key, seq in session.execute(rejected))
    return _unapproved_since(session, scene_id, _latest(holding, values, by_variant))


def withdrawn_since_draft(session: Session, scene_id: str, number: int) -> tuple[set[str], set[str]]:
    """The ids of the business's materials, and of the scene's variants, that were rejected or retired after a release
    of the scene was drafted, whatever became of them later."""
    drafted = select(AuditEntry.seq).where(*_of(session, "releases"), AuditEntry.key == f"{scene_id}/{number}")
    since = session.scalar(drafted.order_by(AuditEntry.seq).limit(1)) or 0
    later = _became(ReviewState.REJECTED, ReviewState.RETIRED), AuditEntry.seq > since
    materials = session.scalars(select(AuditEntry.key).where(*_of(session, "materials"), *later))
    variants = session.scalars(select(AuditEntry.key).where(*_of_variants(session, scene_id), *later))
    return set(materials), {_variant_in(key) for key in variants}


def _became(*states: ReviewState) -> sa.ColumnElement[bool]:
    became: sa.ColumnElement[bool] = AuditEntry.after["state"].as_string().in_([state.value for state in states])
    return became


def _of(session: Session, entity: str) -> tuple[sa.ColumnElement[bool], ...]:
    return AuditEntry.business_id == session.business, AuditEntry.entity == entity


def _of_variants(session: Session, scene_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return *_of(session, "variants"), AuditEntry.key.startswith(f"{scene_id}/", autoescape=True)


def _variant_in(key: str) -> str:
    return key.partition("/")[2]


def _last(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The highest number of each name."""
    found: dict[str, int] = {}
    for name, seq in pairs:
        found[name] = max(seq, found.get(name, 0))
    return found


def _latest(
    holding: Mapping[str, Collection[str]], values: Mapping[str, int], by_variant: Mapping[str, int]
) -> dict[str, int]:
    """Per variant, the last entry about it or about a value that it shows; only of those that have one."""
    last = {id: max([by_variant.get(id, 0), *(values.get(n, 0) for n in names)]) for id, names in holding.items()}
    return {id: seq for id, seq in last.items() if seq}


def _unapproved_since(session: Session, scene_id: str, last: Mapping[str, int]) -> set[str]:
    """The variants that no person has approved since the audit entry given for each."""
    if not last:
        return set()
    approvals = select(AuditEntry.key, AuditEntry.seq).where(
        *_of_variants(session, scene_id),
        AuditEntry.seq > min(last.values()),
        _became(ReviewState.APPROVED),
        AuditEntry.after["reviewer"].as_string() != RULE,
    )
    approved = _last((_variant_in(key), seq) for key, seq in session.execute(approvals))
    return {id for id, seq in last.items() if approved.get(id, 0) < seq}


def _made_or_reopened(session: Session, scene_id: str, mine: str) -> dict[str, int]:
    """Per variant, when the person last made it, or took its approval back by changing what it shows."""
    actors = session.scalars(select(AuditEntry.actor).where(*_of(session, "variants")).distinct())
    names = [actor for actor in actors if person_key(actor) == mine]
    before = AuditEntry.before["state"].as_string()
    reopened = sa.and_(
        _became(ReviewState.DRAFT), before.in_([ReviewState.APPROVED.value, ReviewState.IN_REVIEW.value])
    )
    made = sa.or_(AuditEntry.action == "created", AuditEntry.after["author"].as_string().is_not(None), reopened)
    query = select(AuditEntry.key, AuditEntry.seq).where(*_of_variants(session, scene_id), made)
    rows = session.execute(query.where(AuditEntry.actor.in_(names))) if names else ()
    return _last((_variant_in(key), seq) for key, seq in rows)


@dataclass(frozen=True)
class _ValueChange:
    """Somebody changed what fills these placeholders in a scene."""

    seq: int  # of the audit entry
    actor: str
    names: frozenset[str]


def _value_changes(session: Session, scene_id: str) -> list[_ValueChange]:
    """Every change of the scene's product values and of the business's placeholders, oldest first.

    A new definition may bring to light a value that was not shown before: it is a change by who set the value, too.
    """
    placeholders = placeholders_of(get_business(session))
    changes: list[_ValueChange] = []
    setter: dict[str, str] = {}  # of the value that fills the placeholder
    for entry in _value_entries(session, scene_id):
        before, after = entry.before, entry.after
        if entry.entity == "scenes":
            names = {p.name for p in placeholders if p.fills(before or {}) != p.fills(after or {})}
            setter |= dict.fromkeys(names, entry.actor)
        else:
            old, new = ({p["name"]: Placeholder.model_validate(p).fills({}) for p in side} for side in (before, after))
            names = {name for name in new if old.get(name) != new[name]}
            changes += [_ValueChange(entry.seq, setter[n], frozenset({n})) for n in sorted(names & setter.keys())]
        if names:
            changes.append(_ValueChange(entry.seq, entry.actor, frozenset(names)))
    return changes


def _value_entries(session: Session, scene_id: str) -> list[sa.Row[Any]]:
    """What the trail has of the scene's product values and of the business's placeholders, oldest first."""
    columns = AuditEntry.seq, AuditEntry.actor, AuditEntry.entity
    # Of a scene's document only this: it may name thousands of materials.
    product = (getattr(AuditEntry, side)[("spec", "product")].label(side) for side in ("before", "after"))
    of_scene = select(*columns, *product).where(*_of(session, "scenes"), AuditEntry.key == scene_id)
    defined = (getattr(AuditEntry, side)["placeholders"].label(side) for side in ("before", "after"))
    # Not those that a business begins with, which nobody in it wrote.
    of_business = select(*columns, *defined).where(*_of(session, "businesses"), AuditEntry.action == "changed")
    rows = [row for query in (of_scene, of_business) for row in session.execute(query) if row.after is not None]
    return sorted(rows, key=lambda row: row.seq)


def _rule_switched_on(session: Session, scene_id: str) -> tuple[int, str | None]:
    """The audit entry with which the scene's rule was last switched on, and by whom; (0, None): it never was."""
    before, after = (getattr(AuditEntry, side)[("spec", "approve_automatically")] for side in ("before", "after"))
    query = select(AuditEntry.seq, AuditEntry.actor, before.label("before"), after.label("after"))
    query = query.where(*_of(session, "scenes"), AuditEntry.key == scene_id).order_by(AuditEntry.seq.desc())
    for entry in session.execute(query):
        if entry.after and not entry.before:
            return entry.seq, person_key(entry.actor)
    return 0, None
