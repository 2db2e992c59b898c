"""Review: from a scene's combinations to variants that may be shown, and who says so.

draft → in review → approved or rejected → retired. Materials and variants go the same way; a variant can be approved
only while its materials are, and falls back to draft when one of them changes, or what fills its copies' placeholders
(businesses.py takes the approvals back). A release takes what is approved.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select
from sqlalchemy.orm import defer

from kaleidoscope.access import RULE, person_key
from kaleidoscope.businesses import (
    get_business,
    kept_from_rule,
    placeholders_of,
    reopen_variants,
    shaped_by,
    wrote_material,
)
from kaleidoscope.combiner import (
    MatchTerm,
    MaterialTerm,
    Option,
    Slot,
    Space,
    TagTerm,
    broken_rules,
    count,
    diagnose,
    explode,
    parse,
    variant_id,
    work_limit,
)
from kaleidoscope.content import Copy, parse_content, placeholders_in
from kaleidoscope.coverage import Cover, Traffic, cover, traffic
from kaleidoscope.database import PAGE, Page, Session, add_rows, change_rows, find, paginate
from kaleidoscope.errors import ConflictError, InputError, NotFoundError
from kaleidoscope.scenes import (
    USABLE,
    SceneSpace,
    materials_by_id,
    options_of,
    possible,
    space_basis,
    space_of,
    spec_of,
)
from kaleidoscope.tables import (
    LedgerEntry,
    Material,
    Release,
    Reviewed,
    Scene,
    Variant,
    VariantMaterial,
    now,
)
from kaleidoscope.vocabulary import Level, MaterialKind, ReviewState, Role

MAX_VARIANTS = 100_000  # of a scene that are stored and reviewed; more are capped
MAX_TERMS = 50  # of a filter
MAX_NAMED = 20_000  # materials or variants that a filter comes to
OWN = "your own: somebody else has to review it"

DRAFT, IN_REVIEW, APPROVED = ReviewState.DRAFT, ReviewState.IN_REVIEW, ReviewState.APPROVED
REJECTED, RETIRED = ReviewState.REJECTED, ReviewState.RETIRED
WITHDRAWN = (REJECTED, RETIRED)
NAMED = 5  # of many that a note names


@dataclass(frozen=True)
class Move:
    """A step of the review: from which states, to which, and who may take it."""

    name: str
    come_from: frozenset[ReviewState]
    to: ReviewState
    role: Role
    needs_reason: bool = False


MOVES = {
    move.name: move
    for move in (
        Move("submit", frozenset({DRAFT, REJECTED}), IN_REVIEW, Role.EDITOR),
        Move("approve", frozenset({IN_REVIEW}), APPROVED, Role.REVIEWER),
        Move("reject", frozenset({IN_REVIEW, APPROVED}), REJECTED, Role.REVIEWER, needs_reason=True),
        Move("retire", frozenset({DRAFT, IN_REVIEW, APPROVED, REJECTED}), RETIRED, Role.EDITOR),
        Move("restore", frozenset({RETIRED}), DRAFT, Role.EDITOR),
    )
}


@dataclass(frozen=True)
class Moved:
    """How many were moved, why the others were not, and what whoever moved them should know."""

    moved: int
    skipped: Mapping[str, int] = field(default_factory=dict)  # reason → how many
    notes: tuple[str, ...] = ()  # such as: a retired material is still shown by the live release


# ── making variants ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Made:
    """What `make_variants` did, and how well the variants cover what the materials can combine to."""

    legal: int  # combinations that constraints and hard checks allow
    created: int
    kept: int
    restored: int
    retired: int
    approved: int  # by the scene's rule
    remarked: int  # variants a soft check remarks on
    coverage: Cover | None  # of a capped scene
    warnings: tuple[str, ...] = ()  # what is odd about the constraints


@dataclass(frozen=True, eq=False)
class Planned:
    """What a scene's variants are to be, worked out from what the database held."""

    scene_id: str
    basis: str  # a hash of what it was worked out from
    found: SceneSpace
    legal: int
    wanted: Mapping[str, Mapping[str, str]]  # id → slot → material
    remarks: Mapping[str, list[str]]  # id → what soft checks remark
    coverage: Cover | None
    warnings: tuple[str, ...]


