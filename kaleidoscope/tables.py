"""The ORM tables. Names and constraints only: what may be done with the rows is in the services beside this file.

A business is a tenant: every row of one has `business_id` at the head of its primary key, and foreign keys carry it
along, so that the database itself refuses a reference into another business. The schema is made by `migrations/`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column, relationship

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
SLUG = String(63)
NAME = String(200)
DOCUMENT = JSON(none_as_null=True)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC; SQLite, which has no time zones, gets it back when it is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; refuses a time without a zone."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a stored time needs a time zone")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Back with its zone."""
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """All tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        dict[str, Any]: DOCUMENT,
        list[Any]: DOCUMENT,
    }
    audited: ClassVar[bool] = True  # whether a change of a row writes an audit entry
    unaudited: ClassVar[frozenset[str]] = frozenset()  # columns that stay out of it


class Tenant:
    """A row that belongs to a business. Sessions see only those of their caller's (database.py)."""

    @declared_attr
    def business_id(cls) -> Mapped[str]:
        """The business."""
        return mapped_column(SLUG, ForeignKey("businesses.id"), primary_key=True, sort_order=-1)


class Versioned:
    """A row that two people can edit at once: every update counts `version` up, and names the one it changes."""

    version: Mapped[int] = mapped_column(Integer, nullable=False)
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:
        return {"version_id_col": cls.version}


class Business(Versioned, Base):
    """A tenant: a business line that owns scenes and materials."""

    __tablename__ = "businesses"

    id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    name: Mapped[str] = mapped_column(NAME)
    two_person_publish: Mapped[bool] = mapped_column(default=False)
    placeholders: Mapped[list[Any]]  # content.Placeholder, what copy may hold in braces


class ApiToken(Base):
    """A bearer token, of which only the hash is kept. Without a business it is the installation's own."""

    __tablename__ = "api_tokens"
    unaudited = frozenset({"token_hash"})

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    business_id: Mapped[str | None] = mapped_column(SLUG, ForeignKey("businesses.id"), index=True)
    user: Mapped[str] = mapped_column(NAME)
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    roles: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditEntry(Base):
    """One change of one row: who, when, and the columns that changed before and after. Append-only."""

    __tablename__ = "audit"
    audited = False

    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    business_id: Mapped[str | None] = mapped_column(SLUG, ForeignKey("businesses.id"))
    at: Mapped[datetime] = mapped_column(default=now)
    actor: Mapped[str] = mapped_column(NAME)
    action: Mapped[str] = mapped_column(String(16))  # created, changed, deleted
    entity: Mapped[str] = mapped_column(String(32))  # the table
    key: Mapped[str] = mapped_column(Text)  # primary key without the business, joined by /
    before: Mapped[dict[str, Any] | None]
    after: Mapped[dict[str, Any] | None]

    __table_args__ = (Index(None, "business_id", "entity", "key"),)


class IdempotencyKey(Base):
    """The answer to a create request, kept so that the same request sent twice creates once."""

    __tablename__ = "idempotency_keys"
    audited = False

    owner: Mapped[str] = mapped_column(String(80), primary_key=True)  # the token
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class TaxonomyVersion(Tenant, Base):
    """One version of a business's tag vocabulary, with the mapping from the one before. Append-only."""

    __tablename__ = "taxonomies"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    document: Mapped[dict[str, Any]]  # taxonomy.Taxonomy
    mapping: Mapped[dict[str, Any]]  # "dimension=value" of the version before → list of those of this one
    note: Mapped[str] = mapped_column(Text, default="")
    author: Mapped[str] = mapped_column(NAME)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Reviewed:
    """A row that people approve."""

    state: Mapped[str] = mapped_column(String(16))  # vocabulary.ReviewState
    reason: Mapped[str | None] = mapped_column(Text)  # why it was rejected, or fell back to draft
    author: Mapped[str] = mapped_column(NAME)
    reviewer: Mapped[str | None] = mapped_column(NAME)
    reviewed_at: Mapped[datetime | None]


class Material(Reviewed, Versioned, Tenant, Base):
    """One atomic option for a slot, reusable between the scenes of a business."""

    __tablename__ = "materials"

    id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))  # vocabulary.MaterialKind
    content: Mapped[dict[str, Any]]  # content.Copy, Image, Layout or Style
    content_hash: Mapped[str] = mapped_column(String(64))  # of kind and content: exact duplicates have the same
    tags: Mapped[list[Any]]  # content.Tag: dimension, value, source, confidence
    taxonomy: Mapped[int]  # number of the taxonomy version that the tags are from

    __table_args__ = (Index(None, "business_id", "content_hash"),)


