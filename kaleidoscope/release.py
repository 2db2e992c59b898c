"""Releases: immutable snapshots of what a scene shows, and the ledger of which of them is live.

A release is drafted from what is approved, started as a canary, advanced stage by stage while its guardrails hold, and
rolled back in one transaction. Every transition appends one ledger entry with the complete state after it; nothing
else says what is live. docs/releases.md shows it to operators.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.orm import defer

from kaleidoscope.access import person_key
from kaleidoscope.businesses import get_business, placeholders_of, withdrawn_since_draft
from kaleidoscope.content import Placeholder
from kaleidoscope.database import PAGE, Page, Session, check_moment, find, paginate
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, JobError, NotFoundError
from kaleidoscope.interventions import DescribedVariant, Moment, Rule, describe_variants, segment_text, upcoming_rules
from kaleidoscope.review import approval_holds, placeholders_shown
from kaleidoscope.scenes import AttributionSpec, materials_by_id, possible, space_basis, space_of, spec_of
from kaleidoscope.tables import LedgerEntry, Material, Release, Scene, Variant, now
from kaleidoscope.taxonomy import current_taxonomy
from kaleidoscope.vocabulary import Bucket, MaterialKind, ReleaseState, ReviewState, Role

STAGES = (0.01, 0.05, 0.2, 0.5, 1.0)
SUM_TOLERANCE = 1e-9
MIN_EPSILON = 0.01
HEALTH_MAX_AGE = timedelta(minutes=15)
CLOCK_TOLERANCE = timedelta(minutes=1)  # between the machine that measured and this one

Text = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
Metric = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# ── what a release says ─────────────────────────────────────────────────────────────────────────────────────────────


class Shares(_Model):
    """The share of traffic of each bucket; they sum to 1."""

    control: Share = 0.0
    random: Share = 0.0
    model: Share = 0.0
    challenger: Share = 0.0

    @model_validator(mode="after")
    def _sum_to_one(self) -> Shares:
        total = math.fsum(getattr(self, bucket) for bucket in Bucket)
        if abs(total - 1) > SUM_TOLERANCE:
            raise ValueError(f"the shares of the buckets sum to {total:.12g}, not to 1")
        return self


class PolicyKind(StrEnum):
    """How a bucket that learns picks a variant."""

    UNIFORM = "uniform"
    EPSILON_GREEDY = "epsilon_greedy"
    THOMPSON = "thompson"


class PolicySpec(_Model):
    """A policy, and the share of its picks that are uniform, so that every exposure has a propensity above 0."""

    kind: PolicyKind = PolicyKind.EPSILON_GREEDY
    epsilon: Annotated[float, Field(ge=MIN_EPSILON, le=1, allow_inf_nan=False)] = 0.1


class Challenger(_Model):
    """What bucket challenger shows."""

    model_version: Text
    policy: PolicySpec = PolicySpec()


class Guardrail(_Model):
    """Bounds that a metric of the candidate has to keep, measured over the last `window_s` seconds."""

    metric: Metric
    min: Number | None = None
    max: Number | None = None
    window_s: Annotated[int, Field(ge=1, le=30 * 86_400)] = 3600

    @model_validator(mode="after")
    def _bounds_something(self) -> Guardrail:
        if self.min is None and self.max is None:
            raise ValueError(f"guardrail {self.metric!r} has no bound; give min, max, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"guardrail {self.metric!r} can never hold: its min is above its max")
        return self

    def holds(self, value: float) -> bool:
        """Whether the value keeps the bounds; not a number keeps none."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        """In words."""
        bounds = [f"at least {self.min:g}"] if self.min is not None else []
        bounds += [f"at most {self.max:g}"] if self.max is not None else []
        return f"{' and '.join(bounds)} over {self.window_s} s"


class Frequency(_Model):
    """How often a unit may see a variant before it rests: `max_exposures` in the last `window_s` seconds."""

    max_exposures: Annotated[int, Field(ge=1, le=10_000)]
    window_s: Annotated[int, Field(ge=1, le=90 * 86_400)] = 86_400

    def __str__(self) -> str:
        """In words."""
        return f"rests after {self.max_exposures} exposures in {self.window_s} s"


class ReleasePlan(_Model):
    """What whoever drafts a release decides; everything else is taken from the scene."""

    shares: Shares
    without_random: Text | None = None  # why nothing goes to bucket random, where nothing does
    policy: PolicySpec = PolicySpec()  # of bucket model
    model_version: Text | None = None
    best_single: Text | None = None  # the variant for users whom no model can rank for
    challenger: Challenger | None = None
    frequency: Frequency | None = None  # of buckets model and challenger; None: a variant never rests
    guardrails: Annotated[tuple[Guardrail, ...], Field(max_length=50)] = ()
    stages: Annotated[tuple[Share, ...], Field(min_length=1, max_length=50)] = STAGES

    @model_validator(mode="after")
    def _buckets_have_what_they_show(self) -> ReleasePlan:
        if self.shares.random == 0 and self.without_random is None:
            raise ValueError(
                "bucket random gets no traffic, and without it nothing can be learned or compared; give it a share, or"
                " say why not in without_random"
            )
        if self.model_version is None and self.shares.model > 0:
            raise ValueError("bucket model gets traffic but there is no model_version; name one, or give it share 0")
        if (self.challenger is None) != (self.shares.challenger == 0):
            raise ValueError("give challenger exactly if bucket challenger gets traffic")
        return self

    @model_validator(mode="after")
    def _guardrails_are_distinct(self) -> ReleasePlan:
        metrics = [guardrail.metric for guardrail in self.guardrails]
        if len(set(metrics)) < len(metrics):
            raise ValueError("a metric has two guardrails; give it one, with min and max")
        return self

    @model_validator(mode="after")
    def _stages_rise_to_all(self) -> ReleasePlan:
        rising = all(a < b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if not (self.stages[0] > 0 and rising and self.stages[-1] == 1):
            raise ValueError("stages are shares of the traffic that rise, from above 0 to exactly 1")
        return self


class SlotSnapshot(_Model):
    """A slot of the scene."""

    name: str
    kind: MaterialKind


class SceneSnapshot(_Model):
    """What a release keeps of its scene."""

    id: str
    name: str
    product: dict[str, str | int | float]
    slots: tuple[SlotSnapshot, ...]
    context: tuple[str, ...] = ()  # attributes of a request that are not the user's
    attribution: AttributionSpec = AttributionSpec()
    fatigue_hours: float | None = None


class MaterialSnapshot(_Model):
    """What a release keeps of a material."""

    kind: MaterialKind
    content: dict[str, Any]  # content.Content
    content_hash: str


class ReleaseContent(ReleasePlan):
    """Everything that decides what a scene shows. Two contents that say the same have the same hash."""

    scene: SceneSnapshot
    taxonomy: int  # number of the version that the variants' tags are from
    variants: tuple[DescribedVariant, ...]  # by id
    materials: dict[str, MaterialSnapshot]
    baseline: str  # id of the variant that bucket control shows
    interventions: tuple[Rule, ...]  # by id
    placeholders: tuple[Placeholder, ...] = ()  # what copies may hold in braces, with their fallbacks


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one text of a JSON document, whatever machine wrote it and in whatever order its keys stand."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def verify(release: Release) -> ReleaseContent:
    """The release's content; raises JobError where it is not what was drafted."""
    if hashlib.sha256(canonical(release.content)).hexdigest() != release.content_hash:
        raise JobError(
            f"Release {release.number} of scene {release.scene_id!r} was changed in the database after it was drafted:"
            " its content does not have its hash. Do not show it; roll back to another, or restore a backup."
        )
    return ReleaseContent.model_validate(release.content)