def plan_variants(session: Session, scene_id: str) -> Planned:
    """What `make_variants` would bring the scene's variants to; the costly part of it, which changes nothing.

    Raises InputError where nothing can be combined, a constraint contradicts the others, the baseline is forbidden, or
    there are too many combinations and no cap, TooComplexError where it cannot be worked out in reasonable time.
    """
    session.caller.require(Role.EDITOR)
    scene = find(session, Scene, scene_id)
    found = space_of(session, scene)
    existing = _variants(session, scene_id)
    basis = _basis(session, scene, existing)
    alive = [v.materials for v in existing.values() if v.state != RETIRED]
    with work_limit():
        findings = diagnose(found.space)
        problems = [p.message for p in findings if p.level == Level.ERROR]
        if problems:
            raise InputError("\n".join(f"scene {scene_id!r}: {p}" for p in problems))
        legal = count(found.space)
        wanted, coverage = _wanted(found, legal, alive)
    remarks = {id: found.remarks_on(materials) for id, materials in wanted.items()}
    warnings = tuple(f.message for f in findings if f.level == Level.WARNING)
    return Planned(scene_id, basis, found, legal, wanted, remarks, coverage, warnings)


def _basis(session: Session, scene: Scene, existing: Mapping[str, Variant]) -> str:
    """A hash of everything that a plan depends on."""
    held = [space_basis(session, scene), sorted((v.id, v.state == RETIRED) for v in existing.values())]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def make_variants(session: Session, scene_id: str, planned: Planned | None = None) -> Made:
    """Bring the scene's variants in line with its materials, constraints and cap.

    New combinations become drafts, those that are no longer possible or wanted are retired, the others stay as they
    are. `planned` is what `plan_variants` worked out before, in another transaction, so that nobody had to wait for it.
    Raises what that raises, and ConflictError where the plan is of something that changed meanwhile.
    """
    session.caller.require(Role.EDITOR)
    scene = find(session, Scene, scene_id, lock=True)
    planned = plan_variants(session, scene_id) if planned is None else planned
    existing = _variants(session, scene_id)
    if planned.basis != _basis(session, scene, existing):
        raise ConflictError(f"Scene {scene_id!r}, or what it is made of, changed meanwhile. Make the variants again.")
    space = planned.found.space
    slots = {slot.name: {option.id for option in slot.options} for slot in space.slots}
    created, restored, retired = [id for id in planned.wanted if id not in existing], 0, 0
    _add_variants(session, scene_id, {id: planned.wanted[id] for id in created}, planned.remarks)
    changes: list[tuple[Variant, dict[str, Any]]] = []
    for id, variant in existing.items():
        if id in planned.wanted:
            change: dict[str, Any] = {"remarks": planned.remarks[id]}
            if variant.state == RETIRED:
                change |= {**_as(variant, DRAFT, None), "author": session.caller.user}
                restored += 1
            changes.append((variant, change))
        elif variant.state != RETIRED:
            why = _why_gone(variant.materials, slots, capped=planned.coverage is not None)
            changes.append((variant, _as(variant, RETIRED, why)))
            retired += 1
    change_rows(session, changes)
    return Made(
        planned.legal,
        len(created),
        len(planned.wanted) - len(created) - restored,
        restored,
        retired,
        approve_by_rule(session, scene_id) if planned.found.spec.approve_automatically else 0,
        sum(map(bool, planned.remarks.values())),
        planned.coverage,
        planned.warnings,
    )


