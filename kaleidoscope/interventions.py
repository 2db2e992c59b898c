"""Interventions: business rules that pin or block variants for a segment and a time window.

The first half is pure: what a set of rules leaves of a set of variants, for a user at a moment. The second half keeps
the rules. A release takes a copy of them, so a change shows with the next release. docs/releases.md has the order of
precedence in words.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import compress, islice
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from sqlalchemy import Select, or_, select

from kaleidoscope.database import (
    PAGE,
    Page,
    Session,
    check_id,
    check_moment,
    check_version,
    find,
    paginate,
    refuse_existing,
)
from kaleidoscope.errors import ConflictError, InputError
from kaleidoscope.scenes import materials_by_id, options_of
from kaleidoscope.tables import Intervention, Material, Scene, Variant, now
from kaleidoscope.taxonomy import current_taxonomy
from kaleidoscope.vocabulary import InterventionKind, ReviewState, Role

MAX_PRIORITY = 1_000_000
MAX_SEGMENTS = 1_000  # that `find_conflicts` looks at
NEW = "(new)"  # the id, in conflicts, of a rule that has none yet; no stored rule can be called that
MAX_REMEMBERED_IDS = 4_000_000  # variant ids in all the answers that a `Compiled` keeps

PIN, BLOCK = InterventionKind.PIN, InterventionKind.BLOCK

Plain = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
# Equal moments have one form, so that they hash alike in a release.


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("it is beyond the years 1 to 9999 in UTC") from None


Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DescribedVariant(_Model):
    """A variant by what rules can name: its id, its materials and its tags."""

    id: str
    materials: dict[str, str]  # slot → material id
    tags: dict[str, tuple[str, ...]]  # dimension → values


class Target(_Model):
    """What a rule is about: one variant, every variant with a material, or every variant with a tag."""

    variant: Plain | None = None
    material: Plain | None = None
    tag: Annotated[dict[Plain, Plain], Field(min_length=1, max_length=1)] | None = None  # dimension → value

    @model_validator(mode="after")
    def _is_one_thing(self) -> Target:
        if sum(part is not None for part in (self.variant, self.material, self.tag)) != 1:
            raise ValueError("name exactly one of variant, material and tag")
        return self

    @property
    def dimension_and_value(self) -> tuple[str, str] | None:
        """The tag."""
        return next(iter(self.tag.items())) if self.tag else None

    def __str__(self) -> str:
        """In words."""
        if self.dimension_and_value:
            return f"tag {'='.join(self.dimension_and_value)}"
        return f"variant {self.variant}" if self.variant is not None else f"material {self.material}"


class InterventionSpec(_Model):
    """What a rule does, to what, for whom, when, and how it ranks against others."""

    kind: InterventionKind
    target: Target
    segment: Annotated[dict[Plain, Plain], Field(max_length=20)] = {}  # user feature → value; empty: everybody
    starts_at: Moment | None = None  # None: since ever
    ends_at: Moment | None = None  # the first moment at which it no longer holds; None: for good
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    note: Annotated[str, StringConstraints(max_length=2_000, pattern=r"^[^\x00]*$")] = ""

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> InterventionSpec:
        if self.starts_at is not None and self.ends_at is not None and self.ends_at <= self.starts_at:
            raise ValueError("ends_at is not after starts_at; the window [starts_at, ends_at) would be empty")
        return self

    def in_force(self, at: datetime) -> bool:
        """Whether the moment is in the window."""
        return (self.starts_at is None or self.starts_at <= at) and (self.ends_at is None or at < self.ends_at)


class Rule(InterventionSpec):
    """A stored rule, as a release holds it."""

    id: str
    created_at: Moment

    def __str__(self) -> str:
        """In words."""
        return f"{self.kind} {self.id!r} ({self.target}, for {segment_text(self.segment)}, priority {self.priority})"


def segment_text(segment: Mapping[str, str]) -> str:
    """A segment in words."""
    return ", ".join(f"{feature}={value}" for feature, value in sorted(segment.items())) or "everybody"


# ── resolving ───────────────────────────────────────────────────────────────────────────────────────────────────────


def precedence(rule: Rule) -> tuple[int, bool, int, float, str]:
    """The sort key that puts the rule that wins first.

    Higher priority; then blocks before pins; then the segment of more features; then created later; then the id.
    """
    return -rule.priority, rule.kind == PIN, -len(rule.segment), -rule.created_at.timestamp(), rule.id


@dataclass(frozen=True)
class Applied:
    """What became of a rule that is in force for a user."""

    rule: str
    kind: InterventionKind
    outcome: Literal["applied", "overruled", "ignored"]  # a block that a pin outranks; a pin that leaves nothing
    variants: int  # that it names
    reason: str = ""


@dataclass(frozen=True)
class Resolution:
    """What the rules leave."""

    pinned: frozenset[str] | None  # what the pins that hold have in common; None: no pin holds
    blocked: frozenset[str]  # what blocks take away; never eligible
    eligible: tuple[str, ...]  # in the order in which the variants were given
    unpinned: tuple[str, ...]  # what blocks alone leave: bucket random draws from these
    applied: tuple[Applied, ...]  # the rules in force, the one that wins first
    reason: str | None  # why nothing is eligible


def resolve(
    interventions: Iterable[Rule], variants: Sequence[DescribedVariant], user: Mapping[str, str], at: datetime
) -> Resolution:
    """What the rules leave of the variants for a user (feature → value) at a moment; `Compiled` for many users.

    >>> monday = datetime(2026, 1, 5, tzinfo=UTC)
    >>> rule = Rule(id="no-gold", kind="block", target={"tag": {"subject": "gold"}}, created_at=monday)
    >>> gold = DescribedVariant(id="v1", materials={"image": "i3"}, tags={"subject": ("gold",)})
    >>> plain = DescribedVariant(id="v2", materials={"image": "i1"}, tags={})
    >>> resolve([rule], [gold, plain], {"age": "young"}, monday).eligible
    ('v2',)
    """
    return Compiled(interventions, variants).resolve(user, at)


class Compiled:
    """Rules over variants, made ready once a release: a request costs a look at each rule of a segment in force.

    Sets of variants and of rules are the bits of integers. Answers depend on the rules in force alone, and are kept.
    """

    def __init__(self, interventions: Iterable[Rule], variants: Sequence[DescribedVariant]) -> None:
        self.rules = sorted(interventions, key=precedence)
        self.ids = [variant.id for variant in variants]
        self.everything = (1 << len(self.ids)) - 1
        self.named = _named(self.rules, variants)  # per rule: the variants it names
        moments = {m for rule in self.rules for m in (rule.starts_at, rule.ends_at) if m is not None}
        self._moments = sorted(moments)
        # Between two moments at which a window opens or closes, the rules in force are the same.
        self._epochs = [self._in_force(at) for at in (None, *self._moments)]
        self._answers: dict[int, Resolution] = {}
        self._keep = max(16, MAX_REMEMBERED_IDS // max(1, len(self.ids)))

    def resolve(self, user: Mapping[str, str], at: datetime) -> Resolution:
        """What is left for a user (feature → value) at a moment; raises InputError for a time without a zone."""
        if at.tzinfo is None:
            raise InputError(f"at: {at.isoformat()} has no time zone. Add one, such as +00:00.")
        active, candidates = self._epochs[bisect_right(self._moments, at)]
        for bit, segment in candidates:
            for feature, value in segment:
                if user.get(feature) != value:
                    break
            else:
                active |= bit
        answer = self._answers.get(active)
        if answer is None:
            if len(self._answers) >= self._keep:
                self._answers.clear()
            answer = self._answers[active] = self._answer(active)
        return answer

    def _in_force(self, at: datetime | None) -> tuple[int, list[tuple[int, list[tuple[str, str]]]]]:
        """The rules for everybody (as bits), and those for a segment, from a moment on; None: before the first."""
        everybody, segments = 0, []
        for position, rule in enumerate(self.rules):
            if rule.starts_at is None if at is None else rule.in_force(at):
                if rule.segment:
                    segments.append((1 << position, list(rule.segment.items())))
                else:
                    everybody |= 1 << position
        return everybody, segments

    def _answer(self, active: int) -> Resolution:
        left = unpinned = self.everything
        pins: list[str] = []
        blocks, effects = 0, []
        for position, (rule, named) in enumerate(zip(self.rules, self.named, strict=True)):
            if not active >> position & 1:
                continue
            outcome: Literal["applied", "overruled", "ignored"] = "applied"
            reason = "" if named else "none of the variants is what it names"
            if rule.kind == BLOCK:
                blocks |= named
                unpinned &= ~named
                if not pins:
                    left &= ~named
                elif left & named:
                    outcome = "overruled"
                    reason = f"{_pins(pins)} outranks it for {(left & named).bit_count()} of its variants"
            elif left & named:
                left &= named
                pins.append(rule.id)
            else:
                outcome = "ignored"
                if named and pins and named & ~blocks:
                    reason = f"{_pins(pins)} outranks it, and no variant is in both"
                elif named:
                    reason = "every variant it pins is blocked"
            effects.append(Applied(rule.id, rule.kind, outcome, named.bit_count(), reason))
        return Resolution(
            pinned=frozenset(self._ids(left)) if pins else None,
            blocked=frozenset(self._ids(blocks & ~left)),
            eligible=self._ids(left),
            unpinned=self._ids(unpinned),
            applied=tuple(effects),
            reason=None if left else self._why_nothing(effects),
        )

    def _ids(self, which: int) -> tuple[str, ...]:
        bits = reversed(f"{which:0{len(self.ids)}b}")
        return tuple(compress(self.ids, (bit == "1" for bit in bits)))

    def _why_nothing(self, effects: Sequence[Applied]) -> str:
        if not self.ids:
            return "there are no variants"
        blocks = ", ".join(repr(e.rule) for e in effects if e.kind == BLOCK and e.outcome == "applied" and e.variants)
        return f"every variant is blocked, by {blocks}"


def _pins(ids: Sequence[str]) -> str:
    return f"pin {' and '.join(map(repr, ids))}"


def _named(rules: Sequence[Rule], variants: Sequence[DescribedVariant]) -> list[int]:
    """The variants that each rule names, as bits; one pass over the variants for all rules."""
    by_id: dict[str, bytearray] = {}
    by_material: dict[str, bytearray] = {}
    by_tag: dict[tuple[str, str], bytearray] = {}
    size = len(variants) // 8 + 1
    sets = []
    for rule in rules:
        target = rule.target
        if target.variant is not None:
            sets.append(by_id.setdefault(target.variant, bytearray(size)))
        elif target.material is not None:
            sets.append(by_material.setdefault(target.material, bytearray(size)))
        else:
            sets.append(by_tag.setdefault(target.dimension_and_value or ("", ""), bytearray(size)))
    for position, variant in enumerate(variants):
        hits = [by_id[variant.id]] if variant.id in by_id else []
        if by_material:
            hits += [by_material[m] for m in variant.materials.values() if m in by_material]
        if by_tag:
            hits += [by_tag[d, v] for d, values in variant.tags.items() for v in values if (d, v) in by_tag]
        for bits in hits:
            bits[position >> 3] |= 1 << (position & 7)
    return [int.from_bytes(bits, "little") for bits in sets]


# ── conflicts ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Conflict:
    """Something to know before a rule is saved; nothing of it forbids saving."""

    code: Literal["pin_against_block", "disjoint_pins", "touches_nothing", "nothing_left", "not_all_checked"]
    message: str
    rules: tuple[str, ...]  # ids, the rule in question first
    winner: str | None  # id of the rule that holds where they contradict each other
    variants: int  # that the winner keeps from the loser, or that the rule names
    segment: Mapping[str, str]  # of the users it is about


def find_conflicts(
    rule: Rule, others: Sequence[Rule], variants: Sequence[DescribedVariant], at: datetime
) -> list[Conflict]:
    """What the rule would contradict, from now (`at`) on, among rules and variants that there are."""
    compiled = Compiled([rule, *others], variants)
    named = {r.id: bits for r, bits in zip(compiled.rules, compiled.named, strict=True)}
    mine = named[rule.id]
    if not mine:
        message = f"This rule touches no variant: {rule.target} names none of the {len(variants)} approved ones."
        return [Conflict("touches_nothing", message, (rule.id,), None, 0, rule.segment)]
    others = [
        other for other in others if _overlap(rule, other, at) and _merged(rule.segment, other.segment) is not None
    ]
    found = []
    for other in sorted(others, key=precedence):
        winner, loser = sorted((rule, other), key=precedence)
        shared = mine & named[other.id]
        where = _merged(rule.segment, other.segment) or {}
        if rule.kind != other.kind and shared:
            n = shared.bit_count()
            message = f"{rule} and {other} disagree on {_count(n)}: {winner.kind} {winner.id!r} wins."
            found.append(Conflict("pin_against_block", message, (rule.id, other.id), winner.id, n, where))
        elif rule.kind == other.kind == PIN and named[other.id] and not shared:
            n = named[loser.id].bit_count()
            message = (
                f"{rule} and {other} pin different variants: {winner.id!r} wins, and {loser.id!r} with its {_count(n)}"
                " is ignored."
            )
            found.append(Conflict("disjoint_pins", message, (rule.id, other.id), winner.id, n, where))
    if rule.kind == BLOCK:
        found += _nothing_left(rule, others, variants, at, mine.bit_count())
    return found


def _nothing_left(
    rule: Rule, others: Sequence[Rule], variants: Sequence[DescribedVariant], at: datetime, n: int
) -> list[Conflict]:
    """The broadest segments for which the rule takes away the last variant, at any moment of its window."""
    segments = {frozenset(rule.segment.items()): dict(rule.segment)}
    for other in others:
        merged = [_merged(segment, other.segment) for segment in islice(segments.values(), MAX_SEGMENTS)]
        segments |= {frozenset(segment.items()): segment for segment in merged if segment is not None}
    begin = max(rule.starts_at or at, at)
    opening = {other.starts_at or begin for other in others} | {other.ends_at or begin for other in others}
    moments = sorted({begin} | {moment for moment in opening if moment > begin and rule.in_force(moment)})
    after, before = Compiled([rule, *others], variants), Compiled(others, variants)
    found: list[Conflict] = []
    for segment in sorted(islice(segments.values(), MAX_SEGMENTS), key=len):
        if any(conflict.segment.items() <= segment.items() for conflict in found):
            continue
        for moment in moments:
            then, otherwise = after.resolve(segment, moment), before.resolve(segment, moment)
            if not then.unpinned and otherwise.unpinned:
                blocks = tuple(e.rule for e in then.applied if e.kind == BLOCK and e.rule != rule.id)
                where = "" if not then.eligible else " in bucket random, where pins do not count"
                message = f"With this rule nothing is left to show for {segment_text(segment)}{where}."
                found.append(Conflict("nothing_left", message, (rule.id, *blocks), rule.id, n, segment))
                break
    if len(segments) > MAX_SEGMENTS:
        message = f"Only {MAX_SEGMENTS} of the segments were checked for whether something is left to show."
        found.append(Conflict("not_all_checked", message, (rule.id,), None, n, rule.segment))
    return found


def _count(n: int) -> str:
    return f"{n} variant{'' if n == 1 else 's'}"


def _overlap(a: Rule, b: Rule, at: datetime) -> bool:
    begin = max(a.starts_at or at, b.starts_at or at, at)
    return a.in_force(begin) and b.in_force(begin)


def _merged(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str] | None:
    """The users who are in both segments; None: there cannot be any."""
    return None if any(a.get(feature, value) != value for feature, value in b.items()) else {**a, **b}


# ── services ────────────────────────────────────────────────────────────────────────────────────────────────────────


def add_intervention(session: Session, scene_id: str, intervention_id: str, spec: InterventionSpec) -> Intervention:
    """A new rule of the scene. Raises InputError where its target does not exist or its window is over."""
    session.caller.require(Role.EDITOR)
    find(session, Scene, scene_id)
    check_id("intervention", intervention_id)
    refuse_existing(session, Intervention, scene_id, intervention_id)
    if spec.ends_at is not None and spec.ends_at <= now():
        raise InputError(f"ends_at: {spec.ends_at.isoformat()} is over. Give a later moment.")
    _check_target(session, scene_id, spec.target)
    rule = Intervention(
        business_id=session.business,
        scene_id=scene_id,
        id=intervention_id,
        author=session.caller.user,
        **_columns(spec),
    )
    session.add(rule)
    session.flush()
    return rule


def change_intervention(
    session: Session, scene_id: str, intervention_id: str, spec: InterventionSpec, *, version: int | None
) -> Intervention:
    """Replace what a rule does. Raises ConflictError where it has ended, or `version` is not the current one."""
    session.caller.require(Role.EDITOR)
    rule = find(session, Intervention, scene_id, intervention_id, lock=True)
    yours, current = spec.model_dump(mode="json"), spec_of(rule).model_dump(mode="json")
    check_version(rule, version, yours, current)
    if rule.ended:
        raise ConflictError(f"Intervention {intervention_id!r} has ended and cannot be changed. Add another one.")
    if yours != current:
        if spec.target != Target.model_validate(rule.target):
            _check_target(session, scene_id, spec.target)
        for column, value in _columns(spec).items():
            setattr(rule, column, value)
        session.flush()
    return rule


def end_intervention(session: Session, scene_id: str, intervention_id: str) -> Intervention:
    """Take a rule out of all later releases, for good; ending it twice changes nothing."""
    session.caller.require(Role.EDITOR)
    rule = find(session, Intervention, scene_id, intervention_id, lock=True)
    if not rule.ended:
        rule.ended = True
        session.flush()
    return rule


def get_intervention(session: Session, scene_id: str, intervention_id: str) -> Intervention:
    """The rule; raises NotFoundError."""
    return find(session, Intervention, scene_id, intervention_id)


def list_interventions(
    session: Session, scene_id: str, *, active_at: datetime | None = None, cursor: str | None = None, limit: int = PAGE
) -> Page[Intervention]:
    """The scene's rules by id, the ended ones too; with `active_at` those in force at that moment."""
    find(session, Scene, scene_id)
    query: Select[Any] = select(Intervention).where(Intervention.scene_id == scene_id)
    if active_at is not None:
        active_at = check_moment("active_at", active_at)
        query = query.where(
            Intervention.ended.is_(False),
            or_(Intervention.starts_at.is_(None), Intervention.starts_at <= active_at),
            or_(Intervention.ends_at.is_(None), Intervention.ends_at > active_at),
        )
    return paginate(session, query, Intervention.id, cursor=cursor, limit=limit)