# ── drafting ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Checked:
    """Which of a scene's approved variants are possible as the scene is, worked out from what the database held."""

    basis: list[Any]  # what it was worked out from
    possible: Mapping[str, bool]  # by id


def check_variants(session: Session, scene_id: str) -> Checked:
    """What `draft_release` has to know of the scene's variants; the costly part of it, which changes nothing.

    Raises TooComplexError where hard checks cannot be worked out in reasonable time.
    """
    session.caller.require(Role.EDITOR, Role.PUBLISHER)
    scene = find(session, Scene, scene_id)
    approved = Variant.scene_id == scene_id, Variant.state == ReviewState.APPROVED
    combinations: dict[str, dict[str, Any]] = dict(
        session.execute(select(Variant.id, Variant.materials).where(*approved)).all()
    )
    space = space_of(session, scene, remarks=False).space
    fits = possible(space, list(combinations.values()))
    return Checked(space_basis(session, scene), dict(zip(combinations, fits, strict=True)))


def draft_release(
    session: Session, scene_id: str, plan: ReleasePlan, note: str = "", checked: Checked | None = None
) -> Release:
    """A new release of the scene's variants that are approved, with what they hold and the rules from now on.

    `checked` is what `check_variants` worked out before, in another transaction, so that nobody had to wait for it.
    Raises ConflictError where nothing is approved, or the baseline is not; it counts what is missing.
    """
    session.caller.require(Role.EDITOR, Role.PUBLISHER)
    if "\0" in note:
        raise InputError("note: holds the character NUL. Take it out.")
    scene = find(session, Scene, scene_id, lock=True)
    spec = spec_of(scene)
    rows = session.scalars(select(Variant).where(Variant.scene_id == scene_id).order_by(Variant.id)).all()
    holding = approval_holds(session, [row for row in rows if row.state == ReviewState.APPROVED])
    approved = [row for row in rows if row.id in holding]
    if not approved:
        raise ConflictError(f"Scene {scene_id!r} has no variant to release. {_missing(rows, holding)}")
    if spec.baseline is None:
        raise ConflictError(f"Scene {scene_id!r} has no baseline. Say in the scene which combination control shows.")
    baseline = next((row.id for row in approved if row.materials == spec.baseline), None)
    if baseline is None:
        named = ", ".join(f"{slot}={material}" for slot, material in sorted(spec.baseline.items()))
        raise ConflictError(
            f"The baseline of scene {scene_id!r} ({named}) is not among its {len(approved)} approved variants."
            f" {_missing(rows, holding)} Or choose another baseline."
        )
    if plan.best_single is not None and plan.best_single not in holding:
        raise ConflictError(
            f"best_single: {plan.best_single!r} is not among the {len(approved)} approved variants of scene"
            f" {scene_id!r}. Name one of them, or leave it out."
        )
    checked = check_variants(session, scene_id) if checked is None else checked
    if checked.basis != space_basis(session, scene) or not holding <= checked.possible.keys():
        raise ConflictError(f"Scene {scene_id!r}, or what it is made of, changed meanwhile. Draft the release again.")
    allowed = [checked.possible[row.id] for row in approved]
    if not all(allowed):
        raise ConflictError(
            f"{allowed.count(False)} of the {len(approved)} approved variants of scene {scene_id!r} are not possible as"
            " the scene is now: its slots, constraints or checks have changed. Make the variants again."
        )
    rules = upcoming_rules(session, scene_id)
    taxonomy_number, taxonomy = current_taxonomy(session)
    there = set(taxonomy.tags)
    for rule in rules:
        tag = rule.target.dimension_and_value
        if tag is not None and tag not in there:
            raise ConflictError(
                f"Intervention {rule.id!r} is about tag {'='.join(tag)}, which the taxonomy has no longer: it would do"
                " nothing. Change what it is about, or end it."
            )
    materials = materials_by_id(session, {m for row in approved for m in row.materials.values()})
    content = ReleaseContent(
        **plan.model_dump(),
        scene=SceneSnapshot(
            id=scene.id,
            name=spec.name,
            product=spec.product,
            slots=tuple(SlotSnapshot(name=slot.name, kind=slot.kind) for slot in spec.slots),
            context=spec.context,
            attribution=spec.attribution,
            fatigue_hours=spec.fatigue_hours,
        ),
        taxonomy=taxonomy_number,
        variants=tuple(describe_variants(session, approved)),
        materials={
            id: MaterialSnapshot(kind=MaterialKind(m.kind), content=m.content, content_hash=m.content_hash)
            for id, m in materials.items()
        },
        baseline=baseline,
        interventions=tuple(rules),
        placeholders=placeholders_of(get_business(session)),
    )
    document = content.model_dump(mode="json")
    last = session.scalar(select(func.max(Release.number)).where(Release.scene_id == scene_id))
    release = Release(
        business_id=session.business,
        scene_id=scene_id,
        number=(last or 0) + 1,
        content=document,
        content_hash=hashlib.sha256(canonical(document)).hexdigest(),
        author=session.caller.user,
        note=note,
    )
    session.add(release)
    session.flush()
    return release