def _wanted(
    found: SceneSpace, legal: int, alive: Sequence[Mapping[str, str]]
) -> tuple[dict[str, dict[str, str]], Cover | None]:
    spec, space, coverage = found.spec, found.space, None
    broken = broken_rules(space, spec.baseline) if spec.baseline is not None else ()
    if broken:
        raise InputError(f"baseline: {'; '.join(broken)} rules this combination out. Change one of them.")
    if spec.cap is None or legal <= spec.cap:
        if legal > MAX_VARIANTS:
            raise InputError(
                f"{legal:,} combinations are possible, at most {MAX_VARIANTS:,} can be kept. Give the scene a `cap`."
            )
        batches = explode(space)
    else:
        first = [spec.baseline] if spec.baseline is not None else []
        coverage = cover(space, spec.cap, keep=[*first, *(m for m in alive if m != spec.baseline)])
        batches = iter([coverage.variants])
    return {variant_id(m): m for batch in batches for m in _combinations(space, batch)}, coverage


def _combinations(space: Space, batch: Any) -> Iterator[dict[str, str]]:
    """The combinations in a batch of variants, as slot → material."""
    names = [slot.name for slot in space.slots]
    columns = [batch.column(name).to_pylist() for name in names]
    yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _add_variants(
    session: Session, scene_id: str, wanted: Mapping[str, Mapping[str, str]], remarks: Mapping[str, list[str]]
) -> None:
    add_rows(
        session,
        Variant,
        [
            {
                "scene_id": scene_id,
                "id": id,
                "materials": dict(materials),
                "remarks": remarks[id],
                "state": DRAFT.value,
                "author": session.caller.user,
                "version": 1,
            }
            for id, materials in wanted.items()
        ],
    )
    held = [
        {"scene_id": scene_id, "variant_id": id, "slot": slot, "material_id": material}
        for id, materials in wanted.items()
        for slot, material in materials.items()
    ]
    add_rows(session, VariantMaterial, held)


def _why_gone(materials: Mapping[str, str], slots: Mapping[str, set[str]], *, capped: bool) -> str:
    if set(materials) != set(slots):
        return "the scene has other slots now"
    gone = [m for slot, m in materials.items() if m not in slots[slot]]
    if gone:
        return f"material {gone[0]} is not in use any more"
    return "left out by the cap, or forbidden" if capped else "forbidden by a constraint or a hard check"


def plan_learning(session: Session, scene_id: str, *, cap: int | None = None) -> Traffic:
    """What the scene's traffic can learn about its variants in use, or about `cap` of its combinations.

    Raises InputError where the scene says nothing of its traffic, or has no variants and no cap is given,
    TooComplexError where variants for a cap cannot be worked out in reasonable time.
    """
    found = space_of(session, find(session, Scene, scene_id))
    plan, space = found.spec.traffic, found.space
    if plan is None:
        raise InputError(f"scene {scene_id!r} does not say what traffic it has. Give it `traffic`.")
    if cap is not None:
        combinations: Any = cover(space, cap).variants
    else:
        usable = [v.materials for v in _variants(session, scene_id).values() if v.state in USABLE]
        combinations = [m for m, fits in zip(usable, possible(space, usable), strict=True) if fits]
        if not combinations:
            raise InputError(f"scene {scene_id!r} has no variants. Make them, or plan for a number of them: `cap`.")
    return traffic(
        space,
        combinations,
        exposures_per_day=plan.exposures_per_day,
        click_rate=plan.click_rate,
        random_share=plan.random_share,
        minimum_effect=plan.minimum_effect,
    )


# ── finding them ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class VariantFilter:
    """Which variants of a scene: all of these at once.

    A term is what constraints are made of: `copy:c7` (holds this material in this slot), `image.image_style=flat` (the
    slot's material has the tag), `image_style=flat` (any slot's).
    """

    where: tuple[str, ...] = ()
    states: tuple[ReviewState, ...] = ()
    ids: tuple[str, ...] = ()
    remarked: bool | None = None  # only those a soft check remarks on, or only the others


def find_variants(
    session: Session,
    scene_id: str,
    wanted: VariantFilter | None = None,
    *,
    cursor: str | None = None,
    limit: int = PAGE,
) -> Page[Variant]:
    """A page of the scene's variants that the filter lets through, by id; raises InputError for an unknown term."""
    scene = find(session, Scene, scene_id)
    query = _query(session, scene, wanted or VariantFilter())
    return paginate(session, query, Variant.id, cursor=cursor, limit=limit)