def conflicts(session: Session, scene_id: str, spec: InterventionSpec, ignoring: str | None = None) -> list[Conflict]:
    """What a rule would contradict if it were saved, among the rules from now on and the approved variants.

    `ignoring` is the id of the rule that it would replace; a new rule is called `(new)`.
    """
    find(session, Scene, scene_id)
    made = now() if ignoring is None else find(session, Intervention, scene_id, ignoring).created_at
    rule = Rule(id=ignoring or NEW, created_at=made, **spec.model_dump())
    others = [other for other in upcoming_rules(session, scene_id) if other.id != ignoring]
    approved = select(Variant).where(Variant.scene_id == scene_id, Variant.state == ReviewState.APPROVED)
    variants = session.scalars(approved.order_by(Variant.id)).all()
    return find_conflicts(rule, others, describe_variants(session, variants), now())


def upcoming_rules(session: Session, scene_id: str) -> list[Rule]:
    """The scene's rules that are in force or will be, by id: what a release takes."""
    query = select(Intervention).where(
        Intervention.scene_id == scene_id,
        Intervention.ended.is_(False),
        or_(Intervention.ends_at.is_(None), Intervention.ends_at > now()),
    )
    return [rule_of(row) for row in session.scalars(query.order_by(Intervention.id))]


def spec_of(row: Intervention) -> InterventionSpec:
    """A stored rule's spec."""
    return InterventionSpec.model_validate({name: getattr(row, name) for name in InterventionSpec.model_fields})