def _missing(rows: Sequence[Variant], holding: set[str]) -> str:
    waiting = sum(row.state in (ReviewState.DRAFT, ReviewState.IN_REVIEW) for row in rows)
    lapsed = sum(row.state == ReviewState.APPROVED and row.id not in holding for row in rows)
    if not waiting and not lapsed:
        return "None is waiting for review: make variants from the scene first, then have them approved."
    parts = [f"{waiting} of {len(rows)} variants are not approved: submit them, and have them approved."] * (
        waiting > 0
    )
    if lapsed:
        parts.append(
            f"{lapsed} of {len(rows)} were approved, but their materials, or what fills their placeholders,"
            " have changed, or are no longer approved: approve the materials, then the variants again."
        )
    return " ".join(parts)


# ── health ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class HealthCheck(_Model):
    """A metric of the candidate as it was measured; value None: nobody knows."""

    metric: Metric
    value: Number | None
    bound: Number | None = None
    ok: bool


class Health(_Model):
    """How the candidate is doing."""

    ok: bool
    checks: Annotated[tuple[HealthCheck, ...], Field(max_length=200)] = ()
    observed_at: Moment

    @classmethod
    def judge(cls, guardrails: Iterable[Guardrail], measured: Mapping[str, float | None], at: datetime) -> Health:
        """The health that measured values (by metric) amount to; a value that is missing or no number is not ok."""
        checks = []
        for rail in guardrails:
            value = measured.get(rail.metric)
            value = None if value is None or not math.isfinite(value) else value
            too_low = rail.min is not None and value is not None and value < rail.min
            bound = rail.min if rail.max is None or too_low else rail.max
            ok = value is not None and rail.holds(value)
            checks.append(HealthCheck(metric=rail.metric, value=value, bound=bound, ok=ok))
        return cls(ok=all(check.ok for check in checks), checks=tuple(checks), observed_at=at)