def get_variant(session: Session, scene_id: str, id: str) -> Variant:
    """The variant with this id, or with the only id that begins so; raises NotFoundError."""
    found = session.get(Variant, (session.business, scene_id, id))
    if found is None and len(id) >= 4 and id.isalnum():
        starts = select(Variant).where(Variant.scene_id == scene_id, Variant.id.startswith(id, autoescape=True))
        several = session.scalars(starts.limit(2)).all()
        found = several[0] if len(several) == 1 else None
    if found is None:
        raise NotFoundError(f"There is no variant {id!r} in scene {scene_id!r} of business {session.business!r}.")
    return found


def count_variants(session: Session, scene_id: str) -> dict[str, int]:
    """How many variants of the scene are in each state."""
    query = select(Variant.state, sa.func.count()).where(Variant.scene_id == scene_id).group_by(Variant.state)
    found = dict(session.execute(query).all())
    return {state.value: found[state] for state in ReviewState if state in found}


def _query(session: Session, scene: Scene, wanted: VariantFilter) -> sa.Select[Variant]:
    query = select(Variant).where(Variant.scene_id == scene.id)
    if wanted.states:
        query = query.where(Variant.state.in_(set(wanted.states)))
    if wanted.ids:
        if len(set(wanted.ids)) > MAX_NAMED:
            raise InputError(f"ids: {len(set(wanted.ids)):,} variants are named, at most {MAX_NAMED:,} can be at once.")
        query = query.where(Variant.id.in_(set(wanted.ids)))
    if wanted.remarked is not None:
        empty = sa.cast(Variant.remarks, sa.Text) == "[]"
        query = query.where(~empty if wanted.remarked else empty)
    if wanted.where:
        slots = _held(session, scene)
        terms = {frozenset(pairs) for text in dict.fromkeys(wanted.where) for pairs in _matching(text, slots)}
        named = sum(map(len, terms))
        if len(terms) > MAX_TERMS or named > MAX_NAMED:  # a statement holds no more
            raise InputError(
                f"where: {len(terms):,} terms, which {named:,} materials in slots carry; a filter takes up to"
                f" {MAX_TERMS} terms and {MAX_NAMED:,} materials. Leave terms out, or name slots: slot.dimension=value."
            )
        query = query.where(*(_holds(pairs) for pairs in sorted(terms, key=sorted)))
    return query


def _matching(text: str, slots: Sequence[Slot]) -> list[set[tuple[str, str]]]:
    """Per term of an expression, the (slot, material) pairs of which a variant must hold one."""
    found = []
    for term in parse(f"forbid {text}", slots).terms:
        if isinstance(term, MatchTerm):
            raise InputError(f"{text}: a filter takes terms such as copy:c7 or image.image_style=flat, not `matches`.")
        found.append({(slot.name, o.id) for slot in slots for o in slot.options if _carries(term, slot.name, o)})
    return found


def _carries(term: MaterialTerm | TagTerm, slot: str, option: Option) -> bool:
    """Whether a variant with this option in this slot has what the term asks for."""
    if isinstance(term, MaterialTerm):
        return slot == term.slot and option.id in term.ids
    values = option.tags.get(term.dimension, ())
    return term.slot in (None, slot) and bool(values) and (not term.values or not set(term.values).isdisjoint(values))


def _held(session: Session, scene: Scene) -> tuple[Slot, ...]:
    """The slots and materials that variants of the scene hold, also those it has no longer."""
    pairs = select(VariantMaterial.slot, VariantMaterial.material_id).where(VariantMaterial.scene_id == scene.id)
    found = [(slot, id) for slot, id in session.execute(pairs.distinct())]
    materials = materials_by_id(session, {m for _, m in found})
    options = options_of(session, materials.values())
    slots: dict[str, list[Option]] = {}
    for slot, id in sorted(found):
        slots.setdefault(slot, []).append(options[id])
    return tuple(Slot(name, tuple(options)) for name, options in slots.items())