class Scene(Versioned, Tenant, Base):
    """One placement with a fixed product, and what may be varied in it."""

    __tablename__ = "scenes"

    id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    name: Mapped[str] = mapped_column(NAME)
    spec: Mapped[dict[str, Any]]  # scenes.SceneSpec: product, slots, constraints, checks, cap, baseline, traffic
    author: Mapped[str] = mapped_column(NAME)


class Variant(Reviewed, Versioned, Tenant, Base):
    """One combination of materials of a scene. Its tags are those of its materials and are not stored."""

    __tablename__ = "variants"

    scene_id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    materials: Mapped[dict[str, Any]]  # slot → material id
    remarks: Mapped[list[Any]]  # failed soft checks, as sentences
    fingerprint: Mapped[str | None] = mapped_column(String(64))  # of the materials' content and tags when approved
    held: Mapped[list[VariantMaterial]] = relationship(
        lazy="raise", cascade="all, delete-orphan", passive_deletes=True
    )  # `materials` again, as rows that can be searched

    __table_args__ = (
        ForeignKeyConstraint(["business_id", "scene_id"], ["scenes.business_id", "scenes.id"]),
        Index(None, "business_id", "scene_id", "state"),
    )


class VariantMaterial(Tenant, Base):
    """Which variants hold a material."""

    __tablename__ = "variant_materials"
    audited = False

    scene_id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    variant_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    slot: Mapped[str] = mapped_column(SLUG, primary_key=True)
    material_id: Mapped[str] = mapped_column(SLUG)

    __table_args__ = (
        ForeignKeyConstraint(
            ["business_id", "scene_id", "variant_id"],
            ["variants.business_id", "variants.scene_id", "variants.id"],
            ondelete="CASCADE",
        ),
        ForeignKeyConstraint(["business_id", "material_id"], ["materials.business_id", "materials.id"]),
        Index(None, "business_id", "material_id"),
    )


class Intervention(Versioned, Tenant, Base):
    """A business rule that pins or blocks variants for a segment and a time window."""

    __tablename__ = "interventions"

    scene_id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))  # vocabulary.InterventionKind
    target: Mapped[dict[str, Any]]  # {"variant": id}, {"material": id} or {"tag": {dimension: value}}
    segment: Mapped[dict[str, Any]]  # user feature → value; empty: everybody
    starts_at: Mapped[datetime | None]
    ends_at: Mapped[datetime | None]
    priority: Mapped[int] = mapped_column(default=0)
    note: Mapped[str] = mapped_column(Text, default="")
    ended: Mapped[bool] = mapped_column(default=False)
    author: Mapped[str] = mapped_column(NAME)

    __table_args__ = (ForeignKeyConstraint(["business_id", "scene_id"], ["scenes.business_id", "scenes.id"]),)


class Release(Tenant, Base):
    """An immutable snapshot of everything that decides what a scene shows. Append-only."""

    __tablename__ = "releases"
    unaudited = frozenset({"content"})  # append-only itself, and large

    scene_id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[dict[str, Any]]  # release.ReleaseContent
    content_hash: Mapped[str] = mapped_column(String(64))
    author: Mapped[str] = mapped_column(NAME)
    note: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime] = mapped_column(default=now)

    __table_args__ = (ForeignKeyConstraint(["business_id", "scene_id"], ["scenes.business_id", "scenes.id"]),)


class LedgerEntry(Tenant, Base):
    """One transition of a scene's releases, with what is live after it. Append-only; `seq` counts within the scene,
    so that of two people who move a scene at once the database lets one win."""

    __tablename__ = "ledger"

    scene_id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(default=now)
    actor: Mapped[str] = mapped_column(NAME)
    action: Mapped[str] = mapped_column(String(16))  # release.Action
    release: Mapped[int]  # the release that was moved
    stable: Mapped[int | None]  # the release that serves what the candidate does not
    candidate: Mapped[int | None]  # the release in canary
    share: Mapped[float]  # of the traffic that the candidate serves, 0..1
    paused: Mapped[bool]
    stage: Mapped[int | None]  # of the candidate, from 0
    health: Mapped[dict[str, Any] | None]
    reason: Mapped[str] = mapped_column(Text, default="")

    __table_args__ = (
        ForeignKeyConstraint(["business_id", "scene_id"], ["scenes.business_id", "scenes.id"]),
        ForeignKeyConstraint(
            ["business_id", "scene_id", "release"], ["releases.business_id", "releases.scene_id", "releases.number"]
        ),
        Index(None, "business_id", "scene_id", "at"),
    )