def failures(guardrails: Iterable[Guardrail], health: Health) -> list[str]:
    """What is wrong, or not known, in words; nothing: the candidate is healthy.

    A guardrail that nobody measured has failed, and so has one whose value breaks its bounds whatever `ok` says.
    """
    rails = {rail.metric: rail for rail in guardrails}
    failed = []
    for check in health.checks:
        rail = rails.get(check.metric)
        if check.value is None:
            failed.append(f"{check.metric}: unknown")
        elif not check.ok or (rail is not None and not rail.holds(check.value)):
            bound = f", has to be {rail}" if rail else f", bound {check.bound:g}" if check.bound is not None else ""
            failed.append(f"{check.metric}: {check.value:g}{bound}")
    measured = {check.metric for check in health.checks}
    failed += [f"{metric}: not measured" for metric in rails if metric not in measured]
    if not failed and not health.ok:
        failed.append("the health report says that it is not ok")
    return failed


# ── the ledger ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Action(StrEnum):
    """What a ledger entry did."""

    START = "start"
    ADVANCE = "advance"
    PAUSE = "pause"
    RESUME = "resume"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True)
class Live:
    """What is live in a scene after a ledger entry.

    `candidate` serves `share` of the traffic and `stable` the rest; where there is no stable release, the rest gets
    the caller's own default.
    """

    scene: str
    seq: int
    at: datetime
    actor: str
    action: Action
    release: int  # the one that the entry moved
    stable: int | None
    candidate: int | None
    share: float
    paused: bool
    stage: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the details of an error."""
        return {**asdict(self), "at": self.at.isoformat()}

    def __str__(self) -> str:
        """In words."""
        parts = [f"release {self.stable} is stable" if self.stable is not None else "no release is stable"]
        if self.candidate is not None:
            paused = ", paused" if self.paused else ""
            parts.append(f"release {self.candidate} is in canary with {_percent(self.share)} of the traffic{paused}")
        return " and ".join(parts)


def start(session: Session, scene_id: str, number: int, *, expected_seq: int | None = None) -> LedgerEntry:
    """Put a draft live, at its first stage.

    Raises ForbiddenError where two people are needed and the author is the one who starts; ConflictError where another
    release is in canary, this one was started before, or it holds what was `withdrawn`.
    """
    session.caller.require(Role.PUBLISHER)
    before = _standing(session, scene_id, Action.START, number, expected_seq)
    release = get_release(session, scene_id, number)
    same = person_key(release.author) == person_key(session.caller.user)
    if get_business(session).two_person_publish and same:
        raise ForbiddenError(
            f"{session.caller.user} drafted release {number}, and this business wants two people to publish. Have"
            " another publisher start it."
        )
    if before.candidate is not None:
        raise _conflict(
            f"Release {before.candidate} is in canary. Advance it to the end or roll it back, then start {number}.",
            before, Action.START, number,
        )  # fmt: skip
    state = release_state(session, scene_id, number)
    if state != ReleaseState.DRAFT:
        raise _conflict(
            f"Release {number} was started before and is {_words(state)}. Draft a new one, or roll back to this one.",
            before, Action.START, number,
        )  # fmt: skip
    content = verify(release)
    gone = withdrawn(session, number, content)
    if gone:
        raise _conflict(
            f"Release {number} holds what was rejected or retired since: {_some(gone)}. Draft a new one.",
            before, Action.START, number,
        )  # fmt: skip
    return _enter_stage(session, before, Action.START, content, number, 0)


def advance(
    session: Session,
    scene_id: str,
    *,
    health: Health,
    expected_seq: int | None = None,
    rollback_if_unhealthy: bool = False,
) -> LedgerEntry:
    """Move the candidate to its next stage; from the last one it becomes the stable release.

    The health must be recent and from this stage, and every guardrail of the release must be in it and hold. Raises
    ConflictError naming those that failed; with `rollback_if_unhealthy` rolls the candidate back instead. Raises
    ConflictError, too, where the candidate holds what was `withdrawn`.
    """
    session.caller.require(Role.PUBLISHER)
    before = _standing(session, scene_id, Action.ADVANCE, None, expected_seq)
    number = before.candidate
    if number is None:
        raise _conflict("No release is in canary. Start one.", before, Action.ADVANCE, None)
    content = verify(get_release(session, scene_id, number))
    _refuse_stale(session, before, health, number)
    failed = failures(content.guardrails, health)
    if failed and rollback_if_unhealthy:
        return _roll_back(session, before, number, before.stable, f"guardrails failed: {'; '.join(failed)}", health)
    if failed:
        raise _conflict(
            f"Release {number} is not healthy: {'; '.join(failed)}. Wait, pause it, or roll it back.",
            before, Action.ADVANCE, number,
        )  # fmt: skip
    if before.paused:
        raise _conflict(f"Release {number} is paused. Resume it first.", before, Action.ADVANCE, number)
    gone = withdrawn(session, number, content)
    if gone:
        raise _conflict(
            f"Release {number} holds what was rejected or retired since: {_some(gone)}. Roll it back, and draft a new"
            " one.",
            before, Action.ADVANCE, number,
        )  # fmt: skip
    return _enter_stage(session, before, Action.ADVANCE, content, number, (before.stage or 0) + 1, health)


def pause(session: Session, scene_id: str, *, reason: str, expected_seq: int | None = None) -> LedgerEntry:
    """Hold the candidate at its stage: it keeps its share of the traffic, and cannot be advanced."""
    session.caller.require(Role.PUBLISHER)
    _need_reason(reason)
    return _hold(session, scene_id, Action.PAUSE, reason, expected_seq)


def resume(session: Session, scene_id: str, *, reason: str = "", expected_seq: int | None = None) -> LedgerEntry:
    """Let a paused candidate be advanced again."""
    session.caller.require(Role.PUBLISHER)
    return _hold(session, scene_id, Action.RESUME, reason, expected_seq)


def _hold(session: Session, scene_id: str, action: Action, reason: str, expected_seq: int | None) -> LedgerEntry:
    before = _standing(session, scene_id, action, None, expected_seq)
    number, paused = before.candidate, action == Action.PAUSE
    if number is None:
        raise _conflict(f"No release is in canary: there is nothing to {action}.", before, action, None)
    if before.paused == paused:
        state = "paused already" if paused else "not paused"
        raise _conflict(f"Release {number} is {state}.", before, action, number)
    return _append(session, replace(before, paused=paused), action, number, reason=reason)


def rollback(
    session: Session, scene_id: str, *, reason: str, to: int | None = None, expected_seq: int | None = None
) -> LedgerEntry:
    """Take back what is live, at once: `stable` of the entry is the release that serves again.

    A candidate gives way to the stable release; without a candidate, the stable release gives way to the one that was
    stable before it came. `to` names another that was stable at some time. Where there was none before, no release is
    live afterwards, and callers show their own default until one is started.
    """
    session.caller.require(Role.PUBLISHER)
    _need_reason(reason)
    before = _standing(session, scene_id, Action.ROLL_BACK, to, expected_seq)
    moved = before.candidate if before.candidate is not None else before.stable
    if moved is None and to is None:
        raise _conflict("Nothing is live: there is nothing to roll back.", before, Action.ROLL_BACK, None)
    if to is None and before.candidate is not None:
        target = before.stable
    else:
        history = _history(session, scene_id)
        target = _stable_before(history, before.stable) if to is None else to
        if to is not None:
            get_release(session, scene_id, to)
            if to == before.stable and before.candidate is None:
                raise _conflict(f"Release {to} is live already.", before, Action.ROLL_BACK, to)
            if all(entry.stable != to for entry in history):
                raise _conflict(
                    f"Release {to} was never fully live. Start it, or roll back to one that was.",
                    before, Action.ROLL_BACK, to,
                )  # fmt: skip
        if target is not None and target != before.stable:
            verify(get_release(session, scene_id, target))
    return _roll_back(session, before, moved if moved is not None else target, target, reason)


def describe(entry: LedgerEntry) -> str:
    """What an entry did, in a sentence."""
    why = f": {entry.reason}" if entry.reason else ""
    match Action(entry.action):
        case Action.ROLL_BACK if entry.stable is None:
            live = "no release is live, and callers show their own default until one is started"
            return f"{entry.actor} rolled back release {entry.release}; {live}{why}"
        case Action.ROLL_BACK:
            return f"{entry.actor} rolled back to release {entry.stable}{why}"
        case Action.START | Action.ADVANCE:
            verb = "started" if entry.action == Action.START else "advanced"
            full = entry.candidate is None
            at = "to" if entry.action == Action.ADVANCE else "at"
            return f"{entry.actor} {verb} release {entry.release} {at} {_percent(1.0 if full else entry.share)}{why}"
        case Action.PAUSE | Action.RESUME:
            return f"{entry.actor} {entry.action}d release {entry.release} at {_percent(entry.share)}{why}"


# ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def live_at(session: Session, scene_id: str, at: datetime | None = None) -> Live | None:
    """What is live now, or was at a moment; None: no release had been started. One query."""
    query: Select[Any] = select(LedgerEntry).where(LedgerEntry.scene_id == scene_id)
    if at is not None:
        query = query.where(LedgerEntry.at <= check_moment("at", at))
    entry = session.scalar(query.order_by(LedgerEntry.seq.desc()).limit(1))
    return None if entry is None else _live(entry)


def _live(entry: LedgerEntry) -> Live:
    return Live(
        entry.scene_id,
        entry.seq,
        entry.at,
        entry.actor,
        Action(entry.action),
        entry.release,
        entry.stable,
        entry.candidate,
        entry.share,
        entry.paused,
        entry.stage,
    )


def all_live(session: Session) -> dict[str, Live]:
    """What is live now in every scene of the business, by scene. One query."""
    last = select(LedgerEntry.scene_id, func.max(LedgerEntry.seq)).where(LedgerEntry.business_id == session.business)
    last = last.group_by(LedgerEntry.scene_id)
    entries = session.scalars(select(LedgerEntry).where(tuple_(LedgerEntry.scene_id, LedgerEntry.seq).in_(last)))
    return {entry.scene_id: _live(entry) for entry in entries}


def shown_number(session: Session, scene_id: str, number: int | None = None) -> int:
    """The number, or that of the stable release, or of the canary; raises NotFoundError where nothing is live."""
    if number is not None:
        return get_release(session, scene_id, number).number
    live = live_at(session, find(session, Scene, scene_id).id)
    found = None if live is None else live.candidate if live.stable is None else live.stable
    if found is None:
        raise NotFoundError(f"No release of scene {scene_id!r} is live. Start one, or name an earlier release.")
    return found


def get_release(session: Session, scene_id: str, number: int) -> Release:
    """The release; raises NotFoundError. `verify` reads its content."""
    release = session.get(Release, (session.business, scene_id, number))
    if release is None:
        find(session, Scene, scene_id)
        raise NotFoundError(f"There is no release {number} of scene {scene_id!r} in business {session.business!r}.")
    return release


def list_releases(session: Session, scene_id: str, *, cursor: str | None = None, limit: int = PAGE) -> Page[Release]:
    """The scene's releases, newest first. Their contents, which can be large, are read only when looked at."""
    find(session, Scene, scene_id)
    query: Select[Any] = select(Release).where(Release.scene_id == scene_id).options(defer(Release.content))
    return paginate(session, query, Release.number, cursor=cursor, limit=limit, descending=True)