def _holds(pairs: Collection[tuple[str, str]]) -> sa.ColumnElement[bool]:
    """That a variant holds one of the (slot, material) pairs."""
    by_slot: dict[str, list[str]] = {}
    for slot, id in pairs:
        by_slot.setdefault(slot, []).append(id)
    one = [sa.and_(VariantMaterial.slot == s, VariantMaterial.material_id.in_(ids)) for s, ids in by_slot.items()]
    mine = sa.and_(
        VariantMaterial.business_id == Variant.business_id,
        VariantMaterial.scene_id == Variant.scene_id,
        VariantMaterial.variant_id == Variant.id,
    )
    return sa.exists().where(mine, sa.or_(*one)) if one else sa.false()


def _variants(session: Session, scene_id: str) -> dict[str, Variant]:
    return {v.id: v for v in session.scalars(select(Variant).where(Variant.scene_id == scene_id))}


# ── moving them ─────────────────────────────────────────────────────────────────────────────────────────────────────


def move_variants(
    session: Session, scene_id: str, move: str, wanted: VariantFilter | None = None, *, reason: str | None = None
) -> Moved:
    """Take a step (`MOVES`) with every variant of the scene that the filter lets through.

    Those for which it is impossible stay as they are, and are counted by why: nobody approves what they made or changed
    themselves since the last approval, be it a product value. A note names the live release that still shows what is
    taken out of use. Raises InputError where a needed reason is missing, ForbiddenError where the caller
    lacks the role.
    """
    step = _allowed(session, move, reason)
    scene = find(session, Scene, scene_id, lock=True)
    query = _query(session, scene, wanted or VariantFilter())
    variants = session.scalars(query.order_by(Variant.id).with_for_update().options(defer(Variant.remarks))).all()
    obstacle: Callable[[Variant], str | None] = lambda variant: None  # noqa: E731
    fingerprints: Mapping[str, str] = {}
    if step.to == APPROVED:
        materials = _materials_of(session, variants)
        unapproved = {id for id, m in materials.items() if m.state != APPROVED}
        fingerprints = _fingerprints(session, variants, materials)
        own = shaped_by(session, scene_id, placeholders_shown(variants, materials), session.caller.user)

        def obstacle(variant: Variant) -> str | None:
            if variant.id in own:
                return OWN
            waiting = sorted(unapproved.intersection(variant.materials.values()))
            return f"material {waiting[0]} is not approved" if waiting else None

    skipped: Counter[str] = Counter()
    done, changes = [], []
    for variant in variants:
        why = _obstacle(variant, step, session.caller.user) or obstacle(variant)
        if why:
            skipped[why] += 1
            continue
        shown = {"fingerprint": fingerprints.get(variant.id)}
        changes.append((variant, _taken(session, variant, step, reason) | shown))
        done.append(variant.id)
    change_rows(session, changes)
    notes = _still_shown(session, "variant", done, [scene_id]) if step.to in WITHDRAWN else ()
    return Moved(len(done), dict(skipped.most_common()), notes)