def rule_of(row: Intervention) -> Rule:
    """A stored rule, as a release holds it."""
    return Rule(id=row.id, created_at=row.created_at, **spec_of(row).model_dump())


def describe_variants(session: Session, variants: Iterable[Variant]) -> list[DescribedVariant]:
    """Variants by what rules can name; tags are the union of their materials', under the current taxonomy."""
    variants = list(variants)
    materials = materials_by_id(session, {m for v in variants for m in v.materials.values()})
    options = options_of(session, materials.values())
    described = []
    for variant in variants:
        tags: dict[str, set[str]] = {}
        for material in variant.materials.values():
            for dimension, values in options[material].tags.items():
                tags.setdefault(dimension, set()).update(values)
        united = {dimension: tuple(sorted(values)) for dimension, values in sorted(tags.items())}
        described.append(DescribedVariant(id=variant.id, materials=dict(variant.materials), tags=united))
    return described


def _columns(spec: InterventionSpec) -> dict[str, Any]:
    return {
        **spec.model_dump(exclude={"target"}),
        "kind": spec.kind.value,
        "target": spec.target.model_dump(exclude_none=True),
    }


def _check_target(session: Session, scene_id: str, target: Target) -> None:
    if target.variant is not None and session.get(Variant, (session.business, scene_id, target.variant)) is None:
        raise InputError(f"target: there is no variant {target.variant!r} in scene {scene_id!r}. Make it first.")
    if target.material is not None and session.get(Material, (session.business, target.material)) is None:
        raise InputError(f"target: there is no material {target.material!r}. Add it first.")
    if target.dimension_and_value is not None:
        current_taxonomy(session)[1].check_tags([target.dimension_and_value])