def ledger(session: Session, scene_id: str, *, cursor: str | None = None, limit: int = PAGE) -> Page[LedgerEntry]:
    """The scene's ledger, newest first."""
    find(session, Scene, scene_id)
    query: Select[Any] = select(LedgerEntry).where(LedgerEntry.scene_id == scene_id)
    return paginate(session, query, LedgerEntry.seq, cursor=cursor, limit=limit, descending=True)


def release_state(session: Session, scene_id: str, number: int) -> ReleaseState:
    """Where a release stands; raises NotFoundError."""
    exists = select(Release.number).where(Release.scene_id == scene_id, Release.number == number)
    if session.scalar(exists) is None:
        get_release(session, scene_id, number)
    return release_states(session, scene_id, [number])[number]


def release_states(session: Session, scene_id: str, numbers: Iterable[int]) -> dict[int, ReleaseState]:
    """Where these releases of a scene stand, by number, in one query."""
    states = _states(_history(session, scene_id))
    return {number: states.get(number, ReleaseState.DRAFT) for number in numbers}


@dataclass(frozen=True)
class _Moment:
    """A ledger entry, as far as states follow from it."""

    seq: int
    at: datetime
    action: str
    release: int
    stable: int | None
    candidate: int | None
    paused: bool

    @property
    def live(self) -> set[int]:
        return {number for number in (self.stable, self.candidate) if number is not None}