def move_materials(session: Session, move: str, ids: Sequence[str], *, reason: str | None = None) -> Moved:
    """Take a step (`MOVES`) with these materials of the business; all must exist.

    Variants that hold a material which is rejected or retired fall back to draft, and a note names the live release
    that still shows it. Where a material is approved, the scenes that hold it and say `approve_automatically` approve
    what they can.
    """
    step = _allowed(session, move, reason)
    skipped: Counter[str] = Counter()
    done, changes = [], []
    known = {p.name for p in placeholders_of(get_business(session))}
    for id in dict.fromkeys(ids):
        material = find(session, Material, id, lock=True)
        why = _obstacle(material, step, session.caller.user)
        if why is None and step.role == Role.REVIEWER and wrote_material(session, id, session.caller.user):
            why = OWN
        if why is None and step.to in (IN_REVIEW, APPROVED):
            why = _unfillable(material, known)
        if why:
            skipped[why] += 1
            continue
        changes.append((material, _taken(session, material, step, reason)))
        done.append(id)
    change_rows(session, changes)
    notes: tuple[str, ...] = ()
    if step.to in WITHDRAWN:
        for id in done:
            reopen_variants(session, [id], f"material {id} was {step.to.value}")
        notes = _still_shown(session, "material", done, _scenes_holding(session, done))
    if step.to == APPROVED:
        for scene in session.scalars(select(Scene).order_by(Scene.id)):
            spec = spec_of(scene)
            if spec.approve_automatically and any(not set(done).isdisjoint(slot.materials) for slot in spec.slots):
                approve_by_rule(session, scene.id)
    return Moved(len(done), dict(skipped.most_common()), notes)


def approve_by_rule(session: Session, scene_id: str) -> int:
    """Approve the drafts, and those in review, whose materials are all approved and that no soft check remarks on.

    Not what only a person may approve: what was rejected, and what shows values that nobody else looked at
    (`businesses.kept_from_rule`).
    """
    scene = find(session, Scene, scene_id)
    waiting = VariantFilter(states=(DRAFT, IN_REVIEW), remarked=False)
    query = _query(session, scene, waiting).options(defer(Variant.remarks))
    variants = session.scalars(query.order_by(Variant.id).with_for_update()).all()
    materials = _materials_of(session, variants)
    fingerprints = _fingerprints(session, variants, materials)
    kept = kept_from_rule(session, scene_id, placeholders_shown(variants, materials))
    by_rule = {"reviewer": RULE, "reviewed_at": now()}
    changes = [
        (variant, {**_as(variant, APPROVED, None), **by_rule, "fingerprint": fingerprints[variant.id]})
        for variant in variants
        if variant.id not in kept and all(materials[m].state == APPROVED for m in variant.materials.values())
    ]
    change_rows(session, changes)
    return len(changes)


def approval_holds(session: Session, variants: Collection[Variant]) -> set[str]:
    """The ids of the variants that are approved, and whose materials are, and that still show what was approved."""
    materials = _materials_of(session, variants)
    fingerprints = _fingerprints(session, variants, materials)
    return {
        v.id
        for v in variants
        if v.state == APPROVED
        and v.fingerprint == fingerprints[v.id]
        and all(materials[m].state == APPROVED for m in v.materials.values())
    }


def _allowed(session: Session, move: str, reason: str | None) -> Move:
    if move not in MOVES:
        raise InputError(f"{move!r} is no step of the review. The steps are: {', '.join(MOVES)}.")
    step = MOVES[move]
    session.caller.require(step.role)
    if step.needs_reason and not (reason and reason.strip()):
        raise InputError(f"reason: say why, to {move} something.")
    return step


def _obstacle(row: Reviewed, step: Move, user: str) -> str | None:
    if row.state not in step.come_from:
        fitting = " or ".join(state.replace("_", " ") for state in ReviewState if state in step.come_from)
        return f"{row.state.replace('_', ' ')}, not {fitting}"
    if step.role == Role.REVIEWER and person_key(row.author) == person_key(user):
        return OWN
    return None


def _unfillable(material: Material, known: Collection[str]) -> str | None:
    """Why a copy cannot be shown: it was out of use while a placeholder that it holds was removed."""
    content = parse_content(material.content)
    gone = sorted(placeholders_in(content) - set(known)) if isinstance(content, Copy) else []
    return f"holds {{{gone[0]}}}, which is no placeholder any more: change the copy" if gone else None


def _scenes_holding(session: Session, material_ids: Sequence[str]) -> list[str]:
    """The scenes that have, or had, a variant with one of the materials."""
    found: set[str] = set()
    for start in range(0, len(material_ids), 500):
        held = VariantMaterial.material_id.in_(material_ids[start : start + 500])
        found |= set(session.scalars(select(VariantMaterial.scene_id).where(held).distinct()))
    return sorted(found)