APPEND_ONLY = ("audit", "taxonomies", "releases", "ledger")


# ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

JOB_ACTIVE = text("state IN ('queued', 'running')")


class Job(Tenant, Base):
    """One piece of work for a worker. The row is its own trail: who asked, who cancelled, and what became of it."""

    __tablename__ = "jobs"
    audited = False  # heartbeats and schedules would drown what people do

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # counts within the business
    kind: Mapped[str] = mapped_column(String(32))  # of jobs.JOB_KINDS
    subject: Mapped[str] = mapped_column(String(64), default="")  # what it is about: a scene; empty: the business
    arguments: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))  # jobs.JobState
    author: Mapped[str] = mapped_column(NAME)
    created_at: Mapped[datetime] = mapped_column(default=now)
    due_at: Mapped[datetime] = mapped_column(default=now)  # not before
    attempts: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int]
    worker: Mapped[str | None] = mapped_column(NAME)  # who runs it; whoever else does has lost it
    host: Mapped[str | None] = mapped_column(NAME)
    pid: Mapped[int | None]  # of its process group
    started_at: Mapped[datetime | None]  # the attempt there is, or was
    heartbeat_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    cancelled_by: Mapped[str | None] = mapped_column(NAME)
    exit_code: Mapped[int | None]
    result: Mapped[dict[str, Any] | None]  # the JSON object it printed
    error: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        # Never two of one kind about the same thing at once.
        Index(
            "uq_jobs_active",
            "business_id",
            "kind",
            "subject",
            unique=True,
            sqlite_where=JOB_ACTIVE,
            postgresql_where=JOB_ACTIVE,
        ),
        Index(None, "business_id", "state", "due_at"),
        Index(None, "business_id", "kind", "subject", "id"),
    )


# ── portraits ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Portrait(Tenant, Base):
    """One analysis of a scene's log: what it was of, and the segments and tags that its cells are about."""

    __tablename__ = "portraits"
    unaudited = frozenset({"segments", "tags", "shown", "overlaps"})  # large

    scene_id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # counts within the scene
    log_hash: Mapped[str] = mapped_column(String(128))
    run_hash: Mapped[str] = mapped_column(String(64))  # of the log and of how it was analysed
    taxonomy: Mapped[int | None]  # number of the version that the tags are of; None: of none
    releases: Mapped[list[Any]]  # numbers
    since: Mapped[datetime | None]  # of the exposures
    until: Mapped[datetime | None]
    exposures: Mapped[int] = mapped_column(BigInteger)
    units: Mapped[int | None] = mapped_column(BigInteger)
    buckets: Mapped[list[Any]]
    methods: Mapped[list[Any]]
    seed: Mapped[int | None] = mapped_column(BigInteger)
    simulated: Mapped[bool]
    shown: Mapped[dict[str, Any]]  # dimension → value → exposures
    segments: Mapped[list[Any]]  # {field: value}; the first is everybody, {}
    tags: Mapped[list[Any]]  # {dimension: value}
    overlaps: Mapped[list[Any]]  # [position of a segment, of another field's, share of the users in both]
    cells: Mapped[int]  # how many
    insights: Mapped[int]  # of them
    author: Mapped[str] = mapped_column(NAME)
    created_at: Mapped[datetime] = mapped_column(default=now)

    __table_args__ = (
        ForeignKeyConstraint(["business_id", "scene_id"], ["scenes.business_id", "scenes.id"]),
        ForeignKeyConstraint(["business_id", "taxonomy"], ["taxonomies.business_id", "taxonomies.number"]),
        UniqueConstraint("business_id", "scene_id", "run_hash"),
    )