def _history(session: Session, scene_id: str) -> list[_Moment]:
    e = LedgerEntry
    columns = select(e.seq, e.at, e.action, e.release, e.stable, e.candidate, e.paused)
    mine = columns.where(e.business_id == session.business, e.scene_id == scene_id)
    return [_Moment(*row) for row in session.execute(mine.order_by(e.seq))]


def _states(history: Iterable[_Moment]) -> dict[int, ReleaseState]:
    """Where the releases stand that were ever started.

    What an entry takes off is rolled back by a rollback, and superseded by anything else.
    """
    states: dict[int, ReleaseState] = {}
    live: set[int] = set()
    for entry in history:
        rolled_back = entry.action == Action.ROLL_BACK
        for number in live - entry.live:
            states[number] = ReleaseState.ROLLED_BACK if rolled_back else ReleaseState.SUPERSEDED
        if entry.stable is not None:
            states[entry.stable] = ReleaseState.FULL
        if entry.candidate is not None:
            states[entry.candidate] = ReleaseState.PAUSED if entry.paused else ReleaseState.CANARY
        live = entry.live
    return states


def _stable_before(history: Sequence[_Moment], number: int | None) -> int | None:
    """The release that was stable before this one came to be, the first time."""
    before = None
    for entry in history:
        if entry.stable == number:
            return before
        before = entry.stable
    return None


# ── writing the ledger ──────────────────────────────────────────────────────────────────────────────────────────────