def _still_shown(session: Session, what: str, ids: Sequence[str], scene_ids: Sequence[str]) -> tuple[str, ...]:
    """A note for each live release of the scenes that shows some of the materials, or variants, with these ids."""
    notes = []
    for scene_id in scene_ids if ids else ():
        last = select(LedgerEntry).where(LedgerEntry.scene_id == scene_id).order_by(LedgerEntry.seq.desc()).limit(1)
        entry = session.scalar(last)
        for number in (entry.stable, entry.candidate) if entry is not None else ():
            if number is None:
                continue
            content = find(session, Release, scene_id, number).content
            held = content["materials"] if what == "material" else {v["id"] for v in content["variants"]}
            shown = [id for id in ids if id in held]
            if shown:
                more = f" and {len(shown) - NAMED:,} more" if len(shown) > NAMED else ""
                named = f"{what}{'s' if len(shown) > 1 else ''} {', '.join(shown[:NAMED])}{more}"
                notes.append(
                    f"{named} {'is' if len(shown) == 1 else 'are'} in release {number} of scene {scene_id}, which is"
                    " live until another release takes over"
                )
    return tuple(notes)


def _taken(session: Session, row: Reviewed, step: Move, reason: str | None) -> dict[str, Any]:
    """What a step makes of a row's columns."""
    change = _as(row, step.to, reason.strip() if reason else None)
    if step.role == Role.REVIEWER:
        change |= {"reviewer": session.caller.user, "reviewed_at": now()}
    return change


def _as(row: Reviewed, state: ReviewState, reason: str | None) -> dict[str, Any]:
    """What a state makes of a row's columns."""
    change: dict[str, Any] = {"state": state.value, "reason": reason}
    if state != APPROVED:
        change |= {"reviewer": None, "reviewed_at": None}
        if isinstance(row, Variant):
            change["fingerprint"] = None
    return change


def _materials_of(session: Session, variants: Iterable[Variant]) -> dict[str, Material]:
    return materials_by_id(session, {m for v in variants for m in v.materials.values()})


def _placeholders_held(materials: Mapping[str, Material]) -> dict[str, set[str]]:
    """The placeholders in each of the copies that hold some."""
    copies = {id: parse_content(m.content) for id, m in materials.items() if m.kind == MaterialKind.COPY}
    return {id: names for id, c in copies.items() if isinstance(c, Copy) and (names := placeholders_in(c))}


def placeholders_shown(variants: Iterable[Variant], materials: Mapping[str, Material]) -> dict[str, set[str]]:
    """The placeholders in the copies of each variant, by its id."""
    held = _placeholders_held(materials)
    return {v.id: set().union(*(held[m] for m in v.materials.values() if m in held)) for v in variants}


def _fingerprints(session: Session, variants: Collection[Variant], materials: Mapping[str, Material]) -> dict[str, str]:
    """What each variant shows and means now: a hash of the content and the tags of its materials, and, for a copy with
    placeholders, of what fills them."""
    parts: dict[str, list[Any]] = {
        id: [m.content_hash, sorted((t["dimension"], t["value"]) for t in m.tags)] for id, m in materials.items()
    }
    holding = _placeholders_held(materials)
    filled: dict[tuple[str, str], list[Any]] = {}  # by scene and material
    if holding:
        placeholders = sorted(placeholders_of(get_business(session)), key=lambda p: p.name)
        for scene_id in {v.scene_id for v in variants}:
            product = spec_of(find(session, Scene, scene_id)).product
            fills = {p.name: p.fills(product) for p in placeholders}
            for id, names in holding.items():
                filled[scene_id, id] = [[fills[name] for name in sorted(names) if name in fills]]
    return {
        v.id: hashlib.sha256(
            json.dumps(
                [[slot, id, *parts[id], *filled.get((v.scene_id, id), ())] for slot, id in sorted(v.materials.items())]
            ).encode()
        ).hexdigest()
        for v in variants
    }