class PortraitRow(Tenant, Base):
    """How a segment takes a tag, of a portrait; `position` is its rank by what matters. Intervals are of 95 %."""

    __tablename__ = "portrait_cells"
    audited = False  # the portrait is

    scene_id: Mapped[str] = mapped_column(SLUG, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    segment: Mapped[int]  # position in Portrait.segments
    tag: Mapped[int]  # position in Portrait.tags
    n: Mapped[int] = mapped_column(BigInteger)
    clicks: Mapped[int | None] = mapped_column(BigInteger)
    share: Mapped[float | None]  # PortraitCell says of what
    click_share: Mapped[float | None]
    independent: Mapped[float | None]
    ctr: Mapped[float | None]
    ctr_low: Mapped[float | None]
    ctr_high: Mapped[float | None]
    preference: Mapped[float | None]
    preference_low: Mapped[float | None]
    preference_high: Mapped[float | None]
    shrunk: Mapped[float | None]
    shrunk_low: Mapped[float | None]
    shrunk_high: Mapped[float | None]
    effect: Mapped[float | None]
    effect_low: Mapped[float | None]
    effect_high: Mapped[float | None]
    q_value: Mapped[float | None]
    crossed: Mapped[bool]
    found_by: Mapped[dict[str, Any] | None]  # method → sign
    explained_by: Mapped[list[Any] | None]  # [position of a segment, position of a tag]

    __table_args__ = (
        ForeignKeyConstraint(
            ["business_id", "scene_id", "number"],
            ["portraits.business_id", "portraits.scene_id", "portraits.number"],
        ),
        Index(None, "business_id", "scene_id", "number", "segment"),
    )


# ── the log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Logged:
    """A row of the log: of a business, but without references, so that the log may live in a database of its own.

    Written in bulk through `Database.bulk`, not row by row, and not audited. Moments are whole microseconds since 1970.
    """

    audited = False

    business_id: Mapped[str] = mapped_column(SLUG, primary_key=True, sort_order=-1)


class Decision(Logged, Base):
    """A decision that was taken (decision_record.DecisionRecord), until its day is compacted.

    Where an event came before the record, or the record was lost, what the token claims (`recorded` false).
    """

    __tablename__ = "decisions"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    scene: Mapped[str] = mapped_column(SLUG)
    unit: Mapped[str] = mapped_column(Text)
    at_us: Mapped[int] = mapped_column(BigInteger)
    bucket: Mapped[str] = mapped_column(String(16))  # vocabulary.Bucket
    variant: Mapped[str] = mapped_column(String(64))
    propensity: Mapped[float]
    learn: Mapped[bool]
    release: Mapped[int]
    model_version: Mapped[str | None] = mapped_column(Text)
    recorded: Mapped[bool]
    reason: Mapped[str | None] = mapped_column(String(32))  # decision_record.Reason
    release_hash: Mapped[str | None] = mapped_column(String(64))
    candidates: Mapped[int | None]
    features: Mapped[dict[str, Any] | None]
    context: Mapped[dict[str, Any] | None]
    rested: Mapped[list[Any] | None]
    key: Mapped[str | None] = mapped_column(String(16))
    detail: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (Index(None, "business_id", "scene", "at_us"), Index(None, "business_id", "unit", "scene"))


class Event(Logged, Base):
    """What happened to a decision, once per event id, until its day is compacted."""

    __tablename__ = "events"

    decision_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    event_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))  # events.Kind
    at_us: Mapped[int] = mapped_column(BigInteger)  # by the client's clock, between the decision and its receipt
    received_us: Mapped[int] = mapped_column(BigInteger)
    value: Mapped[float | None]

    __table_args__ = (UniqueConstraint("business_id", "event_id"), {"sqlite_with_rowid": False})


class EventCount(Logged, Base):
    """How many events of a day (of receipt) met which fate, and what compaction left out."""

    __tablename__ = "event_counts"

    scene: Mapped[str] = mapped_column(SLUG, primary_key=True)  # empty where no token could be believed
    day: Mapped[str] = mapped_column(String(10), primary_key=True)  # ISO
    what: Mapped[str] = mapped_column(String(16), primary_key=True)  # events.Count
    n: Mapped[int] = mapped_column(BigInteger)


class ClosedDays(Logged, Base):
    """Until when a scene's log is closed: decisions before this day take no more events, and are compacted."""

    __tablename__ = "closed_days"

    scene: Mapped[str] = mapped_column(SLUG, primary_key=True)
    before: Mapped[str] = mapped_column(String(10))  # ISO day


class LogPart(Logged, Base):
    """A day of a scene that is in Parquet now; what is still in `decisions` and `events` of it counts no more."""

    __tablename__ = "log_parts"

    scene: Mapped[str] = mapped_column(SLUG, primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)  # ISO
    file: Mapped[str | None] = mapped_column(Text)  # below the log's folder; None: dropped, or nothing was left
    generation: Mapped[int]  # counts how often the file was written anew, without units that were erased
    rows: Mapped[int] = mapped_column(BigInteger)