def _standing(session: Session, scene_id: str, action: Action, release: int | None, expected_seq: int | None) -> Live:
    """What is live now, with the scene locked: nobody else moves it before this transaction ends."""
    find(session, Scene, scene_id, lock=True)
    nothing = Live(scene_id, 0, datetime.min.replace(tzinfo=UTC), "", action, 0, None, None, 0.0, False, None)
    before = live_at(session, scene_id) or nothing
    if expected_seq is not None and expected_seq != before.seq:
        raise _conflict(
            f"Scene {scene_id!r} was moved meanwhile, by {before.actor}: {before}. Look at it, and decide again.",
            before, action, release, expected_seq,
        )  # fmt: skip
    return before


def _conflict(
    message: str, before: Live, action: Action, release: int | None, expected_seq: int | None = None
) -> ConflictError:
    yours = {"action": action.value, "release": release, "expected_seq": expected_seq}
    return ConflictError(message, details={"yours": yours, "current": before.as_dict() if before.seq else None})


def _enter_stage(
    session: Session,
    before: Live,
    action: Action,
    content: ReleaseContent,
    number: int,
    stage: int,
    health: Health | None = None,
) -> LedgerEntry:
    if stage == len(content.stages) - 1:
        full = replace(before, stable=number, candidate=None, share=0.0, paused=False, stage=None)
        return _append(session, full, action, number, health=health)
    canary = replace(before, candidate=number, share=content.stages[stage], paused=False, stage=stage)
    return _append(session, canary, action, number, health=health)


def _roll_back(
    session: Session, before: Live, moved: int | None, to: int | None, reason: str, health: Health | None = None
) -> LedgerEntry:
    after = replace(before, stable=to, candidate=None, share=0.0, paused=False, stage=None)
    return _append(session, after, Action.ROLL_BACK, moved or 0, health=health, reason=reason)


def _append(
    session: Session, after: Live, action: Action, release: int, *, health: Health | None = None, reason: str = ""
) -> LedgerEntry:
    """Write the entry after the one that `after` was made from."""
    if "\0" in reason:
        raise InputError("reason: holds the character NUL. Take it out.")
    entry = LedgerEntry(
        business_id=session.business,
        scene_id=after.scene,
        seq=after.seq + 1,
        at=max(now(), after.at),  # a clock that was set back does not reorder the ledger
        actor=session.caller.user,
        action=action.value,
        release=release,
        stable=after.stable,
        candidate=after.candidate,
        share=after.share,
        paused=after.paused,
        stage=after.stage,
        health=health.model_dump(mode="json") if health else None,
        reason=reason.strip(),
    )
    session.add(entry)
    session.flush()
    return entry


def _refuse_stale(session: Session, before: Live, health: Health, number: int) -> None:
    """Raise ConflictError unless the health was observed lately, and since the candidate entered its stage."""
    age = now() - health.observed_at
    entered = max(
        (e.at for e in _history(session, before.scene) if e.release == number and e.action in _ENTERS),
        default=before.at,
    )
    seen = health.observed_at.isoformat()
    last = session.get(LedgerEntry, (session.business, before.scene, before.seq))
    used = (last.health or {}).get("observed_at") if last is not None else None
    if age > HEALTH_MAX_AGE:
        problem = f"was observed at {seen}, more than {HEALTH_MAX_AGE.total_seconds() / 60:g} minutes ago"
    elif age < -CLOCK_TOLERANCE:
        problem = f"was observed at {seen}, which is yet to come"
    elif health.observed_at < entered:
        problem = f"was observed at {seen}, before this stage began at {entered.isoformat()}"
    elif used is not None and health.observed_at <= datetime.fromisoformat(used):
        problem = f"was observed at {seen}, and a report of {used} served for the stage before"
    else:
        return
    raise _conflict(f"The health of release {number} {problem}. Measure it again.", before, Action.ADVANCE, number)


_ENTERS = (Action.START, Action.ADVANCE)


def withdrawn(session: Session, number: int, content: ReleaseContent) -> list[str]:
    """What in a release was rejected or retired since it was drafted, in words: `material c3`.

    Only an approval of the same makes it good again. What was edited since is not withdrawn: the release keeps what was
    approved.
    """
    scene_id, gone = content.scene.id, (ReviewState.REJECTED, ReviewState.RETIRED)
    once_materials, once_variants = withdrawn_since_draft(session, scene_id, number)
    materials = {
        id
        for id, row in materials_by_id(session, set(content.materials)).items()
        if row.state in gone
        or (id in once_materials and not (row.state == ReviewState.APPROVED and _as_held(row, content)))
    }
    of_scene = select(Variant).where(Variant.scene_id == scene_id)
    held = {v.id for v in content.variants}
    variants = held.intersection(session.scalars(of_scene.where(Variant.state.in_(gone)).with_only_columns(Variant.id)))
    again = [row for row in session.scalars(of_scene) if row.id in once_variants & held] if once_variants else []
    variants |= {row.id for row in again} - _approved_as_held(session, again, content)
    return [f"material {id}" for id in sorted(materials)] + [f"variant {id}" for id in sorted(variants)]


def _as_held(material: Material, content: ReleaseContent) -> bool:
    return material.content_hash == content.materials[material.id].content_hash


def _approved_as_held(session: Session, variants: Sequence[Variant], content: ReleaseContent) -> set[str]:
    """Those of the variants whose approval holds and that show and mean what they do in the release."""
    if not variants:
        return set()
    materials = materials_by_id(session, {m for v in variants for m in v.materials.values()})
    changed = {id for id, material in materials.items() if not _as_held(material, content)}
    product = spec_of(find(session, Scene, content.scene.id)).product
    fills = {p.name: p.fills(product) for p in placeholders_of(get_business(session))}
    filled = {p.name: p.fills(content.scene.product) for p in content.placeholders}
    shown, described = placeholders_shown(variants, materials), {v.id: v for v in describe_variants(session, variants)}
    same = {v.id for v in content.variants if described.get(v.id) == v}
    return {
        v.id
        for v in variants
        if v.id in same
        and changed.isdisjoint(v.materials.values())
        and all(fills.get(name) == filled.get(name) for name in shown[v.id])
    } & approval_holds(session, variants)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def _need_reason(reason: str) -> None:
    if not reason.strip():
        raise InputError("reason: say why; it is what others read in the ledger.")


def _percent(share: float) -> str:
    return f"{share * 100:.6g} %"


def _words(state: ReleaseState) -> str:
    return state.value.replace("_", " ")


# ── comparing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Change:
    """Something that two releases say differently; None: one of them says nothing of it."""

    what: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        """In words."""
        if self.before is None:
            return f"{self.what}: added ({self.after})"
        return f"{self.what}: {self.before} → {self.after}" if self.after is not None else f"{self.what}: removed"


@dataclass(frozen=True)
class ReleaseDiff:
    """From one release to another."""

    variants_added: tuple[str, ...]
    variants_removed: tuple[str, ...]
    changes: tuple[Change, ...]

    def lines(self) -> list[str]:
        """One readable line a difference; none: they show the same."""
        counted = (("added", self.variants_added), ("removed", self.variants_removed))
        return [_listed(word, ids) for word, ids in counted if ids] + [str(change) for change in self.changes]


def diff(a: ReleaseContent, b: ReleaseContent) -> ReleaseDiff:
    """What changes from release content `a` to `b`."""
    before, after = {v.id: v for v in a.variants}, {v.id: v for v in b.variants}
    old, new = _facts(a), _facts(b)
    return ReleaseDiff(
        tuple(id for id in after if id not in before),
        tuple(id for id in before if id not in after),
        tuple(Change(what, old.get(what), new.get(what)) for what in {**old, **new} if old.get(what) != new.get(what)),
    )


def _listed(word: str, ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return f"{len(ids)} variant{'' if len(ids) == 1 else 's'} {word}: {', '.join(ids[:5])}{more}"


def _facts(content: ReleaseContent) -> dict[str, str]:
    """What a release says but for its variants, by what it is about."""
    facts = {f"share of {bucket}": _percent(getattr(content.shares, bucket)) for bucket in Bucket}
    if content.without_random is not None:
        facts["without random"] = content.without_random
    facts["policy"] = _policy(content.policy)
    if content.model_version is not None:
        facts["model"] = content.model_version
    if content.challenger is not None:
        facts["challenger"] = f"{content.challenger.model_version}, {_policy(content.challenger.policy)}"
    if content.frequency is not None:
        facts["frequency"] = f"a variant {content.frequency}"
    facts |= {f"guardrail {rail.metric}": str(rail) for rail in content.guardrails}
    facts["stages"] = ", ".join(map(_percent, content.stages))
    facts["baseline"] = content.baseline
    facts["taxonomy"] = str(content.taxonomy)
    facts["scene"] = content.scene.name
    facts |= {f"product {field}": str(value) for field, value in content.scene.product.items()}
    facts |= {f"slot {slot.name}": slot.kind.value for slot in content.scene.slots}
    facts |= {f"material {id}": f"{m.kind} {m.content_hash[:8]}" for id, m in sorted(content.materials.items())}
    facts |= {f"intervention {rule.id}": _rule(rule) for rule in content.interventions}
    return facts


def _policy(policy: PolicySpec) -> str:
    return policy.kind.value if policy.kind == PolicyKind.UNIFORM else f"{policy.kind} (epsilon {policy.epsilon:g})"


def _rule(rule: Rule) -> str:
    window = " ".join(
        f"{word} {moment.isoformat()}" for word, moment in (("from", rule.starts_at), ("to", rule.ends_at)) if moment
    )
    who = f"for {segment_text(rule.segment)}"
    return ", ".join(part for part in (f"{rule.kind} {rule.target}", who, f"priority {rule.priority}", window) if part)
